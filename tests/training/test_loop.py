"""The whole way, on real digits: what a run gives, and that stopping it anywhere changes nothing."""

import copy
import gzip
import itertools
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from ml_collections import ConfigDict

from cnn_cases import models, stopping
from cnn_cases.data import order
from cnn_cases.models import layers
from cnn_cases.training import checkpoint, devices, logbook, loop, predictions, programs, running
from configs import resnet_digits
from tests.conftest import example_of_step, interrupt, metrics_of, poisoned, stop_after, tiny_config


def run(config, workdir, program=None):
    return loop.train_and_evaluate(config, workdir, program=program, show_progress=False)


def rows(workdir):
    return logbook.read_rows(workdir / "metrics.jsonl")


def last_state(workdir, program):
    """The state of the newest checkpoint."""
    like = program.init_state(0)
    checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", 1)
    try:
        return checkpoints.restore(like)[1]
    finally:
        checkpoints.close()


@pytest.fixture(scope="module")
def program(data_dir):
    """Of the config `config`, compiled once for all tests."""
    return programs.make_program(tiny_config(data_dir), jax.devices()[:1])


def test_a_run_learns_and_leaves_its_figures(config, tmp_path, program):
    result = run(config, tmp_path, program)
    assert result["status"] == "finished"
    assert set(result["metrics"]) == {
        f"{split}/{name}" for split in ("train", "validation", "test") for name in ("loss", "error")
    }
    losses = [row["running/loss"] for row in rows(tmp_path) if "running/loss" in row]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    evaluated = [row["step"] for row in rows(tmp_path) if "validation/error" in row]
    assert evaluated == [4, 8, 12]
    assert {**rows(tmp_path)[-1], "step": None} == {**result["metrics"], "step": None}


def test_a_run_compiles_its_steps_and_no_program_for_each_shape(config, tmp_path, caplog):
    config.data.image_size = 18  # which no other test has, so that nothing is compiled already
    with jax.log_compiles():
        run(config, tmp_path)
    compiled = re.findall(r"Finished XLA compilation of (\S+)", caplog.text)
    assert 4 <= len(compiled) <= 6, compiled  # initial values, learning rate, training, evaluation


def test_what_a_row_needs_waits_for_no_later_step(config, tmp_path):
    # On one device, calls are ahead of what is read.
    program = programs.make_program(config, jax.devices()[:1])
    calls = []

    def train(state, *others):
        calls.append(("train", int(state.step) + 1))
        return program.train(state, *others)

    def schedule(step):
        calls.append(("rate", step + 1))
        return program.schedule(step)

    run(config, tmp_path, program._replace(train=train, schedule=schedule))
    rates = [index for index, (what, _) in enumerate(calls) if what == "rate"]
    assert [calls[index][1] for index in rates] == [3, 6, 9, 12]
    assert all(calls[index - 1] == ("train", calls[index][1]) for index in rates)


@pytest.mark.parametrize(
    ("steps_per_call", "expected"), [(1, "d" + "sd" * 2 + "sdr" * 9 + "srrr"), (2, "dd" + "sddr" * 5 + "sr")]
)
def test_calls_are_sent_ahead_unless_they_are_long_and_batches_always_drawn_ahead(
    steps_per_call, expected, config, tmp_path, monkeypatch
):
    config.steps_per_call = steps_per_call
    config.log_every_steps = config.evaluation.every_steps = config.checkpoint.every_steps = config.num_steps
    program = programs.make_program(config, jax.devices()[:1])
    done = []  # batches that are drawn, calls that are sent, calls whose metrics are read

    def noting(what, function):
        def noted(*arguments):
            done.append(what)
            return function(*arguments)

        return noted

    monkeypatch.setattr(order, "places_in_order", noting("d", order.places_in_order))
    monkeypatch.setattr(running.RunningMetrics, "add", noting("r", running.RunningMetrics.add))
    run(config, tmp_path, program._replace(train=noting("s", program.train)))
    assert "".join(done) == expected


def test_a_finished_run_without_its_config_is_nobodys(config, tmp_path, program):
    run(config, tmp_path, program)
    (tmp_path / "config.json").unlink()
    config.optimizer.momentum = 0.5
    with pytest.raises(ValueError, match=r"holds metrics\.jsonl, but no config\.json"):
        run(config, tmp_path, program)
    assert not (tmp_path / "config.json").exists()


def test_a_finished_run_is_not_run_again(config, tmp_path, program):
    first = run(config, tmp_path, program)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    assert run(config, tmp_path, program) == first
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.fixture(scope="module")
def unbroken(data_dir, tmp_path_factory, program):
    """The workdir of a run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("unbroken")
    run(tiny_config(data_dir), workdir, program)
    return workdir


class KilledError(BaseException):
    """Stands for SIGKILL: nothing in the loop may handle it."""


def kill():
    raise KilledError


def test_the_seed_is_that_of_the_initial_values_and_of_the_batches(config, tmp_path, program):
    config.seed = 5

    def train(state, _arrays, batches):
        seen.update(state=jax.device_get(state), index=np.asarray(batches["index"]))
        raise KilledError

    seen = {}
    with pytest.raises(KilledError):
        run(config, tmp_path, program._replace(train=train))
    assert seen["state"].seed == 5
    jax.tree.map(np.testing.assert_array_equal, seen["state"].params, program.init_state(5).params)
    batch = next(program.feed.train_batches(5, 0))
    np.testing.assert_array_equal(seen["index"].ravel(), batch["index"])
    kernels = [program.init_state(seed).params["conv1"]["kernel"] for seed in (0, 5)]
    assert not np.array_equal(*kernels)


@pytest.mark.parametrize("steps", [1, 4, 5, 7, 8, 11])
def test_a_killed_and_resumed_run_is_the_unbroken_run_to_the_bit(steps, config, tmp_path, program, unbroken):
    with pytest.raises(KilledError):
        run(config, tmp_path / "killed", stop_after(program, steps, kill))
    run(config, tmp_path / "killed", program)
    assert (tmp_path / "killed/metrics.jsonl").read_bytes() == (unbroken / "metrics.jsonl").read_bytes()
    states = [last_state(workdir, program) for workdir in (tmp_path / "killed", unbroken)]
    jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("steps", [2, 5, 8])
def test_a_signal_saves_at_once_and_changes_nothing(number, steps, config, tmp_path, program, unbroken):
    stopped = stop_after(program, steps, lambda: os.kill(os.getpid(), number))
    handlers = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(stopping.InterruptedRun, match=f"{number.name}: saved after step {steps}") as caught:
        run(config, tmp_path / "stopped", stopped)
    assert caught.value.signal_number == number
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert last_state(tmp_path / "stopped", program).step == steps
    run(config, tmp_path / "stopped", program)
    assert (tmp_path / "stopped/metrics.jsonl").read_bytes() == (unbroken / "metrics.jsonl").read_bytes()
    states = [last_state(workdir, program) for workdir in (tmp_path / "stopped", unbroken)]
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_a_signal_counts_once_and_a_later_one_acts_as_ever(monkeypatch):
    acts, now = [], [10.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[-1])
    before = signal.signal(signal.SIGTERM, lambda number, _: acts.append(number))
    try:
        with stopping.stop_signals() as stop:
            for after in (0, stopping.SAME_SIGNAL_SECONDS / 2, stopping.SAME_SIGNAL_SECONDS):
                assert not acts
                now.append(10.0 + after)
                signal.raise_signal(signal.SIGTERM)
                assert stop.number == signal.SIGTERM
        assert acts == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_blocked_signals_are_those_of_before_even_after_an_error():
    def mask():
        return signal.pthread_sigmask(signal.SIG_BLOCK, ())

    def fail():
        assert mask() == {signal.SIGINT, signal.SIGUSR2}
        raise OSError("no process")

    with stopping.blocked(signal.SIGUSR2):
        with pytest.raises(OSError, match="no process"), stopping.blocked(signal.SIGINT, signal.SIGUSR2):
            fail()
        assert mask() == {signal.SIGUSR2}
    assert not mask()


@pytest.mark.parametrize("step", [4, 8, 12])
def test_a_signal_during_an_evaluation_ends_it_and_changes_nothing(step, config, tmp_path, program, unbroken):
    evaluated = []

    def evaluate(state, arrays, batch):
        evaluated.append(int(state.step))
        if evaluated[-1] == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return program.evaluate(state, arrays, batch)

    with pytest.raises(stopping.InterruptedRun, match=f"SIGTERM: saved after step {step}"):
        run(config, tmp_path, program._replace(evaluate=evaluate))
    assert evaluated.count(step) == 1  # there are more batches, and more splits
    assert last_state(tmp_path, program).step == step
    expected = json.loads((unbroken / "result.json").read_text())["metrics"]
    assert run(config, tmp_path, program)["metrics"] == expected
    assert (tmp_path / "metrics.jsonl").read_bytes() == (unbroken / "metrics.jsonl").read_bytes()
    jax.tree.map(np.testing.assert_array_equal, last_state(tmp_path, program), last_state(unbroken, program))
    errors, expected = (checkpoint._errors(workdir / "checkpoints") for workdir in (tmp_path, unbroken))
    assert [errors[one] for one in (8, 12)] == [expected[one] for one in (8, 12)]


def test_a_checkpoint_that_only_a_signal_made_is_never_the_best(config, tmp_path, program):
    config.evaluation.every_steps, config.checkpoint.every_steps, config.checkpoint.keep_last = 2, 4, 9

    def evaluate(state, arrays, batch):
        if int(state.step) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return program.evaluate(state, arrays, batch)

    with pytest.raises(stopping.InterruptedRun, match="saved after step 2"):
        run(config, tmp_path, program._replace(evaluate=evaluate))
    run(config, tmp_path, program)
    assert checkpoint.steps(tmp_path / "checkpoints") == [2, 4, 8, 12]
    assert list(checkpoint._errors(tmp_path / "checkpoints")) == [4, 8, 12]


def test_a_signal_during_an_evaluation_is_not_lost(config, tmp_path, program):
    def evaluate(state, arrays, batch):
        os.kill(os.getpid(), signal.SIGTERM)
        return program.evaluate(state, arrays, batch)

    config.checkpoint.every_steps = 0
    program_4 = programs.make_program(config, jax.devices()[:1])._replace(evaluate=evaluate)
    with pytest.raises(stopping.InterruptedRun, match="saved after step 4"):
        run(config, tmp_path, program_4)
    assert last_state(tmp_path, program).step == 4


def test_a_prediction_can_be_ended_on_the_way(program):
    state = program.init_state(0)
    calls = itertools.count(1)

    def check_stop():
        if next(calls) == 3:
            raise KilledError

    with pytest.raises(KilledError):
        programs.predict(program, state, "test", "single", batch_size=200, check_stop=check_stop)
    assert next(calls) == 4  # there are more examples


def test_a_kill_between_the_last_checkpoint_and_the_result_loses_nothing(config, tmp_path, program):
    first = run(config, tmp_path, program)
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "result.json").unlink()
    assert run(config, tmp_path, program)["metrics"] == first["metrics"]
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics


def test_a_damaged_checkpoint_costs_only_the_steps_after_the_one_before(
    config, tmp_path, program, unbroken, caplog
):
    with pytest.raises(KilledError):
        run(config, tmp_path / "killed", stop_after(program, 10, kill))
    for file in (tmp_path / "killed/checkpoints/8/state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with caplog.at_level(logging.WARNING, "cnn_cases"):
        run(config, tmp_path / "killed", program)
    assert "checkpoint 8 is damaged" in caplog.text
    assert "resuming from step 4" in caplog.text
    assert (tmp_path / "killed/metrics.jsonl").read_bytes() == (unbroken / "metrics.jsonl").read_bytes()


def test_a_run_whose_last_save_failed_is_not_finished(config, tmp_path, program, unbroken, monkeypatch):
    before = checkpoint._checksums

    def full(directory):
        if directory.name.startswith("12."):
            raise OSError("no space left")
        return before(directory)

    monkeypatch.setattr(checkpoint, "_checksums", full)
    with pytest.raises(
        OSError, match=r"step 12 could not be saved .* the latest checkpoint is that of step 8"
    ):
        run(config, tmp_path / "full", program)
    assert not (tmp_path / "full/result.json").exists()
    monkeypatch.undo()
    run(config, tmp_path / "full", program)
    assert (tmp_path / "full/metrics.jsonl").read_bytes() == (unbroken / "metrics.jsonl").read_bytes()
    states = [last_state(workdir, program) for workdir in (tmp_path / "full", unbroken)]
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_deleted_checkpoints_do_not_make_a_run_start_anew(config, tmp_path, program):
    with pytest.raises(KilledError):
        run(config, tmp_path, stop_after(program, 6, kill))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(
        ValueError, match=r"no checkpoint is left in .*, though one of step 4 was saved there"
    ):
        run(config, tmp_path, program)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("missing", [("rewound_to", "evaluated"), ("rows",)])
def test_a_checkpoint_of_older_code_is_refused_in_one_line(missing, config, tmp_path, program, monkeypatch):
    as_dict = loop.Extra._asdict

    def as_older_code_did(extra):
        return {key: value for key, value in as_dict(extra).items() if key not in missing}

    monkeypatch.setattr(loop.Extra, "_asdict", as_older_code_did)
    with pytest.raises(KilledError):
        run(config, tmp_path, stop_after(program, 6, kill))
    before = {path: path.read_bytes() for path in tmp_path.glob("*.json*")}
    with pytest.raises(ValueError, match=f"step 4 was saved by older code, without {', '.join(missing)}:"):
        run(config, tmp_path, program)
    assert {path: path.read_bytes() for path in tmp_path.glob("*.json*")} == before


def test_names_of_splits_that_would_leave_the_workdir_are_refused(config):
    with config.unlocked():
        config.data.splits["/x"] = "test"
    with pytest.raises(ValueError, match=r"data.splits names '/x'; such a name must be a word"):
        programs.make_program(config)


def test_several_steps_a_call_give_the_same_run(config, tmp_path, unbroken):
    config.steps_per_call = 2
    config.log_every_steps = 4
    config.evaluation.every_steps = 4
    program = programs.make_program(config, jax.devices()[:1])
    run(config, tmp_path / "scanned", program)
    ours, theirs = last_state(tmp_path / "scanned", program), last_state(unbroken, program)
    assert ours.step == theirs.step
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), ours.params, theirs.params)


def test_a_run_goes_on_where_a_call_does_other_numbers_of_steps(config, tmp_path, program, unbroken):
    config.checkpoint.every_steps = 3
    config.log_every_steps = 4
    with pytest.raises(KilledError):
        run(config, tmp_path, stop_after(program, 5, kill))
    result = run(config, tmp_path, program._replace(steps_per_call=4))  # steps 4, 5 to 8 and 9 to 12
    assert result["step"] == 12
    assert result["metrics"]["test/error"] < 1
    assert [row["step"] for row in rows(tmp_path) if "running/loss" in row] == [4, 8, 12]
    ours, theirs = last_state(tmp_path, program), last_state(unbroken, program)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), ours.params, theirs.params)


def test_an_open_number_of_steps_a_call_goes_by_the_device_and_the_intervals(config):
    config.steps_per_call = 0
    config.num_steps, config.log_every_steps = 64_000, 100
    config.evaluation.every_steps, config.checkpoint.every_steps = 1_000, 4_000

    def chosen(platform="gpu", image_shape=(32, 32, 3), **changes):
        changed = copy.deepcopy(config)
        changed.update_from_flattened_dict(changes)
        return programs.steps_per_call(changed, platform, image_shape)

    assert chosen() == chosen("tpu") == 50
    assert chosen("cpu") == 10
    assert chosen("cpu", **{"evaluation.every_steps": 25}) == 5
    assert chosen("cpu", (224, 224, 3), batch_size=4) == 5
    assert chosen("cpu", (224, 224, 3), batch_size=24) == 1
    assert chosen("cpu", (224, 224, 3), batch_size=4, **{"data.feed": "stream"}) == 5
    assert chosen(**{"data.feed": "stream"}) == 1
    assert chosen(**{"evaluation.every_steps": 0}) == 50
    assert chosen(**{"evaluation.every_steps": 25}) == 25
    assert chosen(log_every_steps=30, **{"evaluation.every_steps": 600}) == 10
    assert chosen(log_every_steps=1) == 1
    assert chosen(profile_steps=(12, 17)) == 50, "the profile is of the calls in which these steps are"
    assert chosen(steps_per_call=4) == 4


def tiny_resnet(data_dir):
    config = resnet_digits.get_config()
    config.model.depth = 8
    config.num_steps = 4
    config.batch_size = 16
    config.data.data_dir = data_dir
    config.data.augment.pad = 1
    config.evaluation.every_steps = 2
    config.evaluation.batch_size = 200
    config.checkpoint.every_steps = 2
    config.log_every_steps = 1
    return config


def streamed(config):
    config.data.feed = "stream"
    config.data.image_size = 16
    config.data.crop.name = "area"
    config.data.crop.eval_shorter_side = 18
    return config


def test_a_killed_and_resumed_stream_is_the_unbroken_one_to_the_bit(config, tmp_path):
    program = programs.make_program(streamed(config), jax.devices()[:1])
    run(config, tmp_path / "unbroken", program)
    with pytest.raises(KilledError):
        run(config, tmp_path / "killed", stop_after(program, 7, kill))
    run(config, tmp_path / "killed", program)
    kept = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("killed", "unbroken")]
    assert kept[0] == kept[1]
    states = [last_state(tmp_path / name, program) for name in ("killed", "unbroken")]
    jax.tree.map(np.testing.assert_array_equal, *states)


def assert_devices_change_nothing_but_rounding(config, workdir):
    figures = {}
    for count in (1, 2, 4):
        run(config, workdir / str(count), programs.make_program(config, jax.devices()[:count]))
        (start,) = logbook.read_environments(workdir / str(count))
        assert len(start["devices"]) == count
        figures[count] = rows(workdir / str(count))
    assert any("running/loss" in row for row in figures[1])
    for count in (2, 4):
        for one, many in zip(figures[1], figures[count], strict=True):
            assert one.keys() == many.keys()
            for name in one:
                # Errors are counts over hundreds: one example may fall on the other side.
                tolerance = 0.02 if name.endswith("/error") else 2e-3 * max(1, abs(one[name]))
                assert abs(one[name] - many[name]) <= tolerance, (count, one["step"], name)


def test_the_number_of_devices_changes_nothing_but_rounding(data_dir, tmp_path):
    assert_devices_change_nothing_but_rounding(tiny_resnet(data_dir), tmp_path)


def test_the_number_of_devices_changes_nothing_of_a_stream_but_rounding(config, tmp_path):
    assert_devices_change_nothing_but_rounding(streamed(config), tmp_path)


def test_without_global_batch_statistics_the_number_of_devices_matters(data_dir):
    first_losses = []
    for count, together in ((1, True), (4, True), (4, False)):
        config = tiny_resnet(data_dir)
        config.sync_batch_norm = together
        program = programs.make_program(config, jax.devices()[:count])
        state = devices.replicate(program.init_state(config.seed), program.devices)
        batch = jax.tree.map(lambda leaf: leaf[None], next(program.feed.train_batches(config.seed, 0)))
        _, metrics = program.train(state, program.arrays, devices.shard(batch, count, axis=1))
        first_losses.append(metrics["loss"].item())
    assert abs(first_losses[0] - first_losses[1]) < 1e-3
    assert abs(first_losses[0] - first_losses[2]) > 1e-2


class OwnStatistics(nn.Module):
    """A network that does not know of the other devices."""

    num_classes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, image, train):
        x = nn.BatchNorm(use_running_average=not train, dtype=self.dtype)(image)
        return nn.Dense(self.num_classes, dtype=self.dtype)(x.reshape(len(x), -1))


@pytest.mark.parametrize(("num_devices", "together"), [(1, True), (2, True), (2, False)])
def test_batch_statistics_that_cannot_be_global_are_refused(
    num_devices, together, config, tmp_path, monkeypatch
):
    monkeypatch.setitem(models.MODELS, "own", OwnStatistics)
    config.model = {"name": "own"}
    config.sync_batch_norm = together
    program = programs.make_program(config, jax.devices()[:num_devices])
    if num_devices == 1 or not together:
        assert run(config, tmp_path, program)["status"] == "finished"
        return
    with pytest.raises(
        ValueError, match="'own' would compute separate batch statistics on each of the 2 devices"
    ):
        run(config, tmp_path, program)


class OwnDropout(nn.Module):
    """A network that drops what it is told to by Flax, which knows nothing of the other devices."""

    num_classes: int
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, image, train):
        x = nn.Dropout(0.5, deterministic=not train)(image)
        return nn.Dense(self.num_classes, dtype=self.dtype)(x.reshape(len(x), -1))


@pytest.mark.parametrize(("num_devices", "together"), [(1, True), (2, True), (2, False)])
def test_dropout_that_is_the_same_on_all_devices_is_refused(num_devices, together, config, monkeypatch):
    monkeypatch.setitem(models.MODELS, "own", OwnDropout)
    config.model = {"name": "own"}
    config.sync_batch_norm = together
    program = programs.make_program(config, jax.devices()[:num_devices])
    if num_devices == 1 or not together:
        programs.check_program(program, config)
        return
    with pytest.raises(
        ValueError, match=r"'own' uses Flax's Dropout, which would draw the same mask on each of"
    ):
        programs.check_program(program, config)


class ForgetsToPassOn(nn.Module):
    """A network that has a field axis_name and does not pass it to one of its layers."""

    num_classes: int
    forgotten: str
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, image, train):
        known = {layer: None if layer == self.forgotten else self.axis_name for layer in ("norm", "dropout")}
        norm = layers.batch_norm(train=train, epsilon=1e-5, dtype=self.dtype, axis_name=known["norm"])
        x = layers.Dropout(0.5, known["dropout"])(norm()(image), train)
        return nn.Dense(self.num_classes, dtype=self.dtype)(x.reshape(len(x), -1))


@pytest.mark.parametrize(("num_devices", "together"), [(1, True), (2, True), (2, False)])
@pytest.mark.parametrize(
    ("forgotten", "reason"),
    [("norm", "separate batch statistics"), ("dropout", "the same dropout mask"), ("", None)],
)
def test_an_axis_that_a_network_does_not_pass_on_is_missed(
    forgotten, reason, num_devices, together, config, monkeypatch
):
    monkeypatch.setitem(models.MODELS, "own", ForgetsToPassOn)
    config.model = {"name": "own", "forgotten": forgotten}
    config.sync_batch_norm = together
    program = programs.make_program(config, jax.devices()[:num_devices])
    if num_devices == 1 or not (together and forgotten):
        programs.check_program(program, config)
        return
    with pytest.raises(ValueError, match=rf"'own' would .* {reason} .* each of the 2 devices"):
        programs.check_program(program, config)


class OwnConvolution(nn.Module):
    """A network with a convolution of Flax or of `layers`."""

    num_classes: int
    of_flax: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, image, train):
        del train  # no layer behaves differently in training
        conv = nn.Conv if self.of_flax else layers.Conv
        return conv(self.num_classes, (3, 3), dtype=self.dtype)(image).mean(axis=(1, 2))


@pytest.mark.parametrize(("of_flax", "steps_per_call"), [(True, 4), (True, 1), (False, 4)])
def test_convolutions_that_are_slow_in_a_loop_are_told_of(
    of_flax, steps_per_call, config, caplog, monkeypatch
):
    monkeypatch.setitem(models.MODELS, "own", OwnConvolution)
    config.model = {"name": "own", "of_flax": of_flax}
    config.steps_per_call, config.log_every_steps = steps_per_call, 4
    with caplog.at_level(logging.WARNING, "cnn_cases"):
        programs.make_program(config).init_state(0)
    assert ("OwnConvolution uses Flax's Conv" in caplog.text) == (of_flax and steps_per_call == 4)


def test_an_evaluation_can_be_shared_by_any_number_of_devices(config):
    program = programs.make_program(config, jax.devices()[:3])
    (batch,) = program.feed.eval_batches("validation")
    assert len(batch["mask"]) == 201  # not 200
    values = programs.evaluate(program, program.init_state(0), "validation")
    alone = programs.make_program(config, jax.devices()[:1])
    assert values == pytest.approx(programs.evaluate(alone, alone.init_state(0), "validation"))


@pytest.mark.parametrize(
    ("changes", "told"), [({}, False), ({"num_microbatches": 2}, True), ({"sync_batch_norm": False}, True)]
)
def test_another_number_of_devices_is_told_where_the_steps_depend_on_it(
    changes, told, config, tmp_path, caplog
):
    config.update(changes)
    program = programs.make_program(config, jax.devices()[:1])
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path, stop_after(program, 4, interrupt))
    assert "number of devices" not in caplog.text
    starts = json.loads((tmp_path / "environment.json").read_text())
    starts[-1]["devices"] = ["cpu"] * 7
    (tmp_path / "environment.json").write_text(json.dumps(starts))
    run(config, tmp_path, program)
    assert ("number of devices has changed since the last start: 7 then, 1 now" in caplog.text) == told


@pytest.mark.parametrize("num_devices", [1, 4])
def test_evaluation_counts_every_example_exactly_once(num_devices, config):
    config.evaluation.batch_size = 48  # 185 = 3 * 48 + 41
    program = programs.make_program(config, jax.devices()[:num_devices])
    counts = []

    def evaluate(state, arrays, batch):
        sums = program.evaluate(state, arrays, batch)
        counts.append(float(sums["count"]))
        return sums

    state = program.init_state(0)
    values = programs.evaluate(program._replace(evaluate=evaluate), state, "validation")
    assert (sum(counts), len(counts)) == (185, 4)
    whole = [batch["index"][batch["mask"] == 1] for batch in program.feed.eval_batches("validation")]
    image, label = program.feed.prepare(program.feed.arrays, {"index": np.concatenate(whole)}, None)
    logits = program.model.apply({"params": state.params}, image, train=False)
    assert values["validation/error"] == pytest.approx(float((logits.argmax(axis=1) != label).mean()))


@pytest.mark.parametrize("crop", ["area", "squeeze"])
def test_the_single_view_of_a_stream_is_the_one_that_the_loop_evaluates(crop, config):
    config = streamed(config)
    config.data.crop.name = crop
    program = programs.make_program(config, jax.devices()[:1])
    state = program.init_state(0)
    expected = programs.evaluate(program, state, "test")
    found = predictions.scores(*programs.predict(program, state, "test", "single", batch_size=200))
    assert found["error"] == pytest.approx(expected["test/error"])
    assert found["loss"] == pytest.approx(expected["test/loss"], rel=1e-5)


def test_computing_in_bfloat16_leaves_float32_parameters(data_dir, tmp_path):
    config = tiny_resnet(data_dir)
    config.num_steps = 2
    config.dtype = "bfloat16"
    program = programs.make_program(config, jax.devices()[:1])
    assert program.model.dtype == jnp.bfloat16
    run(config, tmp_path, program)
    state = last_state(tmp_path, program)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype("float32")}


def diverging(program, steps, value):
    """A program whose loss is `value` at step number `steps`."""

    def train(state, arrays, batches):
        state, metrics = program.train(state, arrays, batches)
        if int(state.step) == steps:
            metrics = metrics | {"loss": jnp.full_like(metrics["loss"], value)}
        return state, metrics

    return program._replace(train=train)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_checkpoint(
    value, config, tmp_path, program
):
    with pytest.raises(
        loop.DivergedError, match=r"diverged at step 7: loss (nan|inf).* is of step 4"
    ) as caught:
        run(config, tmp_path, diverging(program, 7, value))
    assert caught.value.step == 7
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["status"], result["step"], result["checkpoint"]) == ("diverged", 7, 4)
    batch = next(program.feed.train_batches(config.seed, 6))
    assert result["examples"] == (batch["index"] - program.feed._ranges["train"].start).tolist()
    assert last_state(tmp_path, program).step == 4
    with pytest.raises(loop.DivergedError, match="diverged at step 7 and would diverge again"):
        run(config, tmp_path, program)


def test_a_learning_rate_out_of_all_bounds_diverges_for_real(config, tmp_path):
    config.optimizer.learning_rate = 1e20
    with pytest.raises(loop.DivergedError, match="diverged at step"):
        run(config, tmp_path, programs.make_program(config, jax.devices()[:1]))


def test_a_blow_up_in_the_last_update_is_not_called_finished_nor_saved(config, tmp_path):
    config.num_steps = 1
    config.schedule.warmup_steps = 0
    config.log_every_steps = 1
    config.optimizer.learning_rate = 1e38
    with pytest.raises(loop.DivergedError, match=r"diverged at step 1: .*; there is no checkpoint yet"):
        run(config, tmp_path, programs.make_program(config, jax.devices()[:1]))
    assert json.loads((tmp_path / "result.json").read_text())["status"] == "diverged"


def test_a_state_that_its_last_update_broke_is_not_saved(config, tmp_path, program):
    only_train(config)
    config.checkpoint.every_steps = 4

    def train(state, _arrays, batches):
        step = state.step + 1
        value = jnp.nan if int(step) == 4 else 0.0
        broken = jax.tree.map(lambda leaf: jnp.full_like(leaf, value), state.params)
        del batches
        return state.replace(step=step, params=broken), metrics_of(1.0)

    with pytest.raises(
        loop.DivergedError,
        match="diverged at step 4: largest number of the state nan; there is no checkpoint yet",
    ):
        run(config, tmp_path, program._replace(train=train))


def test_a_step_whose_numbers_go_wrong_is_skipped_if_the_config_says_so(
    config, tmp_path, program, monkeypatch
):
    config.on_nonfinite = "skip"
    config.ema_decay = 0.9  # an average that a stop must not lose either
    bad = poisoned(config, monkeypatch, example_of_step(program, config.seed, [7]))
    result = run(config, tmp_path / "run", bad)
    assert (result["status"], result["nonfinite"]) == ("finished", [7])
    skipped = {row["step"]: row["running/skipped"] for row in rows(tmp_path / "run") if "running/loss" in row}
    assert skipped == {3: 0, 6: 0, 9: 1, 12: 0}
    assert all(np.isfinite(list(row.values())).all() for row in rows(tmp_path / "run"))
    for steps in (7, 8, 10):
        workdir = tmp_path / f"killed-{steps}"
        with pytest.raises(KilledError):
            run(config, workdir, stop_after(bad, steps, kill))
        assert run(config, workdir, bad)["nonfinite"] == [7]
        assert (workdir / "metrics.jsonl").read_bytes() == (tmp_path / "run/metrics.jsonl").read_bytes()


def calls_of_profile(workdir):
    (path,) = workdir.glob("profile/plugins/profile/*/perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return [event.get("name") for event in events].count("train")


def test_a_profile_of_the_steps_that_were_asked_for_is_written_and_changes_nothing(
    config, tmp_path, program, unbroken
):
    config.profile_steps = (6, 8)
    run(config, tmp_path, program)
    assert calls_of_profile(tmp_path) == 3
    assert (tmp_path / "metrics.jsonl").read_bytes() == (unbroken / "metrics.jsonl").read_bytes()


def test_a_profile_is_of_the_calls_in_which_its_steps_are(config, tmp_path):
    config.log_every_steps = 4
    config.profile_steps = (6, 9)
    config.evaluation.final_splits = ("test",)
    run(config, tmp_path, programs.make_program(config, jax.devices()[:1])._replace(steps_per_call=4))
    assert calls_of_profile(tmp_path) == 2  # of steps 5 to 8 and 9 to 12


def test_steps_are_not_skipped_for_ever(config, tmp_path):
    config.on_nonfinite = "skip"
    config.evaluation.update(every_steps=0, splits=())
    config.checkpoint.best_on = ""
    config.optimizer.learning_rate = 1e38
    config.schedule.warmup_steps = 0
    with pytest.raises(loop.DivergedError, match=r"at step 1\d: 10 steps in a row were skipped"):
        run(config, tmp_path, programs.make_program(config, jax.devices()[:1]))


def test_a_run_goes_back_to_its_checkpoint_and_on_with_other_batches_if_the_config_says_so(
    config, tmp_path, program, unbroken, monkeypatch
):
    config.on_nonfinite = "rewind"
    config.profile_steps = (6, 8)  # which is begun twice
    bad = poisoned(config, monkeypatch, example_of_step(program, config.seed, [7]))
    result = run(config, tmp_path / "run", bad)
    config.profile_steps = ()
    assert (result["status"], result["nonfinite"]) == ("finished", [7])
    ours, theirs = rows(tmp_path / "run"), rows(unbroken)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for our, their in zip(ours, theirs, strict=True):
        assert (our == their) == (our["step"] <= 4)
    for steps in (6, 7, 8, 10):
        workdir = tmp_path / f"killed-{steps}"
        with pytest.raises(KilledError):
            run(config, workdir, stop_after(bad, steps, kill))
        assert run(config, workdir, bad)["nonfinite"] == [7]
        assert (workdir / "metrics.jsonl").read_bytes() == (tmp_path / "run/metrics.jsonl").read_bytes()


def test_a_run_does_not_go_back_for_ever(config, tmp_path, program):
    config.on_nonfinite = "rewind"
    with pytest.raises(loop.DivergedError, match=r"diverged at step 7: .* is of step 4") as caught:
        run(config, tmp_path, diverging(program, 7, float("nan")))
    assert caught.value.step == 7
    seed = json.loads((tmp_path / "result.json").read_text())["seed_of_batches"]
    assert seed == loop.seed_of_batches(config.seed, [4] * loop.MAX_REWINDS, 4)


def test_a_checkpoint_of_a_signal_counts_its_own_rewinds(config, tmp_path, program):
    config.on_nonfinite = "rewind"
    calls = []

    def after(number):
        """A program that is NaN at step 6 until a signal has come at step 5 of the second attempt."""
        stopped = stop_after(diverging(program, number, float("nan")), 5, lambda: calls.append(5))

        def train(state, arrays, batches):
            found = stopped.train(state, arrays, batches)
            if number == 6 and len(calls) == 2:
                signal.raise_signal(signal.SIGTERM)
            return found

        return program._replace(train=train)

    with pytest.raises(stopping.InterruptedRun):
        run(config, tmp_path, after(6))
    with pytest.raises(loop.DivergedError, match=r"diverged at step 7: .* is of step 5"):
        run(config, tmp_path, after(7))
    assert len(calls) == 2  # step 5 was not done again
    seed = json.loads((tmp_path / "result.json").read_text())["seed_of_batches"]
    assert seed == loop.seed_of_batches(config.seed, [4, *[5] * loop.MAX_REWINDS], 5)


def test_each_rewind_draws_other_batches_and_the_first_attempt_the_configs():
    seeds = [loop.seed_of_batches(0, [4] * rewinds, 4) for rewinds in range(loop.MAX_REWINDS + 1)]
    assert (seeds[0], len(set(seeds)), loop.MAX_REWINDS) == (0, 4, 3)
    assert loop.seed_of_batches(0, [8], 4) == 0, "steps before the checkpoint are those of the first attempt"
    assert loop.seed_of_batches(0, [4], 8) == seeds[1]
    assert loop.seed_of_batches(1, [4], 4) != seeds[1]


def losses_of(workdir):
    return [row["running/loss"] for row in rows(workdir) if "running/loss" in row]


def only_train(config):
    config.evaluation.every_steps = config.checkpoint.every_steps = 0
    config.evaluation.splits, config.evaluation.final_splits, config.checkpoint.best_on = (), (), ""


def test_augmentation_depends_neither_on_devices_nor_on_microbatches(config, tmp_path, unbroken):
    only_train(config)
    config.num_microbatches = 3
    for count in (1, 2):
        run(config, tmp_path / str(count), programs.make_program(config, jax.devices()[:count]))
        np.testing.assert_allclose(losses_of(tmp_path / str(count)), losses_of(unbroken), rtol=1e-3)


def test_mixing_does_not_depend_on_devices(config, tmp_path):
    config.data.augment.update(cutout=4, mixup=0.4)
    config.num_steps = config.log_every_steps = 4
    only_train(config)
    losses = []
    for count in (1, 2):  # tests/data/test_resident.py has four
        run(config, tmp_path / str(count), programs.make_program(config, jax.devices()[:count]))
        losses += losses_of(tmp_path / str(count))
    np.testing.assert_allclose(losses, losses[0], rtol=1e-4)


@pytest.mark.parametrize("key", ["mixup", "cutmix"])
def test_a_loss_of_one_class_refuses_mixed_examples(key, config):
    config.data.augment[key] = 0.2
    config.loss.name = "rbf_map"
    with pytest.raises(
        ValueError, match=rf"data.augment.{key} = 0.2 gives an example shares of two classes, .*'rbf_map'"
    ):
        programs.make_program(config)


def change(config, key, value):
    config.update_from_flattened_dict({key: value})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("batch_size", 30, r"batch_size = 30 .* over 4 devices; .* 28 and 32"),
        ("evaluation.batch_size", 0, "evaluation.batch_size = 0 must be between 1 and"),
        ("batch_size", 1260, "batch_size = 1260 must be between 1 and the 1257 training examples"),
        ("num_steps", 0, "num_steps = 0 must be 1 or more"),
        ("seed", -1, "seed = -1 must be in"),
        ("steps_per_call", -1, "steps_per_call = -1 must be 0 or more"),
        ("steps_per_call", 5, "num_steps = 12 must be a positive multiple of steps_per_call = 5"),
        ("steps_per_call", 4, "log_every_steps = 3 must be a positive multiple of steps_per_call = 4"),
        ("steps_per_call", 3, "evaluation.every_steps = 4 must be .* multiple of steps_per_call = 3"),
        ("log_every_steps", 0, "log_every_steps = 0 must be a positive multiple"),
        ("checkpoint.keep_last", 0, "checkpoint.keep_last = 0 must be 1 or more"),
        ("checkpoint.every_steps", -4, "checkpoint.every_steps = -4 must be"),
        ("checkpoint.best_on", "test", r"checkpoint.best_on = 'test' is not evaluated .*'validation'"),
        (
            "evaluation.splits",
            ("tset",),
            "evaluation.splits names 'tset'; data.splits has test, train, validation",
        ),
        ("dtype", "float16", "dtype = 'float16' is unknown; known: float32, bfloat16"),
        ("model.name", "lenet", "model.name = 'lenet' is unknown; known: lenet5"),
        ("data.name", "cifr10", "data.name = 'cifr10' is not a TFDS data set"),
        ("data.feed", "flow", "data.feed = 'flow' is unknown; known: resident, stream"),
        ("data.crop.name", "area", "data.crop.name = 'area' cannot be used with data.feed = 'resident'"),
        ("data.image_size", 8, "LeNet-5 needs images of at least 16x16 pixels, got 8x8"),
        ("profile_steps", (3,), r"profile_steps = \(3,\) must be \(first, last\) step, from 1 to num_steps"),
        ("profile_steps", (5, 13), r"profile_steps = \(5, 13\) must be"),
        ("profile_steps", (6, 5), r"profile_steps = \(6, 5\) must be"),
        ("on_nonfinite", "ignore", "on_nonfinite = 'ignore' is unknown; known: stop, skip, rewind"),
        ("num_microbatches", 0, "num_microbatches = 0 must be 1 or more"),
        ("num_microbatches", 5, r"batch_size = 24 .* over 4 devices and num_microbatches = 5; .*: 20 and 40"),
        ("ema_decay", 1.0, r"ema_decay = 1.0 must be in \[0, 1\)"),
        ("loss.name", "hinge", "loss.name = 'hinge' is unknown; known: cross_entropy, rbf"),
        ("data.augment.cutout", 17, "data.augment.cutout = 17 must be at most 16, the pixels"),
        ("loss.side_weight", -0.3, "loss.side_weight = -0.3 must be 0 or more"),
        ("optimizer.name", "lion", "optimizer.name = 'lion' is unknown; known: sgd, rmsprop"),
        ("schedule.name", "step", "schedule.name = 'step' is unknown"),
    ],
)
def test_an_impossible_config_is_refused_before_the_workdir_is_touched(key, value, message, config, tmp_path):
    change(config, key, value)
    with pytest.raises(ValueError, match=message):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


class TooManyAnswers(nn.Module):
    """A network of somebody's own, with a mistake in it."""

    num_classes: int
    dtype: Any

    @nn.compact
    def __call__(self, image, train):
        del train
        return nn.Dense(self.num_classes + 2)(image.reshape(len(image), -1))


def test_a_network_whose_answers_do_not_fit_the_classes_is_refused(config, tmp_path, monkeypatch):
    monkeypatch.setitem(models.MODELS, "own", TooManyAnswers)
    with config.unlocked():
        config.model = ConfigDict({"name": "own"})
    with pytest.raises(
        ValueError, match=r"logits of shape \[6, 12\]; data with 10 classes need \[batch, 10\]"
    ):
        run(config, tmp_path)
    assert rows(tmp_path) == []


@pytest.mark.parametrize("name", ["train[:10%]", "runs\\x", "a*"])
def test_a_workdir_whose_path_means_something_else_is_refused(name, config, tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"{name}: its path must have no *, ?, [ or b")):
        run(config, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "encoding"), [("\udce9", "utf-8"), ("\xe9", "latin-1"), ("\udce9", "ascii")]
)
def test_a_workdir_whose_path_is_not_utf8_is_refused(name, encoding, config, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsencode", lambda path: path.encode(encoding, "surrogateescape"))
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: encoding)
    with pytest.raises(ValueError, match=rf"its path must be UTF-8, .* names of files for {encoding}; use"):
        run(config, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_workdir_may_have_letters_of_any_language(tmp_path):
    checkpoint.check_path(tmp_path / "Pr\xfcfung \u8a66\u9a13")


@pytest.mark.parametrize("workdir", ["gs://bucket/run", "file:///tmp/run"])
def test_a_workdir_that_is_no_directory_is_refused(workdir, config):
    with pytest.raises(ValueError, match=r"workdir = \w+:/+\S+ must be a directory; mount the bucket first"):
        run(config, workdir)


def test_a_start_that_fails_can_be_tried_again(config, tmp_path, program):
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(FileExistsError) as kept:  # by a notebook, with all that its frames hold
        run(config, tmp_path, program)
    (tmp_path / "checkpoints").unlink()
    assert run(config, tmp_path, program)["status"] == "finished"
    del kept


def test_a_workdir_of_another_config_is_refused_and_left_alone(config, tmp_path, program):
    run(config, tmp_path, program)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    config.optimizer.momentum = 0.5
    with pytest.raises(ValueError, match=r"optimizer.momentum: 0.9 saved, 0.5 given"):
        run(config, tmp_path, program)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_run_that_is_older_than_a_key_goes_on_with_its_default(config, tmp_path, program):
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path, stop_after(program, 6, interrupt))
    path = tmp_path / "config.json"
    older = json.loads(path.read_text())
    del older["start"], older["optimizer"]["frozen"]
    path.write_text(json.dumps(older))
    config.optimizer.frozen = ("conv1",)
    with pytest.raises(
        ValueError, match=r"other config:\n  optimizer\.frozen: \[\] saved, \['conv1'\] given"
    ):
        run(config, tmp_path)
    config.optimizer.frozen = ()
    assert run(config, tmp_path, program)["status"] == "finished"
    assert json.loads(path.read_text())["start"] == {"workdir": "", "step": "last", "layers": ["*"]}


@pytest.mark.parametrize("together", [True, False])
def test_what_a_config_says_of_a_step_reaches_it(together, config, monkeypatch):
    seen, make = {}, programs.steps.make_train_steps
    monkeypatch.setattr(
        programs.steps, "make_train_steps", lambda *parts, **said: seen.update(said) or make(*parts, **said)
    )
    config.loss.side_weight, config.ema_decay, config.num_microbatches = 0.7, 0.9, 3
    config.sync_batch_norm, config.on_nonfinite = together, "skip"
    config.optimizer.frozen = ("conv*",)
    programs.make_program(config, jax.devices()[:1])
    assert list(map(seen.pop("frozen"), ("conv1", "dense1"))) == [True, False]
    assert seen == {
        "side_weight": 0.7,
        "num_microbatches": 3,
        "ema_decay": 0.9,
        "per_device_dropout": not together,
        "skip_nonfinite": True,
    }


def test_examples_are_mixed_over_all_devices(config):
    config.data.augment.mixup = 0.4
    feed, targets = programs.make_program(config, jax.devices()[:1]).feed, []
    batch = next(feed.train_batches(config.seed, 0))
    for count in (1, 2):
        prepare = jax.pmap(feed.prepare, devices.AXIS, in_axes=(None, 0, None), devices=jax.devices()[:count])
        _, target = prepare(feed.arrays, devices.shard(batch, count), jax.random.key(0))
        targets.append(np.asarray(target).reshape(24, 10))
    np.testing.assert_array_equal(*targets)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, False),
        ({"evaluation.final_splits": ("test",)}, True),
        ({"checkpoint.every_steps": 6}, True),  # evaluations are every 4
        ({"checkpoint.every_steps": 6, "checkpoint.best_on": ""}, False),
    ],
)
def test_checkpoints_that_can_not_be_the_best_are_told_of(changes, told, config, tmp_path, capfd):
    config.update_from_flattened_dict(changes)
    program = programs.make_program(config, jax.devices()[:1])
    with pytest.raises(KeyboardInterrupt):
        loop.train_and_evaluate(config, tmp_path, program=stop_after(program, 1, interrupt))
    words = "only checkpoints at whose step 'validation' is evaluated can be the best"
    assert (words in capfd.readouterr().err) == told


def test_a_script_without_a_guard_is_told_of_it_in_its_workers(tmp_path):
    (tmp_path / "script.py").write_text(f"""
import multiprocessing

from cnn_cases.training import loop

multiprocessing.set_start_method("spawn", force=True)
if multiprocessing.current_process().name != "MainProcess":  # in the child
    loop.train_and_evaluate(None, {str(tmp_path / "run")!r})
child = multiprocessing.Process(target=print)
child.start()
child.join()
assert child.exitcode == 1
""")
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py"],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "ValueError: a worker process first runs the script that started it" in done.stderr
    assert not (tmp_path / "run").exists()
