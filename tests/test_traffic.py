"""Compiling for a GPU that is not there."""

import importlib.util
import json
import subprocess
import sys

import pytest

from benchmarks import traffic


@pytest.mark.skipif(not traffic.has_compiler(), reason="needs JAX for CUDA, whose compiler it tries")
def test_a_step_is_compiled_for_a_gpu_that_is_not_there(tmp_path):
    out = tmp_path / "traffic.json"
    command = [sys.executable, "-m", "benchmarks.traffic", "--cases", "LeNet-5", "--out", out]
    assert subprocess.run(command, check=False).returncode == 0
    (row,) = json.loads(out.read_text()).values()
    assert row["environment"]["devices"] == ["NVIDIA H200, by its description"]
    image = 4096 * 32 * 32 * 4
    assert 10 * image < row["bytes_a_step"] < 100 * image
    assert 20 < row["kernels_a_step"] < 200


def test_without_the_compiler_for_gpus_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["traffic"])
    with pytest.raises(SystemExit) as ended:
        traffic.main()
    assert ended.value.code == 2
    assert 'error: this needs the compiler for GPUs: pip install "jax[cuda12]==' in capsys.readouterr().err


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
