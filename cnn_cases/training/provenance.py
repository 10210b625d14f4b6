"""The code, packages and machine that a result may depend on, besides its config."""

import datetime
import functools
import hashlib
import importlib.metadata
import itertools
import os
import pathlib
import platform
import re
import subprocess
import zlib

import jax

# Packages that a result may depend on: those that compute, and those that turn files into pixels.
PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "tensorflow-datasets",
    "numpy",
    "grain",
    "opencv-python-headless",
    "simplejpeg",
)
CPUINFO = pathlib.Path("/proc/cpuinfo")  # of Linux, where `platform` often does not know the processor


def note_code():
    """Notes the code and its commit, for every `environment` of this process."""
    commit(), _code()


def stamp():
    """Returns {"date", "environment"}: when and where the figures of a record are measured."""
    return {"date": datetime.date.today().isoformat(), "environment": environment()}


def environment(devices=None):
    """Returns what a result may depend on besides its config.

    Args:
      devices: those that are used, in all processes; None for all that there are.
    """
    return {
        "commit": commit(),
        "code": _code(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_model": _cpu_model(),  # floating-point results differ in rounding from one to another
        "cpus": cpu_threads(),
        "devices": [device.device_kind for device in devices or jax.devices()],
        # None is JAX's own choice: bfloat16 on TPUs, TF32 on GPUs that have it.
        "matmul_precision": jax.config.jax_default_matmul_precision,
        # Other random numbers mean another augmentation and dropout; and x64 has other rounding.
        "random_numbers": jax.config.jax_default_prng_impl,
        "partitionable": jax.config.jax_threefry_partitionable,
        "x64": jax.config.jax_enable_x64,
        "xla_flags": _xla_flags(),
        "versions": {package: _version(package) for package in PACKAGES},
    }


def what_runs(environment):
    """Returns the part of an `environment` that should be the same in all processes and starts of a run."""
    names = ("code", "python", "versions", "matmul_precision", "random_numbers", "partitionable", "x64")
    return {name: environment[name] for name in names if name in environment}


def cpu_threads():
    """Returns the number of XLA's CPU threads: PJRT_NPROC, or else one per core that this process may use."""
    threads = os.environ.get("PJRT_NPROC", "")
    if threads.isdecimal() and int(threads):
        return int(threads)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _xla_flags():
    """Returns XLA's flags, `runtime`'s included, and those of its compiler for TPUs; some change rounding."""
    return [flag for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS") for flag in os.environ.get(name, "").split()]


def _cpu_model():
    """Returns the processor's name for itself; None if the system does not tell it.

    On x86 with the numbers of its family and model: in a virtual machine, generations that differ in their
    vector instructions, and so in rounding and speed, can have one name.
    """
    text = CPUINFO.read_text() if CPUINFO.exists() else ""
    told = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", text, re.MULTILINE))
    if told.keys() >= {"model name", "cpu family", "model"}:
        return "{model name} (family {cpu family}, model {model})".format_map(told)
    return told.get("model name") or platform.processor() or None


def _version(package):
    """Returns a package's version; None if it is not installed, as when another package replaces it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache  # files that change later are not the code that this process runs
def _code():
    """Returns a checksum, 12 hexadecimal digits, of the code that a run's result may depend on."""
    package = pathlib.Path(__file__).parents[1]
    rooms = (sorted((package / room).rglob("*.py")) for room in ("data", "models", "training"))
    files = itertools.chain([package / "settings.py"], *rooms)
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


@functools.cache
def commit():
    """Returns the commit of this code; None if no git checkout tracks it.

    If Python files differ from the commit or are new, "-dirty-" and a checksum of these changes follow it.
    """
    root = pathlib.Path(__file__).parents[2]

    def git(*arguments):
        return subprocess.run(["git", "-C", root, *arguments], capture_output=True, check=True).stdout

    try:
        git("ls-files", "--error-unmatch", __file__)  # fails in another project's checkout
        commit = git("rev-parse", "HEAD").decode().strip()
        changes = git("diff", "HEAD", "--no-ext-diff", "--binary", "--", "*.py")
        for name in git("ls-files", "--others", "--exclude-standard", "-z", "--", "*.py").split(b"\0")[:-1]:
            changes += name + (root / os.fsdecode(name)).read_bytes()
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}-dirty-{zlib.crc32(changes):08x}" if changes else commit
