"""Whole processes, from start to trained: `python -m benchmarks.end_to_end [--cases CASE ...]`.

`train.py`, and the depth study on digits, are compared with a script in plain PyTorch that does the same work
(`benchmarks.torch_training`): the same networks, learning rates, steps and evaluations, on the same images,
which it reads from one .npz, in batches of the same size; their order and the initial values are PyTorch's.
Imports and compilation count. Ours also writes checkpoints, metrics and reports, as it always does. "First
start" begins with nothing compiled, "later start" finds what the start before it compiled. The study uses two
processes, `--jobs=2`, with half of the threads each; "torch, two processes" divides its networks likewise.

The contenders take turns. Values are medians over the turns; a ratio is the median of their time by ours in a
turn: above 1, ours is faster. This project does not require PyTorch: pip install torch. MNIST has to be
prepared: make data DATASET=mnist
"""

import argparse
import importlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

import numpy as np

from benchmarks import children, contenders, record
from cnn_cases import parsing, tables
from cnn_cases.data import splits
from cnn_cases.studies import jobs, plan
from cnn_cases.training import logbook, optimizer, provenance
from configs import common

ROOT = pathlib.Path(__file__).parent.parent


class Case(NamedTuple):
    """A training run of ours, or a study, and the peer's network.

    Attributes:
      config: a module of `configs`.
      overrides: keys of the config and their values.
      peer: a training config -> a function of `benchmarks.peers` and its arguments.
      jobs: how many networks of a study are trained side by side.
    """

    config: str
    overrides: dict
    peer: Any
    jobs: int = 1


def _resnet(config):
    model = config.model
    return ("cifar_resnet", dict(depth=model.depth, plain=model.plain, channels=1))


CASES = {
    "ResNet-20, digits": Case("resnet_digits", {}, _resnet),
    "LeNet-5, MNIST": Case(
        "lenet5_mnist",
        {"num_steps": 860, "checkpoint.every_steps": 430},  # two epochs
        lambda _: ("lenet5", dict(channels=1, image_size=32)),
    ),
    "depth study, digits": Case("studies.depth_digits", {}, _resnet, jobs=2),
}
OURS = ("first start", "later start")
TWO = "torch, two processes"
PEERS = ("torch", TWO, "torch.compile, first start", "torch.compile, later start")
# `benchmarks.torch_training` does these in one way, that of `configs.common`.
FIXED = (
    *("start", "dtype", "num_microbatches", "loss", "ema_decay", "evaluation.protocol"),
    *("data.feed", "data.crop", "data.normalization", "data.augment"),
    *("optimizer.name", "optimizer.nesterov", "optimizer.decayed", "optimizer.clip_norm"),
    *("optimizer.rate_patterns", "optimizer.rate_factors", "optimizer.frozen"),
)


def settings_of(case, data):
    """The settings of `benchmarks.torch_training` except `compiled`; writes the images to the file `data`.

    Raises:
      ValueError: a config asks for what that script does not do.
    """
    config = importlib.import_module(f"configs.{case.config}").get_config()
    configs = [run.config for run in plan.expand(config)] if "grid" in config else [config]
    config = configs[0]
    for key, value in case.overrides.items():
        config.update_from_flattened_dict({key: value})
    for one in configs:
        _check_fixed(one)
    arrays = {}
    for split, expression in config.data.splits.items():
        image, label, _ = splits.load_split(
            config.data.name, expression, config.data.data_dir, config.data.image_size, config.data.border
        )
        arrays |= {f"{split}_image": image, f"{split}_label": label}
    np.savez(data, **arrays)
    schedule = optimizer.make_schedule(
        config.optimizer.learning_rate, config.num_steps, **config.schedule.to_dict()
    )
    return {
        "data": str(data),
        "batch_size": config.batch_size,
        "rates": [float(schedule(step)) for step in range(config.num_steps)],
        "momentum": config.optimizer.momentum,
        "weight_decay": config.optimizer.weight_decay,
        "splits": config.evaluation.splits,
        "every_steps": config.evaluation.every_steps,
        "final_splits": config.evaluation.final_splits,
        "eval_batch_size": config.evaluation.batch_size,
        "networks": [(*case.peer(one), one.seed) for one in configs],
    }


def _check_fixed(config):
    config, usual = config.to_dict(), common.get_config().to_dict()
    for key in FIXED:
        if plan.lookup(config, key) != plan.lookup(usual, key):
            raise ValueError(f"{key} = {plan.lookup(config, key)!r}, which the script in PyTorch does not do")


class Outcome(NamedTuple):
    """A contender's cost and result: test_error is the median over its networks, platform "cpu" or "gpu"."""

    seconds: float
    cpu_seconds: float
    test_error: float
    platform: str


def _run_ours(case, workdir, cache):
    study = case.config.startswith("studies.")
    command = ["-m", "cnn_cases.studies.depth_curves", f"--jobs={case.jobs}"] if study else ["train.py"]
    command += [f"--config=configs/{case.config.replace('.', '/')}.py", f"--workdir={workdir}"]
    command += [f"--config.{key}={value}" for key, value in case.overrides.items()]
    cost, _ = _timed(
        [command], {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_ENABLE_COMPILATION_CACHE": "true"}
    )
    runs = sorted(workdir.glob("runs/*")) if study else [workdir]
    errors = [logbook.read_result(run)["metrics"]["test/error"] for run in runs]
    starts = itertools.chain(*map(logbook.read_environments, runs))
    on_cpu = all(start["devices"] == ["cpu"] for start in starts)
    return Outcome(*cost, statistics.median(errors), "cpu" if on_cpu else "gpu")


def _run_theirs(settings, directory, cache, processes):
    """Runs PyTorch, with the networks dealt out to the processes."""
    commands = []
    for index in range(processes):
        path = directory / f"settings_{index}.json"
        path.write_text(json.dumps(settings | {"networks": settings["networks"][index::processes]}))
        commands.append(["-m", "benchmarks.torch_training", path])
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
    if processes > 1:
        environment["OMP_NUM_THREADS"] = str(max(1, provenance.cpu_threads() // processes))
    cost, outputs = _timed(commands, environment)
    found = [json.loads(output.splitlines()[-1]) for output in outputs]
    errors = itertools.chain(*(one["test"] for one in found))
    return Outcome(*cost, statistics.median(errors), found[0]["platform"])


def _timed(commands, environment):
    """((seconds, CPU seconds of the processes and their children), what each process printed)."""
    before = os.times()
    began = time.perf_counter()
    running = [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=ROOT,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]
    with children.ended(*running):
        outputs = [process.communicate() for process in running]
    seconds = time.perf_counter() - began
    for command, process, (_, errors) in zip(commands, running, outputs, strict=True):
        if process.returncode:
            raise RuntimeError(f"{command}: exit code {process.returncode}: {errors[-2000:]}")
    after = os.times()
    cpu = sum(getattr(after, one) - getattr(before, one) for one in ("children_user", "children_system"))
    return (seconds, cpu), [output for output, _ in outputs]


def _peers_of(case, peers):
    """Those of the peers that a case has, in the order of PEERS: a first start compiles for a later one."""
    return [one for one in PEERS if one in peers and (one != TWO or case.jobs > 1)]


def measure(name, turns, peers):
    """Measures one case; returns a dict that JSON can hold."""
    case = CASES[name]
    found = {one: [] for one in (*OURS, *_peers_of(case, peers))}
    platforms = {}
    with tempfile.TemporaryDirectory() as directory:
        directory = pathlib.Path(directory)
        settings = settings_of(case, directory / "data.npz")
        for turn in range(turns):
            for one, outcomes in found.items():
                compiled = one.startswith("torch.compile")
                cache = directory / f"{'torch' if compiled else 'jax'}_{turn}"  # new in each turn
                if one in OURS:
                    outcome = _run_ours(case, directory / f"{one}_{turn}", cache)
                else:
                    own = settings | {"compiled": compiled}
                    processes = case.jobs if one == TWO else 1
                    outcome = _run_theirs(own, directory, cache, processes)
                platforms[one] = outcome.platform
                contenders.check_same_platform(platforms)
                outcomes.append(outcome)
                print(
                    f"{name}, {one}: {outcome.seconds:.1f} s, test error {outcome.test_error:.4f}", flush=True
                )
    rows = {}
    for one, outcomes in found.items():
        seconds, cpu_seconds, errors, _ = zip(*outcomes, strict=True)
        rows[one] = {
            "seconds": contenders.summary(seconds),
            "cpu_seconds": contenders.summary(cpu_seconds),
            "test_error": statistics.median(errors),
            "ratio": {our: contenders.ratios(seconds, _seconds(found[our]))["median"] for our in OURS},
        }
    networks = len(settings["networks"])
    return {
        "networks": networks,
        "steps": len(settings["rates"]),
        "turns": turns,
        "jobs": case.jobs,
        "contenders": rows,
    }


def _seconds(outcomes):
    return [outcome.seconds for outcome in outcomes]


def cells(rows):
    """The table of {case: row}: lists of cells, the header first."""
    lines = [["training", "process", "turns", "s", "CPU s", "beside first start", "beside later start"]]
    for name, row in rows.items():
        for one, found in row["contenders"].items():
            line = [name, one if one not in OURS else f"cnn_cases, {one}", str(row["turns"])]
            for unit in ("seconds", "cpu_seconds"):
                line.append("{median:.1f} ({lowest:.1f} to {highest:.1f})".format(**found[unit]))
            line += [f"{found['ratio'][our]:.2f}" for our in OURS]
            lines.append(line)
    return lines


def main():
    """Measures, prints the results, and writes them to --out."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.end_to_end", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, metavar="CASE", default=list(CASES))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--turns", type=parsing.positive_number, default=3)
    parser.add_argument("--out", type=record.output, help="a JSON file, of which each case is a section")
    options = parser.parse_args()
    contenders.check_installed(parser, options.peers)
    first, later = PEERS[-2:]
    if later in options.peers and first not in options.peers:
        parser.error(f"--peers: {later!r} needs {first!r}, which compiles for it")
    commands = {}
    for name in options.cases:
        peers = " ".join(map(repr, _peers_of(CASES[name], options.peers)))
        given = f"--cases {name!r} --peers {peers} --turns={options.turns}"
        commands[name] = f"python -m benchmarks.end_to_end {given}"
    children.end_on_sigterm()
    jobs.share_accelerators()  # this process uses JAX too
    record.check(parser, options.out, commands, record.devices_here)
    rows = {}
    for name in options.cases:
        rows[name] = measure(name, options.turns, options.peers)
        print(tables.markdown(cells({name: rows[name]}), words=(0, 1)), flush=True)
        if options.out:
            torch = {"torch": importlib.metadata.version("torch")} if options.peers else {}
            record.write_section(options.out, name, commands[name], rows[name] | torch)
    print(tables.markdown(cells(rows), words=(0, 1)))


if __name__ == "__main__":
    main()
