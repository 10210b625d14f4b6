"""The costs of sharing the work and of depth: `python -m benchmarks.scaling [--only=sharing|depth]`.

sharing   Milliseconds of a training step on one batch that is split over 1, 2 and 4 virtual CPU devices of
          one process, and over 2 and 4 processes with a CPU device each; compared with the step by plain
          `jax.jit` on one device. All share the same cores, so nothing becomes faster, and the extra time is
          the cost of sharing: the devices wait for each other at every batch normalisation, whose statistics
          are those of the whole batch, and for the mean of the gradients.
depth     Seconds until the first training step of CIFAR-10's ResNets is done, with ours the first call (ten
          steps), with tracing and compilation, and milliseconds of the steps after it; compared with PyTorch,
          eager and with torch.compile, if it is installed (pip install torch).

Every contender has separate processes, and the contenders take turns. Values are medians over the turns with
the lowest and the highest; a ratio is the median of the ratios of the turns.
"""

import argparse
import contextlib
import functools
import importlib.util
import socket

import jax

from benchmarks import contenders, flags, record, throughput
from cnn_cases import parsing, tables
from cnn_cases.training import devices as devices_lib
from cnn_cases.training import processes, runtime

JIT, ONE = "jax.jit", "1 device"
DEVICES, PROCESSES = (2, 4), (2, 4)
DEFAULT_CASES = ("ResNet-20", "ResNet-20, digits")
CASES = [name for name, case in flags.CASES.items() if case.cpu_batch % max(*DEVICES, *PROCESSES) == 0]
DEPTHS = (8, 20, 32, 44, 56, 110)
DTYPE = "float32"


def teams():
    """{who: [(function that makes a `contenders.Network` of a case, environment) for each process]}."""
    found = {
        JIT: [(functools.partial(_make, over_devices=_jit_train), _on_cpu(1))],
        ONE: [(_make, _on_cpu(1))],
    }
    for count in DEVICES:
        # Devices wait for each other, each in a thread; with too few threads they wait forever (JAX 0.10).
        environment = _on_cpu(count) | {"PJRT_NPROC": "16"}
        found[f"{count} devices"] = [(functools.partial(_make, num_devices=count), environment)]
    for count in PROCESSES:
        with socket.socket() as one:
            one.bind(("localhost", 0))
            address = f"localhost:{one.getsockname()[1]}"
        jobs = [dict(coordinator_address=address, num_processes=count, process_id=i) for i in range(count)]
        found[f"{count} processes"] = [(functools.partial(_make, job=job), _on_cpu(1)) for job in jobs]
    return found


def _on_cpu(num_devices):
    flag = f"--xla_force_host_platform_device_count={num_devices}"
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flag}


def _make(case, num_devices=1, over_devices=devices_lib.pmap_train, job=None):
    runtime.choose_cpu_flags()
    if job:
        processes.join(**job)
    return throughput.ours(case, DTYPE, num_devices=num_devices, over_devices=over_devices)


def _jit_train(train_steps, _):
    """Like `devices.pmap_train`, for one device and without pmap."""
    train_steps = jax.vmap(train_steps, in_axes=(None, None, 0), out_axes=None, axis_name=devices_lib.AXIS)
    return jax.jit(train_steps, donate_argnums=0)


def _leave(group):
    """Ends the processes of a job, all at once since they wait for each other."""
    for left in [one.also(processes.end_together, 0, 30) for one in group]:
        left.exception()  # BrokenProcessPool, as the process is gone


def sharing(case, turns):
    """Measures a case.

    Returns:
      {"batch_size": ..., "teams": {who: {"step_seconds", "ratio" to one device, ...}}}, and the kind of the
      device.
    """
    groups, facts, rows = {}, {}, {}
    with contextlib.ExitStack() as stack:
        for who, processes in teams().items():
            groups[who] = [
                stack.enter_context(contenders.Contender(make, case, environment=environment))
                for make, environment in processes
            ]
            if len(processes) > 1:
                stack.callback(_leave, groups[who])
            facts[who] = [one.made.result() for one in groups[who]]
        seconds = contenders.race(groups, "train", turns)
    for who, values in seconds.items():
        rows[who] = {
            "step_seconds": contenders.summary(values),
            "ratio": contenders.ratios(values, seconds[ONE]),
            "first_step_seconds": max(one["first_step_seconds"] for one in facts[who]),
        }
    one = facts[ONE][0]
    return {"batch_size": one["batch_size"], "dtype": DTYPE, "teams": rows}, one["devices"]


def depth_costs(depth, turns, kinds):
    """Measures a depth: {"batch_size": ..., "contenders": {kind: {"first_step_seconds", "step_seconds"}}}."""
    with contextlib.ExitStack() as stack:
        groups, facts = {}, {}
        for kind in kinds:
            one = contenders.Contender(throughput.make, throughput.cifar_resnet(depth), DTYPE, kind)
            groups[kind] = [stack.enter_context(one)]
            facts[kind] = one.made.result()
            contenders.check_same_platform({one: found["platform"] for one, found in facts.items()})
        seconds = contenders.race(groups, "train", turns)
    rows = {
        kind: {
            "first_step_seconds": round(facts[kind]["first_step_seconds"], 2),
            "step_seconds": contenders.summary(values),
        }
        for kind, values in seconds.items()
    }
    row = {"batch_size": facts[throughput.OURS]["batch_size"], "dtype": DTYPE, "contenders": rows}
    peers = [kind for kind in kinds if kind != throughput.OURS]
    return row | ({"torch": facts[peers[0]]["torch"]} if peers else {})


def sharing_cells(rows):
    """The table of {case: row of `sharing`}: lists of cells, the header first; ms, ratio to one device."""
    lines = [["network", "batch", *next(iter(rows.values()))["teams"]]]
    for name, row in rows.items():
        line = [name, str(row["batch_size"])]
        for found in row["teams"].values():
            line.append(f"{found['step_seconds']['median'] * 1e3:,.1f} ({found['ratio']['median']:.2f})")
        lines.append(line)
    return lines


def depth_cells(rows):
    """The table of {depth: row of `depth_costs`}: lists of cells, the header first."""
    kinds = list(dict.fromkeys(kind for row in rows.values() for kind in row["contenders"]))
    head = ["depth", *(f"{kind}, first step, s" for kind in kinds), *(f"{kind}, later, ms" for kind in kinds)]
    lines = [head]
    for depth, row in rows.items():
        found = [row["contenders"].get(kind) for kind in kinds]
        line = [str(depth), *(f"{one['first_step_seconds']:.1f}" if one else "" for one in found)]
        lines.append(
            [*line, *(f"{one['step_seconds']['median'] * 1e3:,.0f}" if one else "" for one in found)]
        )
    return lines


def main():
    """Measures, prints the results, and writes them to --out."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=("sharing", "depth"), help="one of the two")
    parser.add_argument("--cases", nargs="+", choices=CASES, metavar="CASE", default=DEFAULT_CASES)
    parser.add_argument("--depths", nargs="+", type=int, choices=DEPTHS, default=DEPTHS)
    parser.add_argument("--turns", type=parsing.positive_number, default=5)
    parser.add_argument(
        "--out", type=record.output, help="a JSON file, of which each case and each depth is a section"
    )
    options = parser.parse_args()
    cases = () if options.only == "depth" else options.cases
    depths = () if options.only == "sharing" else options.depths
    commands = {name: f"--only=sharing --cases {name!r}" for name in cases}
    commands |= {f"depth {depth}": f"--only=depth --depths {depth}" for depth in depths}
    commands = {
        name: f"python -m benchmarks.scaling {one} --turns={options.turns}" for name, one in commands.items()
    }
    record.check(parser, options.out, commands)
    rows = {}
    for name in cases:
        rows[name], devices = sharing(flags.CASES[name], options.turns)
        if options.out:
            record.write_section(options.out, name, commands[name], rows[name], devices)
    if rows:
        print(tables.markdown(sharing_cells(rows), words=(0,)), flush=True)
    rows, kinds = {}, [throughput.OURS, *(throughput.PEERS if importlib.util.find_spec("torch") else ())]
    for depth in depths:
        rows[depth] = depth_costs(depth, options.turns, kinds)
        if options.out:
            section = f"depth {depth}"
            record.write_section(options.out, section, commands[section], rows[depth])
    if rows:
        print(tables.markdown(depth_cells(rows)), flush=True)


if __name__ == "__main__":
    main()
