"""What a result may depend on besides its config: code, packages, machine."""

import datetime
import functools
import hashlib
import importlib.metadata
import itertools
import os
import pathlib
import platform
import subprocess
import zlib

import jax

# On which a result may depend: what computes, and what makes pixels of files.
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


def stamp():
    """{"date", "environment"}: when and where the figures of a record are measured."""
    return {"date": datetime.date.today().isoformat(), "environment": environment()}


def environment():
    """What a result may depend on besides its config."""
    return {
        "commit": _commit(),
        "code": _code(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": cpu_threads(),
        "devices": [device.device_kind for device in jax.devices()],
        # None is JAX's own choice: bfloat16 on TPUs, TF32 on GPUs that have it.
        "matmul_precision": jax.config.jax_default_matmul_precision,
        "versions": {package: _version(package) for package in PACKAGES},
    }


def what_runs(environment):
    """Of an `environment`, what must be alike in all processes and starts of one training."""
    names = ("code", "python", "versions", "matmul_precision")
    return {name: environment[name] for name in names if name in environment}


def cpu_threads():
    """XLA's threads on a CPU: PJRT_NPROC, or else one for each core that this process may use."""
    threads = os.environ.get("PJRT_NPROC", "")
    if threads.isdecimal() and int(threads):
        return int(threads)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(package):
    """Of a package; None where it is not there, as one that another package stands in for."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache  # of this process: what lies there later is not what runs
def _code():
    """A checksum of the code that a training runs, on which its result may depend; 12 hexadecimal digits."""
    package = pathlib.Path(__file__).parents[1]
    rooms = (sorted((package / room).rglob("*.py")) for room in ("data", "models", "training"))
    files = itertools.chain([package / "settings.py"], *rooms)
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


@functools.cache
def _commit():
    """The commit of this code; None where no git checkout has it.

    Where Python files differ from it or are new, with "-dirty-" and a checksum of them behind it.
    """
    root = pathlib.Path(__file__).parents[2]

    def git(*arguments):
        return subprocess.run(["git", "-C", root, *arguments], capture_output=True, check=True).stdout

    try:
        git("ls-files", "--error-unmatch", __file__)  # a checkout around an installation is another project's
        commit = git("rev-parse", "HEAD").decode().strip()
        changes = git("diff", "HEAD", "--no-ext-diff", "--binary", "--", "*.py")
        for name in git("ls-files", "--others", "--exclude-standard", "-z", "--", "*.py").split(b"\0")[:-1]:
            changes += name + (root / os.fsdecode(name)).read_bytes()
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}-dirty-{zlib.crc32(changes):08x}" if changes else commit
