"""Reads existing runs, for commands that inspect them."""

import logging
import pathlib

from absl import flags
from ml_collections import ConfigDict

from cnn_cases import settings
from cnn_cases.training import devices, disk, logbook, provenance, transfer


def load_config(workdir, data_dir=""):
    """Loads the config of a run from its config.json.

    Keys that did not exist when the run was made have their defaults from configs/common.py.

    Args:
      workdir: of the run.
      data_dir: TFDS's directory; "" for the config's.

    Raises:
      ValueError: the workdir has no config, or its config is not that of a training run, or was changed.
    """
    saved = _read_config(workdir, "run of train.py")
    if not {"model", "data"} <= set(saved):
        raise ValueError(f"workdir = {workdir} holds no run of train.py: its config has no model and no data")
    config = ConfigDict(settings.from_json(settings.completed(saved)))
    try:
        settings.check(config)
    except ValueError as error:  # changed by hand, or saved by code that has other keys
        raise ValueError(
            f"workdir = {workdir} has a config.json that does not fit this code: {error}"
        ) from None
    config.data.data_dir = data_dir or config.data.data_dir
    return config


def load_study(workdir, data_dir=""):
    """Loads the config of a study (see `studies.plan`) as `load_config` loads that of a run.

    Raises:
      ValueError: the workdir has no config, or its config is not that of a study.
    """
    saved = _read_config(workdir, "study")
    if not settings.is_study(saved):
        raise ValueError(f"workdir = {workdir} holds no study: its config has no base, grid and seeds")
    study = ConfigDict(settings.from_json(settings.completed(saved)))
    study.base.data.data_dir = data_dir or study.base.data.data_dir
    return study


def _read_config(workdir, what):
    """Reads a config.json; `what` says for the error message whose it is."""
    path = pathlib.Path(workdir) / "config.json"
    try:
        return disk.read_json(path, dict, logbook.PUT_BACK)
    except OSError as error:
        raise ValueError(f"workdir = {workdir} holds no {what}: {error}") from error


def read_starts(workdir):
    """Reads the environments of a run's starts; warns if code or packages differ from the last start.

    If environment.json is damaged, it logs a warning that nothing can be compared, and returns an empty list.
    """
    try:
        starts = logbook.read_environments(workdir)
    except ValueError as error:
        logging.getLogger(__name__).warning("%s. The code and data may differ from the run's", error)
        return []
    # The first use of devices, which may be missing.
    logbook.warn_of_changes(workdir, starts, provenance.environment(devices.local_devices()))
    return starts


def check_data(workdir, starts, feed, splits=("train",)):
    """Raises ValueError if the data differ from those of a run.

    The network would otherwise see other pixels, since the normalisation's statistics are recomputed from the
    data.

    Args:
      workdir: of the run.
      starts: from `read_starts`.
      feed: made from the run's config and the current data.
      splits: names in data.splits that must be unchanged; only those that the run recorded are checked.
    """
    there, here = starts[-1].get("data", {}) if starts else {}, feed.fingerprint()
    for split in splits:
        if split in there and there[split] != here[split]:
            raise ValueError(
                f"workdir = {workdir} was trained with other data: data.splits.{split} was {there[split]} "
                f"then and is {here[split]} now (number and checksum of the examples); see --data_dir"
            )


def initial_state(workdir, config, program):
    """Returns the state before a run's first step, with the layers that it started from, if any.

    Args:
      workdir, config: of the run.
      program: of this config.

    Raises:
      ValueError: the run started from the layers of another run, which is not what it was then.
    """
    noted = logbook.noted_start(workdir) if config.start.workdir else None
    if not noted:
        return program.init_state(config.seed)
    state = program.starting_from(noted[0]).init_state(config.seed)
    if noted != transfer.identity(config.start.workdir, noted[0]):
        raise ValueError(
            f"start.workdir = {config.start.workdir!r} is not what it was when {workdir} started from "
            f"step {noted[0]} of it; restore that run; without it, only checkpoints of {workdir} can be used"
        )
    return state


def usable_devices(config):
    """As many local devices as can share the run's batches; the run may have used another number."""
    local, size = devices.local_devices(), config.batch_size // config.num_microbatches
    return local[: max(count for count in range(1, len(local) + 1) if size % count == 0)]


def define_data_dir():
    """Defines --data_dir, for commands that read runs which may have been made on another machine."""
    flags.DEFINE_string("data_dir", "", "The directory of TFDS's data sets; default: data.data_dir.")
