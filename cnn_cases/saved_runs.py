"""A run that is there already, for commands that look into it."""

import logging
import pathlib

from absl import flags
from ml_collections import ConfigDict

from cnn_cases import settings
from cnn_cases.training import devices, disk, logbook, provenance


def load_config(workdir, data_dir=""):
    """The config of a run, from its config.json.

    A key that did not exist yet when the run was made has its default of configs/common.py.

    Args:
      workdir: of the run.
      data_dir: where TFDS keeps its sets; "" for the config's.

    Raises:
      ValueError: the workdir has no config, or not that of a training, or one that was changed.
    """
    path = pathlib.Path(workdir) / "config.json"
    try:
        saved = disk.read_json(path, dict, logbook.PUT_BACK)
    except OSError as error:
        raise ValueError(f"workdir = {workdir} holds no run of train.py: {error}") from error
    if not {"model", "data"} <= set(saved):
        raise ValueError(f"workdir = {workdir} holds no run of train.py: its config has no model and no data")
    config = ConfigDict(settings.from_json(settings.completed(saved)))
    settings.check(config)
    config.data.data_dir = data_dir or config.data.data_dir
    return config


def read_starts(workdir):
    """The environments of a run's starts, with a warning where code or packages are not those of the last.

    Where environment.json is damaged, a warning says that nothing can be compared, and there are none.
    """
    try:
        starts = logbook.read_environments(workdir)
    except ValueError as error:
        logging.getLogger(__name__).warning("%s. Code and data here may be others than the run's", error)
        return []
    logbook.warn_of_changes(workdir, starts, provenance.environment())
    return starts


def check_data(workdir, starts, feed, splits=("train",)):
    """Raises ValueError where the data are not a run's own: the network would be shown other pixels.

    The statistics that normalise them are taken of the data anew.

    Args:
      workdir: of the run.
      starts: of `read_starts`.
      feed: of its config, with the data that are here.
      splits: parts of data.splits that must be as they were, if the run has noted how they were.
    """
    there, here = starts[-1].get("data", {}) if starts else {}, feed.fingerprint()
    for split in splits:
        if split in there and there[split] != here[split]:
            raise ValueError(
                f"workdir = {workdir} was trained with other data: data.splits.{split} is {there[split]} "
                f"there and {here[split]} here (number and checksum of the examples); see --data_dir"
            )


def usable_devices(config):
    """As many local devices as the batches of the run can be split over; it may have had others."""
    local, size = devices.local_devices(), config.batch_size // config.num_microbatches
    return local[: max(count for count in range(1, len(local) + 1) if size % count == 0)]


def define_data_dir():
    """The flag of commands that look into runs which may have been made on another machine."""
    flags.DEFINE_string("data_dir", "", "Where TFDS keeps its sets; default: data.data_dir.")
