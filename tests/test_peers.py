"""With the same weights, a peer gives the logits and the gradients that our network gives."""

import functools

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util

from benchmarks import throughput
from cnn_cases.models import layers, make_model
from cnn_cases.models.inception import GoogLeNet
from tests.models.tracing import recorded

# Of GoogLeNet's modules, in the order of the peer's branches; ours computes the reductions first.
PARTS = ("conv_1x1", "reduce_3x3", "conv_3x3", "reduce_5x5", "conv_5x5", "project_pool")
NAMES = {"weight": {1: "scale", 2: "kernel", 4: "kernel"}, "bias": {1: "bias"}}


def without_dropout(function, args, kwargs, context):
    return args[0] if isinstance(context.module, layers.Dropout) else function(*args, **kwargs)


def our_layers(model, variables, image):
    """The paths of the layers that have parameters of their own, in the order of the peer's."""
    own = {path[:-1] for path in traverse_util.flatten_dict(variables["params"])}
    called = recorded(lambda: jax.eval_shape(lambda given: apply(model, given, image), variables))
    paths = [path for path in (tuple(name.split("/")) for name in called) if path in own]
    if not isinstance(model, GoogLeNet):
        return paths
    places = {path[0]: place for place, path in reversed(list(enumerate(paths)))}

    def place(path):
        return places[path[0]], PARTS.index(path[1]) if path[1:] and path[1] in PARTS else paths.index(path)

    return sorted(paths, key=place)


def apply(model, variables, image):
    """(logits, *side_logits) of a training call."""
    rngs = {"dropout": jax.random.key(0)}
    outputs, _ = model.apply(variables, image, train=True, rngs=rngs, mutable=["batch_stats"])
    return outputs if isinstance(outputs, tuple) else (outputs,)


def their_layers(network, image):
    """[(layer, the channels, height and width that were flattened before it)]."""
    import torch

    found, flattened = [], [None]

    def note(layer, inputs, _):
        if isinstance(layer, torch.nn.Flatten):
            flattened[0] = inputs[0].shape[1:]
        elif list(layer.parameters(recurse=False)):
            found.append((layer, flattened[0]))
            flattened[0] = None

    hooks = [layer.register_forward_hook(note) for layer in network.modules() if not list(layer.children())]
    with torch.no_grad():
        network(image)
    for hook in hooks:
        hook.remove()
    return found


def as_ours(value, flattened, shape):
    """A weight or its gradient in our order of axes."""
    value = value.detach().numpy()
    if value.ndim == 4:
        return value.transpose(2, 3, 1, 0)
    if value.ndim == 2 and flattened is not None:  # channels come first there, and last here
        value = value.reshape(-1, *flattened).transpose(0, 2, 3, 1).reshape(len(value), -1)
    return value.T.reshape(shape)


def total_loss(losses):
    """Of the logits' loss and those of the side branches."""
    return losses[0] + throughput.SIDE_WEIGHT * sum(losses[1:])


@pytest.mark.parametrize("name", throughput.CASES)
def test_a_peer_computes_what_ours_does(name):
    torch = pytest.importorskip("torch", reason="PyTorch is a requirement of the benchmarks alone")
    from benchmarks import peers  # which needs it, too

    case, rng = throughput.CASES[name], np.random.default_rng(0)
    # Large pixels: in response normalisation the constant would hide all else.
    image = 30 * rng.standard_normal((4, *case.image_shape), np.float32)
    label = rng.integers(0, case.num_classes, 4)
    model = make_model(**case.model, num_classes=case.num_classes, dtype="float32")
    torch.manual_seed(0)
    make, arguments = case.peer
    network = getattr(peers, make)(**arguments).train()
    their_image = torch.tensor(np.moveaxis(image, -1, 1).copy())
    for layer in network.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), image, train=False))
    batch_stats = jax.tree.map(lambda leaf: np.zeros(leaf.shape), shapes.get("batch_stats", {}))
    expected = traverse_util.flatten_dict(shapes["params"])
    pairs = list(zip(our_layers(model, shapes, image), their_layers(network, their_image), strict=True))
    assert len(pairs) == len({path[:-1] for path in expected})

    def in_our_tree(of):
        leaves = {}
        for path, (layer, flattened) in pairs:
            for key, weight in layer.named_parameters():
                leaf = (*path, NAMES[key][weight.ndim])
                leaves[leaf] = as_ours(of(weight), flattened, expected[leaf].shape)
        return traverse_util.unflatten_dict(leaves)

    def theirs(network, image):
        network.zero_grad()
        outputs = network(image)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        losses = [torch.nn.functional.cross_entropy(logits, torch.tensor(label)) for logits in outputs]
        total_loss(losses).backward()
        return [logits.detach().numpy() for logits in outputs], in_our_tree(lambda weight: weight.grad)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def ours(params):
        with nn.intercept_methods(without_dropout):
            outputs = apply(model, {"params": params, "batch_stats": batch_stats}, image)
        losses = [-jax.nn.log_softmax(logits)[np.arange(len(label)), label].mean() for logits in outputs]
        return total_loss(losses), outputs

    grads, outputs = ours(in_our_tree(lambda weight: weight))
    single = theirs(network, their_image)
    double = theirs(network.double(), their_image.double())
    leaves = zip(*map(jax.tree.leaves_with_path, ((list(outputs), grads), single, double)), strict=True)
    for (path, one), (_, single), (_, double) in leaves:
        # Some networks magnify what is rounded: as much of it as the peer shows of itself is no mistake. And
        # an activation that is all but zero may fall on either side of it, which moves gradients by a step.
        is_logits = path[0].idx == 0
        rounding = np.linalg.norm(single - double) / np.linalg.norm(double)
        off = np.linalg.norm(one - double) / np.linalg.norm(double)
        assert off < (1e-4 if is_logits else 1e-2) + 3 * rounding, (jax.tree_util.keystr(path), off, rounding)
