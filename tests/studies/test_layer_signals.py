import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_cases.models.resnet import CifarResNet, ResNet
from cnn_cases.studies import layer_signals, sweep
from cnn_cases.training import devices, programs
from cnn_cases.training.losses import cross_entropy
from cnn_cases.training.state import TrainState
from configs.studies import depth_digits
from tests.conftest import draw, metrics_of
from tests.studies.conftest import cells as cells_of


def tiny_study(data_dir):
    """Nets of 8 layers for four steps, with two checkpoints, at half the width of a digit."""
    study = depth_digits.get_config()
    with study.unlocked():
        study.grid = (("model.depth", (8,)), ("model.plain", (True, False)))
        study.seeds = (0, 1)
    base = study.base
    base.data.data_dir = data_dir
    base.data.image_size = 4
    base.data.augment.pad = 1
    base.num_steps, base.steps_per_call = 4, 1
    base.batch_size = 24
    base.evaluation.every_steps = 4
    base.evaluation.batch_size = 200
    base.checkpoint.every_steps = 2
    base.checkpoint.keep_last = 2
    return study


@pytest.fixture(scope="module")
def workdir(data_dir, tmp_path_factory):
    """A study whose steps move all parameters, but compute nothing: to compile real ones takes long."""
    directory = tmp_path_factory.mktemp("study")
    make_program = programs.make_program

    def train(state, *_):
        params = jax.tree.map(lambda leaf: np.float32(1.01) * np.asarray(leaf), state.params)
        return state.replace(step=state.step + 1, params=params), metrics_of(1.0)

    def evaluate(*arguments):
        batch = arguments[-1]
        return dict.fromkeys(("loss", "error", "count"), batch["mask"].sum())

    with pytest.MonkeyPatch.context() as patch:
        moving = {"train": train, "evaluate": evaluate}
        patch.setattr(programs, "make_program", lambda config, *_: make_program(config)._replace(**moving))
        sweep.run_all(tiny_study(data_dir), directory)
    return directory


@pytest.fixture(scope="module")
def record(workdir):
    return layer_signals.measure(workdir, num_batches=2)


# A batch is an image and a label here, and a feed hands them on as they are.


def hand_on(arrays, batch, key):
    del arrays, key
    return batch["image"], batch["label"]


BATCH = {
    "image": np.random.default_rng(0).normal(size=(6, 4, 4, 1)).astype(np.float32),
    "label": np.arange(6, dtype=np.int32),
    "mask": np.ones(6, np.float32),
}


def state_of(model, seed=3):
    variables = draw(model, BATCH["image"].shape[1:], seed)
    return TrainState(jnp.int32(0), jnp.int32(seed), variables["params"], {}, variables["batch_stats"], ())


def responses(model, state, batch=BATCH):
    sums = jax.jit(layer_signals.make_response_sums(model.apply, hand_on))
    return layer_signals.deviations(sums(state, {}, batch))


def gradient_norms(model):
    return jax.jit(layer_signals.make_gradient_norms(model.apply, hand_on, cross_entropy))


@pytest.mark.parametrize(
    ("model", "count"),
    [
        (CifarResNet(depth=8), 7),
        (CifarResNet(depth=20, plain=True), 19),
        (CifarResNet(depth=14, shortcut="C"), 13),  # projections are no layers of the depth
        (ResNet(depth=18), 17),
        (ResNet(depth=50), 49),
    ],
)
def test_there_is_a_kernel_and_a_norm_for_each_layer_but_the_dense_one(model, count):
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    params = jax.eval_shape(lambda: model.lazy_init(jax.random.key(0), image, train=False))["params"]
    kernels = layer_signals.in_forward_order(params, layer_signals.CONVOLUTION)
    assert len(kernels) == count
    for before, after in itertools.pairwise(kernels):
        assert before.shape[-1] in (after.shape[-2], after.shape[-2] // 4, after.shape[-1] * 4), (
            "out of order"
        )


def test_ten_blocks_are_counted_and_not_spelled():
    tree = {f"stage1_block{n}": {"conv1": {"kernel": n}, "conv2": {"kernel": n + 0.5}} for n in (10, 2, 1)}
    tree["conv1"] = {"kernel": 0}
    assert layer_signals.in_forward_order(tree, layer_signals.CONVOLUTION) == [0, 1, 1.5, 2, 2.5, 10, 10.5]


def test_a_gradient_is_how_far_a_step_of_training_goes(data_dir):
    config = tiny_study(data_dir).base
    config.model.depth = 8
    config.optimizer.learning_rate, config.schedule.name = 1.0, "constant"
    config.optimizer.momentum = config.optimizer.weight_decay = 0.0
    program = programs.make_program(config, jax.devices()[:1])
    state = program.init_state(5)
    look = layer_signals.make_measurement(program, num_batches=1)
    norms, kernels = [], []
    for batch in itertools.islice(program.feed.train_batches(5, 0), 2):
        norms.append(look(state)["gradient_norms"])
        kernels.append(layer_signals.in_forward_order(state.params, layer_signals.CONVOLUTION))
        kernels[-1] = [np.array(kernel) for kernel in kernels[-1]]
        batches = {name: leaf[None] for name, leaf in batch.items()}
        state = devices.replicate(state, program.devices)
        state, _ = program.train(state, program.arrays, devices.shard(batches, 1, axis=1))
    kernels.append(layer_signals.in_forward_order(state.params, layer_signals.CONVOLUTION))
    for step in range(2):
        moved = [np.linalg.norm(a - b) for a, b in zip(kernels[step], kernels[step + 1], strict=True)]
        np.testing.assert_allclose(norms[step], moved, rtol=1e-3)


def test_a_kernel_twice_as_large_has_half_the_gradient():
    model = CifarResNet(depth=8, plain=True)
    measure = gradient_norms(model)
    state = state_of(model)
    norms = measure(state, {}, BATCH)
    block = state.params["stage1_block1"]
    larger = block | {"conv1": {"kernel": 2 * block["conv1"]["kernel"]}}
    twice = measure(state.replace(params=state.params | {"stage1_block1": larger}), {}, BATCH)
    factors = np.ones(7)
    factors[1] = 0.5
    np.testing.assert_allclose(twice / norms, factors, rtol=1e-2)  # but for BN's epsilon


def test_a_block_with_a_last_scale_of_zero_answers_zero_and_learns_nothing():
    model = CifarResNet(depth=8)
    state = state_of(model)
    block = state.params["stage2_block1"]
    silent = block | {"norm2": block["norm2"] | {"scale": jnp.zeros(32)}}
    state = state.replace(params=state.params | {"stage2_block1": silent})
    deviations = responses(model, state)
    assert deviations[4] == 0
    assert (np.delete(deviations, 4) > 0).all()
    norms = gradient_norms(model)(state, {}, BATCH)
    np.testing.assert_array_equal(norms[3:5], 0)
    assert (np.delete(norms, [3, 4]) > 0).all()


def test_a_normalised_response_is_as_wide_as_its_scale():
    model = CifarResNet(depth=8)
    state = state_of(model)
    scales = [0.5, 1, 2, 3, 0.1, 1.5, 0.7]
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: -leaf if path[-1].key == "scale" else leaf, state.params
    )
    names = ["norm1", *(f"stage{s}_block1/norm{n}" for s in (1, 2, 3) for n in (1, 2))]
    for name, scale in zip(names, scales, strict=True):
        *block, norm = name.split("/")
        owner = params[block[0]] if block else params
        owner[norm]["scale"] *= scale  # minus ones before
    # Running statistics that are those of this batch.
    stats = state.batch_stats
    step = jax.jit(
        lambda stats: model.apply(
            {"params": params, "batch_stats": stats}, BATCH["image"], train=True, mutable=["batch_stats"]
        )[1]["batch_stats"]
    )
    for _ in range(150):
        stats = step(stats)
    measured = responses(model, state.replace(params=params, batch_stats=stats))
    np.testing.assert_allclose(measured, scales, rtol=1e-2)


def test_responses_are_those_of_the_images_under_the_mask():
    model = CifarResNet(depth=8)
    state = state_of(model)
    half = {name: leaf[:3] for name, leaf in BATCH.items()}
    masked = BATCH | {"mask": np.float32([1, 1, 1, 0, 0, 0])}
    np.testing.assert_allclose(responses(model, state, masked), responses(model, state, half), rtol=1e-5)
    assert not np.allclose(responses(model, state), responses(model, state, half), rtol=1e-3)


def test_sums_of_batches_give_the_deviation_of_all_values():
    values = np.random.default_rng(2).normal(3, 2, size=(5, 40))
    sums = [[[len(v)], [v.sum()], [(v**2).sum()]] for v in values]
    np.testing.assert_allclose(layer_signals.deviations(np.sum(sums, axis=0)), [values.std()])


def test_every_saved_state_of_every_run_is_measured(record):
    points = {(s["depth"], s["plain"], s["seed"], s["step"]) for s in record["states"]}
    assert points == set(itertools.product((8,), (True, False), (0, 1), (0, 2, 4)))
    assert len(record["states"]) == len(points)
    assert record["response_images"] == 400
    for state in record["states"]:
        assert len(state["gradient_norms"]) == len(state["kernel_norms"]) == 7
        assert (state["response_stds"] is None) == (state["step"] == 0)


def test_twins_start_from_the_same_kernels(record):
    plain, residual = (layer_signals.pick(record, 8, plain, 0, "kernel_norms") for plain in (True, False))
    np.testing.assert_array_equal(plain, residual)
    assert (plain[0] != plain[1]).any(), "but seeds do not"


def test_the_table_has_a_row_for_each_net_and_step(record):
    head, *rows = cells_of(layer_signals.table(record, "markdown"))
    assert [row[:3] for row in rows] == [
        ["8", kind, step] for kind in ("plain", "residual") for step in ("0", "2", "4")
    ]
    states = [s for s in record["states"] if s["plain"] and s["step"] == 0]
    norms = np.mean([s["gradient_norms"] for s in states], axis=0)
    cells = [float(rows[0][head.index(f"gradient, {which}")]) for which in ("first", "largest", "last")]
    np.testing.assert_allclose(cells, [norms[0], norms.max(), norms[-1]], rtol=5e-3)
    assert [row[-1] == "" for row in rows] == [True, False, False] * 2


def test_the_figures_show_the_measured_values(record):
    axes = layer_signals.draw_gradients(record).axes
    assert [axis.get_title() for axis in axes[:4]] == ["plain nets", "residual nets", "plain-8", "residual-8"]
    expected = layer_signals.pick(record, 8, True, 4, "gradient_norms").mean(axis=0)
    np.testing.assert_allclose(axes[2].lines[2].get_ydata(), expected)
    for axis, plain in ((axes[0], True), (axes[1], False)):
        expected = layer_signals.pick(record, 8, plain, 0, "gradient_norms").mean(axis=0)
        np.testing.assert_allclose(axis.lines[0].get_ydata(), expected)
    original, ranked = layer_signals.draw_responses(record).axes
    assert [line.get_label() for line in original.lines] == ["plain-8", "residual-8"]
    for line, plain in zip(original.lines, (True, False), strict=True):
        first, last = (layer_signals.pick(record, 8, plain, step, "response_stds") for step in (2, 4))
        assert not np.allclose(first, last)
        np.testing.assert_allclose(line.get_ydata(), last.mean(axis=0))
    assert sorted(ranked.lines[0].get_ydata(), reverse=True) == list(ranked.lines[0].get_ydata())


def test_a_legend_names_the_lines_of_both_panels(record):
    record["states"] = [one for one in record["states"] if one["plain"] or one["step"] == 0]
    for row in np.reshape(layer_signals.draw_gradients(record).axes, (3, 2)):
        shown = [text.get_text() for text in row[1].get_legend().get_texts()]
        assert shown == [line.get_label() for line in row[0].lines]
        assert len(shown) >= len(row[1].lines)


def test_a_report_lies_beside_the_runs(record, tmp_path):
    layer_signals.write_report(record, tmp_path / "layers")
    assert {path.name for path in (tmp_path / "layers").iterdir()} == {
        *("record.json", "table.md"),
        *("gradients.png", "gradients.svg", "responses.png", "responses.svg"),
    }


def test_a_study_that_cannot_be_measured_is_refused(data_dir, tmp_path, config):
    def refuse(study, message):
        (tmp_path / "config.json").write_text(study.to_json())
        with pytest.raises(ValueError, match=message):
            layer_signals.measure(tmp_path)

    with pytest.raises(ValueError, match="num_batches = 0 must be 1 or more"):
        layer_signals.measure(tmp_path, num_batches=0)
    with pytest.raises(ValueError, match=f"workdir = {tmp_path} holds no study: .*config.json"):
        layer_signals.measure(tmp_path)
    refuse(config, f"workdir = {tmp_path} holds no study: its config has no base, grid and seeds")
    study = tiny_study(data_dir)
    refuse(study, "holds no runs of a study")
    other = study.copy_and_resolve_references()
    other.base = config
    refuse(other, r"grid: model\.depth = 8 does not fit the base config")
    other = study.copy_and_resolve_references()
    other.grid = (("model.plain", (True, False)), ("optimizer.learning_rate", (1.0, 2.0)))
    refuse(other, r"a depth study needs values of model\.depth, and True and False for model\.plain")
    for plain in (True, False):
        (tmp_path / f"runs/depth-8_plain-{plain}_seed-0").mkdir(parents=True)
    other = study.copy_and_resolve_references()
    with other.unlocked():
        other.adjust = ((("model.plain", False), (("model.scan_blocks", True),)),)
    refuse(other, r"depth-8_plain-False_seed-0: model\.scan_blocks = True stacks the layers of a stage")
    with other.unlocked():
        del other.adjust
        other.base.model.scan_blocks = True
    refuse(other, r"depth-8_plain-True_seed-0: model\.scan_blocks = True stacks the layers of a stage")
    with study.unlocked():
        study.adjust = ((("model.plain", False), (("batch_size", 1257),)),)
    refuse(
        study,
        r"at one batch size only; these differ: batch_size = 24 in depth-8_plain-True_seed-0; "
        r"batch_size = 1257 in depth-8_plain-False_seed-0",
    )


def test_runs_that_have_not_begun_are_left_out(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "runs/depth-8_plain-False_seed-1")
    states = layer_signals.measure(tmp_path, num_batches=1)["states"]
    assert {(state["plain"], state["seed"]) for state in states} == {(True, 0), (True, 1), (False, 0)}


def test_a_run_that_had_other_training_images_is_refused(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    path = max((tmp_path / "runs").iterdir()) / "environment.json"
    starts = json.loads(path.read_text())
    starts[-1]["data"]["train"] = [7, 8]
    path.write_text(json.dumps(starts))
    with pytest.raises(
        ValueError, match=rf"{path.parent.name} was trained with other data: data.splits.train"
    ):
        layer_signals.measure(tmp_path, num_batches=1)


def test_batches_are_those_of_the_next_steps_and_responses_of_training_images(data_dir, monkeypatch):
    program = programs.make_program(tiny_study(data_dir).base, jax.devices()[:1])
    roles, eval_batches = [], program.feed.eval_batches
    monkeypatch.setattr(program.feed, "eval_batches", lambda role: roles.append(role) or eval_batches(role))
    monkeypatch.setattr(
        layer_signals, "make_gradient_norms", lambda *_: lambda state, *_: jnp.float32(state.step)[None] ** 2
    )
    monkeypatch.setattr(
        layer_signals,
        "make_response_sums",
        lambda *_: lambda *given: jnp.float32(given[2]["index"][0]) ** jnp.arange(3)[:, None],
    )
    look = layer_signals.make_measurement(program, num_batches=4)
    found = look(program.init_state(5).replace(step=jnp.int32(2)))
    assert found["gradient_norms"] == [np.mean([4, 9, 16, 25])]
    # Of one value in each batch, which is the number of its first example.
    np.testing.assert_allclose(found["response_stds"], [np.std([0, 200, 400, 600])], rtol=1e-5)
    assert roles == ["train"]


def test_the_table_has_the_kernels_and_the_mean_response(record):
    head, *rows = cells_of(layer_signals.table(record, "markdown"))
    states = [s for s in record["states"] if s["plain"] and s["step"] == 4]
    kernels = np.mean([s["kernel_norms"] for s in states], axis=0)
    cells = [float(rows[2][head.index(f"kernel, {which}")]) for which in ("first", "largest", "last")]
    np.testing.assert_allclose(cells, [kernels[0], kernels.max(), kernels[-1]], rtol=5e-3)
    mean = np.mean([s["response_stds"] for s in states])
    np.testing.assert_allclose(float(rows[2][-1]), mean, atol=5e-3)


def test_lines_begin_at_the_first_layer_in_a_band_from_the_least_seed_to_the_greatest(record):
    axes = layer_signals.draw_gradients(record).axes
    for axis, what in ((axes[2], "gradient_norms"), (axes[4], "kernel_norms")):
        seeds = layer_signals.pick(record, 8, True, 4, what)
        line, band = axis.lines[2], axis.collections[2].get_datalim(axis.transData)
        np.testing.assert_array_equal(line.get_xdata(), range(1, 8))
        np.testing.assert_allclose(line.get_ydata(), seeds.mean(axis=0))
        np.testing.assert_allclose((band.ymin, band.ymax), (seeds.min(), seeds.max()), rtol=1e-5)
