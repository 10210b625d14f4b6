"""The curves of a study's runs as an HTML page that shows values under the pointer and can hide curves.

The page is one file that includes its library, so it opens from disk without a network.
"""

import itertools
from typing import NamedTuple

from bokeh.colors import RGB
from bokeh.core.validation import silence
from bokeh.core.validation.warnings import MISSING_RENDERERS
from bokeh.embed import file_html
from bokeh.layouts import column, gridplot
from bokeh.models import CheckboxButtonGroup, CustomJS, HoverTool, InlineStyleSheet
from bokeh.plotting import figure
from bokeh.resources import INLINE
from matplotlib.colors import to_hex

from cnn_cases.studies import figures, plan, records

silence(MISSING_RENDERERS)  # a panel is empty if all of its runs diverged before their first row
_DASHES = ("solid", "solid", "dashed", "dotted", "dotdash")  # training, then the splits

# A line is visible while all of its buttons are pressed.
_TOGGLE = """
for (const line of lines) {
  line.visible = groups.every((group, n) => group.active.includes(line.tags[n]));
}
"""

_TEMPLATE = """
{% block preamble %}
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
  body { background: #f6f7f9; color: #1d2733; font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; }
  main { max-width: 1280px; margin: 0 auto; padding: 28px 32px 48px; }
  h1 { font-size: 24px; font-weight: 650; margin: 0 0 4px; }
  p { color: #5a6675; margin: 0 0 18px; max-width: 80ch; }
</style>
{% endblock %}
{% block contents %}
<main>
<h1>{{ heading | e }}</h1>
<p>{{ summary | e }}</p>
{{ super() }}
</main>
{% endblock %}
"""

_BUTTONS = """
.bk-btn-group { flex-wrap: wrap; gap: 6px; }
.bk-btn-group > .bk-btn {
  flex-grow: 0; margin: 0; padding: 4px 14px; font-size: 13px; background: white; color: #5a6675;
  border: 1px solid #c9d0d9 !important; border-radius: 999px !important;
}
.bk-btn-group > .bk-btn.bk-active { border-color: transparent !important; background: #44505f; color: white; }
"""


class _Choices(NamedTuple):
    """Titles of the buttons. A line's tags are the indices of its four buttons."""

    points: list
    panels: list
    seeds: list
    curves: list


def to_html(record, panel_key=None, panels=None):
    """The page as text.

    Args:
      record: see `records`.
      panel_key: a key of the grid, with a column of panels for each value; None for one column.
      panels: {value of that key: title of its column}.
    """
    panels = panels or {None: ""}
    names = records.names_of_points(record, without=panel_key)
    # Titles of curves, and the first part of their names.
    kinds = {"training": "running", **{split: split for split in figures.splits(record)}}
    choices = _Choices(
        points=list(dict.fromkeys(names.values())),
        panels=list(panels.values()),
        seeds=[f"seed {seed}" for seed in record["config"]["seeds"]],
        curves=list(kinds),
    )
    colors = [to_hex(color) for color in figures.shades(len(choices.points))]
    plots, lines = _plots(record, panels), []
    hovered = {place: [] for place in plots}
    runs = [
        (code, point, run)
        for code, part in records.split_by_code(record).items()
        for point, of_point in records.group_by_point(part).items()
        for run in of_point
    ]
    for (code, point, run), (kind, split), quantity in itertools.product(
        runs, kinds.items(), ("error", "loss")
    ):
        curve, panel = f"{split}/{quantity}", run.get(panel_key)
        if not run["curves"].get(curve):
            continue
        button = (names[point], panels[panel], f"seed {run['seed']}", kind)
        tags = [titles.index(title) for titles, title in zip(choices, button, strict=True)]
        style = {"color": colors[tags[0]], "name": ", ".join(filter(None, (*button, code)))}
        drawn = _draw(plots[quantity, panel], run, curve, style, _DASHES[tags[-1] % len(_DASHES)])
        for line in drawn:
            line.tags = tags
        lines += drawn
        hovered[quantity, panel].append(drawn[0])
    for (quantity, panel), plot in plots.items():
        value = "@y{%.2f} %" if quantity == "error" else "@y{%.4g}"
        plot.add_tools(
            HoverTool(
                tooltips=f"<b>$name</b><br>step @x, {quantity} {value}",
                formatters={"@y": "printf"},
                renderers=hovered[quantity, panel],
                line_policy="nearest",
            )
        )
    heading = f"{figures.describe_key(record, 'model.name')} on {figures.describe_key(record, 'data.name')}"
    plots = gridplot(
        list(plots.values()), ncols=len(panels), sizing_mode="stretch_width", toolbar_location="right"
    )
    return file_html(
        column(*_buttons(choices, colors, lines), plots, spacing=12, sizing_mode="stretch_width"),
        INLINE,
        title=heading,
        template=_TEMPLATE,
        template_variables={"heading": heading, "summary": _summary(record)},
    )


def _summary(record):
    runs, steps = record["runs"], max(plan.values_of(record["config"], "num_steps"))
    diverged = records.num_diverged(runs)
    words = ["One run" if len(runs) == 1 else f"{len(runs)} runs", f"of up to {steps:,} steps."]
    if diverged:
        words.append(f"{diverged} diverged: a cross marks the end of each that logged a value.")
    words.append("Hover for values, drag to move, press a button to hide or show its lines.")
    return " ".join(words)


def _plots(record, panels):
    """{("error" or "loss", panel): plot}; plots of one quantity share their axes."""
    unit = figures.loss_label(record)
    plots, steps = {}, {}
    for quantity in ("error", "loss"):
        values = {}
        for panel, title in panels.items():
            plots[quantity, panel] = plot = figure(
                height=380,
                title=f"{title}: {quantity}" if title else quantity,
                x_axis_label="training step",
                y_axis_label="error (%)" if quantity == "error" else unit,
                y_axis_type="linear" if quantity == "error" else "log",
                tools="pan,box_zoom,wheel_zoom,reset,save",
                active_scroll=None,
                sizing_mode="stretch_width",
                **steps,
                **values,
            )
            steps, values = {"x_range": plot.x_range}, {"y_range": plot.y_range}
            plot.y_range.only_visible = True
            plot.toolbar.logo = None
            plot.toolbar.autohide = True
            plot.outline_line_color = None
            plot.background_fill_color = plot.border_fill_color = "white"
            plot.grid.grid_line_color = "#e6e9ee"
            plot.axis.axis_line_color = plot.axis.major_tick_line_color = "#9aa5b3"
            plot.axis.minor_tick_line_color = None
            plot.axis.axis_label_text_font_style = "normal"
            plot.min_border = 12
    return plots


def _draw(plot, run, name, style, dash):
    """Draws the line of a curve, or a dot if it has only one value, and a cross where a diverged run ends.

    Returns:
      The renderers. The first one has all values; under the pointer, Bokeh finds no line of a single one.
    """
    steps, values, _, _ = figures.mean_curve([run], name)
    drawn = []
    if len(steps) > 1:
        width = 1 if name.startswith("running/") else 2.4
        drawn.append(plot.line(steps, values, line_width=width, line_dash=dash, **style))
    elif run["status"] != "diverged":
        drawn.append(plot.scatter(steps, values, size=7, **style))
    if run["status"] == "diverged":
        drawn.append(plot.scatter(steps[-1:], values[-1:], marker="x", size=11, line_width=2.5, **style))
    return drawn


def _buttons(choices, colors, lines):
    """A row of buttons for each kind of choice, visible if there is more than one button."""
    groups = []
    for titles in choices:
        look = _BUTTONS
        if titles is choices.points and len(titles) > 1:
            for number, color in enumerate(colors, start=1):
                # On a luminance of 0.18 black and white text have the same contrast, 4.6.
                ink = "black" if RGB.from_hex_string(color).luminance > 0.18 else "white"
                look += f".bk-btn.bk-active:nth-child({number}) {{ background: {color}; color: {ink}; }}"
        groups.append(
            CheckboxButtonGroup(
                labels=titles,
                active=list(range(len(titles))),
                stylesheets=[InlineStyleSheet(css=look)],
                visible=len(titles) > 1,
            )
        )
    toggle = CustomJS(args={"lines": lines, "groups": groups}, code=_TOGGLE)
    for group in groups:
        group.js_on_change("active", toggle)
    return groups
