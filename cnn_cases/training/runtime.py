"""Sets up a process that computes: XLA's flags, memory, JAX's cache of programs, garbage collection."""

import ctypes
import gc
import hashlib
import importlib.util
import mmap
import os
import pathlib
import platform
import resource
import sys

import jax
import jaxlib
import psutil

from cnn_cases.training import provenance

# XLA's flags for CPUs, and the versions of jaxlib that know them: give sums to YNNPACK, and keep the barriers
# that mark what must be computed only once.
CPU_FLAGS = {
    "xla_cpu_experimental_ynn_fusion_type": "REDUCE",
    "xla_disable_hlo_passes": "cse_barrier_expander",
}
_KNOWN_BY = ("0.10.", "0.11.")
DETERMINISTIC_FLAG = "--xla_gpu_deterministic_ops=true"

# Of glibc's malloc.h, and the size of a huge page.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_HUGE_PAGE = 2**21


def choose_cpu_flags():
    """Sets CPU_FLAGS for XLA, in this process and in those that it starts. Call it before JAX is used.

    XLA has two libraries for CPUs, YNNPACK and Eigen. By default it gives convolutions to YNNPACK and sums to
    neither; with the flag, Eigen computes the convolutions and YNNPACK the sums. XLA also recomputes
    activations wherever they are used, which costs more than keeping them; `models.fast.conv_general_dilated`
    uses barriers to mark those to keep, and XLA would remove the barriers too early. `python -m
    benchmarks.flags` measures the effect.

    A flag that is already in XLA_FLAGS stays unchanged. Nothing is set for other versions of jaxlib, which
    may abort at an unknown flag, nor where JAX is installed for accelerators, whose compilers do not need
    these barriers or belong to another version of XLA.
    """
    if _is_for_cpus() and jaxlib.__version__.startswith(_KNOWN_BY):
        for name, value in CPU_FLAGS.items():
            if name not in os.environ.get("XLA_FLAGS", ""):
                _add_xla_flag(f"--{name}={value}")


def keep_memory():
    """Makes this process keep the memory that it frees, in huge pages. Call it before JAX is used.

    XLA allocates the activations of a step on a CPU, and frees them at its end. glibc returns blocks of that
    size to Linux, which in the next step hands out zeroed pages of 4 KiB again, one after another: 69,000 for
    ResNet-56 with 64 images. Here they stay in glibc's heap, for the next step, and half of the machine's
    memory is reserved for that heap and marked for pages of 2 MiB. What is reserved is in use only once it
    has been written to, but from then on until the process ends.

    Does nothing if the environment sets up glibc's malloc (MALLOC_..., GLIBC_TUNABLES), if reserved memory
    counts as used (ulimit -v, strict overcommit), where Linux has no such pages or JAX is installed for
    accelerators, and on other systems.
    """
    if sys.platform != "linux" or not _is_for_cpus() or not _can_reserve():
        return
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):  # not glibc
        return
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = (ctypes.c_size_t,)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    libc.free.argtypes = (ctypes.c_void_p,)
    libc.mallopt(_M_ARENA_MAX, 1)  # one heap for XLA's threads, too: the others are too small
    libc.mallopt(_M_MMAP_MAX, 0)  # even large blocks come from the heap
    libc.mallopt(_M_TRIM_THRESHOLD, -1)  # which is never made smaller
    size = psutil.virtual_memory().total // 2
    block = libc.malloc(size)
    if block:
        begin = -(-block // _HUGE_PAGE) * _HUGE_PAGE
        libc.madvise(begin, block + size - begin, mmap.MADV_HUGEPAGE)
        libc.free(block)


def _can_reserve():
    """Whether this process can reserve much memory that it may never use, and in huge pages (Linux)."""
    try:
        pages = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
        overcommit = pathlib.Path("/proc/sys/vm/overcommit_memory").read_text()
    except OSError:
        return False
    limits = (resource.getrlimit(which)[0] for which in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    return (
        "[never]" not in pages
        and overcommit.strip() != "2"
        and all(limit == resource.RLIM_INFINITY for limit in limits)
    )


def _is_for_cpus():
    """Whether JAX is installed for CPUs alone."""
    return not any(map(importlib.util.find_spec, ("libtpu", "jax_plugins")))


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

    The directory is ~/.cache/cnn_cases, or the value of JAX_COMPILATION_CACHE_DIR.
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
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [f"model name: {platform.processor()}"]
    telling = ("model name", "flags", "Features", "CPU implementer", "CPU part")  # on x86, and on ARM
    kind = {line for line in lines if line.startswith(telling)}
    return f"{platform.machine()}-{hashlib.sha256(''.join(sorted(kind)).encode()).hexdigest()[:16]}"


def collect_garbage_rarely():
    """Makes Python search for reference cycles after fifty thousand new objects, not after several hundred.

    Tracing a network creates millions of objects, most of which stay alive, and each search visits them. For
    the ten networks of the digits study, with 20 steps each, that took 4.5 of 43 s of CPU time (one process,
    2026-11-29).
    """
    gc.set_threshold(50_000)
