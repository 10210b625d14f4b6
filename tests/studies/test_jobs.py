import gc
import multiprocessing.connection
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import weakref

import jax
import pytest

from cnn_cases import stopping
from cnn_cases.studies import jobs, plan
from cnn_cases.training import disk, processes, programs, provenance, runtime
from tests.studies.conftest import tiny_study

ROOT = pathlib.Path(__file__).parents[2]


def groups_of(data_dir, num_steps=4):
    study = tiny_study(data_dir, grid=(("optimizer.momentum", (0.0, 0.9)),), seeds=(0,))
    study.base.num_steps = num_steps
    return [[run] for run in plan.expand(study)]


def rows(workdir):
    return {path.parent.name: path.read_bytes() for path in workdir.glob("*/metrics.jsonl")}


@pytest.fixture(scope="module")
def one_after_another(data_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("here")
    return list(jobs.run_here(groups_of(data_dir), workdir)), rows(workdir)


def test_runs_side_by_side_are_those_one_after_another_to_the_bit(one_after_another, data_dir, tmp_path):
    ended, expected = one_after_another  # with as many threads, which tests/conftest.py sets
    names = [name for name, _ in jobs.run_side_by_side(groups_of(data_dir), tmp_path, 2)]
    assert sorted(names) == sorted(name for name, _ in ended)
    assert rows(tmp_path) == expected
    again = jobs.run_side_by_side(groups_of(data_dir), tmp_path, 2)
    assert all("(finished before)" in news for _, news in again)


def test_processes_side_by_side_take_memory_of_an_accelerator_as_they_need_it(monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "")  # restored afterwards
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE")
    jobs.share_accelerators()
    assert os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"


def test_processes_side_by_side_are_refused_on_a_tpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with pytest.raises(ValueError, match="cannot share a TPU; leave --jobs or --cluster=local out"):
        jobs.share_accelerators()


def test_a_group_that_has_ended_leaves_nothing_in_memory(data_dir, tmp_path, monkeypatch):
    feeds, make_program = [], programs.make_program

    def make(config, *_):
        program = make_program(config, jax.devices()[:1])
        feeds.append(weakref.ref(program.feed))
        return program

    monkeypatch.setattr(programs, "make_program", make)
    for _ in jobs.run_here(groups_of(data_dir), tmp_path):
        pass
    gc.collect()
    assert [feed() for feed in feeds] == [None, None]


class Telling:
    """Ends the process that gets it, with a message about its threads and where it keeps what it compiles."""

    def __reduce__(self):
        told = "f'{os.environ[\"PJRT_NPROC\"]} threads, {jax.config.jax_compilation_cache_dir}'"
        return exec, (f"import os, jax; raise ValueError({told})",)


def test_processes_share_the_cores(tmp_path, monkeypatch):
    monkeypatch.delenv("PJRT_NPROC")
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setattr(provenance, "cpu_threads", lambda: 6)
    place = tmp_path / f"compiled/{runtime._kind_of_cpu()}-3-threads"
    with pytest.raises(ValueError, match=f"^3 threads, {place}$"):
        list(jobs.run_side_by_side([[Telling()]], tmp_path, 2))


@pytest.mark.parametrize(
    ("variable", "value"),
    [("PJRT_NPROC", "5"), ("XLA_FLAGS", "--xla_force_host_platform_device_count=4")],
)
def test_the_users_threads_and_those_of_virtual_devices_are_left_alone(variable, value, monkeypatch):
    monkeypatch.delenv("PJRT_NPROC")
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.setattr(provenance, "cpu_threads", lambda: 6)
    assert [jobs._threads_each(number) for number in (1, 2, 4, 9)] == [6, 3, 1, 1]
    monkeypatch.setenv(variable, value)
    assert jobs._threads_each(2) is None


@pytest.mark.parametrize(
    ("num_devices", "num_jobs", "shares"),
    [
        (8, 8, [[0], [1], [2], [3], [4], [5], [6], [7]]),
        (8, 3, [[0, 1], [2, 3], [4, 5]]),
        (2, 3, [[0], [1], [0]]),
        (1, 2, [[0], [0]]),
    ],
)
def test_processes_share_accelerators(num_devices, num_jobs, shares):
    devices = list(range(num_devices))
    assert [processes.share_of(devices, index, num_jobs) for index in range(num_jobs)] == shares


def test_who_compiles_for_an_accelerator_may_use_all_threads(monkeypatch):
    monkeypatch.delenv("PJRT_NPROC")
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.setattr(jobs.jax, "default_backend", lambda: "gpu")
    assert jobs._threads_each(2) is None


@pytest.mark.parametrize("to_all", [False, True])  # a scheduler may signal the sweep's processes, too
def test_a_signal_saves_the_runs_of_all_processes(to_all, data_dir, tmp_path, monkeypatch):
    """And the same signal, when it comes once more as they save, does nothing."""
    first, second = groups_of(data_dir, num_steps=4)[0], groups_of(data_dir, num_steps=40_000)[1]
    second[0].config.evaluation.every_steps = second[0].config.checkpoint.every_steps = 40_000
    unfinished = tmp_path / second[0].name
    rows = unfinished / "metrics.jsonl"

    def stop_as_it_trains():
        for name, _ in jobs.run_side_by_side([second, first], tmp_path, 2):
            assert name == first[0].name
            while not (rows.exists() and rows.read_bytes()):
                time.sleep(0.05)
            for process in multiprocessing.active_children() * 30 if to_all else ():
                os.kill(process.pid, signal.SIGTERM)
                time.sleep(0.003)
            os.kill(os.getpid(), signal.SIGTERM)

    kind = multiprocessing.context.SpawnProcess
    terminate = kind.terminate

    def terminate_and_signal(process):
        terminate(process)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(kind, "terminate", terminate_and_signal)
    came = []
    before = signal.signal(signal.SIGTERM, lambda *_: came.append("too early"))
    try:
        with pytest.raises(stopping.InterruptedRun, match="SIGTERM: the current runs were saved"):
            stop_as_it_trains()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not came
    assert not (unfinished / "result.json").exists()
    assert any((unfinished / "checkpoints").iterdir())


def test_ctrl_c_in_a_terminal_ends_processes_that_are_still_starting(data_dir, tmp_path):
    command = [sys.executable, "-m", "cnn_cases.studies.sweep", "--config=configs/studies/seeds.py"]
    command += ["--config.seeds=(0, 1)", f"--workdir={tmp_path}", "--jobs=2"]
    command += [f"--config.base.data.data_dir={data_dir}"]
    sweep = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    children = pathlib.Path(f"/proc/{sweep.pid}/task/{sweep.pid}/children")
    while len(children.read_text().split()) < 3:  # one of them tracks what the others share
        assert sweep.poll() is None
        time.sleep(0.01)
    time.sleep(0.5)
    os.killpg(sweep.pid, signal.SIGINT)
    _, errors = sweep.communicate()
    assert (sweep.returncode, errors) == (130, "SIGINT: the current runs were saved; start again to resume\n")


def test_runs_of_a_parent_that_was_killed_are_saved_and_end(data_dir, tmp_path):
    code = f"""
import pathlib
from cnn_cases.studies import jobs
from tests.studies.test_jobs import groups_of

if __name__ == "__main__":
    groups = groups_of({data_dir!r}, num_steps=40_000)[:1]
    list(jobs.run_side_by_side(groups, pathlib.Path({str(tmp_path)!r}), 1))
"""
    script = tmp_path / "sweep.py"
    script.write_text(code)
    run_dir = tmp_path / groups_of(data_dir)[0][0].name
    parent = subprocess.Popen([sys.executable, script], env=os.environ | {"PYTHONPATH": str(ROOT)})
    while not (run_dir / "metrics.jsonl").exists() or not (run_dir / "metrics.jsonl").read_bytes():
        assert parent.poll() is None
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while True:
        try:
            with disk.lock(run_dir):
                break
        except ValueError:
            assert time.monotonic() < deadline, "the run goes on"
            time.sleep(0.1)
    assert any((run_dir / "checkpoints").iterdir())


class SlowToTell:
    """A group whose process does not come back from telling what its run gave."""

    def __init__(self, runs):
        self.runs = runs

    def __reduce__(self):
        return slow_to_tell, (self.runs,)


def slow_to_tell(runs):
    """To be called in a process of the sweep."""
    tell = multiprocessing.connection.Connection._send_bytes

    def tell_and_wait(*arguments):
        tell(*arguments)
        time.sleep(600)

    multiprocessing.connection.Connection._send_bytes = tell_and_wait
    return runs


@pytest.mark.parametrize("group", [list, SlowToTell])
def test_a_run_that_could_not_be_saved_at_a_signal_is_told(group, data_dir, tmp_path):
    first, second = groups_of(data_dir, num_steps=4)[0], groups_of(data_dir, num_steps=40_000)[1]
    second[0].config.evaluation.every_steps = second[0].config.checkpoint.every_steps = 40_000
    run_dir = tmp_path / second[0].name

    def stop_without_a_place_to_save():
        for _ in jobs.run_side_by_side([second, group(first)], tmp_path, 2):
            while not (run_dir / "metrics.jsonl").exists():
                time.sleep(0.1)
            shutil.rmtree(run_dir)
            run_dir.write_text("in the way")
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(ValueError, match=str(run_dir)):
        stop_without_a_place_to_save()


def test_groups_that_nobody_takes_any_more_hold_nobody_up(tmp_path):
    code = """
import os, pathlib, sys
from cnn_cases.studies import jobs

class Deadly:
    def __reduce__(self):
        return os._exit, (7,)

groups = [[Deadly()], *(["more than a pipe holds" * 10_000] for _ in range(3))]
try:
    list(jobs.run_side_by_side(groups, pathlib.Path(sys.argv[1]), 1))
except ChildProcessError as error:
    print(error)
"""
    command = [sys.executable, "-c", code, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout == "a process of the sweep died with exit code 7; start again to resume\n", done.stderr


def test_a_run_that_is_not_possible_ends_the_others(data_dir, tmp_path):
    good, bad = groups_of(data_dir, num_steps=40_000)[0], groups_of(data_dir)[1]
    bad[0].config.batch_size = 25
    with pytest.raises(ValueError, match="batch_size = 25 cannot be split evenly over 4 devices"):
        list(jobs.run_side_by_side([good, bad], tmp_path, 2))


@pytest.mark.parametrize(
    ("end", "kind", "message"),
    [
        ((os._exit, (7,)), ChildProcessError, "died with exit code 7; start again"),
        (
            (signal.raise_signal, (signal.SIGKILL,)),
            ChildProcessError,
            "exit code -9, perhaps for lack of memory",
        ),
        ((divmod, (1, 0)), RuntimeError, "a process of the sweep failed, see above"),
    ],
)
def test_the_death_of_a_process_is_told(end, kind, message, tmp_path):
    class Deadly:
        def __reduce__(self):
            return end

    with pytest.raises(kind, match=message):
        list(jobs.run_side_by_side([[Deadly()]], tmp_path, 1))
