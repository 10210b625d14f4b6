"""The command line as its user meets it."""

import gc
import json
import multiprocessing
import os
import pathlib
import re
import runpy
import signal
import subprocess
import sys
import time

import jax
import pytest

from cnn_cases import command
from cnn_cases.training import runtime

ROOT = pathlib.Path(__file__).parent.parent
SHORT = [
    "--config=configs/lenet5_digits.py",
    "--config.data.image_size=16",
    "--config.num_steps=8",
    "--config.batch_size=8",
    "--config.schedule.warmup_steps=0",
    "--config.evaluation.every_steps=4",
    "--config.checkpoint.every_steps=4",
    "--config.log_every_steps=4",
    "--config.evaluation.batch_size=400",
]


def start(workdir, *arguments):
    words = [sys.executable, "train.py", f"--workdir={workdir}", *arguments]
    return subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )


def train(workdir, *arguments):
    """Exit code and error output."""
    process = start(workdir, *arguments)
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


# Its processes are forks of one that has done the imports: nothing else takes long until a mistake is told.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["cnn_cases.command"])


def run_here(arguments, errors):
    """train.py in this process, with the file `errors` for its error output."""
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
    sys.argv = ["train.py", *arguments]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


def refused(directory, *arguments):
    """The error output of a start in `directory` that a mistake ends, and that leaves nothing behind."""
    workdir, errors = directory / "run", directory / "errors"
    if not any(one.startswith("--workdir=") for one in arguments):
        arguments = [f"--workdir={workdir}", *arguments]
    process = FORKS.Process(target=run_here, args=(arguments, errors))
    process.start()
    process.join()
    text = errors.read_text()
    assert process.exitcode == 2, text
    assert "Traceback" not in text
    assert not workdir.exists()
    return text


def test_a_network_is_trained_to_the_same_bits_again_and_the_second_start_finds_it_trained(tmp_path):
    workdir, twin = tmp_path / "run", tmp_path / "twin"
    beside = start(twin, *SHORT, "--deterministic")  # of no effect on a CPU, where XLA must know it
    code, errors = train(workdir, *SHORT)
    assert code == 0, errors
    assert "step 4/8: validation/loss" in errors
    assert json.loads((workdir / "result.json").read_text())["step"] == 8
    before = (workdir / "metrics.jsonl").read_bytes()
    _, errors = beside.communicate(timeout=300)
    assert beside.returncode == 0, errors
    assert (twin / "metrics.jsonl").read_bytes() == before
    code, errors = train(workdir, *SHORT)
    assert (code, errors.count("\n")) == (0, 1)
    assert f"{workdir}: finished before, train/loss" in errors
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_sigterm_saves_and_the_next_start_goes_on(tmp_path):
    long = [*SHORT, "--config.num_steps=4000", "--config.checkpoint.every_steps=0"]
    process = start(tmp_path, *long)
    rows = tmp_path / "metrics.jsonl"
    while process.poll() is None and not (rows.exists() and rows.read_bytes()):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 143, errors
    assert "epochs, on 4 x cpu, 4 steps per call" in errors
    assert "SIGTERM: saved after step" in errors
    saved = int(errors.split("saved after step ")[1].split(";")[0])
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [str(saved)]
    process = start(tmp_path, *long)
    line = process.stderr.readline()
    process.kill()
    process.communicate()
    assert f"resuming after step {saved}" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.optimizer.lr=3"], "optimizer.lr=3: there is no such key; known: optimizer.clip_norm, "),
        (
            ["--config", "configs/lenet5_digits.py", "--config.optimiser.name=sgd"],
            "^error: --config.optimiser.name=sgd: there is no such key; did you mean optimizer.name",
        ),
        (["--config.optimiser.name=sgd"], "name=sgd: there is no such key; did you mean optimizer.name?"),
        (
            ["--config.optimizer.momentum=0", "--config.momentum=0.5"],
            "--config.momentum=0.5: there is no such key; did you mean optimizer.momentum?",
        ),
        (
            ["--config.model=vgg"],
            "--config.model=vgg: config.model is a group of keys; did you mean --config.mod",
        ),
        (["--config.num_steps=many"], "--config.num_steps=many: must be an int$"),
        (["--config.optimizer.learning_rate=fast"], "learning_rate=fast: must be a float$"),
        (["--config.sync_batch_norm=yes"], "--config.sync_batch_norm=yes: must be true or false$"),
        (
            [SHORT[0], "--config=configs/resnet_digits.py", "--config.seed=3"],
            r"error: --config is given more than once: --config=configs/lenet5_digits.py --config=\S+$",
        ),
        (
            ["--workdir=here", "--workdir", "there"],
            r"error: --workdir is given more than once: --workdir=here --workdir$",
        ),
        (  # a second tuple would be added to the first; a second number replaces the first
            [
                "--config.optimizer.frozen=conv1",
                "--config.seed=1",
                "--config.seed=2",
                "--config.optimizer.frozen=()",
            ],
            r"error: --config.optimizer.frozen is given more than once: --config\S+=conv1 --config\S+=\(\)$",
        ),
        (
            ["--config=configs/lenet5_digits.py:all"],
            "=configs/lenet5_digits.py has no choices, such as 'all'$",
        ),
        (["--config=configs"], "--config=configs is a directory, not a file$"),
        (
            ["--config.data.name=mnist"],
            "data.name = 'mnist' is not prepared in .*make data DATASET=mnist",
        ),
        (["num_steps=4"], "error: unexpected arguments: num_steps=4"),
        (["--workdir="], "error: --workdir= names no directory"),
        (["--workdir=~/a*b"], rf"error: workdir = {re.escape(str(pathlib.Path.home()))}/a\*b: .* have no \*"),
        (
            ["--config=configs/lenet5_mnist.py:all"],
            "training_set = 'all' is unknown; known: held_out, full_train",
        ),
        (["--config=configs/nope.py"], r"error: --config: No such file .*: 'configs/nope.py', seen from /"),
        (["--config.optimizer=3"], "error: --config.optimizer=3: config.optimizer is a group of keys"),
        (["--config.num_steps.x=3"], "num_steps.x=3: there is no such key; did you mean num_steps?"),
        (["--config.schedule.factors=(0.1,'x')"], r"schedule.factors = \(0.1, 'x'\) .*a tuple of floats"),
    ],
)
def test_a_mistake_is_answered_by_one_message(arguments, message, tmp_path):
    own = [one for one in arguments if one.startswith("--config=")]
    if "--config" in arguments:
        own, arguments = arguments[:2], arguments[2:]
    others = [one for one in arguments if one not in own]
    errors = refused(tmp_path, *(own or SHORT[:1]), *SHORT[1:], *others)
    assert re.search(message, errors, re.MULTILINE), errors


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "c.py: module .* has no attribute 'get_config'"),
        ("raise RuntimeError('oh\\nno')", "c.py, line 1: RuntimeError: oh no"),
        ("get_config = lambda: int('ten')", r"invalid literal for int\(\) with base 10: 'ten'"),
        ("def get_config():\n    return 1 / 0", "c.py, line 2: ZeroDivisionError: division by zero"),
        ("def get_config(:", "c.py, line 1: SyntaxError"),
        (
            "import subprocess\nget_config = lambda: subprocess.check_output(['false'])",
            r"c.py, line 2: CalledProcessError: Command .*'false'.* returned non-zero",
        ),
        (
            "import json\nget_config = lambda: json.loads('{1}')",
            "c.py, line 2: JSONDecodeError: Expecting property name",
        ),
        (
            "get_config = lambda: b'\\xff'.decode()",
            "c.py, line 1: UnicodeDecodeError: 'utf-8' codec can't decode byte",
        ),
        ("from configs import common\nget_config = lambda: common.get_config().nope", "c.py, line 2: .*nope"),
        (
            "get_config = lambda: {'num_steps': 1}",
            r"config = \{'num_steps': 1\} \(dict\) must be a ConfigDict",
        ),
        ("get_config = lambda: None", "get_config.. returned None"),
    ],
)
def test_a_mistake_in_a_config_file_is_answered_by_one_message(text, message, tmp_path):
    (tmp_path / "c.py").write_text(text)
    errors = refused(tmp_path, f"--config={tmp_path / 'c.py'}")
    assert sum(line.startswith("error: ") for line in errors.splitlines()) == 1
    assert re.search(message, errors), errors


def help_here(output):
    """The depth study's --help, written to the file `output`."""
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), sys.stdout.fileno())
    sys.argv = ["depth_curves", "--help"]
    runpy.run_module("cnn_cases.studies.depth_curves", run_name="__main__", alter_sys=True)


def test_help_has_the_flags_of_all_modules_and_is_no_error(tmp_path):
    process = FORKS.Process(target=help_here, args=(tmp_path / "help",))
    process.start()
    process.join()
    text = (tmp_path / "help").read_text()
    assert process.exitcode == 0
    assert "Plain against residual nets" in text
    assert re.findall(r"--(?:\[no\])?(figures_only|jobs|cluster|deterministic):", text) == [
        *("cluster", "deterministic", "figures_only", "jobs")
    ]


def settings_here(output, arguments):
    """What a command finds set before it computes, written to the file `output`."""

    def main():
        found = os.environ["XLA_FLAGS"].split(), jax.config.jax_compilation_cache_dir, gc.get_threshold()[0]
        output.write_text(json.dumps(found))

    os.environ["XLA_FLAGS"] = ""
    sys.argv = ["command", *arguments]
    command.run(main)


@pytest.mark.parametrize(
    ("arguments", "added"), [([], []), (["--deterministic"], ["--xla_gpu_deterministic_ops=true"])]
)
def test_a_command_sets_up_its_process_before_it_computes(arguments, added, tmp_path, monkeypatch):
    process = FORKS.Process(target=settings_here, args=(tmp_path / "found", arguments))
    process.start()
    process.join()
    flags, cache, threshold = json.loads((tmp_path / "found").read_text())
    monkeypatch.setenv("XLA_FLAGS", "")
    runtime.choose_cpu_flags()
    assert flags == [*os.environ["XLA_FLAGS"].split(), *added]
    assert cache == jax.config.jax_compilation_cache_dir
    assert cache.endswith("-16-threads")
    assert threshold == 50_000


def test_a_diverged_run_has_an_exit_code_of_its_own(tmp_path):
    code, errors = train(tmp_path, *SHORT, "--config.optimizer.learning_rate=1e20")
    assert (code, "diverged at step" in errors) == (3, True)
    assert "Traceback" not in errors
