import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from cnn_cases.training import provenance, runtime


@pytest.mark.parametrize("flags", [None, "--xla_gpu_deterministic_ops=false --xla_cpu_use_onednn=true"])
def test_the_switch_for_reproducible_bits_is_xlas_and_keeps_what_the_user_says(flags, monkeypatch):
    if flags is None:
        monkeypatch.delenv("XLA_FLAGS")
    else:
        monkeypatch.setenv("XLA_FLAGS", flags)
    runtime.make_deterministic()
    words = os.environ["XLA_FLAGS"].split()
    assert words == [*(flags or "").split(), "--xla_gpu_deterministic_ops=true"]


YNNPACK = "--xla_cpu_experimental_ynn_fusion_type=REDUCE"
BARRIERS = "--xla_disable_hlo_passes=cse_barrier_expander"


@pytest.mark.parametrize(
    ("version", "flags", "added"),
    [
        ("0.10.2", "", [YNNPACK, BARRIERS]),
        ("0.11.2", "--xla_cpu_use_onednn=true", [YNNPACK, BARRIERS]),
        ("0.10.2", "--xla_cpu_experimental_ynn_fusion_type=DOT", [BARRIERS]),
        ("0.10.2", "--xla_disable_hlo_passes=dce", [YNNPACK]),
        ("0.12.0", "", []),
        ("0.9.1", "", []),
    ],
)
def test_flags_for_cpus_are_set_where_xla_knows_them_and_the_user_says_nothing(
    version, flags, added, monkeypatch
):
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setattr("jaxlib.__version__", version)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)  # JAX is installed for CPUs alone
    runtime.choose_cpu_flags()
    assert os.environ["XLA_FLAGS"].split() == [*flags.split(), *added]


@pytest.mark.parametrize("package", ["libtpu", "jax_plugins"])
def test_there_are_none_where_jax_is_installed_for_accelerators(package, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == package)
    runtime.choose_cpu_flags()
    assert os.environ["XLA_FLAGS"] == ""


def test_a_barrier_is_kept_until_xla_has_chosen_what_to_compute_twice():
    def twice(x):
        kept = lax.optimization_barrier(jnp.maximum(x * x + 1, 3))
        return kept.T, kept * 2

    program = jax.jit(twice).lower(jnp.ones((64, 64))).compile().as_text()
    assert len(re.findall(r" maximum\(", program)) == 1


def in_process(script, **environment):
    """What a script prints that runs in a process of its own, whose C library is not set up by anybody."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    process = subprocess.run(
        [sys.executable, "-c", script], env=inherited | environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.split()


NEW_PAGES = """
import resource
from cnn_cases.training import runtime
runtime.keep_memory()
import jax, jax.numpy as jnp
add = jax.jit(lambda x: x + 1)
x = jnp.zeros(2**24)
for call in range(6):
    if call == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    add(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
reserves = pytest.mark.skipif(not runtime._can_reserve(), reason="this system has no huge pages to reserve")


@reserves
def test_memory_that_a_step_frees_is_there_for_the_next():
    (kept,) = in_process(NEW_PAGES)
    (returned,) = in_process(NEW_PAGES, MALLOC_ARENA_MAX="8")
    assert int(kept) < 2**10 <= 2**14 <= int(returned)  # a call's result has 2**14 pages of 4 KiB


HEAP = """
import importlib, pathlib, resource
from cnn_cases.training import runtime
{before}
runtime.keep_memory()
maps = [line.split() for line in open("/proc/self/smaps")]
heaps = [line[0].split("-") for line in maps if line[-1] == "[heap]"]
size = sum(int(end, 16) - int(begin, 16) for begin, end in heaps)
print(size // 2**30, sum(line[0] == "VmFlags:" and "hg" in line for line in maps))
"""
READ = """
read = pathlib.Path.read_text
pathlib.Path.read_text = lambda path: "{text}" if str(path) == "{path}" else read(path)
"""


@reserves
@pytest.mark.parametrize(
    ("before", "environment"),
    [
        ("", {"MALLOC_ARENA_MAX": "2"}),
        ("", {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}),
        ("resource.setrlimit(resource.RLIMIT_AS, (2**42, 2**42))", {}),
        ("importlib.util.find_spec = lambda name: name == 'jax_plugins'", {}),
        (READ.format(path="/proc/sys/vm/overcommit_memory", text="2"), {}),
        (READ.format(path="/sys/kernel/mm/transparent_hugepage/enabled", text="always madvise [never]"), {}),
    ],
)
def test_no_memory_is_reserved_where_that_may_do_harm_or_the_user_chose(before, environment):
    assert in_process(HEAP.format(before=before), **environment) == ["0", "0"]


@reserves
def test_half_of_the_memory_is_reserved_in_huge_pages_otherwise():
    total = int(re.search(r"MemTotal: +(\d+) kB", pathlib.Path("/proc/meminfo").read_text())[1])
    reserved, huge = in_process(HEAP.format(before=""))
    assert abs(int(reserved) - total / 2**21) <= 1
    assert huge == "1"


def test_what_is_compiled_can_be_kept_in_a_bucket(monkeypatch):
    told = []
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "gs://bucket/compiled/")
    monkeypatch.setattr(jax.config, "update", lambda *pair: told.append(pair))
    runtime.separate_compilation_cache()
    assert told == [
        (
            "jax_compilation_cache_dir",
            f"gs://bucket/compiled/{runtime._kind_of_cpu()}-{provenance.cpu_threads()}-threads",
        )
    ]


def test_who_keeps_nothing_compiled_keeps_nothing_side_by_side(monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setattr(jax.config, "update", pytest.fail)
    runtime.separate_compilation_cache()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
