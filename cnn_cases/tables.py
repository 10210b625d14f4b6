"""Formats tables as text; a table is a list of rows, the header first."""

import csv
import io
import statistics


def aligned(rows, words=()):
    """Formats a table in aligned columns.

    Args:
      rows: lists of strings, all of the same length.
      words: indices of the columns with words, which are left-aligned; columns of numbers are right-aligned.
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
    """Formats a table in Markdown; see `aligned`."""
    rule = [":---" if number in words else "---:" for number in range(len(rows[0]))]
    escaped = [[cell.replace("|", r"\|") for cell in row] for row in rows]  # as in the pattern conv[1|2]*
    return "".join(f"| {' | '.join(row)} |\n" for row in (escaped[0], rule, *escaped[1:]))


def comma_separated(rows):
    """Formats a table as CSV; cells may also be numbers."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()


def render(rows, form, words=()):
    """Formats a table as "text", "markdown" or "csv"; see `aligned`."""
    if form == "csv":
        return comma_separated(rows)
    return (markdown if form == "markdown" else aligned)(rows, words)


def mean_and_deviation(values, digits):
    """`2.25 ± 0.49`: mean and sample standard deviation; only the mean of one value, "" if there is none."""
    text = f"{statistics.mean(values):.{digits}f}" if values else ""
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def statistics_of(values):
    """[mean, sample standard deviation, number of values]; "" for statistics that need more values."""
    mean = statistics.mean(values) if values else ""
    return [mean, statistics.stdev(values) if len(values) > 1 else "", len(values)]
