import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnn_cases.models import make_model
from cnn_cases.training.state import init_state


def make(plain=False, seed=0):
    model = make_model("resnet_cifar", num_classes=10, dtype="bfloat16", depth=8, plain=plain)
    return init_state(model, optax.sgd(0.1, 0.9), (8, 8, 1), seed)


def test_a_plain_net_and_its_residual_twin_start_from_the_same_bits():
    plain, residual = make(plain=True), make(plain=False)
    jax.tree.map(np.testing.assert_array_equal, plain, residual)


def test_another_seed_gives_other_parameters():
    one, other = make(seed=0), make(seed=1)
    assert not np.array_equal(one.params["conv1"]["kernel"], other.params["conv1"]["kernel"])


def test_everything_that_is_learned_is_float32():
    state = make()
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.batch_stats))} == {
        jnp.dtype("float32")
    }


def test_a_model_that_refuses_its_settings_says_so_before_any_training():
    model = make_model("resnet_cifar", num_classes=10, dtype="float32", depth=21)
    with pytest.raises(ValueError, match=r"model.depth = 21 is not 6n \+ 2"):
        init_state(model, optax.sgd(0.1), (8, 8, 1), 0)


def test_a_state_holds_its_seed_and_an_average_that_starts_as_the_net():
    model = make_model("resnet_cifar", num_classes=10, dtype="float32", depth=8)
    state = init_state(model, optax.sgd(0.1), (8, 8, 1), 7, with_ema=True)
    assert int(state.seed) == 7
    newest = {"params": state.params, "batch_stats": state.batch_stats}
    jax.tree.map(np.testing.assert_array_equal, state.ema_params, newest)
