"""A step that went wrong is done again, and the line that made it wrong is named."""

import math
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import pytest

from cnn_cases import replay, stopping
from cnn_cases.data.resident import ResidentFeed
from cnn_cases.models import lenet
from cnn_cases.training import logbook, loop, programs
from configs import nin_digits
from tests.conftest import example_of_step, poisoned, stop_after, tiny_config


@pytest.fixture(autouse=True, scope="module")
def one_device():
    """As a machine with a single one; the tests' have four."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
        yield


@pytest.fixture(scope="module")
def diverged(data_dir, tmp_path_factory):
    """A workdir whose run diverged for real, at step 3, with a checkpoint of each step."""
    workdir, config = tmp_path_factory.mktemp("diverged"), tiny_config(data_dir)
    config.optimizer.learning_rate = 1e3
    config.schedule.warmup_steps = 0
    config.log_every_steps = config.checkpoint.every_steps = 1
    with pytest.raises(loop.DivergedError) as caught:
        loop.train_and_evaluate(config, workdir, show_progress=False)
    return workdir, caught.value


def test_the_step_is_done_again_and_the_line_is_named(diverged):
    workdir, error = diverged
    again = replay.replay(workdir)
    assert (again.step, again.first) == (error.step, error.step - 1)
    assert f"loss {again.metrics['loss']}, error" in str(error)
    assert len(again.examples) == 24
    head, *_, last = again.culprit.splitlines()
    assert head in ("the first infinite number came from", "the first NaN came from")
    assert last.startswith("cnn_cases/")


def test_a_step_that_came_after_the_end_is_refused(diverged):
    with pytest.raises(ValueError, match=r"step = 4 was never reached: .* diverged at step 3"):
        replay.replay(diverged[0], 4)


def test_a_step_before_it_has_the_figures_of_the_run(diverged):
    workdir, _ = diverged
    again = replay.replay(workdir, 2)
    row = next(row for row in logbook.read_rows(workdir / "metrics.jsonl") if row["step"] == 2)
    assert again.metrics["loss"] == row["running/loss"]
    assert again.culprit is None


def test_a_nan_of_the_network_itself_is_traced_to_its_line(config, tmp_path, monkeypatch):
    loop.train_and_evaluate(config, tmp_path, show_progress=False)
    monkeypatch.setattr(lenet, "relu", lambda x: jnp.log(-1 - jnp.square(x)))
    again = replay.replay(tmp_path, 9)  # before the next step, the parameters themselves are NaN
    assert again.first == 8
    head, *_, last = again.culprit.splitlines()
    assert head == "the first NaN came from"
    assert last.startswith("cnn_cases/models/lenet.py:")
    assert "relu(" in last


def test_the_padding_of_a_max_pooling_is_not_the_first_infinite_number(data_dir, tmp_path, monkeypatch):
    config = nin_digits.get_config()
    config.data.data_dir = data_dir
    config.num_steps = config.evaluation.every_steps = config.checkpoint.every_steps = 1
    config.schedule.warmup_steps = 0
    config.batch_size = 8
    loop.train_and_evaluate(config, tmp_path, show_progress=False)
    make_loss = programs.make_loss

    def make_large_loss(**settings):
        loss = make_loss(**settings)
        return lambda logits, label: 1e30 * loss(logits, label)

    monkeypatch.setattr(programs, "make_loss", make_large_loss)
    again = replay.replay(tmp_path, 1)
    assert math.isfinite(again.metrics["loss"])
    assert math.isinf(again.metrics["grad_norm"])
    head, *_, last = again.culprit.splitlines()
    assert head == "the first infinite number came from"
    assert last.startswith("cnn_cases/training/steps.py:")
    assert "tx.update(" in last  # Adam squares the gradient


def test_a_replay_with_other_data_is_refused(config, tmp_path, monkeypatch):
    loop.train_and_evaluate(config, tmp_path, show_progress=False)
    monkeypatch.setattr(ResidentFeed, "fingerprint", lambda _: {"train": [7, 8]})
    with pytest.raises(ValueError, match=r"other data: data\.splits\.train was .* then and is \[7, 8\] now"):
        replay.replay(tmp_path, 10)


def test_a_step_around_rewinds_has_the_batches_of_its_seed(config, tmp_path, monkeypatch):
    config.on_nonfinite, config.log_every_steps, config.checkpoint.keep_last = "rewind", 1, 9
    example = example_of_step(programs.make_program(config), config.seed, [7])
    program = poisoned(config, monkeypatch, example)
    stopped = stop_after(program, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))  # saves, and leaves
    with pytest.raises(stopping.InterruptedRun):
        loop.train_and_evaluate(config, tmp_path, program=stopped, show_progress=False)
    assert loop.train_and_evaluate(config, tmp_path, program=program, show_progress=False)["nonfinite"] == [7]
    rows = {row["step"]: row for row in logbook.read_rows(tmp_path / "metrics.jsonl")}
    monkeypatch.setattr(programs, "make_program", lambda *_: program)  # which is compiled already
    for deleted in ((), (6,), (4, 8)):  # at 6 the seed changes, whether that checkpoint is still there or not
        for step in deleted:
            shutil.rmtree(tmp_path / f"checkpoints/{step}")
        for step in (5, 6, 7, 10):
            assert replay.replay(tmp_path, step).metrics["loss"] == rows[step]["running/loss"]
    shutil.rmtree(tmp_path / "checkpoints/12")
    with pytest.raises(ValueError, match=r"step = 6: .* may have gone back, .* of step 6 or later to tell"):
        replay.replay(tmp_path, 6)


def test_a_damaged_checkpoint_does_not_hinder_who_does_not_need_it(config, tmp_path):
    loop.train_and_evaluate(config, tmp_path, show_progress=False)
    (tmp_path / "checkpoints/12/extra/metadata").write_text("{}")
    assert replay.replay(tmp_path, 10).first == 8


def test_a_step_that_is_none_is_refused(config, tmp_path):
    config.num_steps = config.evaluation.every_steps = config.checkpoint.every_steps = 3
    loop.train_and_evaluate(config, tmp_path, show_progress=False)
    with pytest.raises(ValueError, match="did not diverge: name a step"):
        replay.replay(tmp_path)
    for step in (0, 4):
        with pytest.raises(ValueError, match=f"step = {step} must be between 1 and num_steps = 3"):
            replay.replay(tmp_path, step)


def test_a_damaged_environment_hinders_no_replay_of_steps_after_a_checkpoint(config, tmp_path, caplog):
    loop.train_and_evaluate(config, tmp_path, show_progress=False)
    (tmp_path / "environment.json").write_text("{")
    assert replay.replay(tmp_path, 10).first == 8
    assert "The code and data may differ from the run's" in caplog.text


@pytest.mark.parametrize(("together", "told"), [(True, False), (False, True)])
def test_a_replay_on_another_number_of_devices_is_told(together, told, config, tmp_path, caplog):
    config.sync_batch_norm = together
    program = programs.make_program(config, jax.devices())
    loop.train_and_evaluate(config, tmp_path, program=program, show_progress=False)
    replay.replay(tmp_path, 10)
    assert ("number of devices has changed since the last start: 4 then, 1 now" in caplog.text) == told
