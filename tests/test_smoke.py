"""Networks learn: a few steps on ten real digits, through the feed, step and pmap of a training."""

import itertools

import jax
import numpy as np
import pytest

from cnn_cases.data.feeds import make_feed
from cnn_cases.models import make_model
from cnn_cases.training import devices, steps
from cnn_cases.training.losses import make_loss
from cnn_cases.training.optimizer import make_optimizer
from cnn_cases.training.state import init_state

# Side of the image, and the settings of a small net. The others take minutes to compile and train on a CPU:
# their layers are tried in tests/models, and their configs for the digits train the whole nets.
SMALLEST = {
    "lenet5": (16, {}),
    "lenet5_1998": (32, {}),
    "resnet_cifar": (8, {"depth": 8}),
    "resnet_preact_cifar": (8, {"depth": 11}),
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


@pytest.mark.parametrize("name", SMALLEST)
def test_the_loss_falls_and_every_parameter_moves(name, data_dir):
    image_size, knobs = SMALLEST[name]
    feed = make_feed(
        name="digits",
        data_dir=data_dir,
        splits={"train": "train[:10]"},
        image_size=image_size,
        border=0,
        normalization="channel",
        augment={"pad": 0, "flip": False},
        batch_size=10,
        eval_batch_size=10,
    )
    model = make_model(name, num_classes=feed.num_classes, dtype="float32", axis_name=devices.AXIS, **knobs)
    tx = make_optimizer(lambda _: 1e-3, **ADAM)
    loss_name = "rbf_map" if name == "lenet5_1998" else "cross_entropy"
    loss = make_loss(name=loss_name, label_smoothing=0.0, map_constant=1.0)
    train_steps = steps.make_train_steps(model.apply, tx, feed.prepare, loss, devices.AXIS)
    train = devices.pmap_train(train_steps, jax.devices()[:1])
    state = init_state(model, tx, feed.image_shape, seed=0)
    before = jax.device_get(state.params)
    losses = []
    for batch in itertools.islice(feed.train_batches(0, 0), 15):
        batch = jax.tree.map(lambda leaf: leaf[None], batch)
        state, metrics = train(state, feed.arrays, devices.shard(batch, 1, axis=1))
        losses.append(float(metrics["loss"][0]))
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:2]), losses
    unmoved = jax.tree.map(np.array_equal, before, jax.device_get(state.params))
    assert not any(jax.tree.leaves(unmoved)), unmoved
