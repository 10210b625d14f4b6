"""Two kinds of runs compared in pairs: the same point of the grid and the same seed, except for one key.

Partners of a pair see the same batches, and start from the same values where their parameters are the same,
so what a seed does to both is not in their difference. A mean difference has a 95 % confidence interval of
Student's t, which takes the differences for independent draws of one normal distribution; with three seeds it
is wide, and of one pair there is none. Where a partner diverged, or is of another code, there is no
difference: such pairs are left out and counted.
"""

import math
import statistics

from scipy.special import stdtrit

from cnn_cases import tables
from cnn_cases.studies import records

CONFIDENCE = 0.95


def interval(values):
    """The ends of the confidence interval of the mean of the values; None of fewer than two."""
    if len(values) < 2:
        return None
    mean, error = statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))
    reach = float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2)) * error
    return mean - reach, mean + reach


def compare(record, key, first, second, names):
    """Differences between the runs with `key` = first and their partners with `key` = second.

    Args:
      record: see `records`.
      key: of the grid.
      first: a value of the key.
      second: another.
      names: of final metrics, such as "test/error".

    Returns:
      A dict for each code and each point of the other keys: {"code", **point, "pairs": number of those in
      which both finished, "left_out": number of the other seeds, <name>: {"differences", "mean",
      "interval"}}. With no pair the mean is None, and with fewer than two the interval.
    """
    rows = []
    for code, part in records.split_by_code(record).items():
        partners = {}
        others = [one for one, _ in record["config"]["grid"] if one != key]
        for run in part["runs"]:
            point = tuple(run[one] for one in others)
            partners.setdefault(point, {}).setdefault(run["seed"], {})[run[key]] = run
        for point, seeds in partners.items():
            pairs = [(one.get(first), one.get(second)) for one in seeds.values()]
            good = [pair for pair in pairs if all(run and run["status"] == "finished" for run in pair)]
            row = {"code": code, **dict(zip(others, point, strict=True))}
            row |= {"pairs": len(good), "left_out": len(pairs) - len(good)}
            for name in names:
                values = [one["metrics"][name] - other["metrics"][name] for one, other in good]
                row[name] = {
                    "differences": values,
                    "mean": statistics.mean(values) if values else None,
                    "interval": interval(values),
                }
            rows.append(row)
    return rows


def table(rows, titles, form):
    """The rows of `compare` as text.

    Args:
      rows: of `compare`, for metrics that are errors.
      titles: {key or metric: title of its columns}, in the order of the columns.
      form: "text", "markdown" or "csv"; CSV has fractions, the others percentage points.
    """
    codes = any(row["code"] for row in rows)
    lines = [["code"] * codes]
    for name, title in titles.items():
        if not isinstance(rows[0][name], dict):
            lines[0].append(title)
        elif form == "csv":
            lines[0] += [f"{name} {what}" for what in ("mean difference", "low", "high")]
        else:
            lines[0] += [f"{title} (points)", "95 % interval"]
    lines[0] += ["pairs", "left out"]
    for row in rows:
        cells = [row["code"]] * codes
        for name in titles:
            if not isinstance(row[name], dict):
                cells.append(str(row[name]))
                continue
            mean, ends = row[name]["mean"], row[name]["interval"]
            if form == "csv":
                cells += ["" if mean is None else mean, *(ends or ("", ""))]
            else:
                cells.append("" if mean is None else f"{100 * mean:z.2f}")
                cells.append(f"{100 * ends[0]:z.2f} to {100 * ends[1]:z.2f}" if ends else "")
        lines.append([*cells, str(row["pairs"]), str(row["left_out"])])
    return tables.render(lines, form)
