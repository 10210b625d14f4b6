"""Images a second, beside PyTorch: `python -m benchmarks.throughput [--quick] [--out=FILE.json]`.

Every architecture, in training (a whole step: forward, backward, SGD with momentum and weight decay) and in
inference, on data that lies on the device. The peer is the same network in PyTorch, eager and through
torch.compile, channels last, under autocast where the type is bfloat16: torchvision's where it is installed
and has the same network, else that of `benchmarks.peers`. Parameters and multiply-adds are checked to be as
many. PyTorch is no requirement of this project: pip install torch.

The contenders take turns. Figures are medians over the turns, with the lowest and the highest; a ratio is the
median of the ratios of a turn. `share` is that of the device's ceiling, a large matrix product of the same
type measured in the same run; `bound` is the number of images a second at which either the arithmetic or the
memory traffic that XLA counts for its program would take all of what was measured of the device. Each case
has a process of its own.
"""

import argparse
import concurrent.futures
import importlib
import importlib.metadata
import importlib.util
import multiprocessing
import os
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import record
from cnn_cases import tables
from cnn_cases.analysis import costs
from cnn_cases.models import make_model
from cnn_cases.training import devices as devices_lib
from cnn_cases.training import losses, optimizer, steps
from cnn_cases.training.state import init_state

SIDE_WEIGHT = 0.3
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 1e-4
SECONDS_A_TURN = 1.0


class Case(NamedTuple):
    """A network, and how many images it is given at once on a GPU and on a CPU."""

    model: dict  # arguments of `make_model`
    peer: tuple  # the name in `benchmarks.peers`, and its arguments
    public: str  # the name in torchvision.models, "" where it has none that is the same
    image_shape: tuple
    num_classes: int
    gpu_batch: int
    cpu_batch: int


def _imagenet(model, peer, public, gpu_batch, cpu_batch, side=224):
    return Case(model, peer, public, (side, side, 3), 1000, gpu_batch, cpu_batch)


def _cifar(model, peer, gpu_batch, cpu_batch):
    return Case(model, peer, "", (32, 32, 3), 10, gpu_batch, cpu_batch)


def _cifar_resnet(depth):
    return _cifar(dict(name="resnet_cifar", depth=depth), ("cifar_resnet", dict(depth=depth)), 1024, 64)


def _resnet(depth, gpu_batch, cpu_batch, *, plain=False):
    shortcut = "A" if plain else "B"
    model = dict(name="resnet", depth=depth, plain=plain, shortcut=shortcut)
    # torchvision's bottleneck blocks have their stride in the 3x3 convolution.
    public = "" if plain else f"resnet{depth}"
    placement = {} if depth < 50 else dict(stride_placement="v1.5")
    return _imagenet(
        model | placement, ("resnet_net", dict(depth=depth, plain=plain)), public, gpu_batch, cpu_batch
    )


CASES = {
    "LeNet-5": Case(
        dict(name="lenet5"), ("lenet5", dict(channels=1, image_size=32)), "", (32, 32, 1), 10, 4096, 256
    ),
    "AlexNet": _imagenet(dict(name="alexnet"), ("alexnet_two_groups", {}), "", 256, 16, side=227),
    "VGG-16": _imagenet(dict(name="vgg"), ("vgg_net", {}), "vgg16", 64, 2),
    "NIN": _cifar(dict(name="nin"), ("nin_net", {}), 512, 32),
    "GoogLeNet": _imagenet(dict(name="googlenet"), ("googlenet", {}), "", 128, 8),
    "Inception-v3": _imagenet(
        dict(name="inception_v3"), ("inception_v3_net", {}), "inception_v3", 64, 4, side=299
    ),
    "ResNet-20": _cifar_resnet(20),
    "ResNet-56": _cifar_resnet(56),
    "ResNet-110": _cifar_resnet(110),
    "ResNet-18": _resnet(18, 256, 8),
    "plain-34": _resnet(34, 128, 8, plain=True),
    "ResNet-50": _resnet(50, 128, 4),
    "ResNet-152": _resnet(152, 64, 2),
}
PEERS = ("torch", "torch.compile")
QUICK = ("LeNet-5", "NIN", "ResNet-20")


class Contender(NamedTuple):
    """Functions that start a step or a pass, and one that waits for what was started."""

    train: Any
    infer: Any
    wait: Any
    first_step_seconds: float  # of the first training step: with all that is compiled for it
    peak_bytes: int | None  # on the device, of training; None where it is not counted


def ours(case, batch_size, dtype):
    """This project's training step and inference; and what XLA counts of the first: (Contender, dict)."""
    device = jax.local_devices()[0]
    model = make_model(**case.model, num_classes=case.num_classes, dtype=dtype, axis_name=devices_lib.AXIS)
    tx = optimizer.make_optimizer(
        lambda _: LEARNING_RATE,
        name="sgd",
        momentum=MOMENTUM,
        nesterov=False,
        second_moment=0.999,
        epsilon=1e-8,
        weight_decay=WEIGHT_DECAY,
        decayed="all",
        clip_norm=0.0,
    )
    train_steps = steps.make_train_steps(
        model.apply,
        tx,
        lambda arrays, _, __: (arrays["image"], arrays["label"]),
        losses.make_loss(name="cross_entropy", label_smoothing=0.0, map_constant=1.0),
        devices_lib.AXIS,
        side_weight=SIDE_WEIGHT,
    )
    predict_step = steps.make_predict_step(model.apply, lambda _, image: image)
    arrays = devices_lib.replicate(_batch(case, batch_size), [device])
    state = devices_lib.replicate(init_state(model, tx, case.image_shape, 0), [device])
    infer_state = jax.tree.map(jnp.copy, state)  # training gives its own away
    nothing = np.zeros((1, 1, 1), np.int32)  # devices, steps, and no batch: the images are in `arrays`
    began = time.perf_counter()
    train = devices_lib.pmap_train(train_steps, [device]).lower(state, arrays, nothing).compile()
    predict = devices_lib.pmap_predict(predict_step, [device])
    last = [train(state, arrays, nothing)]
    jax.block_until_ready(last)
    seconds = time.perf_counter() - began
    images = arrays["image"][None]

    def train_once():
        last[0] = train(last[0][0], arrays, nothing)

    def infer_once():
        last[1:] = [predict(infer_state, {}, images)]

    stats = device.memory_stats() or {"peak_bytes_in_use": None}
    counted = train.cost_analysis()
    counted = counted[0] if isinstance(counted, list) else counted
    contender = Contender(
        train_once, infer_once, lambda: jax.block_until_ready(last), seconds, stats["peak_bytes_in_use"]
    )
    return contender, {"flops": counted["flops"], "bytes": counted["bytes accessed"]}


def theirs(case, batch_size, dtype, *, compiled):
    """PyTorch's, by torch.compile or eager: (Contender, where the network is from)."""
    import torch
    from torch.nn import functional

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network, origin = peer(case)
    network = network.to(device, memory_format=torch.channels_last)
    batch = _batch(case, batch_size)
    image = torch.tensor(np.moveaxis(batch["image"], -1, 1)).to(device, memory_format=torch.channels_last)
    label = torch.tensor(batch["label"], dtype=torch.long, device=device)
    torch.backends.cudnn.benchmark = True  # PyTorch's own choice of kernels
    sgd = torch.optim.SGD(
        network.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
    )
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")

    def forward(image, label):
        with autocast:
            outputs = network(image)
            logits, *sides = outputs if isinstance(outputs, tuple) else (outputs,)
            return functional.cross_entropy(logits, label) + SIDE_WEIGHT * sum(
                functional.cross_entropy(side, label) for side in sides
            )

    def predict(image):
        with autocast:
            return functional.log_softmax(network(image), dim=1)

    if compiled:
        forward, predict = torch.compile(forward), torch.compile(predict)

    def train_once():
        network.train()
        sgd.zero_grad(set_to_none=True)
        forward(image, label).backward()
        sgd.step()

    def infer_once():
        network.eval()
        with torch.inference_mode():
            predict(image)

    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize()

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    train_once()
    wait()
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return Contender(train_once, infer_once, wait, seconds, peak), origin


def peer(case):
    """The network in PyTorch, and where it is from: (module, "torchvision" or "benchmarks.peers").

    Raises:
      ValueError: it is not the same network as ours.
    """
    from benchmarks import peers

    ours_counted = counts(case)
    if case.public and importlib.util.find_spec("torchvision"):
        name = case.public
        # Inception-v3 starts its weights by scipy, which takes a minute.
        options = dict(aux_logits=True, init_weights=False) if name == "inception_v3" else {}
        network = getattr(importlib.import_module("torchvision.models"), name)(**options)
        if _parameters(network) == ours_counted["parameters"]:
            return network, "torchvision"
    name, arguments = case.peer
    network = getattr(peers, name)(**arguments)
    found = {"parameters": _parameters(network), "multiply_adds": _multiply_adds(network, case)}
    if found != ours_counted:
        raise ValueError(f"{name} of benchmarks.peers has {found}, ours {ours_counted}")
    return network, "benchmarks.peers"


def counts(case):
    """Parameters, and multiply-adds of a training pass forward for one image, side branches included."""
    model = make_model(**case.model, num_classes=case.num_classes, dtype="float32")
    layers = costs.count(model, case.image_shape)
    trunk, side = costs.total(layers), costs.total(layers, side=True)
    return {
        "parameters": trunk.parameters + side.parameters,
        "multiply_adds": trunk.multiply_adds + side.multiply_adds,
    }


def _parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


def _multiply_adds(network, case):
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    height, width, channels = case.image_shape
    with torch.device("meta"):
        image = torch.zeros(2, channels, height, width)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.to("meta").train()(image)
    network.to_empty(device="cpu")
    return counter.get_total_flops() // 4  # of two images, each product and each sum counted


def _batch(case, batch_size):
    rng = np.random.default_rng(0)
    image = rng.standard_normal((batch_size, *case.image_shape), np.float32)
    return {"image": image, "label": rng.integers(0, case.num_classes, batch_size).astype(np.int32)}


def measure(name, dtype, turns, peers_wanted):
    """One case: a dict that JSON can hold."""
    devices_lib.choose_cpu_kernels()
    case = CASES[name]
    on_gpu = jax.local_devices()[0].platform == "gpu"
    batch_size = case.gpu_batch if on_gpu else case.cpu_batch
    our, counted = ours(case, batch_size, dtype)
    contenders = {"cnn_cases": our}
    row = {
        "batch_size": batch_size,
        "image_shape": case.image_shape,
        "dtype": dtype,
        **counts(case),
        "xla_flops_a_step": counted["flops"],
        "xla_bytes_a_step": counted["bytes"],
    }
    for kind in peers_wanted:
        contenders[kind], row["peer"] = theirs(case, batch_size, dtype, compiled=kind == "torch.compile")
    for work in ("train", "infer"):
        row[work] = _race(contenders, work, batch_size, turns)
    row["first_step_seconds"] = {one: round(c.first_step_seconds, 2) for one, c in contenders.items()}
    row["peak_bytes"] = {one: c.peak_bytes for one, c in contenders.items()}
    if peers_wanted:
        row["torch"] = importlib.metadata.version("torch")
    matrix, copy = ceilings(dtype)
    row["ceilings"] = {"flops_a_second": matrix, "bytes_a_second": copy}
    rate = row["train"]["cnn_cases"]["images_a_second"]["median"]
    # The backward pass does each product of the forward pass twice: for the input and for the weights.
    achieved = 3 * 2 * row["multiply_adds"] * rate
    row["flops_a_second"] = achieved
    row["share_of_ceiling"] = achieved / matrix
    bound = batch_size / max(counted["flops"] / matrix, counted["bytes"] / copy)
    row["bound_images_a_second"], row["share_of_bound"] = bound, rate / bound
    return row


def _race(contenders, work, batch_size, turns):
    """{contender: {"images_a_second": median, lowest, highest, "ratio": ours / its}}."""
    count = {name: _steps_a_turn(one, work) for name, one in contenders.items()}
    rates = {name: [] for name in contenders}
    for _ in range(turns):
        for name, one in contenders.items():
            rates[name].append(count[name] * batch_size / seconds_of(one, work, count[name]))
    result = {}
    for name, values in rates.items():
        ratios = [mine / their for mine, their in zip(rates["cnn_cases"], values, strict=True)]
        result[name] = {"images_a_second": summary(values), "ratio": summary(ratios)}
    return result


def _steps_a_turn(contender, work):
    seconds_of(contender, work, 2)  # what is slow the first time
    return max(1, round(SECONDS_A_TURN / (seconds_of(contender, work, 2) / 2)))


def seconds_of(contender, work, count):
    """Of so many steps or passes, `work` being "train" or "infer"."""
    began = time.perf_counter()
    for _ in range(count):
        getattr(contender, work)()
    contender.wait()
    return time.perf_counter() - began


def summary(values):
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def ceilings(dtype):
    """Floating-point operations and bytes a second of a large matrix product and a large copy."""
    on_gpu = jax.local_devices()[0].platform == "gpu"
    side, size = (8192, 2**29) if on_gpu else (2048, 2**26)
    matrix = jnp.ones((side, side), dtype)
    product = jax.jit(lambda a: a @ a)
    array = jnp.ones(size // 4, jnp.float32)
    copy = jax.jit(lambda a: a + 1)
    flops = 2 * side**3 / _best(lambda: product(matrix))
    return flops, 2 * size / _best(lambda: copy(array))


def _best(function, repeats=10):
    jax.block_until_ready(function())
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(function())
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def cells(rows):
    """The table of {case: row}: lists of cells, the head first. Ratios are ours by theirs."""
    peers_seen = [name for row in rows.values() for name in row["train"] if name != "cnn_cases"]
    peers_seen = list(dict.fromkeys(peers_seen))
    head = ["network", "batch", "pixels"]
    for work in ("training", "inference"):
        head += [f"{work}, images/s", *(f"beside {name}" for name in peers_seen)]
    lines = [[*head, "first step, s", *(f"{name}, s" for name in peers_seen), "share of ceiling"]]
    for name, row in rows.items():
        line = [name, str(row["batch_size"]), "x".join(map(str, row["image_shape"][:2]))]
        for work in ("train", "infer"):
            figures = row[work]["cnn_cases"]["images_a_second"]
            line.append("{median:,.0f} ({lowest:,.0f} to {highest:,.0f})".format(**figures))
            line += ["{median:.2f}".format(**row[work][peer]["ratio"]) for peer in peers_seen]
        line += [f"{row['first_step_seconds'][one]:.1f}" for one in ("cnn_cases", *peers_seen)]
        lines.append([*line, f"{row['share_of_ceiling']:.0%}"])
    return lines


def _apart(function, *arguments):
    """What `function(*arguments)` gives in a process of its own, whose memory goes with it."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def main():
    """Measures, prints, and writes what --out names."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}, eager, three turns")
    parser.add_argument("--cases", nargs="+", choices=CASES, metavar="CASE", default=list(CASES))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--out", help="a JSON file, of which each case is a section")
    options = parser.parse_args()
    if options.quick:
        options.cases, options.peers, options.turns = QUICK, ["torch"], 3
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # there has to be room for PyTorch
    rows = {}
    for name in options.cases:
        rows[name] = _apart(measure, name, options.dtype, options.turns, options.peers)
        print(tables.markdown(cells({name: rows[name]}), words=(0,)), flush=True)
        if options.out:
            command = f"python -m benchmarks.throughput --cases {name} --dtype={options.dtype}"
            record.write_section(options.out, name, command, rows[name])
    print(tables.markdown(cells(rows), words=(0,)))


if __name__ == "__main__":
    main()
