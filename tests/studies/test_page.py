import html
import html.parser
import json
import re
import shutil
import subprocess

import pytest

from cnn_cases.studies import page

PANELS = {True: "plain nets", False: "residual nets"}
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Presses two buttons and points at a curve; then the title is the visible lines and the text of the tooltip.
USE = """
<script>
const all = (root) => [...root.querySelectorAll("*")].flatMap(
  (one) => [one, ...(one.shadowRoot ? all(one.shadowRoot) : [])]);
const after = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));
addEventListener("load", async () => {
  while (!all(document).some((one) => one.matches(".bk-btn"))) await after(100);
  for (const one of all(document)) {
    if (one.matches(".bk-btn") && ["depth 8", "seed 1"].includes(one.textContent)) one.click();
  }
  await after(200);
  const models = [...Bokeh.documents[0]._all_models.values()];
  const lines = models.filter((one) => one.type === "GlyphRenderer" && one.visible);
  const view = Bokeh.index.query_one((one) => one.model === lines[0]);
  const {x, y} = lines[0].data_source.data;
  const surface = view.plot_view.canvas_view.events_el;
  let tips = [];
  while (tips.length === 0) {  // the layout may not have settled
    const [sx, sy] = view.coordinates.map_to_screen([x[1]], [y[1]]);
    const place = {clientX: surface.getBoundingClientRect().x + sx[0],
                   clientY: surface.getBoundingClientRect().y + sy[0],
                   isPrimary: true, pointerType: "mouse"};
    surface.dispatchEvent(new PointerEvent("pointermove", place));
    await after(100);
    tips = all(document).filter((one) => one.matches(".bk-Tooltip"));
  }
  const texts = [...tips[0].shadowRoot.children].filter((one) => !one.matches("style"));
  const text = texts.map((one) => one.textContent).join(" ");
  document.title = JSON.stringify([lines.map((one) => one.name), text]);
});
</script>
"""


class Loads(html.parser.HTMLParser):
    """Collects what a page asks for: src and href of its tags, and url() and @import of its styles."""

    def __init__(self, text):
        super().__init__()
        self.found, self.documents, self._tag = [], [], {}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self._tag = dict(attrs) | {"tag": tag}
        self.found += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]

    def handle_data(self, data):
        if self._tag.get("tag") == "style":
            self.found += re.findall(r"url\([^)]*\)|@import[^;]*", data)
        if self._tag.get("type") == "application/json":
            self.documents.append(data)
        self._tag = {}


def models(text):
    """Every model of the page's document with its attributes."""
    (document,) = Loads(text).documents
    found = []

    def walk(value):
        if isinstance(value, dict):
            if value.get("type") == "object":
                found.append(value)
            value = list(value.values())
        if isinstance(value, list):
            for one in value:
                walk(one)

    walk(json.loads(document))
    return found


def lines(text):
    """{name: [([steps], [values], tags, glyph)]} of all that the page shows values of under the pointer."""
    by_id = {model["id"]: model for model in models(text)}
    result = {}
    for model in by_id.values():
        for shown in model["attributes"]["renderers"] if model["name"] == "HoverTool" else ():
            renderer = by_id[shown["id"]]["attributes"]
            data = dict(renderer["data_source"]["attributes"]["data"]["entries"])
            found = data["x"], data["y"], renderer["tags"], renderer["glyph"]["name"]
            result.setdefault(renderer["name"], []).append(found)
    return result


def test_the_page_asks_for_nothing(record):
    assert Loads(page.to_html(record, "model.plain", PANELS)).found == []


def test_the_check_finds_what_a_page_asks_for():
    text = '<link href="https://a.b/c.css"><script src="d.js"></script><style>p { x: url(e.png) }</style>'
    assert Loads(text).found == ["https://a.b/c.css", "d.js", "url(e.png)"]


def test_every_curve_of_every_run_is_in_the_page(record):
    found = lines(page.to_html(record, "model.plain", PANELS))
    expected = {}
    for run in record["runs"]:
        for curve, title in (("running", "training"), ("test", "test")):
            name = f"depth {run['model.depth']}, {PANELS[run['model.plain']]}, seed {run['seed']}, {title}"
            steps = [step for step, _ in run["curves"][f"{curve}/error"]]
            error, loss = (
                [value for _, value in run["curves"][f"{curve}/{kind}"]] for kind in ("error", "loss")
            )
            expected[name] = [(steps, pytest.approx([100 * value for value in error])), (steps, loss)]
    assert {name: [curve[:2] for curve in curves] for name, curves in found.items()} == expected


def test_the_tags_of_a_line_are_the_numbers_of_its_buttons(record):
    text = page.to_html(record, "model.plain", PANELS)
    groups = [one["attributes"] for one in models(text) if one["name"] == "CheckboxButtonGroup"]
    assert [group["labels"] for group in groups] == [
        ["depth 8", "depth 20"],
        ["plain nets", "residual nets"],
        ["seed 0", "seed 1"],
        ["training", "test"],
    ]
    for name, curves in lines(text).items():
        for _, _, tags, _ in curves:
            titles = [group["labels"][tag] for group, tag in zip(groups, tags, strict=True)]
            assert ", ".join(titles) == name


def test_a_page_of_another_study_has_a_button_for_each_point(record):
    groups = [
        one["attributes"] for one in models(page.to_html(record)) if one["name"] == "CheckboxButtonGroup"
    ]
    assert groups[0]["labels"][:2] == ["depth 8, plain True", "depth 8, plain False"]
    assert [group["visible"] for group in groups if not group["labels"][1:]] == [False], (
        "one panel: no choice"
    )


def test_lines_of_two_commits_say_so(mixed):
    assert "depth 8, plain True, seed 1, test, bbbbbbb-dirty" in lines(page.to_html(mixed))


def test_a_curve_of_one_value_is_a_dot_whose_value_is_under_the_pointer(record):
    """Of a line of one point Bokeh would show nothing."""
    for one in record["runs"]:
        one["curves"]["test/error"] = one["curves"]["test/error"][-1:]
    found = lines(page.to_html(record, "model.plain", PANELS))
    for name, (errors, losses) in found.items():
        single = name.endswith("test") or "depth 20, plain nets, seed 1" in name  # which diverged
        assert (len(errors[0]), errors[3]) == ((1, "Scatter") if single else (2, "Line"))
        assert len(losses[0]) == 2 or "depth 20, plain nets, seed 1" in name


def test_a_diverged_run_is_told_of(record):
    text = page.to_html(record)
    assert "1 diverged: a cross marks the end of each that logged a value. Hover" in text


def test_a_panel_may_be_empty_without_a_warning(record, caplog):
    for one in record["runs"]:
        if one["model.plain"]:
            one |= {"status": "diverged", "curves": {}, "step": 3}
    assert "plain nets" in page.to_html(record, "model.plain", PANELS)
    assert not caplog.records


def test_any_number_of_splits_is_shown(record):
    for one in record["runs"]:
        for name in "abcde":
            one["curves"][f"{name}/error"] = one["curves"]["test/error"]
    assert {name.split(", ")[-1] for name in lines(page.to_html(record))} >= {*"abcde", "test", "training"}


def test_the_summary_has_the_longest_of_the_runs(record):
    record["config"]["grid"].append(["num_steps", [20, 2_000]])
    for one in record["runs"]:
        one["num_steps"] = 20
    assert "of up to 2,000 steps." in page.to_html(record)


@pytest.mark.parametrize("number", [2, 3, 5, 9])
def test_the_text_of_a_button_can_be_read(number, record):
    record["config"]["grid"] = [["model.depth", list(range(number))]]
    record["runs"] = [record["runs"][0] | {"model.depth": depth} for depth in range(number)]
    style = r"nth-child\(\d\) \{ background: (#\w{6}); color: (black|white);"
    pairs = re.findall(style, page.to_html(record))
    assert len(pairs) == number
    for color, ink in pairs:
        channels = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
        light = 0.2126 * red + 0.7152 * green + 0.0722 * blue + 0.05  # as WCAG 2 defines it
        assert (light / 0.05 if ink == "black" else 1.05 / light) > 4.4


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")
def test_a_browser_hides_the_lines_of_released_buttons_and_shows_values_under_the_pointer(record, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(page.to_html(record, "model.plain", PANELS).replace("<head>", f"<head>{USE}", 1))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=60000", "--dump-dom"]
    shown = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=100, check=True)
    title = re.search("<title>(.*?)</title>", shown.stdout, re.DOTALL)[1]
    names, under_pointer = json.loads(html.unescape(title))
    kinds = "training", "test"
    assert set(names) == {f"depth 20, {panel}, seed 0, {kind}" for panel in PANELS.values() for kind in kinds}
    assert under_pointer.strip() == "depth 20, plain nets, seed 0, trainingstep 20, error 50.00 %"
