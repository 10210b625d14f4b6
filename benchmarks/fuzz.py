"""How wrong configs are handled: `python -m benchmarks.fuzz [--inputs=2000] [--minutes=60] [--out=FILE]`.

The configs of `configs/`, shortened, get one or two mistakes in turn, of these KINDS:

missing    a key is left out
misnamed   a key has another name
mistyped   a value has another type, or none
negative   a number is below zero
zero       a number is zero, or a text or tuple is empty
huge       a number is too large for anything, infinite, or NaN
tiny       a number is almost zero
unit       a value has another unit or form: percent, thousands, text, pairs
other      a value has the right type but makes no sense in its place

Two outcomes are right: the config trains, or a ValueError that names a wrong key refuses it before the first
step. The networks whose step compiles in seconds (REAL) train two steps and are evaluated and saved by the
training loop itself; the others are traced with shapes instead of arrays. Blank images replace all data sets
except digits.

Studies get their own kinds of mistakes, and have to expand or to be refused in the same way.
"""

import argparse
import collections
import contextlib
import functools
import importlib
import io
import pathlib
import random
import signal
import sys
import tempfile
import time
from types import SimpleNamespace
from unittest import mock

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from benchmarks import record
from cnn_cases import parsing
from cnn_cases.data import feeds, pixels, sources
from cnn_cases.studies import plan
from cnn_cases.training import loop, programs

ROOT = pathlib.Path(__file__).parent.parent / "configs"
TRAINING = sorted(path.stem for path in ROOT.glob("[!_]*.py") if path.stem != "common")
REAL = (  # train two steps, where a mistake does not enlarge the images
    *("lenet5_digits", "lenet5_mnist", "lenet5_1998_digits", "lenet5_1998_mnist"),
    *("lenet5_1998_distorted_mnist", "vgg_digits", "nin_digits", "nin_cifar10", "resnet18_digits"),
    *("resnet_digits", "resnet_cifar10", "resnet_preact_digits", "resnet_preact_cifar10"),
)
SMALLEST_DEPTHS = {"resnet": 18, "resnet_cifar": 8, "resnet_preact_cifar": 11}
SECONDS = 180  # time limit for each input


class Images:
    """A data set of a few blank images, so that a config builds without its own data set."""

    def __init__(self, name, count=2):
        with tempfile.TemporaryDirectory() as empty:  # what is prepared elsewhere may be in another format
            features = sources.make_builder(name, empty).info.features
        self.shape, self.num_classes = features["image"].shape, features["label"].num_classes
        self.count = count

    def load_split(self, name, split, data_dir, image_size, border):
        """See `splits.load_split`."""
        del name, split, data_dir
        height, width, channels = self.shape
        if image_size:
            height = width = image_size
        image = np.zeros((self.count, height + 2 * border, width + 2 * border, channels), np.uint8)
        return image, np.zeros(self.count, np.int32), self.num_classes

    def open_split(self, name, split, data_dir):
        """See `splits.open_split`."""
        del name, split, data_dir
        file = io.BytesIO()
        Image.new("RGB", (40, 30)).save(file, "PNG")
        label = SimpleNamespace(num_classes=self.num_classes)
        image = SimpleNamespace(shape=self.shape)
        return [{"image": file.getvalue(), "label": 0}] * self.count, {"image": image, "label": label}

    @contextlib.contextmanager
    def in_place(self):
        """Makes every feed use these images instead of its own."""
        blanks = {
            "load_split": self.load_split,
            "open_split": self.open_split,
            "check_disjoint": lambda *_: None,
            "allow_open_files": lambda *_: None,
            "check_resident": lambda *_: None,
        }

        def computed_anew(_name, _data_dir, _key, compute):
            return compute()

        def whitening(images):
            size = images[0].size  # half a minute for 32x32x3; tests/data/test_pixels.py has smaller images
            return {"zca_mean": np.zeros(images.shape[1:], np.float32), "zca_matrix": np.zeros((size, size))}

        with (
            mock.patch.multiple(feeds, **blanks),
            mock.patch.object(feeds.sources, "computed_once", computed_anew),
            mock.patch.object(pixels, "_whitening", whitening),
        ):
            yield


def load(name):
    """Loads a config of `configs/`."""
    return importlib.import_module(f"configs.{name}").get_config()


def shortened(name):
    """The nested dict of a config with two steps, batches of four and the shallowest of its nets."""
    config = load(name).unlock().to_dict()
    config |= {"num_steps": 2, "batch_size": 4, "log_every_steps": 1, "num_microbatches": 1}
    config["evaluation"] |= {"every_steps": 1, "batch_size": 400}
    config["checkpoint"] |= {"every_steps": 1}
    config["schedule"] |= {"warmup_steps": min(config["schedule"]["warmup_steps"], 1)}
    config["data"]["stream"] |= {"workers": 0}
    if "depth" in config["model"]:
        model = config["model"]
        model["depth"] = SMALLEST_DEPTHS.get(model["name"], model["depth"])
    return config


class Object:
    """An object that no config can contain."""

    def __repr__(self):
        return "Object()"


JUNK = (
    *(None, True, False, 0, 3, -1, 0.5, "", "0.9", "3", "nonsense", b"x", (), (1, "x"), ("x",), ((1,),)),
    *([], [1], [0.5, 0.75], {}, {"x": 1}, {1: 2}, {"name": "sgd"}, {1, 2}, 1j, np.int64(3), np.float32(0.5)),
    *(np.zeros(2), range(3), Object(), int),
)
NUMBERS = {
    "negative": {int: (-1, -4, -(2**40)), float: (-1.0, -1e-9, -1e30)},
    "zero": {int: (0,), float: (0.0, -0.0), str: ("",), tuple: ((),)},
    # 18 n + 2 is a depth of both kinds of nets for CIFAR.
    "huge": {
        int: (10**6, 2**31 - 1, 2**31, 10**12, 18 * 10**5 + 2, 10**400),
        float: (1e9, 1e30, 1e300, 10**400, float("inf"), float("nan")),
        str: ("x" * 5000,),
        tuple: ((1e300, 1e300), (1, 10**400), tuple(range(1, 1000)), (float("nan"),) * 2, (10**9, 10**9)),
    },
    "tiny": {float: (1e-9, 1e-30, 1e-300, 5e-324), tuple: ((1e-300, 1e-300), (5e-324, 0.5), (1e-9,))},
    "other": {
        bool: (True, False),
        int: (1, 2, 3, 5, 17),
        float: (1.0, 0.5, 2.0, 1, 7.5),
        str: ("nonsense", "digits", "train", "../x", "adam", "cosine", "\0", "é" * 3),
        tuple: (("x",), (0.0,), (0.5, 0.25), (-1.0, 2.0), (3, 2, 1), ("train", "train"), (True, False)),
    },
}
KINDS = ("missing", "misnamed", "mistyped", *NUMBERS, "unit")


def in_another_unit(value):
    """What users might write for a value if they have another unit or form in mind."""
    if isinstance(value, bool):
        return (int(value), str(value), "yes")
    if isinstance(value, int):
        return (float(value), value * 1000, f"{value}px", (value, value), str(value))
    if isinstance(value, float):
        return (value * 100, round(value * 100), f"{100 * value} %", str(value), (value,), 1 / (value or 1))
    if isinstance(value, tuple):
        return (tuple(100 * one if isinstance(one, float | int) else [one] for one in value), str(value))
    return (value.upper(), [value], (value,), f" {value}")


def paths_of(config, before=()):
    """Yields the paths of all keys of a nested dict, sections included."""
    for key, value in config.items():
        if isinstance(key, str):  # not one that an earlier mistake put there
            yield (*before, key)
        if isinstance(value, dict):
            yield from paths_of(value, (*before, key))


def mutate(config, kind, rng, but=()):
    """Makes one mistake in a config.

    Args:
      config: a nested dict.
      kind: one of KINDS.
      rng: a `random.Random`.
      but: keys that are wrong already, which stay as they are.

    Returns:
      The dotted names of the wrong key, any of which a message may use: a misnamed key has two. [] if the
      config has no key for such a mistake.
    """

    def section_of(path):
        return functools.reduce(lambda part, key: part[key], path[:-1], config)

    def values_for(path):
        old = section_of(path)[path[-1]]
        if kind in ("missing", "misnamed"):
            return (None,)
        if kind == "mistyped":
            return tuple(one for one in JUNK if type(one) is not type(old))
        if isinstance(old, dict):
            return ()
        return in_another_unit(old) if kind == "unit" else NUMBERS[kind].get(type(old), ())

    # A wrong data_dir would be searched for on the disk and in the network.
    paths = [
        path
        for path in paths_of(config)
        if path[-1] != "data_dir"
        and not any(".".join((*path, "")).startswith(f"{key}.") for key in but)
        and values_for(path)
    ]
    if not paths:
        return []
    path = rng.choice(paths)
    section, key = section_of(path), path[-1]
    names = [".".join(path)]
    if kind == "missing":
        del section[key]
    elif kind == "misnamed":
        other = rng.choice((key[:-1], f"{key}s", key.upper(), key[::-1], f"_{key}"))
        section[other] = section.pop(key)
        names.append(".".join((*path[:-1], other)))
    else:
        section[key] = rng.choice(values_for(path))
    return names


class Outcome(SimpleNamespace):
    """The `kinds` and `keys` of the mistakes, the config's `name`, the outcome (`what`) and the `message`."""


RIGHT = ("trained", "refused")


def try_config(rng, directory, name):
    """Puts mistakes into a config, and trains it if possible.

    Args:
      rng: a `random.Random`.
      directory: a directory for the run, which does not exist yet.
      name: of the config, one of TRAINING.

    Returns:
      An Outcome. "trained" and "refused" are right; an unexpected error gives the name of its type.
    """
    values = shortened(name)
    kinds, keys = [], []
    for kind in rng.choices(KINDS, k=1 if rng.random() < 0.8 else 2):
        names_of_key = mutate(values, kind, rng, keys)
        if names_of_key:
            kinds.append(kind)
            keys += names_of_key
    is_here = name.endswith("_digits")
    with contextlib.nullcontext() if is_here else Images(load(name).data.name, 4).in_place():
        what, message = judge(lambda: train(ConfigDict(values), directory, name in REAL), keys)
    if what == "refused" and directory.exists():
        what = "refused, and the workdir touched"
    return Outcome(kinds=kinds, keys=keys, name=name, what=what, message=message)


def judge(action, keys):
    """What `action()` returns, "refused" if an error names one of the keys, or another error; the message."""
    try:
        with time_limit(SECONDS):
            return action(), ""
    except ValueError as error:
        return "refused" if any(
            is_named(key, str(error)) for key in keys
        ) else "refused without a name", f"{type(error).__name__}: {error}"
    except Exception as error:
        return type(error).__name__, f"{type(error).__name__}: {error}"


def is_named(key, message):
    """Whether a message names a key with its dots, or the section and the key separately."""
    section, _, last = key.rpartition(".")
    return section in message and last in message


@contextlib.contextmanager
def time_limit(seconds):
    """Raises TimeoutError in the block after `seconds`."""

    def stop(*_):
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class TwoStepsError(Exception):
    """Two steps are done."""


def train(config, directory, in_earnest):
    """Trains two steps, or traces a step; returns "trained" on success.

    Raises:
      ValueError: the config was refused, before the first step.
    """
    device = jax.local_devices()[:1]
    program = programs.make_program(config, device)
    if in_earnest and max(program.feed.image_shape) <= 64:
        return _train_two_steps(config, program, directory)
    state = program.shapes_of_state()
    programs.check_protocol(program, state, config.evaluation.protocol)
    leading = 1, program.steps_per_call, config.batch_size

    def stacked(dtype, *shape):
        return jax.ShapeDtypeStruct((*leading, *shape), dtype)

    batch = {"position": stacked(np.int32)}
    if config.data.feed == "stream":
        batch |= {"image": stacked(np.uint8, *program.feed.image_shape), "label": stacked(np.int32)}
    else:
        batch |= {"index": stacked(np.int32)}
    try:
        jax.eval_shape(program.train, state, program.arrays, batch)
    except ValueError as error:
        raise RuntimeError(f"refused in the first step: {error}") from error
    return "trained"


def _train_two_steps(config, program, directory):
    steps_done = 0

    def train(state, arrays, batches):
        nonlocal steps_done
        if steps_done >= 2:
            raise TwoStepsError
        steps_done += program.steps_per_call
        return program.train(state, arrays, batches)

    watched = program._replace(train=train)
    try:
        with contextlib.suppress(loop.DivergedError, TwoStepsError):
            loop.train_and_evaluate(config, directory, program=watched, show_progress=False)
    except ValueError as error:
        if steps_done:
            raise RuntimeError(f"refused after the first step: {error}") from error
        raise
    return "trained"


GRIDS = (
    (),
    (("model.depth", (8, 14)),),
    (("optimizer.momentum", (0.0, 0.9)), ("data.augment.flip", (True, False))),
)
VALUES = (*JUNK, -1, 10**12, float("nan"), 2**31, "a/b")


def try_study(rng):
    """Makes a study with a mistake, and expands it if possible; returns an Outcome."""
    values = {
        "base": shortened("resnet_digits"),
        "grid": rng.choice(GRIDS),
        "seeds": (0, 1),
        "adjust": (),
    }
    if values["grid"]:
        values["compare"] = values["against"] = values["grid"][0][0]
    kind = rng.choice(("missing", "misnamed", "mistyped", "inside", "base"))
    part = rng.choice(list(values))
    value = rng.choice(VALUES)
    keys = [part]
    if kind == "missing":
        del values[part]
    elif kind == "misnamed":
        values[part + "s"] = values.pop(part)
    elif kind == "mistyped":
        values[part] = value
    elif kind == "base":
        keys = ["base", *mutate(values["base"], rng.choice(KINDS), rng)]
    else:
        other = rng.choice(VALUES)
        # (key that an error may name instead of the part, wrong value).
        inside = {
            "grid": (
                ("grid", value),
                ("grid", (value, (other,))),
                ("optimizer.momentum", ("optimizer.momentum", (value, other))),
                ("model.depth", ("model.depth", value)),
            ),
            "seeds": (("seed", value), ("seed", other)),
            "adjust": (
                *(("adjust", value), ("adjust", (value, other))),
                ("adjust", ((value, other), (("num_steps", 4),))),
                ("model.depth", (("model.depth", 8), ((value, other),))),
                ("num_steps", (("model.depth", 8), (("num_steps", value),))),
            ),
        }
        part = rng.choice(list(inside))
        key, inner = rng.choice(inside[part])
        keys, values[part] = [part, key], (inner,)
    if part == "grid":
        for name in ("compare", "against"):  # they may no longer be keys of the grid, and be named instead
            values.pop(name, None)

    def expand():
        for run in plan.expand(ConfigDict(values)):
            programs.check(run.config)
        return "trained"

    what, message = judge(expand, keys)
    return Outcome(kinds=[f"study {kind}"], keys=keys, name="study", what=what, message=message)


def main():
    """Tries the configs and studies, prints the outcomes, and writes them to --out."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--inputs", type=parsing.positive_number, default=2000, help="configs; and a tenth as many studies"
    )
    parser.add_argument(
        "--minutes",
        type=parsing.positive_number,
        default=60,
        help="stop after this many minutes, whatever is left",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the mistakes")
    parser.add_argument(
        "--out", type=record.output, help="a JSON file, of which it writes the section 'configs'"
    )
    options = parser.parse_args()
    rng, end = random.Random(options.seed), time.monotonic() + 60 * options.minutes
    counts, kinds, wrong, tried = collections.Counter(), collections.defaultdict(collections.Counter), [], 0
    configs = collections.Counter()
    with tempfile.TemporaryDirectory() as directory:
        # Most mistakes do not change the compiled step.
        jax.config.update("jax_compilation_cache_dir", f"{directory}/compiled")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        while tried < options.inputs and time.monotonic() < end:
            name = TRAINING[tried % len(TRAINING)]
            tried += 1
            configs[name] += 1
            outcomes = [try_config(rng, pathlib.Path(directory, str(tried)), name)]
            if tried % 10 == 0:
                outcomes.append(try_study(rng))
            for outcome in outcomes:
                counts[outcome.what] += 1
                for kind in outcome.kinds:
                    kinds[kind][outcome.what] += 1
                if outcome.what not in RIGHT:
                    wrong.append(vars(outcome))
                    print(outcome, flush=True)
    figures = {
        "configs_tried": tried,
        "studies_tried": tried // 10,
        "outcomes": counts,
        "by_kind": {kind: dict(kinds[kind]) for kind in sorted(kinds)},
        "by_config": configs,
        "wrong": wrong,
    }
    for key, value in figures.items():
        print(f"{key}: {value}")
    if options.out:
        minutes = f" --minutes={options.minutes}" if options.minutes != parser.get_default("minutes") else ""
        command = f"python -m benchmarks.fuzz --inputs={tried}{minutes} --seed={options.seed}"
        record.write_section(options.out, "configs", command, figures)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
