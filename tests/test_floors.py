"""The directions of imports that keep the rooms apart."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FILES = [*ROOT.glob("cnn_cases/**/*.py"), *ROOT.glob("configs/**/*.py"), ROOT / "train.py"]

# Each room, and what of our own it may import. The first match of a module's name counts.
MAY_IMPORT = {
    "cnn_cases.training.programs": (
        "cnn_cases.settings",
        "cnn_cases.models",
        "cnn_cases.data",
        "cnn_cases.training",
    ),
    "cnn_cases.training.loop": ("cnn_cases.settings", "cnn_cases.training"),
    "cnn_cases.training.devices": ("cnn_cases.training.processes",),
    "cnn_cases.training.runtime": ("cnn_cases.training.provenance",),
    "cnn_cases.training.checkpoint": ("cnn_cases.training.disk",),
    "cnn_cases.training.transfer": ("cnn_cases.training.checkpoint",),
    "cnn_cases.training.logbook": (
        "cnn_cases.settings",
        "cnn_cases.training.disk",
        "cnn_cases.training.provenance",
    ),
    "cnn_cases.training": (),
    "cnn_cases.models": ("cnn_cases.models",),
    "cnn_cases.data": ("cnn_cases.data",),
    "cnn_cases.analysis": (
        "cnn_cases.parsing",
        "cnn_cases.models",
        "cnn_cases.analysis",
        "cnn_cases.settings",
        "cnn_cases.tables",
    ),
    "cnn_cases.studies": ("cnn_cases", "configs.common"),
    "cnn_cases.command": (
        "cnn_cases.settings",
        "cnn_cases.training.devices",
        "cnn_cases.training.loop",
        "cnn_cases.training.processes",
        "cnn_cases.training.runtime",
    ),
    "cnn_cases.settings": ("configs.common",),  # the defaults
    "cnn_cases.saved_runs": ("cnn_cases.settings", "cnn_cases.training"),
    "cnn_cases.evaluate": ("cnn_cases",),
    "cnn_cases.predict": ("cnn_cases",),
    "cnn_cases.preview": ("cnn_cases",),
    "cnn_cases.rehearse": ("cnn_cases",),
    "cnn_cases.replay": ("cnn_cases",),
    "cnn_cases": (),
    "configs": ("configs",),
    "train": ("cnn_cases.command", "cnn_cases.training.loop", "cnn_cases.training.processes"),
}


ROOMS = ("cnn_cases", "configs", "train", "benchmarks")  # nothing imports the last


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def own_imports(path):
    """Full names of all that a file imports from this repository."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name for name in names if name.split(".")[0] in ROOMS)


def is_below(name, room):
    return name == room or name.startswith(room + ".")


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_down_only(path):
    room = next(room for room in MAY_IMPORT if is_below(module_name(path), room))
    allowed = (*MAY_IMPORT[room], "cnn_cases.checks", "cnn_cases.stopping")  # which know nothing
    above = [name for name in own_imports(path) if not any(is_below(name, low) for low in allowed)]
    assert not above, f"{module_name(path)} ({room}) must not import {above}"


def test_floors_tell_a_wrong_import(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text("from cnn_cases.training import loop\nimport jax\nimport configs.common\n")
    assert list(own_imports(wrong)) == ["cnn_cases.training.loop", "configs.common"]


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_no_default_stands_at_the_point_of_use(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
            assert "config" not in ast.unparse(node.func.value), ast.unparse(node)
