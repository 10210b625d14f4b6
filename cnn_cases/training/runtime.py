"""Sets up a process that computes: XLA's flags, JAX's cache of programs, Python's garbage collection."""

import atexit
import gc
import hashlib
import importlib.util
import os
import pathlib
import platform

import jax
import jaxlib

from cnn_cases.training import provenance

# XLA's flags for CPUs, and the versions of jaxlib that know them: give sums to YNNPACK, keep the barriers
# that mark what must be computed only once, and let LLVM do only what takes it little time.
CPU_FLAGS = {
    "xla_cpu_experimental_ynn_fusion_type": "REDUCE",
    "xla_disable_hlo_passes": "cse_barrier_expander",
    "xla_backend_optimization_level": "1",
}
_KNOWN_BY = ("0.10.", "0.11.")
DETERMINISTIC_FLAG = "--xla_gpu_deterministic_ops=true"


def choose_cpu_flags():
    """Sets CPU_FLAGS for XLA, in this process and in those that it starts. Call it before JAX is used.

    XLA has two libraries for CPUs, YNNPACK and Eigen. By default it gives convolutions to YNNPACK and sums to
    neither; with the flag, Eigen computes the convolutions and YNNPACK the sums. XLA also recomputes
    activations wherever they are used, which costs more than keeping them; `models.fast.conv_general_dilated`
    uses barriers to mark those to keep, and XLA would remove the barriers too early. LLVM optimises what is
    left, elementwise functions and copies, as well at its level 1 as at XLA's default of 3, and sooner.
    `python -m benchmarks.flags` measures the effect.

    A flag that is already in XLA_FLAGS stays unchanged. Nothing is set for other versions of jaxlib, which
    may abort at an unknown flag, nor where JAX is installed for accelerators, whose compilers do not need
    these barriers or belong to another version of XLA.
    """
    for_cpus = not any(map(importlib.util.find_spec, ("libtpu", "jax_plugins")))
    if for_cpus and jaxlib.__version__.startswith(_KNOWN_BY):
        for name, value in CPU_FLAGS.items():
            if name not in os.environ.get("XLA_FLAGS", ""):
                _add_xla_flag(f"--{name}={value}")


def make_deterministic():
    """Makes runs on GPUs reproducible to the bit, in this process and in those that it starts.

    Call it before JAX is used. XLA then avoids kernels whose result depends on which thread finishes first,
    and chooses kernels without timing them, so that each start chooses the same ones. This costs speed.
    Another kind of GPU, number of devices or version of a package still gives other bits. CPUs and TPUs need
    no such switch and are not affected. Neither the effect nor the cost has been measured on a GPU yet.
    """
    _add_xla_flag(DETERMINISTIC_FLAG)


def _add_xla_flag(flag):
    # After the user's flags: if a flag appears twice, XLA uses the last one.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()


def use_compilation_cache():
    """Makes JAX cache compiled programs for later starts.

    The directory is cnn_cases in XDG_CACHE_HOME or ~/.cache, or the value of JAX_COMPILATION_CACHE_DIR.
    JAX_ENABLE_COMPILATION_CACHE=0 turns this off.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        try:
            home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        except RuntimeError:  # a user without a home
            return
        # In the environment, so that child processes use it, too.
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(home / "cnn_cases")
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # A network compiles many small programs at the start.
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    separate_compilation_cache()


def separate_compilation_cache():
    """Gives each kind of CPU and number of threads a directory in JAX_COMPILATION_CACHE_DIR, if that is set.

    XLA compiles for the number of threads of this process, which JAX's cache does not distinguish, and a
    program compiled for one CPU may not run on another that shares the home directory. Also call this in a
    process that may have another number of threads than its parent, or run on another machine.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        # A string, not a path: it can be a bucket, such as gs://bucket/compiled.
        place = os.environ["JAX_COMPILATION_CACHE_DIR"].rstrip("/")
        place += f"/{_kind_of_cpu()}-{provenance.cpu_threads()}-threads"
        jax.config.update("jax_compilation_cache_dir", place)


def _kind_of_cpu():
    try:
        lines = provenance.CPUINFO.read_text().splitlines()
    except OSError:
        lines = [f"model name: {platform.processor()}"]
    telling = ("model name", "flags", "Features", "CPU implementer", "CPU part")  # on x86, and on ARM
    kind = {line for line in lines if line.startswith(telling)}
    return f"{platform.machine()}-{hashlib.sha256(''.join(sorted(kind)).encode()).hexdigest()[:16]}"


def collect_garbage_rarely():
    """Makes Python search for reference cycles after fifty thousand new objects, not after several hundred.

    Tracing a network creates millions of objects, most of which stay alive, and each search visits them. For
    the ten networks of the digits study, with 20 steps each, that took 4.5 of 43 s of CPU time (one process,
    2026-11-29). Nor does Python search when it ends, which took half a second (one core,
    2026-12-01): frozen objects are not visited, and their memory is freed anyway.
    """
    gc.set_threshold(50_000)
    atexit.register(gc.freeze)
