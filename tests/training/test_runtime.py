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
LLVM = "--xla_backend_optimization_level=1"


@pytest.mark.parametrize(
    ("version", "flags", "added"),
    [
        ("0.10.2", "", [YNNPACK, BARRIERS, LLVM]),
        ("0.11.2", "--xla_cpu_use_onednn=true", [YNNPACK, BARRIERS, LLVM]),
        ("0.10.2", "--xla_cpu_experimental_ynn_fusion_type=DOT", [BARRIERS, LLVM]),
        ("0.10.2", "--xla_disable_hlo_passes=dce", [YNNPACK, LLVM]),
        ("0.10.2", "--xla_backend_optimization_level=2", [YNNPACK, BARRIERS]),
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


@pytest.mark.parametrize(
    ("key", "is_telling"),
    [
        *(("model name", True), ("flags", True)),
        *(("Features", True), ("CPU implementer", True), ("CPU part", True)),
        *(("processor", False), ("cpu MHz", False)),
    ],
)
def test_kinds_of_cpus_differ_in_what_they_are_and_can(key, is_telling, monkeypatch):
    kinds = set()
    for value in ("1", "2"):
        text = f"vendor_id\t: x\n{key}\t: {value}\nbugs\t: \n"
        monkeypatch.setattr(pathlib.Path, "read_text", lambda _, text=text: text)
        kinds.add(runtime._kind_of_cpu())
    assert (len(kinds) == 2) == is_telling


ENDS = """
import atexit
import gc
from cnn_cases.training import runtime

before = gc.get_freeze_count()
atexit.register(lambda: print(gc.get_freeze_count() > before))
{setup}
"""


@pytest.mark.parametrize(
    ("setup", "printed"), [("", "False\n"), ("runtime.collect_garbage_rarely()", "True\n")]
)
def test_a_process_that_ends_does_not_search_its_objects_for_cycles(setup, printed):
    command = [sys.executable, "-c", ENDS.format(setup=setup)]
    assert subprocess.run(command, capture_output=True, check=True, text=True).stdout == printed
