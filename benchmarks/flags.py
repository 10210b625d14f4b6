"""XLA's flags on this CPU: `python -m benchmarks.flags [--cases CASE ...] [--out=FILE.json]`.

Milliseconds of a training step, under XLA's defaults, under what `devices.choose_cpu_flags` sets, and under
what else might help; and with Flax's own convolutions and poolings in place of those of
`cnn_cases.models.layers`. Each has a process of its own, which compiles once; then the processes take turns.
Figures are medians over the turns with the lowest and the highest, a ratio the median of the ratios of a turn
to that of the defaults. Flags that this version of XLA does not know end their process and are told.
"""

import argparse
import concurrent.futures
import contextlib
from unittest import mock

from benchmarks import contenders, record, throughput
from cnn_cases import tables
from cnn_cases.models import layers
from cnn_cases.training import devices

DEFAULTS, FLAX = "defaults", "chosen, Flax's layers"
YNNPACK, BARRIERS = devices.CPU_FLAGS
_CHOSEN = " ".join(f"--{name}={value}" for name, value in devices.CPU_FLAGS.items())
FLAGS = {
    DEFAULTS: "",
    "chosen": _CHOSEN,
    FLAX: _CHOSEN,
    "no barriers": f"--{YNNPACK}={devices.CPU_FLAGS[YNNPACK]}",
    "nothing by YNNPACK": f"--{YNNPACK}= --{BARRIERS}={devices.CPU_FLAGS[BARRIERS]}",
    "sums and elementwise by YNNPACK": f"{_CHOSEN} --{YNNPACK}=REDUCE,ELTWISE",
    "chosen, fast math": f"{_CHOSEN} --xla_cpu_enable_fast_math=true",
    "chosen, oneDNN": f"{_CHOSEN} --xla_cpu_use_onednn=true",
    "chosen, fast to compile": f"{_CHOSEN} --xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE",
}


def _digits(depth):
    return throughput.Case(dict(name="resnet_cifar", depth=depth), (), "", (8, 8, 1), 10, 64, 64)


CASES = throughput.CASES | {f"ResNet-{depth}, digits": _digits(depth) for depth in (20, 56)}
DEFAULT_CASES = ("LeNet-5", "NIN", "AlexNet", "GoogLeNet", "ResNet-20", "ResNet-50", "ResNet-56, digits")
DTYPE = "float32"


def ours(case, dtype, layers_of_flax):
    """`throughput.ours`, with Flax's own layers where wanted."""
    for_cpu = layers.is_for_cpu() and not layers_of_flax
    with mock.patch.object(layers, "is_for_cpu", return_value=for_cpu):
        return throughput.ours(case, dtype)


def measure(name, turns):
    """One case: {"batch_size": ..., "flags": {set of flags: dict, or what became of its process}}."""
    facts, groups, rows = {}, {}, {}
    with contextlib.ExitStack() as stack:
        for one, flags in FLAGS.items():
            environment = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
            process = contenders.Contender(ours, CASES[name], DTYPE, one == FLAX, environment=environment)
            stack.enter_context(process)
            try:
                facts[one] = process.made.result()
                groups[one] = [process]
            except concurrent.futures.process.BrokenProcessPool:
                rows[one] = "not known to this version of XLA"
        seconds = contenders.race(groups, "train", turns)
    for one, values in seconds.items():
        rows[one] = {
            "flags": FLAGS[one],
            "step_seconds": contenders.summary(values),
            "ratio": contenders.ratios(values, seconds[DEFAULTS])["median"],
            "first_step_seconds": facts[one]["first_step_seconds"],
        }
    return {"batch_size": facts[DEFAULTS]["batch_size"], "flags": rows}


def cells(rows):
    """The table of {case: row}: lists of cells, the head first; ms, and the ratio to the defaults."""
    lines = [["network", "batch", *FLAGS]]
    for name, row in rows.items():
        line = [name, str(row["batch_size"])]
        for one in FLAGS:
            found = row["flags"][one]
            if isinstance(found, dict):
                line.append(f"{found['step_seconds']['median'] * 1e3:,.1f} ({found['ratio']:.2f})")
            else:
                line.append(found)
        lines.append(line)
    return lines


def main():
    """Measures, prints, and writes what --out names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.flags", description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, metavar="CASE", default=DEFAULT_CASES)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--out", help="a JSON file, of which each case is a section")
    options = parser.parse_args()
    rows = {}
    for name in options.cases:
        rows[name] = measure(name, options.turns)
        print(tables.markdown(cells({name: rows[name]}), words=(0,)), flush=True)
        if options.out:
            command = f"python -m benchmarks.flags --cases {name!r} --turns={options.turns}"
            record.write_section(options.out, name, command, rows[name])
    print(tables.markdown(cells(rows), words=(0,)))


if __name__ == "__main__":
    main()
