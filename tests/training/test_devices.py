import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from cnn_cases.training import devices


@pytest.mark.parametrize(("size", "nearest"), [(30, "28 and 32"), (3, "4"), (0, "4"), (-5, "4")])
def test_a_batch_that_cannot_be_split_is_refused_with_the_nearest_sizes(size, nearest):
    with pytest.raises(ValueError, match=f"batch_size = {size} .* over 4 devices; .*: {nearest}$"):
        devices.check_batch_size(size, 4)


@pytest.mark.parametrize("size", [4, 128])
def test_a_batch_that_can_be_split_is_accepted(size):
    devices.check_batch_size(size, 4)


def test_shards_keep_the_order_of_examples():
    batch = {"index": np.arange(8), "image": np.arange(16).reshape(8, 2)}
    shards = devices.shard(batch, 4)
    assert shards["image"].shape == (4, 2, 2)
    np.testing.assert_array_equal(shards["index"].reshape(-1), batch["index"])
    steps = devices.shard({"index": np.arange(24).reshape(3, 8)}, 4, axis=1)["index"]
    assert steps.shape == (4, 3, 2)
    np.testing.assert_array_equal(steps[1], [[2, 3], [10, 11], [18, 19]])


@pytest.mark.parametrize("error", [RuntimeError("Backend 'rocm' is not in the list"), AssertionError()])
def test_a_device_that_is_not_there_is_told(error, monkeypatch):
    monkeypatch.setattr(jax, "local_devices", mock.Mock(side_effect=error))
    with pytest.raises(ValueError, match=r"JAX_PLATFORMS = 'cpu': JAX finds no such device here \((B|no )"):
        devices.local_devices()


def test_a_host_of_a_tpu_slice_that_knows_no_others_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(ValueError, match=r"one of 4 of a TPU slice, .* with --distributed=on on each"):
        devices.local_devices()
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    assert devices.local_devices() == jax.local_devices()


def test_a_full_memory_is_told_from_other_errors():
    with pytest.raises(jax.errors.JaxRuntimeError) as full:
        jnp.zeros(2**50, jnp.uint8)
    assert re.match(
        r"a device ran out of memory \(.*\); use a smaller batch_size", devices.message_for_user(full.value)
    )
    assert devices.message_for_user(jax.errors.JaxRuntimeError("INTERNAL: a bug")) is None
    assert devices.message_for_user(TypeError("RESOURCE_EXHAUSTED")) is None
    assert devices.message_for_user(ValueError("RESOURCE_EXHAUSTED")) == "RESOURCE_EXHAUSTED"


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
