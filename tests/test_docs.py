"""The documents keep their word: links lead somewhere, commands can start, numbers are those of the code."""

import ast
import collections
import functools
import importlib
import inspect
import itertools
import json
import math
import pathlib
import re
import shlex
import statistics
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from flax import linen as nn
from flax import traverse_util
from ml_collections import config_flags
from PIL import Image

from benchmarks import report
from benchmarks.throughput import PEERS
from cnn_cases import models
from cnn_cases.data import feeds
from cnn_cases.studies import comparison, depth_curves, ledger, plan, records
from cnn_cases.tables import mean_and_deviation
from cnn_cases.training import runtime
from configs import lenet5_digits

ROOT = pathlib.Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("README.md"), *ROOT.glob("docs/*.md")])
CONFIGS = sorted(path for path in ROOT.glob("configs/**/*.py") if path.stem not in ("__init__", "common"))


def name_of(path):
    return str(path.relative_to(ROOT))


# Links.

FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")


def links(path):
    """(text, target) of every link to a file of ours."""
    found = LINK.findall(FENCED.sub("", path.read_text()))
    return [(text, target) for text, target in found if "://" not in target]


def anchors(path):
    """What `#...` may name in a document, as GitHub derives it from the headings."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_link_leads_to_a_file_and_a_heading(document):
    broken = []
    for _, target in links(document):
        file, _, anchor = target.partition("#")
        path = (document.parent / file) if file else document
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(target)
    assert not broken


def defined(path):
    """Names that a file defines at its top level."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_a_name_that_links_to_python_is_defined_there(document):
    missing = []
    for text, target in links(document):
        name, path = text.strip("`"), document.parent / target
        if text == f"`{name}`" and name.isidentifier() and path.suffix == ".py" and path.exists():
            missing += [] if name in defined(path) else [f"{name} in {target}"]
    assert not missing


# Commands.


def commands(path):
    """The commands of a document's code, or of a config's head, as lists of words."""
    text = path.read_text()
    if path.suffix == ".py":
        head = ast.get_docstring(ast.parse(text))
        assert head, f"{path} has no docstring with its command"
        blocks = [re.sub(r"^Command: +", "", head, flags=re.MULTILINE)]
    else:
        blocks = FENCED.findall(text) + re.findall(r"`([^`\n]+)`", FENCED.sub("", text))
    for block in blocks:
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            if re.match(r"\s*(\w+=\S+ )*(python|make) ", line):
                yield shlex.split(line, comments=True)


COMMANDS = [(path, words) for path in (*DOCUMENTS, *CONFIGS) for words in commands(path)]


def flag_names(path):
    """The flags that a command line declares, by absl or by argparse, or by a neighbour's `define_flags`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr == "define_flags":
                yield from flag_names(path.with_name(f"{node.func.value.id}.py"))
            elif node.func.attr.startswith("DEFINE_"):
                yield node.args[0].value
            elif node.func.attr == "add_argument":
                yield from (word.value.lstrip("-") for word in node.args)


def complaints(words):
    """What is wrong with a command, for all that can be told without running it."""
    if "python" not in words:
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        named = [word for word in words[words.index("make") + 1 :] if "=" not in word]
        return [f"no target {word}" for word in named if word not in targets]
    words = words[words.index("python") + 1 :]
    if words[0] == "-m":
        module, words = words[1], words[2:]
        if module == "pytest":
            return pytest_complaints(words)
        if module.partition(".")[0] != "cnn_cases":
            return []
        program = ROOT / (module.replace(".", "/") + ".py")
    else:
        program, words = ROOT / words[0], words[1:]
    if not program.exists():
        return [f"no file {program.relative_to(ROOT)}"]
    known, wrong = set(flag_names(program)), []
    for word in words:
        flag = re.match(r"--?(\w+)", word)
        if flag and flag[1] not in known:
            wrong.append(f"no flag {word}")
        if word.startswith("configs/") and not (ROOT / word).exists():
            wrong.append(f"no config {word}")
    overrides = [word for word in words if word.startswith("--config")]
    if overrides and "config" in known:
        values = flags.FlagValues()
        config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=["", *overrides])
        try:
            values(["", *overrides])
            len(values["config"].value)  # a file that is not there is noticed at the first look
        except (flags.Error, OSError, AttributeError, KeyError) as error:
            wrong.append(f"{' '.join(overrides)}: {error}")
    return wrong


def pytest_complaints(words):
    files = [ROOT / word for word in words if word.startswith("tests")]
    wrong = [f"no file {path.relative_to(ROOT)}" for path in files if not path.exists()]
    if "-k" in words and not wrong:
        part = words[words.index("-k") + 1]
        names = [name for path in files for name in defined(path)]
        wrong += (
            [] if any(name.startswith("test") and part in name for name in names) else [f"no test {part}"]
        )
    return wrong


# ml_collections loads the config file in a way that Python is giving up.
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize(("path", "words"), COMMANDS, ids=lambda it: name_of(it) if it in DOCUMENTS else "")
def test_every_command_can_start(path, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert not complaints(words), f"{path}: {' '.join(words)}"


# Numbers.


class Table(NamedTuple):
    """A Markdown table: the line of text above it, its columns' titles and its rows of cells."""

    caption: str
    titles: list[str]
    rows: list[list[str]]


def tables(path):
    paragraph = ""
    for block in re.split(r"\n{2,}", path.read_text()):
        lines = block.splitlines()
        if len(lines) > 2 and all(line.startswith("|") for line in lines):
            cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
            yield Table(paragraph, cells[0], cells[2:])
        paragraph = block


TABLES = [table for path in DOCUMENTS for table in tables(path)]
# "`LeNet5()` on 32x32x1:" and a table of layers below.
CAPTION = re.compile(r"`(\w+)(\(.*\))` on ([\dx]+):")
LAYER_TABLES = [table for table in TABLES if CAPTION.fullmatch(table.caption)]
REGISTRY_ROWS = [
    row
    for table in TABLES
    if table.titles == ["architecture", "settings", "image", "parameters"]
    for row in table.rows
]


def literal_arguments(text):
    """The values of a call's "(1, two=3)"."""
    call = ast.parse(f"f{text}", mode="eval").body
    values = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
    return [ast.literal_eval(value) for value in call.args], values


def shape_of(text):
    return tuple(int(side) for side in text.split("x"))


def shape_text(shape):
    return "x".join(map(str, shape))


def init_shapes(model, image):
    """The shapes of a model's parameters, {"layer/kernel": shape}, for one image [H, W, C]."""
    whole_net = "train" in inspect.signature(type(model).__call__).parameters

    def init(x):
        key = jax.random.key(0)
        return model.init({"params": key, "dropout": key}, x, *[False] * whole_net)

    variables = jax.eval_shape(init, jax.ShapeDtypeStruct((1, *image), jnp.float32))
    parameters = traverse_util.flatten_dict(variables["params"], sep="/")
    return {name: leaf.shape for name, leaf in parameters.items()}


class Layer(NamedTuple):
    """What is known of a module; shapes are without the batch."""

    input: tuple[int, ...]
    output: tuple[int, ...]
    parameters: int
    multiplications: int


@functools.cache
def trace(caption):
    """{path: Layer} of all modules of the captioned one, itself under ""."""
    name, arguments, image = CAPTION.fullmatch(caption).groups()
    files = (ROOT / "cnn_cases/models").glob("*.py")
    path = next(path for path in files if path.stem != "__init__" and name in defined(path))
    positional, named = literal_arguments(arguments)
    model = getattr(importlib.import_module(f"cnn_cases.models.{path.stem}"), name)(*positional, **named)
    shapes = {}

    def record(method, args, kwargs, context):
        y = method(*args, **kwargs)
        shapes["/".join(context.module.path)] = args[0].shape[1:], y.shape[1:]
        return y

    with nn.intercept_methods(record):
        parameters = init_shapes(model, shape_of(image))

    def below(path):
        return {key: shape for key, shape in parameters.items() if not path or key.startswith(f"{path}/")}

    def multiplications(key, kernel):
        owner, _, kind = key.rpartition("/")
        return math.prod(kernel) * math.prod(shapes[owner][1][:-1]) if kind == "kernel" else 0

    return {
        path: Layer(
            *shapes[path],
            sum(math.prod(shape) for shape in below(path).values()),
            sum(multiplications(*item) for item in below(path).items()),
        )
        for path in shapes
    }


def path_in(row):
    match = re.match(r"`([\w/]+)`", row[0])
    return match and match[1]


@pytest.mark.parametrize("table", LAYER_TABLES, ids=lambda table: CAPTION.fullmatch(table.caption)[1])
def test_layer_tables_are_those_of_the_code(table):
    layers = trace(table.caption)
    right, sums = [], [0] * (len(table.titles) - 2)
    for number, row in enumerate(table.rows):
        following = next(filter(None, map(path_in, table.rows[number + 1 :])), None)
        if path_in(row):
            layer = layers[path_in(row)]
            counts = [getattr(layer, title) for title in table.titles[2:]]
            sums = [total + count for total, count in zip(sums, counts, strict=True)]
            right.append([row[0], shape_text(layer.output), *(f"{count:,}" for count in counts)])
        elif row[0] in ("in all", "together"):
            whole = [getattr(layers[""], title) for title in table.titles[2:]]
            assert row[0] == "together" or sums == whole, "a layer is missing"
            right.append([row[0], "", *(f"{total:,}" for total in sums)])
        else:
            # A layer without parameters: what the next one takes, or the net gives.
            shape = layers[following].input if following else layers[""].output
            flat = len(shape) == 1 and math.prod(shape_of(row[1])) == shape[0]
            right.append([row[0], row[1] if flat else shape_text(shape), *[""] * len(sums)])
    assert table.rows == right


def test_the_tables_of_the_lecture_are_there():
    captions = {table.caption for table in LAYER_TABLES}
    assert captions >= {
        "`LeNet5()` on 32x32x1:",
        '`AlexNet(variant="lecture")` on 227x227x3:',
        '`VGG(variant="D")` on 224x224x3:',
        "`InceptionModule(64, 96, 128, 16, 32, 32)` on 28x28x192:",
    }


@pytest.mark.parametrize("row", REGISTRY_ROWS, ids=lambda row: " ".join(row[:2]).replace("`", ""))
def test_counts_of_the_registry_are_those_of_the_code(row):
    architecture, settings, image, parameters = row
    _, knobs = literal_arguments(f"({settings.strip('`')})")
    model = models.MODELS[architecture.strip("`")](**knobs)
    shapes = init_shapes(model, shape_of(image))
    assert parameters == f"{sum(map(math.prod, shapes.values())):,}"


def test_every_architecture_is_counted():
    assert {row[0].strip("`") for row in REGISTRY_ROWS} == set(models.MODELS)


def test_large_numbers_in_the_lectures_text_stand_in_a_checked_table():
    text = (ROOT / "docs/case_studies.md").read_text()
    prose = "\n".join(line for line in text.splitlines() if not line.startswith("|"))
    checked = {cell for table in LAYER_TABLES for row in table.rows for cell in row}
    checked |= {row[-1] for row in REGISTRY_ROWS}
    assert set(re.findall(r"\d{3},\d{3}(?:,\d{3})*|\d{1,3},\d{3},\d{3}", prose)) <= checked


@pytest.mark.parametrize(
    ("name", "document"), [("depth_cifar10", "README.md"), ("depth_digits", "docs/results.md")]
)
def test_the_table_of_a_depth_study_is_that_of_its_record(name, document):
    record = json.loads((ROOT / f"results/{name}.json").read_text())
    assert depth_curves.table(record, "markdown") in (ROOT / document).read_text()


def test_the_comparison_of_the_depth_study_is_that_of_its_record():
    record = json.loads((ROOT / "results/depth_digits.json").read_text())
    assert depth_curves.comparison_table(record, "markdown") in (ROOT / "docs/results.md").read_text()


def test_the_table_of_the_transfer_study_is_that_of_its_record():
    points = records.group_by_point(records.read(ROOT / "results/transfer_digits.json"))
    text = (ROOT / "docs/training.md").read_text()
    for split, images in (("train[:50]", "50"), ("train[:200]", "200"), ("train", "1,257")):
        for workdir, words in (("", "at random"), ("runs/lenet5_mnist", "from MNIST")):
            cells = []
            for frozen in ((), ("conv*",), ("conv*", "dense*")):
                errors = [100 * run["metrics"]["test/error"] for run in points[split, workdir, frozen]]
                cells.append(mean_and_deviation(errors, digits=2))
            assert f"| {images} | {words} | {' | '.join(cells)} |" in text


def test_the_table_of_the_shortcuts_is_that_of_its_record():
    points = records.group_by_point(records.read(ROOT / "results/shortcuts_digits.json"))
    text = (ROOT / "docs/case_studies.md").read_text()
    for depth in (20, 32, 44, 56):
        errors = (
            [100 * run["metrics"]["test/error"] for run in points[depth, shortcut]] for shortcut in "ABC"
        )
        cells = [mean_and_deviation(values, digits=2) for values in errors]
        assert f"| {depth} | {' | '.join(cells)} |" in text


def test_the_table_of_dtypes_is_that_of_its_records():
    lines = []
    for path in ROOT.glob("results/dtypes/*.json"):
        record = records.read(path)
        errors = [
            [100 * run["metrics"]["test/error"] for run in runs]
            for runs in records.group_by_point(record).values()
        ]
        (row,) = comparison.compare_study(record)
        mean, low, high = (
            f"{100 * value:.2f}" for value in (row["test/error"]["mean"], *row["test/error"]["interval"])
        )
        cells = [mean_and_deviation(values, digits=2) for values in errors]
        config = f"[{path.stem}](../configs/{path.stem}.py)"
        lines.append(f"| {config} | {' | '.join(cells)} | {mean} ({low} to {high}) |")
    (table,) = (one for one in tables(ROOT / "docs/devices.md") if "float32" in one.titles)
    assert len(lines) == len(table.rows) > 0
    text = (ROOT / "docs/devices.md").read_text()
    assert [line for line in lines if line not in text] == []


@pytest.mark.parametrize(
    ("study", "record", "metric", "words"),
    [
        ("side_branches", "side_branches_imagenette", "validation/error", "{} without and of {} with "),
        ("response_norm_digits", "response_norm_digits", "test/error", "{} without and of {} with "),
        ("vgg_depth_digits", "vgg_depth_digits", "test/error", "{} with D and {} with E"),
    ],
)
def test_the_head_of_a_study_has_the_comparison_of_its_record(study, record, metric, words):
    record = records.read(ROOT / f"results/{record}.json")
    (row,) = comparison.compare_study(record)
    head = one_line(ast.get_docstring(ast.parse((ROOT / f"configs/studies/{study}.py").read_text())))
    means = (
        f"{100 * statistics.mean(run['metrics'][metric] for run in runs):.2f} %"
        for runs in records.group_by_point(record).values()
    )
    low, high = (f"{100 * end:.2f}" for end in row[metric]["interval"])
    assert f"errors of {words.format(*means)}" in head
    difference = (
        f"difference of {100 * row[metric]['mean']:.2f} points has a 95 % interval of {low} to {high}"
    )
    assert difference in head


def test_the_tables_of_speed_are_those_of_the_records():
    text = report.DOCUMENT.read_text()
    assert text == report.fill(text), "run `python -m benchmarks.report`"


def ratios_to_pytorch(work):
    """{network: our speed over the faster of PyTorch's two, as the README writes it}, the lowest first."""
    rows = json.loads((ROOT / "results/throughput_cpu.json").read_text())
    ratios = {
        name.replace(", ", " at "): min(row[work][peer]["ratio"]["median"] for peer in PEERS)
        for name, row in rows.items()
    }
    written = {name: f"{ratio:.2f}" for name, ratio in ratios.items()}
    return dict(sorted(written.items(), key=lambda item: float(item[1])))


def ratios_in_the_readme():
    """The cells of the README's row for two CPU cores: training, inference."""
    (line,) = re.findall(r"^\| two CPU cores.*float32.*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    return [cell.strip() for cell in line.split("|")[2:4]]


def test_the_ratios_in_training_in_the_readme_are_those_of_the_record():
    ratios = ratios_to_pytorch("train")
    faster, slower, slowest = ratios_in_the_readme()[0].split("; ")
    told = dict(re.findall(r"([A-Z][\w-]+(?: at 32x32)?) \((\d\.\d\d)\)", faster))
    assert told == {name: ratio for name, ratio in ratios.items() if float(ratio) > 1}
    lowest, second, *_, last = (name for name in ratios if name not in told)
    assert slowest == f"{ratios[lowest]} for {lowest}"
    assert slower.startswith(f"{ratios[second]} to {ratios[last]} for ")


def test_the_ratios_in_inference_in_the_readme_are_those_of_the_record():
    ratios = ratios_to_pytorch("infer")
    low, *_, high = ratios
    assert ratios_in_the_readme()[1] == f"{ratios[low]} ({low}) to {ratios[high]} ({high})"


def test_the_seconds_of_whole_processes_in_the_readme_are_those_of_the_record():
    cases = json.loads((ROOT / "results/end_to_end_cpu.json").read_text())

    def seconds(case, digits):
        found = {name: one["seconds"]["median"] for name, one in cases[case]["contenders"].items()}
        return {name: f"{value:.{digits}f}" for name, value in found.items()}

    study = seconds("depth study, digits", 0)
    one, other = (seconds(case, 1) for case in ("ResNet-20, digits", "LeNet-5, MNIST"))
    text = " ".join((ROOT / "README.md").read_text().split())
    for words in (
        f"took {study['first start']} s from start to end, and {study['later start']} s when started again",
        f"A plain PyTorch script took {study['torch']} s",
        f"each with half of the networks, took {study['torch, two processes']} s",
        f"took {one['later start']} s with a warm cache and {one['first start']} s without",
        f"MNIST took {other['later start']} and {other['first start']} s",
        f"PyTorch took {one['torch']} and {other['torch']} s",
    ):
        assert words in text


def test_the_figures_of_fault_tolerance_are_those_of_the_record():
    record = json.loads((ROOT / "results/reliability.json").read_text())
    text = one_line((ROOT / "docs/what_survives_what.md").read_text())

    def at_most(seconds):
        return f"{math.ceil(10 * max(seconds)) / 10} s"

    faults, processes = record["signals"], record["processes"]
    kills, terms = (
        sum(number for moment, number in faults["moments"].items() if moment.startswith(signal))
        for signal in ("SIGKILL", "SIGTERM")
    )
    signals = f"{kills} SIGKILLs and {terms} SIGTERMs"
    assert signals in one_line((ROOT / "README.md").read_text())
    damages = record["damage"]["damages"]
    by_outcome = collections.Counter(damage["outcome"] for damage in damages)
    longest = processes["longest_seconds"]
    refusal = at_most(one["seconds"] for one in processes["refused"].values())
    configs = record["configs"]
    memory = {name: feed["mebibytes"] for name, feed in record["memory"]["feeds"].items()}
    slopes = " and ".join(f"{memory[name]['per_1000_steps']:.2f}" for name in ("resident", "stream"))
    for words in (
        f"{signals}, all in one run of {faults['overrides']['num_steps']} steps",
        f"exited within {at_most(faults['seconds_to_save_on_sigterm']['all'])} while it compiled",
        f"does {len(damages)} such things",
        f"{by_outcome['refused']} were refused, {by_outcome['fell back']} fell back to the previous "
        f"checkpoint, {by_outcome['unharmed']} did no harm",
        f"while they compile | when their next collective fails | {at_most([longest['SIGKILL start']])} |",
        f"| {at_most([longest['SIGKILL step'], longest['SIGKILL save']])} |",
        f"| {at_most([longest['SIGSTOP step']])} of {processes['heartbeat_timeout_seconds']} + 10 |",
        f"| {at_most([longest['SIGKILL import']])} of {processes['meeting_timeout_seconds']} + 10 |",
        f"| {refusal}, startup included |",
        f"after {len(processes['blows'])} such failures",
        *(
            f"from {one['first']:.0f} to {one['last']:.0f} MiB, with a peak of {one['largest']:.1f}"
            for one in memory.values()
        ),
        f"slopes are {slopes} MiB per 1,000 steps",
        f"Of {configs['configs_tried']} configs and {configs['studies_tried']} studies, "
        f"{configs['outcomes']['refused']} were refused with the name of the key and "
        f"{configs['outcomes']['trained']} were accepted",
    ):
        assert words in text


@pytest.mark.parametrize("document", ledger.DOCUMENTS, ids=name_of)
def test_the_ledger_is_that_of_the_records(document):
    studies, _ = ledger.read_records(ROOT / "results")
    written = ledger.fill(document, ledger.collect(studies), ROOT / "results")
    assert document.read_text() == written, "run `python -m cnn_cases.studies.ledger --write`"


# Python.


def test_the_python_in_the_manual_runs(data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("choose_cpu_flags", "use_compilation_cache"):
        monkeypatch.setattr(runtime, name, lambda: None)
    shorter = lenet5_digits.get_config()
    shorter.data.data_dir = data_dir
    shorter.num_steps = shorter.evaluation.every_steps = shorter.checkpoint.every_steps = 50
    monkeypatch.setattr(lenet5_digits, "get_config", shorter.copy_and_resolve_references)
    rows = [{"step": 10, "running/loss": 2.5}, {"step": 50, "running/loss": 1.5, "validation/error": 0.25}]
    (tmp_path / "runs/lenet5").mkdir(parents=True)
    (tmp_path / "runs/lenet5/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manual = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs/training.md").read_text(), re.DOTALL):
        exec(block, manual)
    assert manual["curve"] == [(50, 0.25)]
    assert manual["result"]["step"] == 50
    assert [manual[name].shape for name in ("probabilities", "logits")] == [(5, 10), (5, 10)]
    assert len(manual["names"]) == 5


def test_the_study_in_the_manual_is_one_that_the_suite_accepts():
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/studies.md").read_text(), re.DOTALL)
    manual = {}
    exec(block, manual)
    assert len(plan.expand(manual["get_config"]())) == 12
    assert "\nCommand: python " in (manual.get("__doc__") or "")  # see tests/test_configs.py


# Images of one's own.


def test_the_builder_in_the_manual_makes_a_data_set(tmp_path, monkeypatch):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/data.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for split, label, size in itertools.product(("train", "validation", "test"), ("cat", "dog"), (20, 31)):
        path = tmp_path / "pets" / split / label / f"{size}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (size, 40, 3), np.uint8)).save(path)
    exec(block, {"__name__": "manual"})
    config = lenet5_digits.get_config()
    config.data.update(name="pets", data_dir="sets", image_size=64)
    feed = feeds.make_feed(**config.data, batch_size=4, eval_batch_size=4)
    assert (feed.image_shape, feeds.class_names("pets", "sets")) == ((64, 64, 3), ["cat", "dog"])
    assert sorted(label for _, label in feed.examples("test")) == [0, 0, 1, 1]


# Results.


def one_line(text):
    return " ".join(text.split())


@functools.cache
def heads():
    """{name of a config: its docstring}."""
    return {path.stem: ast.get_docstring(ast.parse(path.read_text())) for path in ROOT.glob("configs/*.py")}


@pytest.mark.parametrize("path", sorted(ROOT.glob("results/digits/*.json")), ids=name_of)
def test_errors_on_digits_are_those_of_their_record(path):
    runs = sorted(records.read(path)["runs"], key=lambda run: run["seed"])
    assert [run["seed"] for run in runs] == [0, 1, 2]
    errors = [f"{100 * run['metrics']['test/error']:.1f}" for run in runs]
    head = one_line(heads()[path.stem])
    assert f"Result: {errors[0]}, {errors[1]} and {errors[2]} % test error with seeds 0, 1 and 2" in head
    assert f"({name_of(path)})" in head


def test_results_are_quoted_from_the_heads_of_their_configs():
    quoted = {}
    for table in tables(ROOT / "docs/case_studies.md"):
        if table.titles == ["config", "measured"]:
            quoted |= {LINK.match(config)[1]: result for config, result in table.rows}
    assert set(quoted) == set(heads()) - {"__init__", "common"}
    wrong = [name for name, result in quoted.items() if one_line(result) not in one_line(heads()[name])]
    assert [name for name in wrong if quoted[name] != "not yet measured"] == []
