"""A checkpoint is evaluated as the loop would, or as a paper does; and nothing of the run is changed."""

import csv
import functools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import linen as nn

from cnn_cases import evaluate, saved_runs
from cnn_cases.data import views
from cnn_cases.models import vgg
from cnn_cases.training import checkpoint, loop, predictions, programs, provenance, steps
from cnn_cases.training.state import TrainState
from configs import resnet_digits
from tests.conftest import draw, tiny_config

ROOT = pathlib.Path(__file__).parent.parent
FILES = ["confusion.csv", "confusion.png", "metrics.json", "mistakes.png"]


def train(config, workdir, program):
    return loop.train_and_evaluate(config, workdir, program=program, show_progress=False)


@pytest.fixture(scope="module")
def program(data_dir):
    """LeNet-5's, on one device."""
    return programs.make_program(tiny_config(data_dir), jax.devices()[:1])


@pytest.fixture(scope="module")
def trained(data_dir, program, tmp_path_factory):
    """The workdir of a finished run, to be read only. It had one device; evaluations here take all four."""
    workdir = tmp_path_factory.mktemp("trained")
    config = tiny_config(data_dir)
    config.checkpoint.keep_last = 3
    train(config, workdir, program)
    return workdir


@pytest.fixture(scope="module")
def state(program):
    return program.init_state(3)


def contents(directory):
    """Every path below a directory, with its bytes and when it was changed."""
    return {
        path.relative_to(directory): (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
        for path in directory.rglob("*")
    }


def test_the_single_view_gives_the_figures_of_the_run_and_changes_nothing(trained, tmp_path):
    before = contents(trained)
    metrics, out = evaluate.evaluate_checkpoint(trained, out=str(tmp_path / "out"))
    result = json.loads((trained / "result.json").read_text())["metrics"]
    assert (metrics["split"], metrics["protocol"], metrics["step"]) == ("test", "single", 12)
    assert (metrics["num_examples"], metrics["views_per_example"]) == (355, 1)
    assert 1 - metrics["accuracy"] == pytest.approx(result["test/error"], abs=1e-12)
    assert metrics["loss"] == pytest.approx(result["test/loss"], rel=1e-5)
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert contents(trained) == before


def test_another_evaluation_is_not_overwritten(trained, tmp_path):
    out = str(tmp_path / "out")
    evaluate.evaluate_checkpoint(trained, out=out)
    before = contents(tmp_path)
    for key, changes in (("split", {"split": "validation"}), ("step", {"which": 8})):
        with pytest.raises(
            ValueError, match=rf"out = {out} already holds another evaluation \(different {key}\)"
        ):
            evaluate.evaluate_checkpoint(trained, out=out, **changes)
    assert contents(tmp_path) == before
    metrics, _ = evaluate.evaluate_checkpoint(trained, out=out)
    assert metrics["workdir"] == str(trained)


def test_files_lie_in_the_workdir_and_agree_with_each_other(trained, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(trained, workdir)
    metrics, out = evaluate.evaluate_checkpoint(workdir, protocol="ten_crop", split="validation", which=8)
    assert out == workdir / "evaluation" / "validation_ten_crop_8"
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert metrics["views_per_example"] == 10
    assert metrics["accuracy"] <= metrics["top_5_accuracy"] <= 1
    head, *rows = csv.reader((out / "confusion.csv").read_text().splitlines())
    counts = np.array([row[1:] for row in rows], int)
    assert head[1:] == [row[0] for row in rows] == list("0123456789")
    assert counts.sum() == 185
    assert counts.trace() / 185 == pytest.approx(metrics["accuracy"])
    again, _ = evaluate.evaluate_checkpoint(workdir, protocol="ten_crop", split="validation", which="8")
    unclocked = {"seconds": None}
    assert again | unclocked == metrics | unclocked
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["12", "4", "8"]


def test_a_report_is_of_the_examples_of_its_split_and_the_five_likeliest_classes_of_each(
    trained, tmp_path, monkeypatch
):
    given = []
    monkeypatch.setattr(evaluate, "write_report", lambda *arguments: given.append(arguments))
    metrics, _ = evaluate.evaluate_checkpoint(trained, split="validation", out=tmp_path)
    ((*_, probabilities, label, examples),) = given
    assert [one for _, one in examples] == label.tolist()
    five = np.argsort(-probabilities, axis=1)[:, :5]
    assert metrics["top_5_accuracy"] == pytest.approx((five == label[:, None]).any(axis=1).mean())
    assert metrics["top_5_accuracy"] > metrics["accuracy"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("batch_size", "24", r"batch_size = '24' \(str\) must be an int"),
        ("optimizer", 3, r"optimizer = 3 \(int\) must be a ConfigDict with clip_norm"),
        ("bacth_size", 24, "bacth_size is unknown; did you mean batch_size"),
    ],
)
def test_a_config_that_was_changed_by_hand_is_refused_by_its_key(key, value, message, trained, tmp_path):
    config = json.loads((trained / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ValueError, match=message) as refusal:
        saved_runs.load_config(tmp_path)
    assert f"workdir = {tmp_path} has a config.json that does not fit this code" in str(refusal.value)


def test_a_run_of_before_a_key_existed_and_on_other_devices_can_be_evaluated(trained, tmp_path):
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    config = json.loads((trained / "config.json").read_text())
    del config["evaluation"]["protocol"], config["data"]["splits"]["test"]
    config["evaluation"]["final_splits"] = ["validation"]
    config["batch_size"] = 27  # over three devices, say; there are four
    (tmp_path / "config.json").write_text(json.dumps(config))
    metrics, _ = evaluate.evaluate_checkpoint(tmp_path)
    assert (metrics["split"], metrics["protocol"]) == ("validation", "single")


@pytest.mark.parametrize(
    ("batch_size", "num_microbatches", "count"), [(24, 1, 4), (24, 4, 3), (27, 1, 3), (25, 1, 1)]
)
def test_as_many_devices_evaluate_as_share_the_batches_of_the_run(
    batch_size, num_microbatches, count, data_dir
):
    config = tiny_config(data_dir)
    config.batch_size, config.num_microbatches = batch_size, num_microbatches
    assert len(saved_runs.usable_devices(config)) == count
    programs.check_numbers(config, count)


def test_a_config_comes_back_as_it_was(trained, data_dir):
    config = tiny_config(data_dir)
    config.checkpoint.keep_last = 3
    assert saved_runs.load_config(trained).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"protocol": "tencrop"}, "evaluation.protocol = 'tencrop' is unknown; known: single, flip"),
        ({"split": "tset"}, "split = 'tset' is not in data.splits of .*, which has test, train, validation"),
        ({"which": "5"}, r"no checkpoint of step '5'; .* has steps 4, 8, 12; or use 'last' or 'best'"),
        ({"which": "newest"}, "no checkpoint of step 'newest'"),
        (
            {"protocol": "multi_scale_dense"},
            r"workdir = .*: .*multi_scale_dense' has views of 27x27 .* cannot take",
        ),
        ({"data_dir": "a file"}, "a file"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_and_nothing_written(arguments, message, trained, tmp_path):
    if "data_dir" in arguments:
        arguments = {"data_dir": str(tmp_path / arguments["data_dir"])}
        pathlib.Path(arguments["data_dir"]).write_text("no directory")
        message = re.escape(arguments["data_dir"])
    before = contents(trained)
    with pytest.raises((ValueError, OSError), match=message):
        evaluate.evaluate_checkpoint(trained, out=str(tmp_path / "out"), **arguments)
    assert contents(trained) == before
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_to_is_refused_before_anything_is_predicted(
    trained, tmp_path, monkeypatch
):
    monkeypatch.setattr(programs, "predict", lambda *_, **__: pytest.fail("predicted all the same"))
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(OSError, match=str(tmp_path / "file")):
        evaluate.evaluate_checkpoint(trained, out=str(tmp_path / "file"))


def test_a_directory_without_a_run_is_refused(trained, tmp_path):
    with pytest.raises(ValueError, match=r"holds no run of train.py: .*config.json"):
        evaluate.evaluate_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"base": {}}')
    with pytest.raises(ValueError, match=r"holds no run of train.py: its config has no model"):
        evaluate.evaluate_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is damaged"):
        evaluate.evaluate_checkpoint(tmp_path)
    shutil.copy(trained / "config.json", tmp_path)
    with pytest.raises(ValueError, match=r"there is no checkpoint in .*checkpoints"):
        evaluate.evaluate_checkpoint(tmp_path)


@pytest.fixture(scope="module")
def twin(data_dir, program, tmp_path_factory):
    """The workdir of a run with another seed, to be read only."""
    workdir = tmp_path_factory.mktemp("twin")
    config = tiny_config(data_dir)
    config.seed = 1
    config.checkpoint.keep_last = 3
    train(config, workdir, program)
    return workdir


def test_an_ensemble_answers_with_the_mean_of_its_networks_probabilities(trained, twin, program, tmp_path):
    metrics, out = evaluate.evaluate_checkpoint(trained, twin, split="validation", out=tmp_path / "out")
    answers = []
    for workdir, network in zip((trained, twin), metrics["networks"], strict=True):
        out_of_one = tmp_path / workdir.name
        alone, _ = evaluate.evaluate_checkpoint(workdir, split="validation", out=out_of_one)
        assert network == {"workdir": str(workdir)} | {
            key: alone[key] for key in ("step", "accuracy", "top_5_accuracy", "loss")
        }
        state = checkpoint.read(workdir / "checkpoints", 12, program.shapes_of_state())
        probabilities, label = programs.predict(program, state, "validation", "single", batch_size=100)
        answers.append(probabilities)
    together = (answers[0] + answers[1]) / 2
    assert metrics["accuracy"] == pytest.approx((together.argmax(axis=1) == label).mean())
    assert metrics["loss"] == pytest.approx(-np.log(together[np.arange(len(label)), label]).mean(), rel=1e-5)
    assert metrics["num_examples"] == 185
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert json.loads((out / "metrics.json").read_text()) == metrics
    text = evaluate.table(metrics)
    assert f"{twin}, step 12: accuracy {metrics['networks'][1]['accuracy']:.2%}" in text
    assert "2 networks, protocol 'single'" in text
    again, _ = evaluate.evaluate_checkpoint(trained, twin, split="validation", out=tmp_path / "out")
    assert again | {"seconds": None} == metrics | {"seconds": None}


def test_an_ensemble_does_not_depend_on_the_order_of_its_networks(trained, twin, tmp_path):
    one, other = (
        evaluate.evaluate_checkpoint(*runs, protocol="flip", out=tmp_path / runs[0].name)[0]
        for runs in ((trained, twin), (twin, trained))
    )
    assert one["views_per_example"] == 2
    assert {one[key] for key in ("accuracy", "loss")} == {other[key] for key in ("accuracy", "loss")}
    assert one["networks"] == other["networks"][::-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"data": {"splits": {"test": "test[:50]"}}},
            r"'test' is digits test\[:50\] in .*, that of .* digits test",
        ),
        (
            {"data": {"name": "mnist"}},
            "'test' is mnist test in .*, that of .* digits test in .*; an ensemble is",
        ),
        (
            {"data": {"splits": {"tset": "test"}}},
            "split = 'test' is not in data.splits of .*, which has train, tset",
        ),
    ],
)
def test_an_ensemble_is_of_the_same_examples(change, message, trained, twin, tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "predict", lambda *_, **__: pytest.fail("predicted all the same"))
    config = json.loads((twin / "config.json").read_text())
    splits = {"train": "train", "validation": "validation", **change["data"].get("splits", {"test": "test"})}
    config["data"] |= change["data"] | {"splits": splits}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        evaluate.evaluate_checkpoint(trained, tmp_path, out=tmp_path / "out")


def test_the_command_takes_an_ensemble(trained, twin, data_dir, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(trained, home / "moved")
    text = (home / "moved/config.json").read_text()
    assert data_dir in text
    (home / "moved/config.json").write_text(text.replace(data_dir, str(tmp_path / "nowhere")))
    command = [sys.executable, "-m", "cnn_cases.evaluate", "--workdir=~/moved", f"--workdir={twin}"]
    command += ["--protocol=flip", "--split=validation", f"--data_dir={data_dir}", "--out=~/both"]
    environment = os.environ | {"HOME": str(home), "PYTHONPATH": str(ROOT)}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stderr
    assert f"{home}/moved, step 12: accuracy " in done.stdout
    assert "split 'validation' (digits validation), 185 examples" in done.stdout
    assert "2 networks, protocol 'flip', views of each: 2" in done.stdout
    assert f"results: {home}/both" in done.stdout
    assert sorted(path.name for path in (home / "both").iterdir()) == FILES


def test_an_ensemble_wants_to_know_where_its_files_go(trained, twin):
    with pytest.raises(
        ValueError, match="out = '': an ensemble needs --out, the directory for its evaluation"
    ):
        evaluate.evaluate_checkpoint(trained, twin)


def test_a_run_has_one_vote(trained, twin, tmp_path):
    with pytest.raises(ValueError, match=rf"workdir = {trained}/\.\./{trained.name} is given twice"):
        evaluate.evaluate_checkpoint(twin, trained, f"{trained}/../{trained.name}", out=tmp_path / "out")


def test_networks_whose_labels_differ_are_no_ensemble(trained, twin, tmp_path, monkeypatch):
    labels = iter((np.array([0, 1]), np.array([1])))
    monkeypatch.setattr(programs, "predict", lambda *_, **__: (np.full((2, 10), 0.1), next(labels)))
    with pytest.raises(ValueError, match=rf"workdir = {twin} has other labels in 'test' than {trained}"):
        evaluate.evaluate_checkpoint(trained, twin, out=tmp_path / "out")


def test_all_networks_of_an_ensemble_are_read_before_the_first_is_asked(trained, twin, tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "predict", lambda *_, **__: pytest.fail("predicted all the same"))
    shutil.copytree(twin, tmp_path / "damaged")
    for path in (tmp_path / "damaged" / "checkpoints" / "12").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"damaged/checkpoints"):
        evaluate.evaluate_checkpoint(trained, tmp_path / "damaged", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_ends_with_one_message(trained):
    command = [sys.executable, "-m", "cnn_cases.evaluate", f"--workdir={trained}", "--step=7"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().startswith("error: there is no checkpoint of step '7'")
    assert done.stderr.count("\n") == 1


# What the network is shown.


def test_any_number_of_devices_and_any_batches_predict_the_same(program, state, config):
    expected, label = programs.predict(program, state, "test", "flip", batch_size=200)
    assert len(label) == 355
    np.testing.assert_allclose(expected.sum(axis=1), 1, rtol=1e-6)
    for count, batch_size in ((2, 62), (4, 400)):
        other = programs.make_program(config, jax.devices()[:count])
        found, _ = programs.predict(other, state, "test", "flip", batch_size=batch_size)
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_mirror_image_has_the_predictions_of_its_image_under_flip(program, state):
    examples = list(program.feed.examples("validation"))[:40]
    mirrored = [(image[:, ::-1], label) for image, label in examples]
    flip = views.make_views("flip", program.feed.image_shape, program.feed.view)

    def predict(examples, show):
        return predictions.average_views(
            examples,
            show,
            lambda images: program.predict(state, program.arrays, images[None]),
            batch_size=lambda _: 16,
        )[0]

    np.testing.assert_allclose(predict(mirrored, flip), predict(examples, flip), rtol=1e-6)
    single = views.make_views("single", program.feed.image_shape, program.feed.view)
    assert np.abs(predict(mirrored, single) - predict(examples, single)).max() > 1e-3


@pytest.fixture(scope="module")
def small_vgg():
    """A narrow VGG for 32 pixels, its parameters, and its predictions of views."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(vgg, "FILTERS", (4, 4, 4, 4, 4))
        model = vgg.VGG(variant="A", image_size=32, dense_features=8, num_classes=3)
        params = draw(model, (32, 32, 3), seed=1)["params"]
        params = jax.tree.map(lambda leaf: 1.5 * leaf, params)  # so that the classes differ
        state = TrainState(0, 0, params, ema_params={}, batch_stats={}, opt_state={})
        predict = jax.jit(steps.make_predict_step(model.apply, lambda _, image: image / 255.0))
        yield model, params, lambda images: predict(state, {}, images)


def image_of(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def at_the_crops_size(image, crop):
    """The first of the dense views of a ResNet's test, which is as large as a crop."""
    return views.resnet_dense(image, crop)[:1]


def test_dense_evaluation_at_the_crops_size_without_mirrors_is_the_single_view(small_vgg):
    _, _, run = small_vgg
    dense = functools.partial(at_the_crops_size, crop=32)
    examples = [(image_of(32, 32), 0), (image_of(32, 32)[::-1], 1)]
    found, _ = predictions.average_views(examples, dense, run, batch_size=lambda _: 3)
    single = views.make_views("single", (32, 32, 3), lambda image: image)
    expected, _ = predictions.average_views(examples, single, run, batch_size=lambda _: 3)
    np.testing.assert_array_equal(found, expected)
    assert np.ptp(expected, axis=1).min() > 1e-3


def test_a_rectangle_is_answered_by_the_mean_of_its_map_of_scores(small_vgg):
    model, params, run = small_vgg
    image = image_of(32, 110)
    dense = functools.partial(at_the_crops_size, crop=32)
    found, _ = predictions.average_views([(image, 0)], dense, run, batch_size=lambda _: 2)
    held = image[None, :, 7:103] / 255.0  # 96 of 110 columns
    apply = jax.jit(functools.partial(model.apply, train=False, capture_intermediates=True))
    _, inner = apply({"params": params}, held)
    (score_map,) = inner["intermediates"]["logits"]["__call__"]
    assert score_map.shape == (1, 1, 3, 3)
    np.testing.assert_allclose(found[0], nn.softmax(score_map.mean(axis=(0, 1, 2))), rtol=1e-5)


def test_answers_that_are_no_numbers_are_refused(trained, monkeypatch):
    probabilities = np.full((3, 10), 0.1)
    probabilities[1] = np.nan
    monkeypatch.setattr(programs, "predict", lambda *_, **__: (probabilities, np.zeros(3, np.int32)))
    with pytest.raises(ValueError, match="step 12 predicts NaN for 1 of 3 images; choose another checkpoint"):
        evaluate.evaluate_checkpoint(trained)


# The loop.


def test_the_final_figures_have_the_papers_test_beside_the_single_view(config, program, tmp_path):
    config.num_steps = 4
    config.schedule.warmup_steps = 0
    config.evaluation.final_splits = ("train", "validation")
    config.evaluation.protocol = "ten_crop"
    result = train(config, tmp_path, program)
    single, ten = "validation/", "validation/ten_crop/"
    assert set(result["metrics"]) == {
        "train/loss",
        "train/error",
        f"{single}loss",
        f"{single}error",
        f"{ten}loss",
        f"{ten}error",
        f"{ten}top_5_error",
    }
    metrics, _ = evaluate.evaluate_checkpoint(tmp_path, split="validation")
    assert metrics["protocol"] == "ten_crop"
    assert metrics["loss"] == pytest.approx(result["metrics"][f"{ten}loss"], rel=1e-5)
    assert 1 - metrics["accuracy"] == pytest.approx(result["metrics"][f"{ten}error"], abs=1e-12)


@pytest.mark.parametrize("protocol", ["ten", "multi_scale_dense"])
def test_a_protocol_that_the_network_cannot_take_is_refused_before_the_workdir_is_touched(
    protocol, config, tmp_path
):
    config.evaluation.protocol = protocol
    with pytest.raises(ValueError, match=f"evaluation.protocol = '{protocol}'"):
        train(config, tmp_path / "run", None)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=f"evaluation.protocol = '{protocol}'"):
        programs.check(config)


def test_a_net_that_averages_over_space_takes_larger_views(data_dir):
    config = resnet_digits.get_config()
    config.data.data_dir = data_dir
    config.model.depth = 8
    config.data.normalization = "channel"
    config.evaluation.protocol = "multi_scale_dense"
    programs.check(config)


# Checkpoints and figures.


def test_the_best_checkpoint_is_the_one_of_the_lowest_error(trained):
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    errors = {row["step"]: row["validation/error"] for row in rows if "validation/error" in row}
    assert checkpoint.find(trained / "checkpoints", "best") == min(errors, key=errors.get)
    assert checkpoint.find(trained / "checkpoints", "last") == 12


def test_a_damaged_checkpoint_is_an_error_and_stays_where_it_is(trained, state, tmp_path):
    shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    for file in (tmp_path / "checkpoints" / "12").rglob("manifest.ocdbt"):
        file.write_bytes(file.read_bytes()[:-3])
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint 12 in .* cannot be read: .*manifest.ocdbt"):
        checkpoint.read(tmp_path / "checkpoints", 12, state)
    assert checkpoint.read(tmp_path / "checkpoints", 8, state).step == 8
    assert contents(tmp_path) == before


def test_a_checkpoint_of_another_network_says_what_is_different(trained, state):
    other = state.replace(params=state.params | {"conv9": state.params["conv1"]})
    with pytest.raises(checkpoint.OtherStateError) as raised:
        checkpoint.read(trained / "checkpoints", 12, other)
    difference = "params/conv9/bias is missing in the checkpoint but 6 now"
    assert f"belongs to another network or optimizer: {difference}" in str(raised.value)
    wider = jax.tree.map(lambda leaf: np.zeros((*leaf.shape, 2)), state.params)
    difference = "conv1/bias is 6 in the checkpoint but 6x2 now"
    with pytest.raises(checkpoint.OtherStateError, match=f"{difference}; .* more"):
        checkpoint.read(trained / "checkpoints", 12, state.replace(params=wider))


@pytest.mark.parametrize("changed", ["train", "test", "validation"])
def test_an_evaluation_of_other_data_is_refused(changed, trained, program, monkeypatch):
    """Of another split it does not depend."""
    there = program.feed.fingerprint()
    monkeypatch.setattr(type(program.feed), "fingerprint", lambda _: there | {changed: [7, 8]})
    if changed == "validation":
        assert evaluate.evaluate_checkpoint(trained)[0]["split"] == "test"
        return
    with pytest.raises(
        ValueError, match=rf"other data: data.splits.{changed} was \[.*\] then and is \[7, 8\] now"
    ):
        evaluate.evaluate_checkpoint(trained)


def test_an_evaluation_by_other_code_is_told(trained, monkeypatch, caplog):
    evaluate.evaluate_checkpoint(trained)
    assert not caplog.records
    monkeypatch.setattr(provenance, "_code", lambda: "0123456789ab")
    evaluate.evaluate_checkpoint(trained)
    assert "was last started with other code or packages: code: " in caplog.text


def test_the_confusion_matrix_is_true_by_predicted():
    counts = evaluate.confusion(np.array([1, 1, 0, 2]), np.array([0, 0, 0, 2], np.int32), 3)
    np.testing.assert_array_equal(counts, [[1, 2, 0], [0, 0, 0], [0, 0, 1]])
    text = evaluate.confusion_csv(counts, ["a", "b,c", "d"])
    assert list(csv.reader(text.splitlines())) == [
        ["true \\ predicted", "a", "b,c", "d"],
        ["a", "1", "2", "0"],
        ["b,c", "0", "0", "0"],
        ["d", "0", "0", "1"],
    ]


def test_the_confusion_figure_has_the_shares_of_each_true_class_in_its_row():
    axis = evaluate.draw_confusion(np.array([[3, 1], [0, 4]]), ["cat", "dog"], "").axes[0]
    np.testing.assert_allclose(axis.images[0].get_array(), [[0.75, 0.25], [0, 1]])
    places = {text.get_position(): text.get_text() for text in axis.texts}  # column and row
    assert places == {(0, 0): "3", (1, 0): "1", (1, 1): "4"}
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("predicted class", "true class")


def test_a_mistake_is_shown_with_its_true_and_its_predicted_class_and_the_latters_probability(
    tmp_path, monkeypatch
):
    sheets, draw_mistakes = [], evaluate.draw_mistakes
    monkeypatch.setattr(
        evaluate, "draw_mistakes", lambda *given: sheets.append(given) or draw_mistakes(*given)
    )
    probabilities = np.array(
        [[0.9, 0.0, 0.1], [0.25, 0.0, 0.75], [0.0, 1.0, 0.0], [0.5, 0.3, 0.2], [0.6, 0.4, 0.0]]
    )
    label = np.array([0, 0, 2, 0, 0])
    examples = [(np.full((2, 2, 1), 10 * number, np.uint8), one) for number, one in enumerate(label)]
    metrics = {"examples_of": "pets test", "step": 7, "protocol": "single"}
    evaluate.write_report(tmp_path, metrics, ["cat", "dog", "owl"], probabilities, label, examples)
    ((mistakes, title),) = sheets
    assert [(image[0, 0, 0], *rest) for image, *rest in mistakes] == [
        (20, "owl", "dog", 1.0),
        (10, "cat", "owl", 0.75),
    ]
    assert title == "pets test, step 7, single: 2 of 5 are wrong"
    assert (tmp_path / "confusion.csv").read_text().splitlines()[1:] == [
        "cat,3,0,1",
        "dog,0,0,0",
        "owl,0,1,0",
    ]


def test_few_classes_have_counts_and_names_and_many_have_room():
    few = evaluate.draw_confusion(np.diag([3, 4]), ["cat", "dog"], "").axes[0]
    assert sorted(text.get_text() for text in few.texts) == ["3", "4"]
    names = [f"class {number}" for number in range(1000)]
    many = evaluate.draw_confusion(np.eye(1000, dtype=int), names, "").axes[0]
    assert not many.texts
    assert many.get_xticks().tolist() == many.get_yticks().tolist() == list(range(0, 1000, 50))
    for labels in (many.get_xticklabels(), many.get_yticklabels()):
        assert [text.get_text() for text in labels] == [f"class {number}" for number in range(0, 1000, 50)]


def test_the_surest_mistakes_come_first_and_no_right_answer_is_among_them():
    probabilities = np.array([[0.6, 0.4], [0.1, 0.9], [0.3, 0.7], [0.8, 0.2]])
    label = np.array([1, 0, 1, 1])
    assert evaluate.surest_mistakes(probabilities, label, 2) == [1, 3]
    assert evaluate.surest_mistakes(probabilities, label, 9) == [1, 3, 0]
    examples = ((np.full((1, 1, 1), number), 0) for number in range(100))
    assert sorted(evaluate.pick(examples, [1, 3])) == [1, 3]
    assert next(examples)[0] == 5, "it does not read on"
    assert evaluate.draw_mistakes([], "none").axes


def test_a_mistake_says_what_is_true_before_what_was_said(monkeypatch):
    drawn = []
    monkeypatch.setattr(evaluate.preview, "draw_sheet", lambda _, titles, __: drawn.extend(titles))
    evaluate.draw_mistakes([(np.zeros((2, 2, 1), np.uint8), "owl", "dog", 0.75)], "")
    assert drawn == ["true owl\nsaid dog\n75.0%"]


def test_the_figures_that_are_printed_are_called_by_their_names():
    metrics = {
        **{"split": "test", "examples_of": "digits test", "num_examples": 355, "step": 8},
        **{"protocol": "single", "views_per_example": 1, "seconds": 0.5},
        **{"accuracy": 0.5, "top_5_accuracy": 0.9, "loss": 1.25},
    }
    last = [line.split() for line in evaluate.table(metrics).splitlines()[-3:]]
    assert last == [["accuracy", "50.00%"], ["top-5", "accuracy", "90.00%"], ["loss", "1.2500"]]
