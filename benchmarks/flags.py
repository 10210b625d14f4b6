"""XLA's flags: `python -m benchmarks.flags [--device=gpu] [--cases CASE ...] [--out=FILE.json]`.

Milliseconds of a training step with XLA's defaults, with the flags that `runtime.choose_cpu_flags` or, on a
GPU, `runtime.make_deterministic` sets, and with other flags that might help; on a CPU also with Flax's own
convolutions and pooling in place of those of `cnn_cases.models.fast`, with a single step in each call, and
with memory in huge pages. Each set of flags has a separate process that compiles once, on a GPU at the same
time as the other sets; then the processes take turns. Values are medians over the turns with the lowest and
the highest; a ratio is the median over the turns of the ratio to the defaults. Flags that this version of XLA
does not know end their process and are reported.
"""

import argparse
import concurrent.futures.process
import contextlib
from unittest import mock

from benchmarks import contenders, record, throughput
from cnn_cases import parsing, tables
from cnn_cases.models import fast
from cnn_cases.training import runtime

DEFAULTS, FLAX, HUGE_PAGES = "defaults", "chosen, Flax's layers", "chosen, huge pages"
ONE_STEP = "chosen, one step per call"
YNNPACK, BARRIERS, LLVM = runtime.CPU_FLAGS


def _chosen(changes):
    """The flags of `runtime.choose_cpu_flags`, with some added, changed, or left out with None."""
    flags = runtime.CPU_FLAGS | changes
    return " ".join(f"--{name}={value}" for name, value in flags.items() if value is not None)


_CHOSEN = _chosen({})
FLAGS = {
    "cpu": {
        DEFAULTS: "",
        "chosen": _CHOSEN,
        FLAX: _CHOSEN,
        ONE_STEP: _CHOSEN,
        HUGE_PAGES: _CHOSEN,
        "no barriers": _chosen({BARRIERS: None}),
        "nothing by YNNPACK": _chosen({YNNPACK: ""}),
        "sums and elementwise by YNNPACK": _chosen({YNNPACK: "REDUCE,ELTWISE"}),
        "all optimisations by LLVM": _chosen({LLVM: "3"}),
        "chosen, fast math": _chosen({"xla_cpu_enable_fast_math": "true"}),
        "chosen, oneDNN": _chosen({"xla_cpu_use_onednn": "true"}),
        "chosen, fast to compile": _chosen({"xla_cpu_opt_preset": "CPU_OPT_PRESET_FAST_COMPILE"}),
    },
    "gpu": {
        DEFAULTS: "",
        "deterministic": runtime.DETERMINISTIC_FLAG,
        "deterministic, timed": "--xla_gpu_exclude_nondeterministic_ops=true",
        "no command buffers": "--xla_gpu_enable_command_buffer=",
        "kernels chosen without timing": "--xla_gpu_autotune_level=0",
    },
}
# glibc, from 2.35 on, asks for pages of 2 MiB, which Linux gives at once or, by its setting, only if asked.
GLIBC_HUGE_PAGES = "glibc.malloc.hugetlb=1"
PLATFORMS = {"cpu": "cpu", "gpu": "cuda"}  # the values of JAX_PLATFORMS
DTYPES = {"cpu": "float32", "gpu": "bfloat16"}


def _digits(depth):
    return throughput.Case(dict(name="resnet_cifar", depth=depth), (), "", (8, 8, 1), 10, 64, 64)


CASES = throughput.CASES | {f"ResNet-{depth}, digits": _digits(depth) for depth in (20, 56)}
DEFAULT_CASES = {
    "cpu": (
        "LeNet-5",
        "NIN",
        "AlexNet",
        "GoogLeNet",
        "ResNet-20",
        "ResNet-56",
        "ResNet-50",
        "ResNet-56, digits",
    ),
    "gpu": ("ResNet-20", "ResNet-50", "GoogLeNet"),
}


def ours(case, dtype, flags):
    """`throughput.ours` for a set of flags: FLAX has Flax's own layers, and ONE_STEP one step per call.

    FLAX has one step per call, too: in a loop, the gradients of Flax's convolutions take many times as long.
    """
    for_cpu = fast.is_for_cpu() and flags != FLAX
    with mock.patch.object(fast, "is_for_cpu", return_value=for_cpu):
        return throughput.ours(case, dtype, steps_per_call=1 if flags in (FLAX, ONE_STEP) else 0)


def measure(name, turns, device):
    """Measures a case.

    Returns:
      {"batch_size": ..., "flags": {set of flags: dict, or why its process died}}, and the kinds of devices.
    """
    facts, groups, rows = {}, {}, {}
    with contextlib.ExitStack() as stack:
        made = {}
        for one, flags in FLAGS[device].items():
            environment = {
                "XLA_FLAGS": flags,
                "JAX_PLATFORMS": PLATFORMS[device],
                "GLIBC_TUNABLES": GLIBC_HUGE_PAGES if one == HUGE_PAGES else "",
            }
            process = contenders.Contender(ours, CASES[name], DTYPES[device], one, environment=environment)
            made[one] = stack.enter_context(process)
            if device == "cpu":  # the compilations would share its cores
                concurrent.futures.wait([process.made])
        for one, process in made.items():
            try:
                facts[one] = process.made.result()
                groups[one] = [process]
            except concurrent.futures.process.BrokenProcessPool:
                rows[one] = "its process died, as where XLA does not know a flag"
            except Exception as error:  # any other failure of a contender; the other sets go on
                rows[one] = f"it failed: {error}"[:200]
        if DEFAULTS in rows:  # to which the others are compared
            raise RuntimeError(f"{name}, {DEFAULTS}: {rows[DEFAULTS]}")
        seconds = contenders.race(groups, "train", turns, device)
    for one, values in seconds.items():
        rows[one] = {
            "flags": FLAGS[device][one],
            "step_seconds": contenders.summary(values),
            "ratio": contenders.ratios(values, seconds[DEFAULTS])["median"],
            "first_step_seconds": facts[one]["first_step_seconds"],
        }
    return {"batch_size": facts[DEFAULTS]["batch_size"], "flags": rows}, facts[DEFAULTS]["devices"]


def cells(rows):
    """The table of {case: row}: lists of cells, the header first; ms, and the ratio to the defaults."""
    sets = list(dict.fromkeys(one for row in rows.values() for one in row["flags"]))
    lines = [["network", "batch", *sets]]
    for name, row in rows.items():
        line = [name, str(row["batch_size"])]
        for one in sets:
            found = row["flags"].get(one, "")
            if isinstance(found, dict):
                line.append(f"{found['step_seconds']['median'] * 1e3:,.1f} ({found['ratio']:.2f})")
            else:
                line.append(found)
        lines.append(line)
    return lines


def main():
    """Measures, prints the results, and writes them to --out."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.flags", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=FLAGS, default="cpu")
    parser.add_argument("--cases", nargs="+", choices=CASES, metavar="CASE")
    parser.add_argument("--turns", type=parsing.positive_number, default=7)
    parser.add_argument("--out", type=record.output, help="a JSON file, of which each case is a section")
    options = parser.parse_args()
    cases = options.cases or DEFAULT_CASES[options.device]

    def command(name):
        flags = f"--device={options.device} --cases {name!r} --turns={options.turns}"
        return f"python -m benchmarks.flags {flags}"

    record.check(parser, options.out, {name: command(name) for name in cases})
    rows = {}
    for name in cases:
        rows[name], devices = measure(name, options.turns, options.device)
        print(tables.markdown(cells({name: rows[name]}), words=(0,)), flush=True)
        if options.out:
            record.write_section(options.out, name, command(name), rows[name], devices)
    print(tables.markdown(cells(rows), words=(0,)))


if __name__ == "__main__":
    main()
