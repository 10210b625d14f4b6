"""Four virtual devices, the digits prepared once, and a config small enough to train in seconds."""

import os

# Before JAX starts. Four devices need more threads than two cores would get (see devices.max_in_flight).
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["PJRT_NPROC"] = "16"

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest

from cnn_cases.data import sources
from cnn_cases.data.resident import ResidentFeed
from cnn_cases.training import programs, running, runtime
from configs import lenet5_digits

# Most of the time goes into compiling, and little into running what was compiled.
XLA_FLAGS = "--xla_backend_optimization_level=0"
if jaxlib.__version__.startswith("0.10."):  # XLA had other emitters of fusions then, which compile sooner
    XLA_FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=4 {XLA_FLAGS}"

# As the command line does.
runtime.choose_cpu_flags()
runtime.collect_garbage_rarely()


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """All processes of a session keep what they compile for each other, and not in anybody's home."""
    base = tmp_path_factory.getbasetemp()
    directory = str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = directory
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    runtime.separate_compilation_cache()  # where the processes that tests start will look, too
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.fixture(scope="session", autouse=True)
def data_dir(tmp_path_factory):
    """A TFDS directory of the session's own, with the digits in it."""
    directory = str(tmp_path_factory.mktemp("tfds"))
    before = os.environ.get("TFDS_DATA_DIR")
    os.environ["TFDS_DATA_DIR"] = directory
    sources.prepare("digits", directory)
    yield directory
    if before is None:
        del os.environ["TFDS_DATA_DIR"]
    else:
        os.environ["TFDS_DATA_DIR"] = before


def tiny_config(data_dir):
    """LeNet-5 on digits of 16x16 pixels for 12 steps."""
    config = lenet5_digits.get_config()
    config.num_steps = 12
    config.batch_size = 24
    config.data.image_size = 16
    config.data.data_dir = data_dir
    config.data.augment.pad = 1
    config.data.augment.flip = True
    config.schedule.warmup_steps = 2
    config.evaluation.every_steps = 4
    config.evaluation.batch_size = 200
    config.checkpoint.every_steps = 4
    config.log_every_steps = 3
    return config


@pytest.fixture
def config(data_dir):
    """A tiny config of the test's own, to change as it likes."""
    return tiny_config(data_dir)


def poisoned(config, monkeypatch, example):
    """A program for which an example of the training split, as the network sees it in training, is NaN."""
    prepare = ResidentFeed.prepare

    def poisonous(feed, arrays, batch, key):
        image, label = prepare(feed, arrays, batch, key)
        bad = (batch["index"] == feed._ranges["train"].start + example) & (key is not None)
        return jnp.where(bad[:, None, None, None], jnp.nan, image), label

    monkeypatch.setattr(ResidentFeed, "prepare", poisonous)
    return programs.make_program(config, jax.devices()[:1])


def drawn(seed, *shape):
    """Normally distributed numbers, float32; `jax.random` would compile a program for each shape."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def draw(model, image_shape, seed):
    """The first variables of a model, drawn in one program."""
    image, key = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32), jax.random.key(seed)
    return jax.jit(lambda key: model.lazy_init(key, image, train=False))(key)


def metrics_of(value):
    """What a step that computes nothing says of itself: `value` for all that is measured, and not skipped."""
    return dict.fromkeys(running.NAMES, np.full(1, value)) | {"skipped": np.zeros(1, bool)}


def stop_after(program, steps, action):
    """A program that does `action` when step number `steps` has been done."""

    def train(state, arrays, batches):
        state, metrics = program.train(state, arrays, batches)
        if int(state.step) == steps:
            action()
        return state, metrics

    return program._replace(train=train)


def interrupt():
    """Ends a run at once, so that it saves nothing more; for `stop_after`."""
    raise KeyboardInterrupt


def example_of_step(program, seed, steps):
    """An example that comes at the given steps of the first 12, and at no other."""
    orders = [set(program.feed.training_examples(seed, step).tolist()) for step in range(12)]
    chosen = set.intersection(*(orders[step - 1] for step in steps))
    return min(chosen.difference(*(orders[step] for step in range(12) if step + 1 not in steps)))


class Bomb:
    """What leaves a file where it is unpickled."""

    def __init__(self, trace):
        self._trace = str(trace)

    def __reduce__(self):
        return (open, (self._trace, "w"))
