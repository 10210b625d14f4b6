"""Networks learn: a few steps on a few real digits, through the feed, step and pmap of a training."""

import itertools
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from cnn_cases.data import resident, splits
from cnn_cases.data.pixels import make_pixels
from cnn_cases.models import MODELS, inception, inception_v3, make_model
from cnn_cases.training import devices, steps
from cnn_cases.training.losses import make_loss
from cnn_cases.training.optimizer import make_optimizer
from cnn_cases.training.state import init_state
from configs import common


class Case(NamedTuple):
    """A net to train: as small, and on images as small, as its architecture allows.

    `modules` are what a module of cnn_cases has in another's place meanwhile: (module, name, value).
    """

    name: str
    image_size: int
    knobs: dict[str, Any]
    num_steps: int = 15
    learning_rate: float = 1e-3
    normalization: str = "channel"
    loss: str = "cross_entropy"
    modules: tuple = ()


# To initialise and compile a whole Inception net takes 35 to 50 s of a core: those here have one module of
# each kind, of which the others differ in the numbers of filters. Smaller images would take longer: on
# maps of 2x2 pixels and less, a convolution is a matrix product of patches, which is more to compile.
GOOGLENET = (inception, "TABLE_1", {name: inception.TABLE_1[name] for name in ("4a", "4d")})
INCEPTION_V3 = (
    (inception_v3, "FIGURE_5", {"5d": 64}),
    (inception_v3, "FIGURE_6", {"6b": 128}),
    (inception_v3, "FIGURE_7", ("7b",)),
)
CASES = {
    "lenet5": Case("lenet5", 16, {}, num_steps=30),
    "lenet5_1998": Case("lenet5_1998", 32, {}, num_steps=30, loss="rbf_map"),
    # Its first weights are so small that for some twenty steps it hardly tells one image from another.
    "alexnet": Case(
        "alexnet",
        67,
        {"variant": "two_groups", "dense_features": 512},
        num_steps=70,
        normalization="pixel_mean_255",
    ),
    "vgg": Case(
        "vgg",
        32,
        {"variant": "A", "image_size": 32, "dense_features": 256, "batch_norm": True},
        num_steps=25,
        learning_rate=3e-4,
    ),
    "resnet": Case("resnet", 16, {"depth": 18}, num_steps=8),
    "resnet_cifar": Case("resnet_cifar", 8, {"depth": 8}),
    "resnet_preact_cifar": Case("resnet_preact_cifar", 8, {"depth": 11}),
    "nin": Case("nin", 8, {"variant": "cifar"}, num_steps=30, normalization="pixel_mean_255"),
    "googlenet with side branches": Case(
        "googlenet", 79, {"batch_norm": True, "side_branches": True}, num_steps=10, modules=(GOOGLENET,)
    ),
    "inception_v3": Case("inception_v3", 75, {"side_branches": False}, num_steps=12, modules=INCEPTION_V3),
}
ADAM = dict(
    name="adam",
    momentum=0.9,
    nesterov=False,
    second_moment=0.999,
    epsilon=1e-8,
    weight_decay=0.0,
    decayed="all",
    clip_norm=0.0,
)


def one_of_each(num_classes, image_size, data_dir):
    """The first training image of each of the first classes, and its label."""
    image, label, num_labels = splits.load_split("digits", "train[:60]", data_dir, image_size)
    first = np.unique(label, return_index=True)[1][:num_classes]
    return image[first], label[first], num_labels


def test_every_architecture_is_trained():
    assert {case.name for case in CASES.values()} == set(MODELS)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_loss_falls_and_every_parameter_moves(case, data_dir, monkeypatch):
    for replaced in case.modules:
        monkeypatch.setattr(*replaced)
    image, label, num_classes = one_of_each(4, case.image_size, data_dir)
    feed = resident.ResidentFeed(
        {"train": (image, label)},
        num_classes=num_classes,
        batch_size=len(image),
        eval_batch_size=len(image),
        pixels=make_pixels(
            image,
            normalization=case.normalization,
            augment=common.get_config().data.augment,
            num_classes=num_classes,
        ),
    )
    model = make_model(
        case.name, num_classes=num_classes, dtype="float32", axis_name=devices.AXIS, **case.knobs
    )
    tx = make_optimizer(lambda _: case.learning_rate, **ADAM)
    loss = make_loss(name=case.loss, label_smoothing=0.0, map_constant=1.0)
    train_steps = steps.make_train_steps(model.apply, tx, feed.prepare, loss, devices.AXIS, side_weight=0.3)
    device = jax.devices()[:1]
    train = devices.pmap_train(train_steps, device)
    state = init_state(model, tx, feed.image_shape, seed=0)
    state, arrays = devices.replicate((state, feed.arrays), device)
    before = jax.device_get((state.params, state.batch_stats))
    losses, errors = [], []
    for batch in itertools.islice(feed.train_batches(0, 0), case.num_steps):
        batch = jax.tree.map(lambda leaf: leaf[None], batch)
        state, metrics = train(state, arrays, devices.shard(batch, 1, axis=1))
        losses.append(float(metrics["loss"][0]))
        errors.append(float(metrics["error"][0]))
    # The mean of five, for dropout makes each of them a matter of chance.
    assert np.mean(losses[-5:]) < 0.5 * losses[0], losses
    # A net that is blind to its images is wrong about three of four.
    assert np.mean(errors[-5:]) < 0.4, errors
    unmoved = jax.tree.map(np.array_equal, before, jax.device_get((state.params, state.batch_stats)))
    assert not any(jax.tree.leaves(unmoved)), unmoved
