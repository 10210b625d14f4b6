import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax.extend.core import Literal

from cnn_cases.models import MODELS, make_model
from cnn_cases.models.layers import BatchNorm, Conv, Dense
from tests.models.tracing import recorded

LAYERS = Conv | Dense | BatchNorm
SIZES = {
    "lenet5": (32, 32, 1),
    "lenet5_1998": (32, 32, 1),
    "alexnet": (227, 227, 3),
    "vgg": (224, 224, 3),
    "resnet": (224, 224, 3),
    "resnet_cifar": (32, 32, 3),
    "resnet_preact_cifar": (32, 32, 3),
    "nin": (32, 32, 3),
    "googlenet": (224, 224, 3),
    "inception_v3": (299, 299, 3),
}


SHALLOW = {"resnet": {"depth": 18}, "resnet_preact_cifar": {"depth": 11}}


def make(name, **settings):
    return make_model(name, **{"num_classes": 10, "dtype": "float32"} | settings)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, SHALLOW.get(name, {})) for name in SIZES),
        ("vgg", {"batch_norm": True}),
        ("googlenet", {"batch_norm": True}),
    ],
)
def test_layers_and_logits_have_the_compute_type_and_no_parameter_does(name, settings):
    model = make(name, num_classes=7, dtype="bfloat16", **settings)

    def apply():
        image = jnp.zeros((2, *SIZES[name]))
        variables = model.init(jax.random.key(0), image, train=False)
        rngs = {"dropout": jax.random.key(1)}
        return variables, model.apply(variables, image, train=True, mutable=["batch_stats"], rngs=rngs)[0]

    shapes = []
    calls = recorded(lambda: shapes.extend(jax.eval_shape(apply))).values()
    # In a loop over steps on a CPU, the gradients of Flax's own convolutions take many times as long.
    assert not [module for module, _, _ in calls if isinstance(module, nn.Conv)], "take layers.Conv"
    assert {y.dtype.name for module, _, y in calls if isinstance(module, LAYERS)} == {"bfloat16"}
    variables, all_logits = shapes
    assert {leaf.dtype.name for leaf in jax.tree.leaves(variables)} == {"float32"}
    for logits in jax.tree.leaves(all_logits):  # those of the side branches, too
        assert logits.shape == (2, 7)
        # The RBF units of 1998 measure distances near 84, which bfloat16 would round to halves.
        assert logits.dtype == ("float32" if name == "lenet5_1998" else "bfloat16")


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_every_parameter_of_a_whole_network_counts(name):  # tests/test_smoke.py trains parts of these
    model, image = make(name), jnp.zeros((2, *SIZES[name]))
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), image, train=False))

    def logits(params, batch_stats):
        every = {"params": params, "batch_stats": batch_stats}
        rngs = {"dropout": jax.random.key(1)}
        return model.apply(every, image, train=True, mutable=["batch_stats"], rngs=rngs)[0]

    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    program = jax.make_jaxpr(logits)(params, batch_stats).jaxpr
    # Backward from the logits: what an operation takes counts if something counts that it gives.
    counts = set(program.outvars)
    for operation in reversed(program.eqns):
        if counts.intersection(operation.outvars):
            counts.update(one for one in operation.invars if not isinstance(one, Literal))
    assert counts.issuperset(program.invars[: len(jax.tree.leaves(params))])


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"model.name = 'lenet'.*lenet5, .*resnet_cifar"):
        make("lenet")
    with pytest.raises(ValueError, match=r"dtype = 'float16'.*float32, bfloat16"):
        make("lenet5", dtype="float16")
    with pytest.raises(ValueError, match=r"model.deepth = 20: resnet_cifar has no such.*depth, plain"):
        make("resnet_cifar", deepth=20)


@pytest.mark.parametrize("number", [0, -1, 10.0, True])
def test_an_impossible_number_of_classes_is_refused(number):
    with pytest.raises(ValueError, match=f"num_classes = {number} must be a positive integer"):
        make_model("lenet5_1998", num_classes=number, dtype="float32")


@pytest.mark.parametrize("depth", [20.0, "20", True])
def test_a_setting_of_the_wrong_type_is_refused(depth):
    with pytest.raises(ValueError, match=r"model.depth = .* must be of type int"):
        make("resnet_cifar", depth=depth)


@pytest.mark.parametrize("value", [[2, 2], {"a": 2}])
def test_a_setting_that_has_no_hash_is_refused(value, monkeypatch):
    class Net(nn.Module):
        num_classes: int
        dtype: Any
        blocks: Any = ()

    monkeypatch.setitem(MODELS, "net", Net)
    assert make("net", blocks=(2, 2)).blocks == (2, 2)
    with pytest.raises(ValueError, match=r"model\.blocks = .* must be a number, a string or a tuple"):
        make("net", blocks=value)


def test_a_module_that_lacks_a_field_and_a_field_that_lacks_a_value_are_named(monkeypatch):
    class Net(nn.Module):
        num_classes: int
        width: "int"  # as all annotations are behind `from __future__ import annotations`

    monkeypatch.setitem(MODELS, "net", Net)
    with pytest.raises(ValueError, match=r"model\.name = 'net': the module needs the field dtype$"):
        make("net", width=8)

    class Whole(Net):
        dtype: Any = jnp.float32

    monkeypatch.setitem(MODELS, "net", Whole)
    with pytest.raises(ValueError, match=r"model\.width is missing: net has no default for it"):
        make("net")
    with pytest.raises(ValueError, match=r"model\.width = 8\.0 must be of type int"):
        make("net", width=8.0)


def test_a_field_with_a_factory_needs_no_value_and_annotations_no_import(monkeypatch):
    class Net(nn.Module):
        num_classes: int
        dtype: "jnp.nowhere"  # as of an import that only type checkers do
        blocks: Any = dataclasses.field(default_factory=lambda: (2, 2))

    monkeypatch.setitem(MODELS, "net", Net)
    assert make("net").blocks == (2, 2)


def test_every_model_of_the_registry_is_tried_here():
    assert set(SIZES) == set(MODELS)
