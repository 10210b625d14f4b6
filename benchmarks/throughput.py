"""Images per second, compared with PyTorch: `python -m benchmarks.throughput [--quick] [--out=FILE.json]`.

Every architecture, in training (a whole step: forward, backward, SGD with momentum and weight decay) and in
inference, on data that is on the device already. The peer is the same network in PyTorch, eager and with
torch.compile, channels last, under autocast if the type is bfloat16: torchvision's if it is installed and has
the same network, else that of `benchmarks.peers`. Parameters and multiply-adds are checked to be equal in
number. A call of ours does as many steps as in a long training run whose images are streamed: on a CPU up to
ten, elsewhere one. This project does not require PyTorch: pip install torch.

Each contender has a separate process; when all are made, of one case or of several, they take turns.
Contenders that are made at the same time share the device while XLA and cuDNN choose kernels by timing them,
and may choose worse ones. Values are medians over the turns, with the lowest and the highest; a ratio is the
median of the ratios of the turns. `share_of_ceiling` is the share of the device's ceiling, a large matrix
product of the same type measured in the same run. `bound` is the number of images per second at which the
arithmetic or the memory traffic of our program would use all that was measured of the device: on a CPU as XLA
counts them, on a GPU the multiply-adds and the traffic that `benchmarks.kernels` counts. `peak_bytes` is the
peak memory of training, parameters included: on a GPU as the framework counts it, on a CPU as the growth of
the process.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import contenders, kernels, record
from cnn_cases import parsing, tables
from cnn_cases.analysis import costs
from cnn_cases.models import make_model
from cnn_cases.studies import jobs
from cnn_cases.training import devices as devices_lib
from cnn_cases.training import losses, optimizer, processes, programs, runtime, steps
from cnn_cases.training.state import init_state

SIDE_WEIGHT = 0.3
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 1e-4


class Case(NamedTuple):
    """A network, and its batch sizes on a GPU and on a CPU."""

    model: dict  # arguments of `make_model`
    peer: tuple  # the name in `benchmarks.peers`, and its arguments
    public: str  # the name in torchvision.models, "" if it does not have the same network
    image_shape: tuple
    num_classes: int
    gpu_batch: int
    cpu_batch: int


def _imagenet(model, peer, public, gpu_batch, cpu_batch, side=224):
    return Case(model, peer, public, (side, side, 3), 1000, gpu_batch, cpu_batch)


def _cifar(model, peer, gpu_batch, cpu_batch):
    return Case(model, peer, "", (32, 32, 3), 10, gpu_batch, cpu_batch)


def cifar_resnet(depth):
    """The Case of a ResNet of `depth` layers at 32x32."""
    return _cifar(dict(name="resnet_cifar", depth=depth), ("cifar_resnet", dict(depth=depth)), 1024, 64)


def _resnet(depth, gpu_batch, cpu_batch, *, plain=False, side=224):
    shortcut = "A" if plain else "B"
    model = dict(name="resnet", depth=depth, plain=plain, shortcut=shortcut)
    # torchvision's bottleneck blocks have their stride in the 3x3 convolution.
    public = "" if plain else f"resnet{depth}"
    placement = {} if depth < 50 else dict(stride_placement="v1.5")
    peer = ("resnet_net", dict(depth=depth, plain=plain))
    return _imagenet(model | placement, peer, public, gpu_batch, cpu_batch, side)


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
    "ResNet-20": cifar_resnet(20),
    "ResNet-56": cifar_resnet(56),
    "ResNet-110": cifar_resnet(110),
    "ResNet-18, 32x32": _resnet(18, 2048, 64, side=32),
    "ResNet-18": _resnet(18, 256, 8),
    "plain-34": _resnet(34, 128, 8, plain=True),
    "ResNet-50": _resnet(50, 128, 4),
    "ResNet-152": _resnet(152, 64, 2),
}
OURS = "cnn_cases"
PEERS = ("torch", "torch.compile")
QUICK = ("LeNet-5", "NIN", "ResNet-20")


def ours(case, dtype, *, steps_per_call=0, num_devices=1, over_devices=devices_lib.pmap_train):
    """This project's training step and inference: a `contenders.Network`.

    Args:
      case: a Case.
      dtype: "float32" or "bfloat16".
      steps_per_call: training steps in a call; 0: see `_steps_per_call`.
      num_devices: how many devices of this process share the work, with those of other processes.
      over_devices: (train_steps, devices) -> the jitted function.

    Raises:
      ValueError: this process has fewer devices.
    """
    devices = jax.local_devices()[:num_devices]
    if len(devices) < num_devices:
        raise ValueError(f"num_devices = {num_devices}, and there are {len(devices)}")
    batch_size = _batch_size(case, devices[0].platform)
    facts = {
        "batch_size": batch_size,
        "platform": devices[0].platform,
        "devices": [device.device_kind for device in devices],
        "resident_bytes": contenders.resident_bytes(),
        "steps_per_call": steps_per_call or _steps_per_call(case, devices[0].platform),
    }
    model, tx, train_steps = training(case, dtype)
    at_once = programs.images_at_once(model.apply)
    predict_step = steps.make_predict_step(model.apply, lambda _, image: image, at_once)
    devices_of_all = len(devices_lib.of_all_processes(devices))
    devices_lib.check_batch_size(batch_size, devices_of_all)
    share = batch_size // devices_of_all
    arrays = devices_lib.replicate(_batch(case, share), devices)  # the same images for all devices
    state = devices_lib.replicate(init_state(model, tx, case.image_shape, 0), devices)
    steps_per_call = facts["steps_per_call"]
    # One batch per device and step; its images are in `arrays`.
    nothing = np.zeros((len(devices), steps_per_call, 1), np.int32)
    began = time.perf_counter()
    train = over_devices(train_steps, devices)
    predict = devices_lib.pmap_predict(predict_step, devices)
    last = [train(state, arrays, nothing)]
    jax.block_until_ready(last)
    facts["first_step_seconds"] = time.perf_counter() - began
    # With several processes, pmap can only be compiled by a call (JAX 0.10).
    if facts["platform"] in ("cpu", "gpu") and not processes.is_one_of_several():
        # One step is counted, outside of a loop; if that is what a call does, nothing is compiled again.
        compiled = train.lower(last[0][0], arrays, nothing[:, :1]).compile()
        facts |= _counted(compiled, facts["platform"])
    images = devices_lib.pmap_predict(lambda _, arrays, __: arrays["image"], devices)(None, arrays, nothing)
    wait_each = devices_lib.max_in_flight(devices) == 0

    def wait():
        jax.block_until_ready(last)

    def train_some():
        last[0] = train(last[0][0], arrays, nothing)
        if wait_each:
            wait()

    def infer_once():
        last[1:] = [predict(last[0][0], arrays, images)]

    def peak_bytes():
        return (devices[0].memory_stats() or {}).get("peak_bytes_in_use")

    return contenders.Network(train_some, infer_once, wait, peak_bytes, facts, steps_per_call)


def _steps_per_call(case, platform):
    """As many as in a long training run whose images are streamed."""
    return programs.max_steps_per_call(platform, "stream", _batch_size(case, platform), case.image_shape)


def _counted(compiled, platform):
    if platform == "gpu":
        traffic = kernels.of_program(compiled.as_text())
        return {"kernels_a_step": traffic.kernels, "bytes_a_step": traffic.bytes}
    counted = compiled.cost_analysis()
    counted = counted[0] if isinstance(counted, list) else counted
    return {"xla_flops_a_step": counted["flops"], "xla_bytes_a_step": counted["bytes accessed"]}


def training(case, dtype):
    """Makes the network, its optimizer, and `steps.make_train_steps` for images that are on the device."""
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
    return model, tx, train_steps


def theirs(case, dtype, *, compiled):
    """PyTorch's training step and inference, eager or with torch.compile: a `contenders.Network`."""
    import torch
    from torch.nn import functional

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    make_network, origin = peer(case)
    facts = {"peer": origin, "torch": importlib.metadata.version("torch")}
    facts["platform"] = "gpu" if device.type == "cuda" else "cpu"
    facts["resident_bytes"] = contenders.resident_bytes()
    batch_size = _batch_size(case, device.type)
    network = make_network().to(device, memory_format=torch.channels_last)
    batch = _batch(case, batch_size)
    image = torch.tensor(np.moveaxis(batch["image"], -1, 1)).to(device, memory_format=torch.channels_last)
    label = torch.tensor(batch["label"], dtype=torch.long, device=device)
    torch.backends.cudnn.benchmark = True  # PyTorch's own choice of kernels
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, as in JAX and in its own convolutions
    # Fused is PyTorch's fastest, on a CPU several times as fast as its default.
    sgd = torch.optim.SGD(
        network.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True
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

    def switch(training):  # it walks all modules, so users do not do it in each step
        if network.training != training:
            network.train(training)

    def train_once():
        switch(True)
        sgd.zero_grad(set_to_none=True)
        forward(image, label).backward()
        sgd.step()

    def infer_once():
        switch(False)
        with torch.inference_mode():
            predict(image)

    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize()

    def peak_bytes():
        return torch.cuda.max_memory_allocated() if device.type == "cuda" else None

    began = time.perf_counter()
    train_once()
    wait()
    facts["first_step_seconds"] = time.perf_counter() - began
    return contenders.Network(train_once, infer_once, wait, peak_bytes, facts)


def peer(case):
    """A function that makes the network in PyTorch, and its source, "torchvision" or "benchmarks.peers".

    Raises:
      ValueError: the network is not the same as ours.
    """
    import torch

    from benchmarks import peers

    name, arguments = case.peer
    candidates = {"benchmarks.peers": functools.partial(getattr(peers, name), **arguments)}
    if case.public and importlib.util.find_spec("torchvision"):
        # Inception-v3 draws its initial values with scipy, which takes a minute.
        inception = dict(aux_logits=True, init_weights=False, dropout=0.2)
        options = inception if case.public == "inception_v3" else {}
        public = getattr(importlib.import_module("torchvision.models"), case.public)
        candidates = {"torchvision": functools.partial(public, **options)} | candidates
    ours_counted = counts(case)
    for source, make_network in candidates.items():
        with torch.device("meta"):
            counted = make_network()
        found = {"parameters": _parameters(counted), "multiply_adds": _multiply_adds(counted, case)}
        if found == ours_counted:
            return make_network, source
    raise ValueError(f"{name} of benchmarks.peers has {found}, ours {ours_counted}")


def counts(case):
    """Parameters, and multiply-adds of a forward pass in training per image, side branches included."""
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
        network.train()(image)
    return counter.get_total_flops() // 4  # two images; products and sums are both counted


def _batch_size(case, platform):
    return case.cpu_batch if platform == "cpu" else case.gpu_batch


def _batch(case, batch_size):
    rng = np.random.default_rng(0)
    image = rng.standard_normal((batch_size, *case.image_shape), np.float32)
    return {"image": image, "label": rng.integers(0, case.num_classes, batch_size).astype(np.int32)}


def make(case, dtype, kind):
    """Makes the `contenders.Network` of OURS or of one of PEERS."""
    if kind == OURS:
        runtime.choose_cpu_flags()
        return ours(case, dtype)
    return theirs(case, dtype, compiled=kind == "torch.compile")


def measure(names, dtype, turns, peers_wanted):
    """Measures cases, after the contenders of all of them are made.

    Yields:
      (name, a dict that JSON can hold) for one case after another; in place of the dict the error of a case
      whose contenders failed, for example because the device's memory was full.
    """
    with contextlib.ExitStack() as all_cases:
        of_case = {name: all_cases.enter_context(contextlib.ExitStack()) for name in names}
        made = {name: {} for name in names}
        for name, processes in made.items():
            for kind in (OURS, *peers_wanted):
                one = contenders.Contender(make, CASES[name], dtype, kind)
                processes[kind] = of_case[name].enter_context(one)
                if len(names) == 1:  # finish this contender before the next one starts to compile
                    if one.made.exception():
                        break
                    _check_same_platform(processes)
        concurrent.futures.wait([one.made for processes in made.values() for one in processes.values()])
        for name, processes in made.items():
            try:
                _check_same_platform(processes)
                row = _measure_made(CASES[name], dtype, turns, processes)
            except Exception as error:  # any failure of a contender; the other cases go on
                row = error
            else:
                row |= {"cases_compiled_at_once": len(names)} if len(names) > 1 else {}
            of_case[name].close()  # frees the memory for the next case
            yield name, row


def _check_same_platform(processes):
    platforms = {kind: one.made.result()["platform"] for kind, one in processes.items()}
    contenders.check_same_platform(platforms)


def _measure_made(case, dtype, turns, processes):
    """Measures a case with {kind: Contender}; returns a dict that JSON can hold."""
    facts = {kind: one.made.result() for kind, one in processes.items()}
    row = {"image_shape": case.image_shape, "dtype": dtype}
    peaks = {kind: one.peak().result() for kind, one in processes.items()}
    groups = {kind: [one] for kind, one in processes.items()}
    for work in ("train", "infer"):
        seconds = contenders.race(groups, work, turns, facts[OURS]["platform"])
        row[work] = _rates(seconds, facts[OURS]["batch_size"])
    row |= processes[OURS].also(counts, case).result()
    matrix, copy = processes[OURS].also(ceilings, dtype).result()
    row |= {key: facts[OURS][key] for key in ("batch_size", "steps_per_call")}
    for kind in facts.keys() - {OURS}:
        row |= {key: facts[kind][key] for key in ("peer", "torch")}
    row["first_step_seconds"] = {kind: round(found["first_step_seconds"], 2) for kind, found in facts.items()}
    row["peak_bytes"] = peaks
    row["ceilings"] = {"flops_a_second": matrix, "bytes_a_second": copy}
    rate = row["train"][OURS]["images_a_second"]["median"]
    # The backward pass has two products for each of the forward pass: for the input and for the weights.
    achieved = 3 * 2 * row["multiply_adds"] * rate
    row["flops_a_second"] = achieved
    row["share_of_ceiling"] = achieved / matrix
    platform = facts[OURS]["platform"]
    if platform == "cpu":
        row |= {key: facts[OURS][key] for key in ("xla_flops_a_step", "xla_bytes_a_step")}
        operations, moved = row["xla_flops_a_step"], row["xla_bytes_a_step"]
    elif platform == "gpu":
        row |= {key: facts[OURS][key] for key in ("kernels_a_step", "bytes_a_step")}
        operations, moved = 3 * 2 * row["multiply_adds"] * row["batch_size"], row["bytes_a_step"]
    else:
        return row
    bound = row["batch_size"] / max(operations / matrix, moved / copy)
    return row | {"bound_images_a_second": bound, "share_of_bound": rate / bound}


def _rates(seconds, batch_size):
    """{contender: {"images_a_second": median, lowest, highest, "ratio": ours / the contender's}}."""
    return {
        name: {
            "images_a_second": contenders.summary([batch_size / value for value in values]),
            "ratio": contenders.ratios(values, seconds[OURS]),
        }
        for name, values in seconds.items()
    }


def ceilings(dtype):
    """Floating-point operations and bytes per second of a large matrix product and a large copy."""
    on_gpu = jax.local_devices()[0].platform == "gpu"
    side, size = (8192, 2**29) if on_gpu else (2048, 2**26)
    matrix = jnp.ones((side, side), dtype)
    product = jax.jit(lambda a: a @ a)
    # In place: to get new memory from the system takes longer than to fill it.
    arrays = [jnp.ones(size // 4, jnp.float32)]
    change = jax.jit(lambda a: a + 1, donate_argnums=0)

    def copy():
        arrays.append(change(arrays.pop()))
        return arrays

    return 2 * side**3 / _best(lambda: product(matrix)), 2 * size / _best(copy)


def _best(function, repeats=10):
    jax.block_until_ready(function())
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(function())
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def cells(rows):
    """The table of {case: row}: lists of cells, the header first. Ratios are ours divided by theirs."""
    peers_seen = _peers_of(rows)
    head = ["network", "batch", "pixels"]
    for work in ("training", "inference"):
        head += [f"{work}, images/s", *(f"by {name}'s" for name in peers_seen)]
    lines = [head]
    for name, row in rows.items():
        line = [name, str(row["batch_size"]), "x".join(map(str, row["image_shape"][:2]))]
        for work in ("train", "infer"):
            median, lowest, highest = map(_three_digits, row[work][OURS]["images_a_second"].values())
            line.append(f"{median} ({lowest} to {highest})")
            found = (row[work].get(peer) for peer in peers_seen)
            line += ["{median:.2f}".format(**one["ratio"]) if one else "" for one in found]
        lines.append(line)
    return lines


def cost_cells(rows):
    """The table of the other costs in {case: row}, the header first; with bounds only if a row has one."""
    seen = [OURS, *_peers_of(rows)]
    head = ["network", *(f"first step, s: {one}" for one in seen), *(f"memory, MB: {one}" for one in seen)]
    bounds = ["share of bound"] if any("share_of_bound" in row for row in rows.values()) else []
    lines = [[*head, "GFLOP/s", "share of ceiling", *bounds]]
    for name, row in rows.items():
        first, peak = ([row[key].get(one) for one in seen] for key in ("first_step_seconds", "peak_bytes"))
        line = [name, *("" if one is None else f"{one:.1f}" for one in first)]
        line += ["" if one is None else f"{one / 1e6:,.0f}" for one in peak]
        line.append(_three_digits(row["flops_a_second"] / 1e9))
        line.append(f"{row['share_of_ceiling']:.0%}")
        line += [f"{row['share_of_bound']:.0%}" if "share_of_bound" in row else "" for _ in bounds]
        lines.append(line)
    return lines


def _three_digits(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _peers_of(rows):
    return list(dict.fromkeys(name for row in rows.values() for name in row["train"] if name != OURS))


def main():
    """Measures, prints the results, and writes them to --out."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"unless set otherwise, only {', '.join(QUICK)}, eager, three turns",
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, metavar="CASE", default=list(CASES))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--turns", type=parsing.positive_number, default=7)
    parser.add_argument(
        "--at_once",
        type=parsing.positive_number,
        default=1,
        help="cases to compile at once, for a GPU in a machine of many cores",
    )
    parser.add_argument("--out", type=record.output, help="a JSON file, of which each case is a section")
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(cases=QUICK, peers=["torch"], turns=3)
    options = parser.parse_args()
    contenders.check_installed(parser, options.peers)

    def command(name):
        peers = " ".join(one for one in PEERS if one in options.peers)
        flags = f"--cases {name!r} --peers {peers}"
        flags += f" --dtype={options.dtype} --turns={options.turns} --at_once={options.at_once}"
        return f"python -m benchmarks.throughput {flags}"

    jobs.share_accelerators()  # this process uses JAX too, for the record
    commands = {name: command(name) for name in options.cases}
    record.check(parser, options.out, commands, record.devices_here)
    rows, failed = {}, []
    for first in range(0, len(options.cases), options.at_once):
        names = options.cases[first : first + options.at_once]
        for name, row in measure(names, options.dtype, options.turns, options.peers):
            if isinstance(row, Exception):
                failed.append(f"{name} was not measured: {row!r}")
                print(failed[-1], file=sys.stderr, flush=True)
                continue
            rows[name] = row
            _print({name: row})
            if options.out:
                record.write_section(options.out, name, command(name), row)
    if len(rows) > 1:
        _print(rows)
    if failed:
        sys.exit("\n".join(failed))


def _print(rows):
    for table in (cells(rows), cost_cells(rows)):
        print(tables.markdown(table, words=(0,)), flush=True)


if __name__ == "__main__":
    main()
