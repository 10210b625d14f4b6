import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from cnn_cases.training import devices


@pytest.mark.parametrize(("size", "nearest"), [(30, "28 and 32"), (3, "4"), (0, "4"), (-5, "4")])
def test_a_batch_that_cannot_be_split_is_refused_with_the_nearest_sizes(size, nearest):
    with pytest.raises(ValueError, match=f"batch_size = {size} .* over 4 devices; .*: {nearest}$"):
        devices.check_batch_size("batch_size", size, 4)


@pytest.mark.parametrize("size", [4, 128])
def test_a_batch_that_can_be_split_is_accepted(size):
    devices.check_batch_size("batch_size", size, 4)


def test_shards_keep_the_order_of_examples():
    batch = {"index": np.arange(8), "image": np.arange(16).reshape(8, 2)}
    shards = devices.shard(batch, 4)
    assert shards["image"].shape == (4, 2, 2)
    np.testing.assert_array_equal(shards["index"].reshape(-1), batch["index"])
    steps = devices.shard({"index": np.arange(24).reshape(3, 8)}, 4, axis=1)["index"]
    assert steps.shape == (4, 3, 2)
    np.testing.assert_array_equal(steps[1], [[2, 3], [10, 11], [18, 19]])


def test_the_state_goes_round_as_an_ordinary_replicated_tree():
    four = jax.devices()[:4]

    def step(state, arrays, batch):
        return state + lax.psum((arrays[0] * batch).sum(), devices.AXIS), lax.psum(1, devices.AXIS)

    train = devices.pmap_train(step, four)
    state = devices.replicate(jnp.float32(0), four)
    arrays = devices.replicate(np.float32([2]), four)
    for _ in range(3):
        donated = state
        state, count = train(state, arrays, devices.shard(np.arange(8, dtype=np.float32), 4))
        assert donated.is_deleted()
    assert state.shape == ()
    assert (float(state), int(count)) == (3 * 2 * 28, 4)
    assert state.sharding.is_fully_replicated
    assert len(state.devices()) == 4
