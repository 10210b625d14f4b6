"""The architectures and the registry of their names.

Every model is a Linen module that maps `image [B, H, W, C]` to `logits [B, num_classes]` when called as
`model(image, train)`. In training, a model with side branches (auxiliary classifiers) returns the tuple
`(logits, *side_logits)`.
"""

import dataclasses

import jax.numpy as jnp

from cnn_cases import checks
from cnn_cases.models.alexnet import AlexNet
from cnn_cases.models.inception import GoogLeNet
from cnn_cases.models.inception_v3 import InceptionV3
from cnn_cases.models.lenet import LeNet5, LeNet5Original
from cnn_cases.models.nin import NIN
from cnn_cases.models.resnet import CifarResNet, PreactCifarResNet, ResNet
from cnn_cases.models.vgg import VGG

MODELS = {
    "lenet5": LeNet5,
    "lenet5_1998": LeNet5Original,
    "alexnet": AlexNet,
    "vgg": VGG,
    "resnet": ResNet,
    "resnet_cifar": CifarResNet,
    "resnet_preact_cifar": PreactCifarResNet,
    "nin": NIN,
    "googlenet": GoogLeNet,
    "inception_v3": InceptionV3,
}

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def make_model(name, *, num_classes, dtype, axis_name=None, **settings):
    """Returns the module registered as `name`, with its settings.

    Args:
      name: a key of MODELS.
      num_classes: length of the logits.
      dtype: compute type, a key of DTYPES.
      axis_name: the pmap axis over which the batch is split, for models with batch statistics or dropout.
      **settings: fields of this architecture, such as `depth`.

    Raises:
      ValueError: `name`, `dtype` or a setting is unknown, or a setting or `num_classes` is invalid.
    """
    checks.one_of("model.name", name, MODELS)
    checks.one_of("dtype", dtype, DTYPES)
    if type(num_classes) is not int or num_classes < 1:
        raise ValueError(f"num_classes = {num_classes!r} must be a positive integer")
    fields = {field.name: field for field in dataclasses.fields(MODELS[name])}
    common = dict(num_classes=num_classes, dtype=DTYPES[dtype])
    missing = [field for field in common if field not in fields]
    if missing:
        raise ValueError(f"model.name = {name!r}: the module needs the field {' and '.join(missing)}")
    own = [field for field in fields if field not in {*common, "axis_name", "parent", "name"}]
    for key in own:
        defaults = fields[key].default, fields[key].default_factory
        if key not in settings and all(default is dataclasses.MISSING for default in defaults):
            raise ValueError(f"model.{key} is missing: {name} has no default for it")
    for key, value in settings.items():
        if key not in own:
            raise ValueError(
                f"model.{key} = {value!r}: {name} has no such setting; its settings are: "
                f"{', '.join(own) or 'none'}"
            )
        # Without this check, a value of the wrong type would fail far from its cause.
        # Behind `from __future__ import annotations`, the types of fields are their names.
        expected = getattr(fields[key].type, "__name__", fields[key].type)
        if expected in ("int", "bool", "str") and type(value).__name__ != expected:
            raise ValueError(f"model.{key} = {value!r} must be of type {expected}")
        if isinstance(value, list | dict):  # a Flax module must be hashable
            raise ValueError(f"model.{key} = {value!r} must be a number, a string or a tuple")
    if "axis_name" in fields:
        common["axis_name"] = axis_name
    return MODELS[name](**common, **settings)
