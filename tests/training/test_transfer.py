"""A training begins with layers of another one, and leaves those that are frozen alone."""

import contextlib
import json
import shutil

import jax
import numpy as np
import pytest

from cnn_cases import replay
from cnn_cases.studies import layer_signals
from cnn_cases.training import checkpoint, loop, processes, programs, transfer
from configs import resnet_digits
from tests.conftest import interrupt, stop_after, tiny_config

LENET = ["conv1", "conv2", "dense1", "dense2", "logits"]


def small_resnet(data_dir, **changes):
    """A ResNet-8 on digits of 8x8 pixels for two steps: it has batch statistics."""
    config = resnet_digits.get_config()
    config.num_steps = config.checkpoint.every_steps = config.evaluation.every_steps = 2
    config.log_every_steps = 1
    config.model.depth = 8
    config.batch_size, config.evaluation.batch_size = 24, 200
    config.schedule.warmup_steps = 0
    config.data.data_dir = data_dir
    config.update(changes)
    return config


def train(config, workdir, program=None):
    loop.train_and_evaluate(config, workdir, program=program, show_progress=False)
    return last_state(workdir)


def last_state(workdir):
    directory = workdir / "checkpoints"
    return checkpoint.read(directory, checkpoint.find(directory, "last"))


def begun(config):
    """The state before the first step."""
    return programs.make_program(config, jax.devices()[:1]).init_state(config.seed)


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def differ(one, other):
    """Whether any leaf does."""
    return not all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(other)))


@pytest.fixture(scope="module")
def source(data_dir, tmp_path_factory):
    """A LeNet-5 that was trained for twelve steps."""
    workdir = tmp_path_factory.mktemp("source")
    train(tiny_config(data_dir), workdir)
    return workdir


def test_the_chosen_layers_are_those_of_the_other_run_and_the_rest_is_drawn(config, source):
    drawn = begun(config)
    config.start.workdir, config.start.layers = str(source), ("conv*", "dense1")
    state, there = begun(config), last_state(source)
    for name in LENET:
        taken = name in ("conv1", "conv2", "dense1")
        assert_equal(state.params[name], (there if taken else {"params": drawn.params})["params"][name])
        assert differ(there["params"][name], drawn.params[name])
    assert int(state.step) == 0
    assert_equal(state.opt_state, drawn.opt_state)


@pytest.mark.parametrize(("step", "number"), [("4", 4), ("best", None), ("last", 12)])
def test_any_checkpoint_can_be_the_start(step, number, data_dir, tmp_path):
    source = tiny_config(data_dir)
    source.checkpoint.keep_last = 3
    train(source, tmp_path)
    number = number or checkpoint.find(tmp_path / "checkpoints", "best")
    config = tiny_config(data_dir)
    config.start.workdir, config.start.step = str(tmp_path), step
    assert_equal(begun(config).params, checkpoint.read(tmp_path / "checkpoints", number)["params"])


def test_batch_statistics_come_with_their_layer(data_dir, tmp_path):
    there = train(small_resnet(data_dir), tmp_path)
    config = small_resnet(data_dir)
    config.start.workdir, config.start.layers = str(tmp_path), ("norm1", "stage[12]_*")
    state, drawn = begun(config), begun(small_resnet(data_dir))
    for name in state.params:
        taken = name.startswith(("norm1", "stage1", "stage2"))
        for part, own in (("params", drawn.params), ("batch_stats", drawn.batch_stats)):
            if name in own:
                assert_equal(getattr(state, part)[name], (there[part] if taken else own)[name])
    assert differ(there["batch_stats"]["norm1"], drawn.batch_stats["norm1"])


def test_an_average_gives_its_layers_and_begins_with_them(data_dir, tmp_path):
    there = train(small_resnet(data_dir, ema_decay=0.9), tmp_path)
    config = small_resnet(data_dir, ema_decay=0.5)
    config.start.workdir = str(tmp_path)
    state = begun(config)
    assert_equal({"params": state.params, "batch_stats": state.batch_stats}, there["ema_params"])
    assert_equal(state.ema_params, there["ema_params"])
    assert differ(there["params"], there["ema_params"]["params"])
    train(config, tmp_path / "next")  # no buffer is given away twice
    assert begun(small_resnet(data_dir, start={"workdir": str(tmp_path)})).ema_params == {}


def test_the_deeper_vgg_starts_from_the_layers_of_net_a(data_dir, tmp_path):
    """Simonyan and Zisserman 2014, section 3.1: the first four convolutions and the three dense layers."""

    def vgg(variant, seed):
        config = tiny_config(data_dir)
        config.seed, config.data.image_size = seed, 32
        with config.unlocked():
            config.model.update(name="vgg", variant=variant, image_size=32, dense_features=8)
        return config

    # In place of a training, whose steps would take long to compile.
    with contextlib.closing(checkpoint.Checkpoints(tmp_path / "checkpoints", keep_last=1)) as checkpoints:
        checkpoints.save(1, begun(vgg("A", seed=1)), extra={})
    there, config = last_state(tmp_path), vgg("D", seed=0)
    own = begun(config).params
    config.start.workdir = str(tmp_path)
    config.start.layers = ("conv[123]_1", "conv3_2", "dense*", "logits")
    taken = {"conv1_1", "conv2_1", "conv3_1", "conv3_2", "dense1", "dense2", "logits"}
    for name, layer in begun(config).params.items():
        assert_equal(layer, (there["params"] if name in taken else own)[name])
    assert taken < own.keys()
    assert differ(there["params"]["conv1_1"], own["conv1_1"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"start.layers": ("conv*", "con")},
            r"start\.layers = .*'con' matches no layer; there are: conv1, conv2, ",
        ),
        ({"start.layers": ()}, r"start\.layers = \(\) must have patterns"),
        ({"start.step": "5"}, r"start\.workdir = .* start\.step = '5': there is no checkpoint of step '5'"),
        ({"start.workdir": "nowhere"}, r"start\.workdir = 'nowhere', .*: .* no checkpoint in /.*/nowhere"),
        ({"start.step": "-1", "start.workdir": ""}, r"start\.step = '-1' must be 'last', 'best' or a step"),
        ({"start.workdir": "x" * 5000}, r"start\.workdir = 'xxx"),
        (
            {"data.border": 2},
            r"start\.layers = \('\*',\): dense1/kernel is 16x120 in .* and 64x120 in this network",
        ),
        ({"model.name": "lenet5_1998"}, r"start\.layers = .* has no c1; it has conv1, conv2, dense1"),
        (
            {"optimizer.frozen": ("conv1", "z")},
            r"optimizer\.frozen = .*'z' matches no layer; there are: conv1",
        ),
        (
            {"optimizer.rate_patterns": ("z/*",), "optimizer.rate_factors": (2.0,)},
            r"optimizer\.rate_patterns = .*'z/\*' matches no parameter; there are: conv1/bias, .*, \.\.\.",
        ),
        ({"optimizer.frozen": ("*",)}, r"optimizer\.frozen = \('\*',\) leaves no layer to train, of conv1"),
    ],
)
def test_what_cannot_be_is_refused_before_the_workdir_is_touched(changes, message, config, source, tmp_path):
    config.data.image_size = 32 if "model.name" in changes else 16
    config.start.workdir = str(source)
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=f"^{message}"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=f"^{message}"):  # as a study does, for all of its runs
        programs.check(config, jax.devices()[:1])


def test_batch_normalisation_that_the_other_network_lacks_is_named(data_dir, tmp_path):
    there = train(small_resnet(data_dir), tmp_path)
    state = begun(small_resnet(data_dir))
    layer = dict(state.params["stage1_block1"])
    del layer["norm2"]
    with pytest.raises(
        ValueError, match=r"stage1_block1/norm2/bias is 16 in .* and missing in this network; name"
    ):
        transfer.trained_layers(
            state.replace(params=state.params | {"stage1_block1": layer}),
            tmp_path,
            "last",
            ("stage1_block1",),
        )
    assert "norm2" in there["params"]["stage1_block1"]


def test_a_damaged_start_is_named_and_left_as_it_is(config, source, tmp_path):
    shutil.copytree(source, tmp_path / "source")
    config.start.workdir = str(tmp_path / "source")
    file = max((tmp_path / "source/checkpoints/12/state").rglob("*"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"^start\.workdir = .*checkpoint 12 in .* cannot be read"):
        train(config, tmp_path / "run")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop", "adam", "adamw"])
def test_a_frozen_layer_stays_as_it_was_and_the_others_do_not(optimizer, config, tmp_path):
    config.num_steps = config.evaluation.every_steps = config.checkpoint.every_steps = 3
    config.optimizer.name, config.optimizer.weight_decay = optimizer, 0.1
    config.optimizer.frozen = ("conv*", "dense2")
    drawn, trained = begun(config).params, train(config, tmp_path)["params"]
    for name in LENET:
        if name in ("conv1", "conv2", "dense2"):
            assert_equal(trained[name], drawn[name])
        else:
            assert differ(trained[name], drawn[name])


def test_frozen_layers_are_no_part_of_the_gradient(config, tmp_path):
    config.num_steps = config.evaluation.every_steps = config.checkpoint.every_steps = 1
    config.log_every_steps, config.schedule.warmup_steps, config.optimizer.momentum = 1, 0, 0.0
    config.optimizer.weight_decay = 0.0
    drawn, states, norms = begun(config).params, {}, {}
    for frozen in ((), ("conv*", "dense?")):
        config.optimizer.frozen = frozen
        states[frozen] = train(config, tmp_path / str(len(frozen)))["params"]
        rows = (tmp_path / str(len(frozen)) / "metrics.jsonl").read_text().splitlines()
        norms[frozen] = json.loads(rows[0])["running/grad_norm"]
    whole, part = states.values()
    assert_equal(part["logits"], whole["logits"])
    rate = config.optimizer.learning_rate
    step = jax.tree.map(lambda after, before: np.square((after - before) / rate).sum(), part, drawn)
    np.testing.assert_allclose(np.sqrt(sum(jax.tree.leaves(step))), norms[config.optimizer.frozen], rtol=1e-3)
    assert norms[config.optimizer.frozen] < norms[()]


def test_a_run_that_has_begun_needs_its_start_no_more(config, source, tmp_path):
    shutil.copytree(source, tmp_path / "source")
    config.start.workdir, config.start.layers = str(tmp_path / "source"), ("conv*",)
    config.optimizer.frozen = ("conv1",)
    program = programs.make_program(config, jax.devices()[:1])
    whole = train(config, tmp_path / "whole", program)

    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "stopped", stop_after(program, 6, interrupt))
    shutil.rmtree(tmp_path / "source")
    assert_equal(train(config, tmp_path / "stopped", program), whole)
    with pytest.raises(ValueError, match=r"^start\.workdir = .* there is no checkpoint"):
        train(config, tmp_path / "anew", program)


def test_another_start_is_refused_where_the_run_has_no_checkpoint_yet(config, source, data_dir, tmp_path):
    shutil.copytree(source, tmp_path / "source")
    config.start.workdir, config.checkpoint.every_steps = str(tmp_path / "source"), 0
    program = programs.make_program(config, jax.devices()[:1])

    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run", stop_after(program, 6, interrupt))
    noted = json.loads((tmp_path / "run/environment.json").read_text())[0]["data"]["start"]
    assert noted == transfer.identity(source, "last")
    assert noted[0] == 12
    shutil.rmtree(tmp_path / "source")
    other = tiny_config(data_dir)
    other.seed = 7
    train(other, tmp_path / "source")
    with pytest.raises(
        ValueError, match=r"started with other data: .*'start': \[12, .*; see .* start\.workdir"
    ):
        train(config, tmp_path / "run", program)
    with pytest.raises(
        ValueError, match=r"^start\.workdir = .* is not what it was when .* from step 12 of it"
    ):
        replay.replay(tmp_path / "run", 3)
    with pytest.raises(ValueError, match="is not what it was when"):
        next(layer_signals.saved_states(program, config, tmp_path / "run"))
    shutil.rmtree(tmp_path / "source")
    shutil.copytree(source, tmp_path / "source")
    train(config, tmp_path / "run", program)
    assert replay.replay(tmp_path / "run", 3).first == 0


def test_a_start_that_has_gone_on_since_is_known_by_its_step(config, source, tmp_path):
    shutil.copytree(source, tmp_path / "source")
    config.start.workdir, config.checkpoint.every_steps = str(tmp_path / "source"), 0
    program = programs.make_program(config, jax.devices()[:1])
    train(config, tmp_path / "run", program)
    shutil.copytree(source / "checkpoints/12", tmp_path / "source/checkpoints/16")
    assert transfer.identity(tmp_path / "source", "last")[0] == 16
    assert replay.replay(tmp_path / "run", 3).first == 0


def test_of_several_processes_the_first_alone_reads_the_start(config, monkeypatch):
    drawn = begun(config).params
    monkeypatch.setattr(processes, "is_lead", lambda: False)
    config.start.workdir = "nowhere"
    assert_equal(begun(config).params, drawn)
