"""Compiling for a GPU that is not there."""

import importlib.util
import json
import subprocess
import sys

import pytest

from benchmarks import traffic


def installed():
    return any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))


def run(*flags):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.traffic", *flags], capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(not installed(), reason="needs JAX for CUDA, whose compiler it tries")
def test_a_step_is_compiled_for_a_gpu_that_is_not_there(tmp_path):
    out = tmp_path / "traffic.json"
    assert run("--cases", "LeNet-5", "--out", out).returncode == 0
    (row,) = json.loads(out.read_text()).values()
    assert row["environment"]["devices"] == ["NVIDIA H200, by its description"]
    image = 4096 * 32 * 32 * 4
    assert 10 * image < row["bytes_a_step"] < 100 * image
    assert 20 < row["kernels_a_step"] < 200


@pytest.mark.skipif(installed(), reason="JAX for CUDA is installed")
def test_without_the_compiler_for_gpus_it_says_what_to_install():
    ended = run()
    assert ended.returncode == 2
    assert 'error: this needs the compiler for GPUs: pip install "jax[cuda12]==' in ended.stderr


def test_the_table_has_a_row_for_each_network():
    row = {
        "batch_size": 64,
        "kernels_a_step": 229,
        "bytes_a_step": 18_898_609_790,
        "temporary_bytes": 2.351e9,
    }
    assert traffic.cells({"VGG-16": row}) == [
        ["network", "batch", "kernels", "memory traffic, GB", "temporary memory, MB"],
        ["VGG-16", "64", "229", "18.9", "2,351"],
    ]
