"""With the same weights, a peer gives the logits and the gradients that our network gives.

Where PyTorch is missing, logits that it computed stand in, from peers.json, which
`python -m tests.test_peers` writes.
"""

import functools
import json
import pathlib

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
LOGITS = pathlib.Path(__file__).parent / "peers.json"
# The other networks have no other kinds of layers.
ON_RECORD = (
    *("LeNet-5", "AlexNet", "VGG-16", "NIN", "GoogLeNet", "Inception-v3"),
    *("ResNet-20", "plain-34", "ResNet-50"),
)
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


def as_theirs(value, flattened, shape):
    """The inverse of `as_ours`; `shape` is that of their weight."""
    if value.ndim == len(shape) == 4:
        return value.transpose(3, 2, 0, 1)
    value = value.reshape(-1, shape[0]) if len(shape) == 2 else value
    if flattened is not None and len(shape) == 2:
        channels, height, width = flattened
        value = value.reshape(height, width, channels, -1).transpose(2, 0, 1, 3).reshape(-1, shape[0])
    return value.T


def total_loss(losses):
    """Of the logits' loss and those of the side branches."""
    return losses[0] + throughput.SIDE_WEIGHT * sum(losses[1:])


class Ours:
    """Our network of a case, with drawn images and weights."""

    def __init__(self, name):
        case, rng = throughput.CASES[name], np.random.default_rng(0)
        # Large pixels: in response normalisation the constant would hide all else.
        self.image = 30 * rng.standard_normal((4, *case.image_shape), np.float32)
        self.label = rng.integers(0, case.num_classes, 4)
        self.model = make_model(**case.model, num_classes=case.num_classes, dtype="float32")
        shapes = jax.eval_shape(lambda: self.model.init(jax.random.key(0), self.image, train=False))
        self.batch_stats = jax.tree.map(lambda leaf: np.zeros(leaf.shape), shapes.get("batch_stats", {}))

        def draw(path, leaf):
            noise = rng.standard_normal(leaf.shape, np.float32)
            if path[-1].key == "kernel":
                return noise / np.float32(np.sqrt(np.prod(leaf.shape[:-1])))
            return np.float32(path[-1].key == "scale") + noise / 10

        self.params = jax.tree.map_with_path(draw, shapes["params"])

    def outputs(self, params):
        """(logits, *side_logits) in training, without dropout."""
        with nn.intercept_methods(without_dropout):
            return apply(self.model, {"params": params, "batch_stats": self.batch_stats}, self.image)


class Theirs:
    """The peer of `Ours`, with PyTorch's initial weights."""

    def __init__(self, name, ours):
        import torch

        from benchmarks import peers  # which needs it, too

        torch.manual_seed(0)
        make, arguments = throughput.CASES[name].peer
        self.network = getattr(peers, make)(**arguments).train()
        self.image = torch.tensor(np.moveaxis(ours.image, -1, 1).copy())
        self.label = torch.tensor(ours.label)
        for layer in self.network.modules():
            if isinstance(layer, torch.nn.Dropout):
                layer.p = 0.0
        params = traverse_util.flatten_dict(ours.params)
        variables = {"params": ours.params, "batch_stats": ours.batch_stats}
        layers_of_ours = our_layers(ours.model, variables, ours.image)
        layers_of_theirs = their_layers(self.network, self.image)
        assert len(layers_of_ours) == len({path[:-1] for path in params})
        self.weights = {}  # {path in our tree: (weight, what was flattened before it, shape of ours)}
        for path, (layer, flattened) in zip(layers_of_ours, layers_of_theirs, strict=True):
            for key, weight in layer.named_parameters():
                leaf = (*path, NAMES[key][weight.ndim])
                self.weights[leaf] = weight, flattened, params[leaf].shape

    def load(self, params):
        """Takes weights of ours."""
        import torch

        for leaf, value in traverse_util.flatten_dict(params).items():
            weight, flattened, _ = self.weights[leaf]
            value = as_theirs(value, flattened, weight.shape)
            assert value.shape == weight.shape
            weight.data = torch.tensor(value)

    def in_our_tree(self, of):
        """What `of` returns for each weight, in our tree and order of axes."""
        leaves = {leaf: as_ours(of(weight), *place) for leaf, (weight, *place) in self.weights.items()}
        return traverse_util.unflatten_dict(leaves)

    def outputs(self, dtype):
        """(logits, *side_logits) in training, computed in `dtype`."""
        self.network.to(dtype)
        outputs = self.network(self.image.to(dtype))
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def outputs_and_gradients(self, dtype):
        """[logits, *side_logits], and the gradients of the loss in our tree."""
        import torch

        self.network.zero_grad()
        outputs = self.outputs(dtype)
        total_loss([torch.nn.functional.cross_entropy(one, self.label) for one in outputs]).backward()
        return [one.detach().numpy() for one in outputs], self.in_our_tree(lambda weight: weight.grad)


@pytest.mark.parametrize("name", throughput.CASES)
def test_a_peer_computes_what_ours_does(name):
    torch = pytest.importorskip("torch", reason="PyTorch is a requirement of the benchmarks alone")
    ours = Ours(name)
    theirs = Theirs(name, ours)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradients(params):
        outputs = ours.outputs(params)
        losses = [-jax.nn.log_softmax(one)[np.arange(len(ours.label)), ours.label].mean() for one in outputs]
        return total_loss(losses), list(outputs)

    grads, outputs = gradients(theirs.in_our_tree(lambda weight: weight))
    single = theirs.outputs_and_gradients(torch.float32)
    double = theirs.outputs_and_gradients(torch.float64)
    leaves = zip(*map(jax.tree.leaves_with_path, ((outputs, grads), single, double)), strict=True)
    for (path, one), (_, single), (_, double) in leaves:
        # Some networks magnify what is rounded: as much of it as the peer shows of itself is no mistake. And
        # an activation that is all but zero may fall on either side of it, which moves gradients by a step.
        is_logits = path[0].idx == 0
        rounding = np.linalg.norm(single - double) / np.linalg.norm(double)
        off = np.linalg.norm(one - double) / np.linalg.norm(double)
        assert off < (1e-4 if is_logits else 1e-2) + 3 * rounding, (jax.tree_util.keystr(path), off, rounding)


def on_record(outputs):
    """The first ten logits of two images, of the network and of its side branches."""
    return [np.asarray(logits)[:2, :10].tolist() for logits in outputs]


def computed_by_peer(name):
    import torch

    ours = Ours(name)
    theirs = Theirs(name, ours)
    theirs.load(ours.params)
    with torch.no_grad():
        return on_record(theirs.outputs(torch.float64))


@pytest.mark.parametrize("name", ON_RECORD)
def test_logits_are_those_that_a_peer_computed(name):
    ours, expected = Ours(name), json.loads(LOGITS.read_text())[name]
    found = on_record(jax.jit(ours.outputs)(ours.params))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-3 * np.abs(other).max())


@pytest.mark.parametrize("name", ON_RECORD)
def test_the_logits_on_record_are_a_peers(name):
    pytest.importorskip("torch", reason="PyTorch is a requirement of the benchmarks alone")
    for one, other in zip(computed_by_peer(name), json.loads(LOGITS.read_text())[name], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9)


if __name__ == "__main__":
    LOGITS.write_text(json.dumps({name: computed_by_peer(name) for name in ON_RECORD}) + "\n")
