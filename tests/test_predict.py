import collections
import shutil
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from cnn_cases import predict
from cnn_cases.data import feeds
from cnn_cases.training import checkpoint, devices, loop, programs, provenance
from tests.conftest import tiny_config


@pytest.fixture(scope="module")
def run(data_dir, tmp_path_factory):
    """(workdir, config) of a tiny run, whose last checkpoint is not the best."""
    config, workdir = tiny_config(data_dir), tmp_path_factory.mktemp("predict") / "run"
    config.evaluation.every_steps = config.log_every_steps = 6
    loop.train_and_evaluate(config, workdir, show_progress=False)
    (workdir / "checkpoints/8" / checkpoint.LATER_ERROR).write_text("0")
    assert checkpoint.find(workdir / "checkpoints", "best") == 8
    return workdir, config


def evaluated(workdir, config, protocol, step):
    """What `programs.predict` says of the test split, and its stored images."""
    program = programs.make_program(config)
    state = checkpoint.read(workdir / "checkpoints", step, program.shapes_of_state())
    state = devices.replicate(state, program.devices)
    probabilities, _ = programs.predict(program, state, "test", protocol, batch_size=200)
    return probabilities, [image for image, _ in program.feed.examples("test")]


@pytest.mark.parametrize(("protocol", "step"), [("single", 12), ("single", 8), ("ten_crop", 12)])
def test_images_are_answered_as_in_an_evaluation(run, protocol, step):
    workdir, config = run
    expected, images = evaluated(workdir, config, protocol, step)
    network = predict.load(workdir, step)
    found = network(images[:50], protocol)
    np.testing.assert_allclose(found, expected[:50], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-6)
    assert network.class_names == feeds.class_names("digits", config.data.data_dir)
    assert (network.image_shape, network.step) == ((16, 16, 1), step)


def test_in_python_the_module_gives_the_same_answers(data_dir, tmp_path):
    config = tiny_config(data_dir)
    config.num_steps, config.ema_decay = 4, 0.5
    loop.train_and_evaluate(config, tmp_path / "run", show_progress=False)
    network = predict.load(tmp_path / "run")
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 1), np.uint8)
    logits = network.model.apply(network.state.variables, network.normalize(images), train=False)
    np.testing.assert_allclose(jax.nn.softmax(logits), network(images), rtol=1e-4, atol=1e-6)
    for others, kind in (
        (images / np.float32(255), r"ndarray float32 \(5, 16, 16, 1\)"),
        (images[:, :8, :8], r"ndarray uint8 \(5, 8, 8, 1\)"),
        (list(images), "list"),
    ):
        with pytest.raises(ValueError, match=rf"must be uint8 \[N, 16, 16, 1\]; they are a {kind}"):
            network.normalize(others)


@pytest.mark.parametrize("protocol", ["single", "ten_crop"])
def test_raw_images_are_answered_as_the_stored_ones_that_they_become(data_dir, tmp_path, protocol):
    config = tiny_config(data_dir)
    config.num_steps = config.evaluation.every_steps = config.checkpoint.every_steps = 3
    config.data.border = 2
    loop.train_and_evaluate(config, tmp_path / "run", show_progress=False)
    expected, _ = evaluated(tmp_path / "run", config, protocol, 3)
    config.data.update(border=0, image_size=0)
    raw = feeds.make_feed(**config.data, batch_size=24, eval_batch_size=24).examples("test")
    images = [image for image, _ in raw]
    assert images[0].shape == (8, 8, 1)
    found = predict.load(tmp_path / "run")(images, protocol)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_a_streams_border_is_around_the_views_in_an_evaluation_and_in_an_answer(data_dir, tmp_path):
    config = tiny_config(data_dir)
    config.num_steps = config.evaluation.every_steps = config.checkpoint.every_steps = 3
    config.data.update(feed="stream", image_size=12, border=2)
    loop.train_and_evaluate(config, tmp_path / "run", show_progress=False)
    expected, images = evaluated(tmp_path / "run", config, "ten_crop", 3)
    assert images[0].shape == (8, 8, 1)
    found = predict.load(tmp_path / "run")(images[:20], "ten_crop")
    np.testing.assert_allclose(found, expected[:20], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("content", ["[{", "[3]"])
def test_a_damaged_note_of_the_code_is_told_and_no_hindrance(content, run, tmp_path, caplog):
    shutil.copytree(run[0], tmp_path / "run")
    (tmp_path / "run/environment.json").write_text(content)
    predict.load(tmp_path / "run")
    assert "environment.json is damaged" in caplog.text
    assert "The code and data may differ from the run's" in caplog.text


def test_other_code_is_told(run, monkeypatch, caplog):
    monkeypatch.setattr(provenance, "_code", lambda: "0123456789ab")
    predict.load(run[0])
    assert "was last started with other code or packages: code: " in caplog.text


def test_a_device_that_is_not_there_is_told(run, monkeypatch):
    for name in ("devices", "local_devices"):
        missing = RuntimeError("Unable to initialize backend 'cuda'")
        monkeypatch.setattr(jax, name, mock.Mock(side_effect=missing))
    with pytest.raises(ValueError, match=r"JAX finds no such device here \(Unable to initialize backend"):
        predict.load(run[0])


def test_a_protocol_that_the_network_cannot_take_is_refused(run):
    image = np.zeros((16, 16, 1), np.uint8)
    with pytest.raises(ValueError, match=r"has views of 27x27 pixels, which this .*[^.]; use 'single'"):
        predict.load(run[0])([image], "multi_scale_dense")
    with pytest.raises(ValueError, match="'many' is unknown"):
        predict.load(run[0])([image], "many")


def test_a_photo_is_read_the_right_way_up(tmp_path):
    pixels = np.zeros((10, 20, 3), np.uint8)
    pixels[:, :10] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter to the right
    path = tmp_path / "photo.jpg"
    Image.fromarray(pixels).save(path, exif=exif, quality=95)
    read = predict.read_image(path, 1)
    assert read.shape == (20, 10, 1)
    assert (read[:8] > 200).all()
    assert (read[12:] < 50).all()


@pytest.mark.parametrize(
    ("protocol", "batches"),
    [
        ("single", {(3, 16, 16, 1): 1}),
        ("ten_crop", {(20, 16, 16, 1): 2}),
        ("googlenet_144", {(20, 16, 16, 1): 22}),
        # As many pixels as 20 images of 16x16, and no more views than there are of the shape.
        (
            "resnet_dense",
            {
                (3, 16, 16, 1): 1,
                (3, 18, 18, 1): 1,
                (3, 27, 27, 1): 1,
                (3, 34, 34, 1): 1,
                (2, 46, 46, 1): 2,
            },
        ),
    ],
)
def test_a_batch_has_the_views_of_all_images_and_no_more_pixels_than_one_of_an_evaluation(
    run, monkeypatch, protocol, batches
):
    network, seen = predict.load(run[0]), collections.Counter()

    def answer(_state, _arrays, images):
        seen[images.shape] += isinstance(images, np.ndarray)  # not where shapes alone are asked for
        return jnp.full((len(images), 10), jnp.log(0.1))

    monkeypatch.setattr(network, "_predict", answer)
    network.config.evaluation.batch_size = 20
    network(np.zeros((3, 16, 16, 1), np.uint8), protocol)
    assert +seen == batches


def test_an_image_of_16_bits_is_refused(tmp_path):
    path = tmp_path / "deep.png"
    Image.fromarray(np.full((4, 4), 20_000, np.uint16)).save(path)
    with pytest.raises(ValueError, match=r"deep\.png cannot be read as an image: it has more than 8 bits"):
        predict.read_image(path, 1)


def test_files_that_are_no_images_keep_no_other_from_its_answer(run, tmp_path):
    image, text = tmp_path / "one.png", tmp_path / "notes.txt"
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(image)
    text.write_text("no image")
    command = [sys.executable, "-m", "cnn_cases.predict", f"--workdir={run[0]}", text, image, "nowhere.png"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (chances,) = predict.load(run[0], 12)([predict.read_image(image, 1)])
    best = sorted(range(10), key=lambda digit: -chances[digit])[:3]
    assert done.stdout == f"{image}: {', '.join(f'{digit} ({chances[digit]:.1%})' for digit in best)}\n"
    for path in (text, "nowhere.png"):
        assert f"{path} cannot be read as an image" in done.stderr


def test_the_command_prints_as_many_classes_as_asked_for_of_the_step_and_the_protocol(
    run, tmp_path, monkeypatch, capsys
):
    path = tmp_path / "one.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (16, 16), np.uint8)).save(path)
    given = SimpleNamespace(workdir=run[0], step="8", protocol="ten_crop", top=4)
    monkeypatch.setattr(predict.flags, "FLAGS", given)
    predict.main([path])
    (chances,) = predict.load(run[0], 8)([predict.read_image(path, 1)], "ten_crop")
    best = sorted(range(10), key=lambda digit: -chances[digit])[:4]
    expected = ", ".join(f"{digit} ({chances[digit]:.1%})" for digit in best)
    assert capsys.readouterr().out == f"{path}: {expected}\n"


def test_files_are_read_a_few_at_a_time_and_answered_in_their_order(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(predict, "FILES_AT_ONCE", 2)
    images = np.random.default_rng(1).integers(0, 256, (5, 16, 16), np.uint8)
    paths = [tmp_path / f"{number}.png" for number in range(5)]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    held, predictor = [], predict.TrainedNetwork.__call__
    monkeypatch.setattr(
        predict.TrainedNetwork,
        "__call__",
        lambda self, images, *rest: held.append(len(images)) or predictor(self, images, *rest),
    )
    given = SimpleNamespace(workdir=run[0], step="8", protocol="single", top=1)
    monkeypatch.setattr(predict.flags, "FLAGS", given)
    predict.main(paths)
    assert held == [2, 2, 1]
    expected = predictor(predict.load(run[0], 8), images[..., None])
    lines = [f"{path}: {row.argmax()} ({row.max():.1%})" for path, row in zip(paths, expected, strict=True)]
    assert capsys.readouterr().out.splitlines() == lines


def test_an_answer_that_is_no_number_is_an_error_of_its_file(run, tmp_path, monkeypatch, capsys):
    for name in "abc":
        Image.fromarray(np.zeros((16, 16), np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "a.png").write_text("no image")

    def answer(_self, images, _protocol):
        return np.full((len(images), 10), 0.1) * np.array([[1.0], [np.nan]])

    monkeypatch.setattr(predict.TrainedNetwork, "__call__", answer)
    given = SimpleNamespace(workdir=run[0], step="8", protocol="single", top=1)
    monkeypatch.setattr(predict.flags, "FLAGS", given)
    with pytest.raises(
        ValueError, match=r"(?s)a\.png cannot be .*\n.*c\.png: step 8 predicts NaN; choose anot"
    ):
        predict.main([tmp_path / f"{name}.png" for name in "abc"])
    assert capsys.readouterr().out == f"{tmp_path}/b.png: 0 (10.0%)\n"


def test_a_command_without_images_is_refused():
    with pytest.raises(ValueError, match="no images: list their files after the flags"):
        predict.main([])


def test_neither_the_data_set_nor_the_place_of_the_run_is_needed(run, tmp_path, monkeypatch):
    workdir, config = run
    moved = tmp_path / "elsewhere"
    shutil.copytree(workdir, moved)
    text = (moved / "config.json").read_text()
    assert config.data.data_dir in text
    (moved / "config.json").write_text(text.replace(config.data.data_dir, str(tmp_path / "nowhere")))
    monkeypatch.delenv("TFDS_DATA_DIR")
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 1), np.uint8)
    network = predict.load(moved)
    assert network.step == 12
    np.testing.assert_array_equal(network([image]), predict.load(workdir)([image]))


def test_files_of_any_size_and_colour_are_read(run, tmp_path):
    network = predict.load(run[0])
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 30:50] = 250
    path = tmp_path / "one.png"
    Image.fromarray(pixels).save(path)
    image = predict.read_image(path, 1)
    assert image.shape == (40, 80, 1)
    small = np.asarray(Image.fromarray(image[..., 0]).resize((16, 16), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(network([image]), network(small[None, ..., None]))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([np.zeros((16, 16, 1), np.float32)], r"image 0 must be uint8 \[h, w, 1\]; it is a ndarray float32"),
        ([np.zeros((16, 16), np.uint8)], r"it is a ndarray uint8 \(16, 16\)"),
        ([np.zeros((9, 9, 1), np.uint8), "seven.png"], "image 1 .* it is a str"),
        ([np.zeros((2, 0, 1), np.uint8)], r"image 0 has no pixels: \(2, 0, 1\)"),
        ([], "there are no images"),
    ],
)
def test_images_of_another_kind_are_refused(run, images, message):
    with pytest.raises(ValueError, match=message):
        predict.load(run[0])(images)


def test_a_workdir_that_is_not_whole_is_refused(run, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(run[0], workdir)
    whole = (workdir / "inputs.npz").read_bytes()
    for content in (b"", b"PK", whole[:300], whole[:-30]):
        (workdir / "inputs.npz").write_bytes(content)
        with pytest.raises(
            ValueError, match=r"inputs\.npz is missing or damaged: it is not a file of inputs"
        ):
            predict.load(workdir)
    (workdir / "inputs.npz").unlink()
    with pytest.raises(ValueError, match=r"inputs\.npz is missing or damaged"):
        predict.load(workdir)
    with pytest.raises(ValueError, match="holds no run"):
        predict.load(tmp_path)


def test_a_file_has_one_channel_or_three(tmp_path):
    with pytest.raises(
        ValueError, match=r"x\.png: image files are read as grey or colour, .* takes 4 channels"
    ):
        predict.read_image(tmp_path / "x.png", 4)


def test_a_file_that_is_no_image_is_named(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("no image")
    for one in (path, tmp_path / "nothing.png"):
        with pytest.raises(ValueError, match=f"{one.name} cannot be read as an image"):
            predict.read_image(one, 1)
