"""A small study, and the record of a depth study: two depths, two seeds, and one run that diverged."""

import pytest
from ml_collections import ConfigDict

from tests.conftest import tiny_config

ENVIRONMENT = {
    "commit": "a" * 40,
    "versions": {"jax": "0.10.2", "numpy": "2.4.6"},
    "devices": ["cpu"],
    "cpus": 2,
}


def cells(table):
    """The rows of a table in Markdown, the head first."""
    lines = [line.strip("|").split("|") for line in table.splitlines()]
    return [[cell.strip() for cell in line] for line in (lines[0], *lines[2:])]


def tiny_study(data_dir, **changes):
    """LeNet-5 on digits for 4 steps, at four points with two seeds."""
    base = tiny_config(data_dir)
    base.num_steps = 4
    base.log_every_steps = 2
    study = {
        "base": base,
        "grid": (("optimizer.momentum", (0.0, 0.9)), ("data.augment.flip", (True, False))),
        "seeds": (0, 1),
    }
    return ConfigDict(study | changes)


def run(depth, plain, seed, error, status="finished"):
    outcome = {"model.depth": depth, "model.plain": plain, "seed": seed, "status": status, "step": 20}
    if status == "finished":
        outcome["metrics"] = {"train/loss": 2 * error, "train/error": error, "test/error": error + 0.1}
    errors = [[10, 0.5], [20, error]] if status == "finished" else [[10, 0.9]]
    losses = [[step, 3 * value + 0.01] for step, value in errors]
    curves = {"running/error": errors, "running/loss": losses, "test/error": errors, "test/loss": losses}
    return outcome | {"environments": [0], "curves": curves}


@pytest.fixture
def record():
    runs = [
        run(8, True, 0, 0.1),
        run(8, True, 1, 0.3),
        run(8, False, 0, 0.2),
        run(8, False, 1, 0.2),
        run(20, True, 0, 0.5),
        run(20, True, 1, None, status="diverged"),
        run(20, False, 0, 0.0),
        run(20, False, 1, 0.1),
    ]
    base = {
        "batch_size": 32,
        "num_steps": 20,
        "data": {"name": "digits", "splits": {"train": "train"}},
        "loss": {"name": "cross_entropy"},
        "model": {"name": "resnet_cifar", "depth": 8, "plain": False},
    }
    grid = [["model.depth", [8, 20]], ["model.plain", [True, False]]]
    config = {"base": base, "grid": grid, "seeds": [0, 1]}
    return {"config": config, "environments": [dict(ENVIRONMENT)], "runs": runs}


@pytest.fixture
def mixed(record):
    """The same, its seed 1 run by another commit."""
    record["environments"].append(ENVIRONMENT | {"commit": "b" * 40 + "-dirty"})
    for one in record["runs"]:
        one["environments"] = [one["seed"]]
    return record
