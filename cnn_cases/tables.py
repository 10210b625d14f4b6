"""Tables as text: rows of cells, the head first."""

import csv
import io
import statistics


def aligned(rows, words=()):
    """Columns of equal width.

    Args:
      rows: lists of strings, equally many in each.
      words: numbers of the columns that are set to the left; the others, with figures, are set to the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if number in words else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip() + "\n")
    return "".join(lines)


def markdown(rows, words=()):
    """The same in Markdown; see `aligned`."""
    rule = [":---" if number in words else "---:" for number in range(len(rows[0]))]
    return "".join(f"| {' | '.join(row)} |\n" for row in (rows[0], rule, *rows[1:]))


def comma_separated(rows):
    """The same as CSV; cells may be numbers, too."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()


def render(rows, form, words=()):
    """The rows as "text", "markdown" or "csv"; see `aligned`."""
    if form == "csv":
        return comma_separated(rows)
    return (markdown if form == "markdown" else aligned)(rows, words)


def mean_and_deviation(values, digits):
    """`2.25 ± 0.49`, the mean and the sample deviation; the mean alone of one value, nothing of none."""
    text = f"{statistics.mean(values):.{digits}f}" if values else ""
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def statistics_of(values):
    """[mean, sample deviation, number of values]; empty what there is not, as of one value a deviation."""
    mean = statistics.mean(values) if values else ""
    return [mean, statistics.stdev(values) if len(values) > 1 else "", len(values)]
