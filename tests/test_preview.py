from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib.text import Text

from cnn_cases import preview
from cnn_cases.data.feeds import make_feed
from cnn_cases.training import devices, steps
from cnn_cases.training.losses import cross_entropy
from cnn_cases.training.state import TrainState


def test_the_images_are_those_that_a_training_step_sees(config):
    images, labels = preview.training_images(config, step=4)
    assert (images.shape, images.dtype, labels.shape) == ((24, 16, 16, 1), np.float32, (24,))

    seen = []

    def network(variables, image, train, **_):
        del train
        jax.debug.callback(seen.append, image)
        return jnp.zeros((len(image), 10)) + variables["params"]["bias"], {}

    settings = dict(**config.data) | {"normalization": "none"}
    feed = make_feed(**settings, batch_size=24, eval_batch_size=24)
    tx, params = optax.sgd(0.1), {"bias": jnp.zeros(10)}
    train_steps = steps.make_train_steps(network, tx, feed.prepare, cross_entropy, devices.AXIS)
    state = TrainState(jnp.int32(3), jnp.int32(config.seed), params, {}, {}, tx.init(params))
    batch = jax.tree.map(lambda leaf: leaf[None], next(feed.train_batches(config.seed, 3)))
    train = devices.pmap_train(train_steps, jax.devices()[:1])
    jax.block_until_ready(train(state, feed.arrays, devices.shard(batch, 1, axis=1)))
    np.testing.assert_allclose(images, seen[0], atol=1e-6)


def test_a_mixture_is_called_by_its_parts():
    assert preview.title_of(np.int32(1), ["cat", "dog"]) == "dog"
    assert preview.title_of(np.array([0.3, 0.7]), ["cat", "dog"]) == "70 % dog\n30 % cat"
    assert preview.title_of(np.array([0.0, 1.0]), ["cat", "dog"]) == "100 % dog"


@pytest.mark.parametrize(("count", "places"), [(0, 4), (1, 4), (5, 5), (9, 16)])
def test_a_sheet_has_a_place_for_every_image_and_few_empty_ones(count, places):
    images = [np.full((4, 5, 3), n, np.uint8) for n in range(count)]
    figure = preview.draw_sheet(images, [str(n) for n in range(count)], "a sheet")
    assert len(figure.axes) == places
    drawn = [axis for axis in figure.axes if axis.images]
    assert [axis.get_title() for axis in drawn] == [str(n) for n in range(count)]


@pytest.mark.parametrize(("dtype", "white"), [(np.uint8, 255), (np.float32, 1)])
def test_grey_goes_from_black_to_white(dtype, white):
    (drawn,) = preview.draw_sheet([np.full((4, 5, 1), white // 2, dtype)], ["grey"], "a sheet").axes[0].images
    assert drawn.get_clim() == (0, white)


def test_a_class_may_be_called_by_what_it_costs(tmp_path):
    sheet = preview.draw_sheet([np.zeros((4, 5, 3), np.uint8)], ["true $5\nsaid $\\100"], "$a$")
    sheet.savefig(tmp_path / "sheet.svg")  # a formula would be drawn here, or refused
    assert not any(text.get_parse_math() for text in sheet.findobj(Text))


def test_a_step_before_the_first_is_refused(config):
    with pytest.raises(ValueError, match="step = 0 must be between 1 and num_steps"):
        preview.training_images(config, step=0)


def test_a_seed_that_no_training_takes_is_refused_by_its_key(config):
    config.seed = -3
    with pytest.raises(ValueError, match=r"seed = -3 must be in \[0, 2\*\*31\)"):
        preview.training_images(config, step=1)


def test_the_command_draws_the_first_images_of_the_step_that_is_asked_for(
    config, tmp_path, monkeypatch, capsys
):
    sheets, draw_sheet = [], preview.draw_sheet
    monkeypatch.setattr(preview, "draw_sheet", lambda *given: sheets.append(given) or draw_sheet(*given))
    out = tmp_path / "sheets/four.png"
    given = SimpleNamespace(config=config, step=4, images=5, out=str(out))
    monkeypatch.setattr(preview.flags, "FLAGS", given)
    preview.main()
    images, labels = preview.training_images(config, step=4)
    ((shown, titles, heading),) = sheets
    np.testing.assert_array_equal(shown, images[:5])
    assert titles == [str(label) for label in labels[:5]]
    assert heading == "digits: images of training step 4, as the network is shown them"
    assert capsys.readouterr().out == f"5 images of 16x16 pixels: {out}\n"
    assert out.read_bytes().startswith(b"\x89PNG")


def test_another_kind_of_file_is_refused_before_anything_is_drawn(config, monkeypatch):
    monkeypatch.setattr(preview, "training_images", lambda *_: pytest.fail("went on all the same"))
    given = SimpleNamespace(config=config, step=1, images=5, out="sheet.txt")
    monkeypatch.setattr(preview.flags, "FLAGS", given)
    with pytest.raises(ValueError, match=r"out = sheet\.txt must end in \.png, \.svg or \.pdf"):
        preview.main()
