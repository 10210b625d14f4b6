import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnn_cases.models import make_model
from cnn_cases.training.state import init_state

SGD = optax.sgd(0.1, 0.9)


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


def deep(depth=20, optimizer=SGD):  # most of its layers have the shape of another
    model = make_model("resnet_cifar", num_classes=10, dtype="float32", depth=depth)
    return model, optimizer, (8, 8, 1)


def test_each_kind_of_layer_is_compiled_once_for_all_networks(caplog):
    init_state(*deep(20), seed=0)
    with jax.log_compiles():
        state = init_state(*deep(32), seed=0)
    assert "Finished tracing" in caplog.text
    assert "Finished XLA compilation" not in caplog.text
    kernels = [leaf for leaf in jax.tree.leaves(state.params) if leaf.ndim > 1]
    assert len({np.asarray(kernel).tobytes() for kernel in kernels}) == len(kernels) == 32


def test_layers_that_are_compiled_one_by_one_get_the_values_of_a_single_program():
    model, optimizer, shape = deep()
    variables = jax.jit(lambda: model.init(jax.random.key(3), jnp.zeros((1, *shape)), train=False))()
    state = init_state(model, optimizer, shape, seed=3)
    for ours, theirs in ((state.params, variables["params"]), (state.batch_stats, variables["batch_stats"])):
        jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5), ours, theirs)
    assert all(not leaf.any() for leaf in jax.tree.leaves(state.opt_state))


@pytest.mark.parametrize("shared", ["with the parameters", "with the next seed"])
def test_no_leaf_of_a_state_is_the_memory_of_another(shared):  # since a step donates them all
    constant = jnp.arange(3.0)
    optimizer = optax.GradientTransformation(
        lambda params: params if shared == "with the parameters" else constant, SGD.update
    )
    states = [init_state(*deep(optimizer=optimizer), seed) for seed in (0, 1)]
    leaves = [leaf for leaf in jax.tree.leaves(states) if isinstance(leaf, jax.Array)]
    memory = [leaf.unsafe_buffer_pointer() for leaf in leaves]
    assert len({*memory}) == len(memory) > 100
