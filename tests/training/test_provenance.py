import os
import pathlib
import shutil
import subprocess

import jax
import pytest

from cnn_cases.training import provenance


def test_the_commit_tells_one_local_change_from_another(tmp_path, monkeypatch):
    commit_now = provenance.commit.__wrapped__
    file = tmp_path / "cnn_cases/training/provenance.py"
    file.parent.mkdir(parents=True)
    file.write_text("")
    monkeypatch.setattr(provenance, "__file__", str(file))
    assert commit_now() is None  # no checkout
    (tmp_path / "model.py").write_text("LAYERS = 3")
    who = ("-c", "user.name=x", "-c", "user.email=x@x", "commit", "--quiet", "--message=x")
    for arguments in (("init", "--quiet"), ("add", "model.py"), who):
        subprocess.run(["git", "-C", tmp_path, *arguments], check=True)
    assert commit_now() is None  # somebody else's checkout, around an installation
    for arguments in (("add", "."), who):
        subprocess.run(["git", "-C", tmp_path, *arguments], check=True)
    commit = commit_now()
    assert len(commit) == 40
    (tmp_path / "notes.txt").write_text("no code")
    assert commit_now() == commit
    seen = {commit}
    for name, text in (
        ("model.py", "LAYERS = 4"),
        ("model.py", "LAYERS = 5"),
        ("new.py", ""),
        ("new.py", "A = 1"),
    ):
        (tmp_path / name).write_text(text)
        seen.add(commit_now())
    assert len(seen) == 5
    assert all(one.startswith(f"{commit}-dirty-") for one in seen - {commit})
    subprocess.run(["git", "-C", tmp_path, "add", "."], check=True)
    assert commit_now().startswith(f"{commit}-dirty-")


def test_the_code_is_what_a_training_runs(tmp_path, monkeypatch):
    package = pathlib.Path(provenance.__file__).parents[1]
    shutil.copytree(package, tmp_path / "cnn_cases", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "cnn_cases/training/provenance.py"))
    code_now = provenance._code.__wrapped__
    code = code_now()
    assert len(code) == 12
    (tmp_path / "cnn_cases/studies/page.py").write_text("")
    assert code_now() == code
    seen = {code}
    for name in ("models/vgg.py", "data/new.py", "training/losses.py", "settings.py"):
        (tmp_path / "cnn_cases" / name).write_text("A = 1")
        seen.add(code_now())
    assert len(seen) == 5


def test_a_package_that_is_not_installed_has_no_version(monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGES", ("numpy", "no-such-package"))
    versions = provenance.environment()["versions"]
    assert versions["numpy"]
    assert versions["no-such-package"] is None


@pytest.mark.parametrize(
    ("cpuinfo", "named"),
    [
        (
            "processor\t: 0\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\n\nprocessor\t: 1\n",
            "AMD EPYC (family 26, model 2)",
        ),
        ("model name\t: ARMv7 Processor rev 4 (v7l)\n", "ARMv7 Processor rev 4 (v7l)"),
        ("processor\t: 0\nCPU part\t: 0xd0c\n", "that of the platform"),
        (None, "that of the platform"),
    ],
)
def test_an_environment_names_the_processor(monkeypatch, tmp_path, cpuinfo, named):
    file = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        file.write_text(cpuinfo)
    monkeypatch.setattr(provenance, "CPUINFO", file)
    monkeypatch.setattr(provenance.platform, "processor", lambda: "that of the platform")
    assert provenance.environment()["cpu_model"] == named


def test_an_environment_names_the_precision_that_was_asked_for():
    with jax.default_matmul_precision("highest"):
        assert provenance.environment()["matmul_precision"] == "highest"


def test_settings_of_jax_that_change_the_random_numbers_or_the_rounding_are_told():
    before = provenance.what_runs(provenance.environment())
    with jax.default_prng_impl("rbg"), jax.threefry_partitionable(False), jax.enable_x64(True):
        now = provenance.what_runs(provenance.environment())
    assert {name: now[name] for name in now if now[name] != before[name]} == {
        "random_numbers": "rbg",
        "partitionable": False,
        "x64": True,
    }


def test_the_flags_of_xla_are_told(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true  --xla_gpu_deterministic_ops=true")
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_scoped_vmem_limit_kib=65536")
    assert provenance.environment()["xla_flags"] == [
        "--xla_cpu_enable_fast_math=true",
        "--xla_gpu_deterministic_ops=true",
        "--xla_tpu_scoped_vmem_limit_kib=65536",
    ]
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.delenv("LIBTPU_INIT_ARGS")
    assert provenance.environment()["xla_flags"] == []


@pytest.mark.parametrize(("told", "threads"), [("5", 5), (None, 3), ("", 3), ("0", 3), ("many", 3)])
def test_threads_are_as_many_as_told_or_else_as_the_cores_of_this_process(told, threads, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 4, 7}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    if told is None:
        monkeypatch.delenv("PJRT_NPROC")
    else:
        monkeypatch.setenv("PJRT_NPROC", told)
    assert provenance.cpu_threads() == threads
