"""Several real processes, each with one CPU device, do one training: the one that a single process does."""

import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import zlib

import jax
import numpy as np
import pytest

from cnn_cases.training import logbook, loop, programs
from configs import lenet5_digits, resnet_digits
from tests.conftest import XLA_FLAGS, tiny_config

ROOT = pathlib.Path(__file__).parent.parent.parent
# train.py, with a signal to itself after a step; or an error, where the number is 0.
TRAIN = """
import os, sys
from absl import flags
from cnn_cases import command
from cnn_cases.training import programs
import train

number, steps = map(int, sys.argv[1:3])
del sys.argv[1:3]
make_program = programs.make_program


def make(*arguments):
    program = make_program(*arguments)

    def train(state, arrays, batches):
        state, metrics = program.train(state, arrays, batches)
        if int(state.step) == steps:
            if not number:
                raise RuntimeError("of one process alone")
            os.kill(os.getpid(), number)
        return state, metrics

    return program._replace(train=train)


programs.make_program = make
command.run(train.main)
"""


def flags_of(config, default):
    """The flags that make `config` of a config file's `default`."""

    def flat(settings, prefix=""):
        for key, value in settings.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    before = dict(flat(default.to_dict()))
    changed = {key: value for key, value in flat(config.to_dict()) if value != before[key]}
    return [f"--config.{key}={value}" for key, value in changed.items()]


def free_port():
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def job(count, workdir, arguments, *, send=None, own=None, own_environment=None, slurm=False):
    """Runs a job; returns [(exit code, error output)] of its processes.

    Args:
      send: {process: (signal, the number of steps after which it sends it to itself)}.
      own: {process: arguments of its own}.
      own_environment: {process: variables of its own}.
      slurm: let the processes find each other as Slurm's do, and not by flags.
    """
    port, processes = free_port(), []
    for index in range(count):
        environment = os.environ | {"XLA_FLAGS": XLA_FLAGS, "PJRT_NPROC": "16", "JAX_PLATFORMS": "cpu"}
        environment |= (own_environment or {}).get(index, {})
        command = [f"--workdir={workdir}", *arguments, *(own or {}).get(index, [])]
        if slurm:
            environment |= {
                "SLURM_JOB_ID": "1",
                "SLURM_STEP_NODELIST": "localhost",
                "SLURM_NTASKS": str(count),
            }
            environment |= {"SLURM_PROCID": str(index), "SLURM_LOCALID": str(index)}
            environment["JAX_COORDINATOR_PORT"] = str(port)
        else:
            command += [f"--coordinator_address=localhost:{port}", f"--num_processes={count}"]
            command.append(f"--process_id={index}")
        number, steps = (send or {}).get(index, (0, 0))
        program = ["-c", TRAIN, str(int(number)), str(steps)]
        processes.append(
            subprocess.Popen(
                [sys.executable, *program, *command],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    outputs = []
    for index, process in enumerate(processes):
        if (send or {}).get(index, (0, 0))[0] == signal.SIGSTOP:  # the others, which come first, have ended
            process.kill()
        outputs.append(process.communicate(timeout=300)[1])
    return [(process.returncode, errors) for process, errors in zip(processes, outputs, strict=True)]


def rows(workdir):
    return logbook.read_rows(workdir / "metrics.jsonl")


def assert_alike(ours, theirs):
    """Equal rows but for the rounding of sums; no example falls on the other side here."""
    for our, their in itertools.zip_longest(ours, theirs):
        assert our == pytest.approx(their, rel=1e-4, abs=1e-6)


@pytest.fixture(scope="module")
def digits(data_dir):
    """A config, and the flags for it: augmented, and in the end tested with mirrored views, too."""
    config = tiny_config(data_dir)
    config.evaluation.protocol, config.evaluation.final_splits = "flip", ("test",)
    return config, ["--config=configs/lenet5_digits.py", *flags_of(config, lenet5_digits.get_config())]


@pytest.fixture(scope="module")
def unbroken(digits, tmp_path_factory):
    """The workdir of a job of two processes that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("unbroken")
    outcome = job(2, workdir, digits[1], slurm=True)
    assert [code for code, _ in outcome] == [0, 0], outcome
    return workdir


def test_two_processes_train_as_one_does(digits, unbroken, tmp_path):
    program = programs.make_program(digits[0], jax.devices()[:1])
    result = loop.train_and_evaluate(digits[0], tmp_path, program=program, show_progress=False)
    assert "test/flip/error" in result["metrics"]
    assert_alike(rows(unbroken), rows(tmp_path))
    theirs = json.loads((unbroken / "result.json").read_text())
    assert theirs["metrics"] == pytest.approx(result["metrics"], rel=1e-4)
    assert len(json.loads((unbroken / "environment.json").read_text())) == 1
    assert len(json.loads((unbroken / "environment.json").read_text())[0]["devices"]) == 2


def test_two_processes_start_from_the_layers_of_another_training(digits, unbroken, tmp_path):
    config = digits[0].copy_and_resolve_references()
    config.num_steps = 4
    config.start.workdir, config.optimizer.frozen = str(unbroken), ("conv1",)
    config.data.splits.test = "test[:1]"  # process 1 has none to predict
    flags = flags_of(config, lenet5_digits.get_config())
    outcome = job(2, tmp_path / "two", ["--config=configs/lenet5_digits.py", *flags])
    assert [code for code, _ in outcome] == [0, 0], outcome
    program = programs.make_program(config, jax.devices()[:1])
    loop.train_and_evaluate(config, tmp_path / "one", program=program, show_progress=False)
    assert_alike(rows(tmp_path / "two"), rows(tmp_path / "one"))
    assert "test/flip/error" in rows(tmp_path / "two")[-1]
    assert "starting from *" in outcome[0][1]


def test_a_dead_process_ends_the_others_and_a_signal_to_one_saves_for_all(digits, unbroken, tmp_path):
    outcome = job(2, tmp_path, digits[1], send={1: (signal.SIGKILL, 7)})
    assert [code for code, _ in outcome] == [4, -signal.SIGKILL], outcome
    assert "another process died or left" in outcome[0][1]
    assert "Traceback" not in outcome[0][1]
    assert rows(tmp_path)[-1]["step"] == 6
    # It goes on from step 4. The signal to process 1 comes to an end in both.
    outcome = job(2, tmp_path, digits[1], send={1: (signal.SIGTERM, 10)})
    assert [code for code, _ in outcome] == [143, 143], outcome
    assert "resuming after step 4" in outcome[0][1]
    assert all("SIGTERM: saved after step 10" in errors for _, errors in outcome)
    assert (tmp_path / "checkpoints/10").exists()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert [row["step"] for row in rows(tmp_path)] == [3, 4, 6, 8, 9]
    assert (unbroken / "metrics.jsonl").read_text().startswith(text)


def test_a_silent_process_ends_the_others(digits, tmp_path):
    arguments = [*digits[1], "--heartbeat_timeout_seconds=2"]
    outcome = job(2, tmp_path, arguments, send={1: (signal.SIGSTOP, 3)})
    assert [code for code, _ in outcome] == [4, -signal.SIGKILL], outcome
    assert "error: another process died, or has been silent for 2 s" in outcome[0][1]
    assert "Traceback" not in outcome[0][1]


def test_an_error_of_one_process_ends_the_others(digits, tmp_path):
    outcome = job(2, tmp_path, digits[1], send={1: (0, 3)})
    assert [code for code, _ in outcome] == [4, 1], outcome
    assert "another process died or left" in outcome[0][1]
    assert "RuntimeError: of one process alone" in outcome[1][1]


def test_a_process_that_waits_in_vain_for_the_others_ends(digits, tmp_path):
    arguments = [*digits[1], "--coordinator_address=localhost:1", "--num_processes=2", "--process_id=1"]
    command = [sys.executable, "train.py", f"--workdir={tmp_path}/run", *arguments]
    ended = subprocess.run(
        [*command, "--meeting_timeout_seconds=1"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 4, ended.stderr
    assert "error: not all processes have connected to localhost:1 within 1 s; start all" in ended.stderr
    assert not (tmp_path / "run").exists()


def test_process_0_ends_last():
    program = """if True:
        import sys
        from cnn_cases.training import processes
        index = int(sys.argv[2])
        processes.join(coordinator_address=sys.argv[1], num_processes=3, process_id=index)
        processes.end_together(index, patience_seconds=100)
        raise AssertionError("it goes on")
    """
    command = [sys.executable, "-c", program, f"localhost:{free_port()}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    lead, *others = [
        subprocess.Popen([*command, str(index)], cwd=ROOT, env=environment) for index in range(3)
    ]
    assert [process.wait(100) for process in others] == [1, 2]
    assert lead.poll() is None  # those whom it leaves behind would be aborted
    assert lead.wait(100) == 0


def test_a_process_ends_with_its_code_where_nobody_reads_what_it_says():
    program = """if True:
        import sys
        from cnn_cases.training import processes
        sys.stdin.readline()  # until the reader is gone
        processes.tell("once")
        processes.exit_at_once(5)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    process.stderr.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.wait(100) == 5


def test_four_processes_share_a_stream_and_the_statistics_of_batches(data_dir, tmp_path):
    config = resnet_digits.get_config()
    config.model.depth, config.data.data_dir, config.data.image_size = 8, data_dir, 16
    config.num_steps, config.batch_size, config.log_every_steps = 3, 16, 1
    config.data.feed = "stream"
    config.data.crop.name, config.data.crop.eval_shorter_side = "area", 18
    config.evaluation.every_steps = config.checkpoint.every_steps = 0
    config.evaluation.splits, config.checkpoint.best_on = (), ""
    config.evaluation.final_splits, config.evaluation.batch_size = ("validation",), 48  # 185 examples
    arguments = ["--config=configs/resnet_digits.py", *flags_of(config, resnet_digits.get_config())]
    outcome = job(4, tmp_path / "four", arguments)
    assert [code for code, _ in outcome] == [0] * 4, outcome
    program = programs.make_program(config, jax.devices()[:1])
    loop.train_and_evaluate(config, tmp_path / "one", program=program, show_progress=False)
    assert_alike(rows(tmp_path / "four"), rows(tmp_path / "one"))


def test_processes_of_different_configs_and_packages_are_refused(digits, tmp_path):
    # What is installed is what its metadata say.
    metadata = tmp_path / "packages/optax-0.0.1.dist-info/METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: optax\nVersion: 0.0.1\n")
    outcome = job(
        2,
        tmp_path / "run",
        digits[1],
        own={1: ["--config.optimizer.momentum=0.5"]},
        own_environment={1: {"PYTHONPATH": str(tmp_path / "packages")}},
    )
    for code, errors in outcome:
        assert code == 2, errors
        assert "error: process 1 differs from process 0:" in errors
        assert "config.optimizer.momentum: 0.9 in process 0, 0.5 in process 1" in errors
        assert re.search(r"versions.optax: '[^']+' in process 0, '0.0.1' in process 1", errors)
        assert "Traceback" not in errors
    assert not (tmp_path / "run").exists()


def test_processes_with_different_numbers_of_devices_are_refused(digits, tmp_path):
    two = {"XLA_FLAGS": f"{XLA_FLAGS} --xla_force_host_platform_device_count=2"}
    one = {"XLA_FLAGS": f"{XLA_FLAGS} --xla_force_host_platform_device_count=1"}
    for code, errors in job(2, tmp_path / "run", digits[1], own_environment={0: one, 1: two}):
        assert code == 2, errors
        assert "must have the same number of devices; they have [1, 2]" in errors
        assert "Traceback" not in errors
    assert not (tmp_path / "run").exists()


def test_processes_that_read_other_data_are_refused(digits, data_dir, tmp_path):
    programs.make_program(digits[0])  # leaves the decoded set there
    shutil.copytree(data_dir, tmp_path / "tfds")
    (path,) = (tmp_path / "tfds").glob("digits/*/decoded/validation-image-*.npy")
    images = np.load(path)
    images[0, 0, 0] ^= 1
    np.save(path, images)
    (path,) = path.parent.glob("validation-checksums-*.npy")
    np.save(path, [zlib.crc32(images), *np.load(path)[1:]])
    own = {1: [f"--config.data.data_dir={tmp_path / 'tfds'}"]}
    for code, errors in job(2, tmp_path / "run", digits[1], own=own):
        assert code == 2, errors
        assert re.search(
            r"error: process 1 reads other data than process 0: "
            r".*'validation': \[185, \d+\]\} in process 0, .*\[185, \d+\]\} in process 1 ",
            errors,
        )
    assert not (tmp_path / "run").exists()


def test_all_processes_go_back_together_and_end_together_where_a_training_diverges(data_dir, tmp_path):
    config = tiny_config(data_dir)
    config.on_nonfinite = "rewind"
    config.optimizer.learning_rate = 1e3
    config.schedule.warmup_steps = 0
    config.checkpoint.every_steps = 1
    arguments = ["--config=configs/lenet5_digits.py", *flags_of(config, lenet5_digits.get_config())]
    for code, errors in job(2, tmp_path, arguments):
        assert (code, "the run diverged at step" in errors) == (3, True), errors
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["seed_of_batches"] == loop.seed_of_batches(config.seed, [0] * loop.MAX_REWINDS, 0)
