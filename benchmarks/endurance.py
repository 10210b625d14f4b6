"""Whether a long run's memory stays flat: `python -m benchmarks.endurance [--steps=10000] [--out=FILE]`.

A real `train.py` does many short steps of LeNet-5 on digits, with a row of metrics every 10 steps, an
evaluation and a checkpoint every 50, once with each feed. Meanwhile its resident memory, open files and
threads are sampled from outside, together with those of its worker processes. The results leave out the first
steps, a share `WARM_UP` of all, in which everything is compiled and the allocators' pools fill, and the end.
The exit code is 1 if files or threads become more; how much memory may grow is left to the reader.
"""

import argparse
import pathlib
import sys
import tempfile
import time

import numpy as np
import psutil

from benchmarks import children, faults, record
from cnn_cases import parsing

CONFIG = "configs/lenet5_digits.py"
OVERRIDES = {
    "data.image_size": 16,
    "batch_size": 16,
    "log_every_steps": 10,
    "evaluation.every_steps": 50,
    "evaluation.batch_size": 200,
    "checkpoint.every_steps": 50,
}
FEEDS = {
    "resident": {"data.feed": "resident"},
    "stream": {"data.feed": "stream", "data.crop.name": "area", "data.crop.eval_shorter_side": 18},
}
WARM_UP = 0.2
SECONDS = 0.5  # between two samples
KEPT = 50  # samples in the record
NAMES = ("mebibytes", "files", "threads")
# Files or threads per 1,000 steps, which have 100 rows, 20 evaluations and 20 checkpoints; a leak in any of
# them is above that, and the noise of 8,000 steps is far below.
LEAK = 5


def measure(workdir, overrides):
    """Trains in `workdir`; returns samples [(step of the last row, *NAMES)] of the process and its children.

    Raises:
      RuntimeError: the run failed.
    """
    samples = []
    with (
        (workdir.parent / f"{workdir.name}.log").open("w+") as errors,
        children.ended(faults.start(workdir, overrides, errors, config=CONFIG)) as (process,),
    ):
        family = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                step = faults.last_step(workdir / "metrics.jsonl")
                samples.append((step, *_sizes([family, *family.children(recursive=True)])))
            except psutil.Error:
                pass  # one of them has just ended
            time.sleep(SECONDS)
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(f"exit code {process.returncode}: {errors.read()[-2000:]}")
    return samples


def _sizes(processes):
    """The totals over the processes, in the order of NAMES."""
    sizes = [(one.memory_info().rss / 2**20, one.num_fds(), one.num_threads()) for one in processes]
    return tuple(sum(column) for column in zip(*sizes, strict=True))


def summary(samples, num_steps):
    """Summarises the samples of `measure` after the warm-up.

    Returns:
      For each of NAMES {"first", "last", "largest", "per_1000_steps": the slope of a line fitted to all}.

    Raises:
      ValueError: there are too few samples for a line.
    """
    late = [one for one in samples if WARM_UP * num_steps <= one[0] < num_steps]
    steps, *columns = np.reshape(late, (len(late), 1 + len(NAMES))).T
    if len(np.unique(steps)) < 3:
        raise ValueError(f"steps = {num_steps} are over too soon for samples every {SECONDS} s")
    return {
        name: {
            "first": round(values[0].item(), 1),
            "last": round(values[-1].item(), 1),
            "largest": round(values.max().item(), 1),
            "per_1000_steps": round(1000 * np.polyfit(steps, values, 1)[0].item(), 3),
        }
        for name, values in zip(NAMES, columns, strict=True)
    }


def main():
    """Trains, prints the results, and writes them to --out."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.endurance", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--steps", type=parsing.positive_number, default=10_000)
    parser.add_argument(
        "--out", type=record.output, help="a JSON file, of which it writes the section 'memory'"
    )
    options = parser.parse_args()
    children.end_on_sigterm()
    figures = {"config": CONFIG, "overrides": OVERRIDES, "steps": options.steps, "feeds": {}}
    leaks = []
    for name, feed in FEEDS.items():
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as directory:
            overrides = OVERRIDES | feed | {"num_steps": options.steps}
            samples = measure(pathlib.Path(directory) / "run", overrides)
        seconds = round(time.monotonic() - began, 1)
        found = summary(samples, options.steps)
        print(f"{name}, {seconds} s:", *(f"{key} {value}" for key, value in found.items()), sep="\n  ")
        kept = [samples[place] for place in np.linspace(0, len(samples) - 1, KEPT).astype(int)]
        kept = [dict(zip(("step", *NAMES), map(round, one), strict=True)) for one in kept]
        leaks += [f"{key} with the feed {name}" for key in NAMES[1:] if found[key]["per_1000_steps"] > LEAK]
        figures["feeds"][name] = {"overrides": feed, "seconds": seconds} | found | {"samples": kept}
    if options.out:
        command = f"python -m benchmarks.endurance --steps={options.steps}"
        record.write_section(options.out, "memory", command, figures)
    sys.exit(f"growing: {', '.join(leaks)}" if leaks else 0)


if __name__ == "__main__":
    main()
