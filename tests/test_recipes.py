"""The recipes of long runs are the papers', and those of all records are what their configs say today."""

import importlib
import pathlib

import pytest

from benchmarks.fuzz import ROOT as CONFIGS
from benchmarks.fuzz import load
from cnn_cases import settings
from cnn_cases.studies import ledger, plan, records

RESULTS = pathlib.Path(__file__).parent.parent / "results"
RECORDS = [str(path.relative_to(RESULTS)) for path in sorted(RESULTS.rglob("*.json")) if records.read(path)]

IMAGENET = {
    "data.name": "imagenet2012",
    "data.splits.train": "train",
    "data.splits.validation": "validation",
    "data.augment.flip": True,
    "checkpoint.best_on": "",
    "evaluation.final_splits": ("validation",),
}
CIFAR = {
    "data.name": "cifar10",
    "data.splits.train": "train[:45000]",
    "data.splits.validation": "train[45000:]",
    "data.splits.test": "test",
    "data.augment.flip": True,
    "data.augment.pad": 4,
    "batch_size": 128,
}
LIGHTING = {"data.augment.lighting": 0.1, "data.augment.lighting_basis": "imagenet"}
SGD = {"optimizer.name": "sgd", "optimizer.momentum": 0.9, "optimizer.nesterov": False}
KERNELS, EVERYTHING = {"optimizer.decayed": "kernels"}, {"optimizer.decayed": "all"}


def rates(first, *falls):
    """The learning rate and its falls: pairs of a fraction of the steps and a factor."""
    return {
        "optimizer.learning_rate": first,
        "schedule.name": "piecewise",
        "schedule.boundaries": pytest.approx([boundary for boundary, _ in falls]),
        "schedule.factors": tuple(factor for _, factor in falls),
    }


RECIPES = {
    # Krizhevsky et al. 2012: 90 epochs of 1,281,167 images.
    "alexnet_imagenet2012": {
        **IMAGENET,
        **LIGHTING,
        **SGD,
        **KERNELS,
        **rates(0.01, (30 / 90, 0.1), (60 / 90, 0.1), (80 / 90, 0.1)),
        "num_steps": 900_821,
        "batch_size": 128,
        "optimizer.weight_decay": 5e-4,
        "data.crop.name": "shorter_side",
        "data.crop.shorter_side": (259, 259),
        "data.image_size": 227,
        "data.normalization": "pixel_mean_255",
        "evaluation.protocol": "ten_crop",
        "model.variant": "two_groups",
    },
    # Simonyan and Zisserman 2014: 74 epochs, which the paper counts as 370,000 steps.
    "vgg_imagenet2012": {
        **IMAGENET,
        **LIGHTING,
        **SGD,
        **KERNELS,
        **rates(0.01, (2 / 6, 0.1), (4 / 6, 0.1), (5 / 6, 0.1)),
        "num_steps": 370_337,
        "batch_size": 256,
        "optimizer.weight_decay": 5e-4,
        "data.crop.name": "shorter_side",
        "data.crop.shorter_side": (256, 512),
        "data.image_size": 224,
        "data.normalization": "channel",
        "evaluation.protocol": "multi_scale_dense",
        "model.variant": "D",
        "model.batch_norm": False,
    },
    # Szegedy et al. 2014: 4 % less every 8 epochs.
    "googlenet_imagenet2012": {
        **IMAGENET,
        **LIGHTING,
        **SGD,
        **KERNELS,
        **rates(0.02, *((epoch / 240, 0.96) for epoch in range(8, 240, 8))),
        "num_steps": 1_201_094,
        "batch_size": 256,
        "optimizer.weight_decay": 2e-4,
        "ema_decay": 0.9999,
        "loss.side_weight": 0.3,
        "data.crop.name": "area",
        "data.crop.area": (0.08, 1.0),
        "data.crop.aspect": (3 / 4, 4 / 3),
        "data.image_size": 224,
        "data.augment.brightness": 0.5,
        "data.augment.contrast": 0.5,
        "data.augment.saturation": 0.5,
        "evaluation.protocol": "googlenet_144",
        "model.side_branches": True,
        "model.batch_norm": False,
    },
    # Szegedy et al. 2015b: 100 epochs of 50 replicas with 32 images, 0.94 every two epochs.
    "inception_v3_imagenet2012": {
        **IMAGENET,
        **KERNELS,
        **rates(0.045, *((epoch / 100, 0.94) for epoch in range(2, 100, 2))),
        "num_steps": 80_073,
        "batch_size": 1_600,
        "optimizer.name": "rmsprop",
        "optimizer.momentum": 0.9,
        "optimizer.second_moment": 0.9,
        "optimizer.epsilon": 1.0,
        "optimizer.clip_norm": 2.0,
        "optimizer.weight_decay": 4e-5,
        "ema_decay": 0.9999,
        "loss.side_weight": 0.4,
        "loss.label_smoothing": 0.1,
        "data.crop.name": "area",
        "data.image_size": 299,
        "data.crop.eval_shorter_side": 342,
        "model.side_branches": True,
    },
    # The release for Caffe of the authors of Lin et al. 2013.
    "nin_imagenet2012": {
        **IMAGENET,
        **SGD,
        **KERNELS,
        **rates(0.01, (200 / 450, 0.1), (400 / 450, 0.1)),
        "num_steps": 450_000,
        "batch_size": 64,
        "optimizer.weight_decay": 5e-4,
        "optimizer.rate_patterns": ("*/bias",),
        "optimizer.rate_factors": (2.0,),
        "data.crop.name": "shorter_side",
        "data.crop.shorter_side": (256, 256),
        "data.image_size": 224,
        "data.normalization": "pixel_mean_255",
        "model.variant": "imagenet",
    },
    # Lin et al. 2013.
    "nin_cifar10": {
        **CIFAR,
        **SGD,
        **KERNELS,
        **rates(0.02, (60 / 80, 0.1), (70 / 80, 0.1)),
        "num_steps": 80_000,
        "optimizer.weight_decay": 5e-4,
        "optimizer.rate_patterns": ("*/bias",),
        "optimizer.rate_factors": (2.0,),
        "data.normalization": "gcn_zca",
        "model.variant": "cifar",
    },
    # He et al. 2015, section 3.4, with the 90 epochs of fb.resnet.torch.
    "resnet_imagenet2012": {
        **IMAGENET,
        **LIGHTING,
        **SGD,
        **EVERYTHING,
        **rates(0.1, (30 / 90, 0.1), (60 / 90, 0.1)),
        "num_steps": 450_410,
        "batch_size": 256,
        "optimizer.weight_decay": 1e-4,
        "data.crop.name": "shorter_side",
        "data.crop.shorter_side": (256, 480),
        "data.image_size": 224,
        "data.normalization": "pixel_mean",
        "evaluation.protocol": "ten_crop",
        "model.stride_placement": "v1",
        "model.shortcut": "B",
    },
    # He et al. 2015, section 4.2.
    "resnet_cifar10": {
        **CIFAR,
        **SGD,
        **EVERYTHING,
        **rates(0.1, (32 / 64, 0.1), (48 / 64, 0.1)),
        "num_steps": 64_000,
        "optimizer.weight_decay": 1e-4,
        "schedule.warmup_steps": 0,
        "data.normalization": "pixel_mean",
        "model.shortcut": "A",
    },
    # He et al. 2016.
    "resnet_preact_cifar10": {
        **CIFAR,
        **SGD,
        **EVERYTHING,
        **rates(0.1, (32 / 64, 0.1), (48 / 64, 0.1)),
        "num_steps": 64_000,
        "optimizer.weight_decay": 1e-4,
        "schedule.warmup": "constant",
        "schedule.warmup_steps": 400,
        "schedule.warmup_factor": 0.1,
        "data.normalization": "pixel_mean",
    },
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_that_of_its_paper(name):
    config = load(name).to_dict()
    recipe = RECIPES[name]
    assert {key: plan.lookup(config, key) for key in recipe} == recipe


# What the commands of the records changed.
CHANGED = {
    "depth_cifar10.json": {"dtype": "bfloat16"},
    "depth_cifar10_1000_steps.json": {"num_steps": 1_000},
    "dtypes/resnet_cifar10.json": {"num_steps": 1_000},
}
# Settings that a network got after some of its records, with the value that it had until then.
LATER = {"model.stride_placement": "v1", "model.scan_blocks": False, "model.zero_init_last_gamma": False}
ROUNDING = {"steps_per_call", "evaluation.batch_size"}  # the keys that change nothing else
STUDIES = {"depth_cifar10_1000_steps": "depth_cifar10", "side_branches_imagenette": "side_branches"}


def study_of(name):
    """The study in configs/studies of a record in results/."""
    path = pathlib.Path(name)
    several = {"digits": "seeds", "dtypes": "dtypes"}.get(path.parent.name)
    study = STUDIES.get(path.stem, path.stem)
    if not several and not (CONFIGS / "studies" / f"{study}.py").exists():
        several = "seeds"
    if several:
        return importlib.import_module(f"configs.studies.{several}").get_config(path.stem)
    return load(f"studies.{study}")


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_is_of_the_recipe_that_its_config_has_today(name):
    record = records.read(RESULTS / name)["config"]
    study = study_of(name)
    then = ledger.recipe(settings.from_json(settings.completed(record)["base"]))
    today = ledger.recipe(study.base.to_dict())
    then |= {key: value for key, value in LATER.items() if key in today and key not in then}
    assert then.keys() == today.keys()
    changed = {key: then[key] for key, value in today.items() if then[key] != value}
    assert {key: value for key, value in changed.items() if key not in ROUNDING} == CHANGED.get(name, {})
    grid = dict(study.grid)
    assert {key for key, _ in record["grid"]} == set(grid)
    assert all(set(values) <= set(grid[key]) for key, values in record["grid"] if name not in CHANGED)
    assert settings.from_json(record.get("adjust", ())) == study.get("adjust", ())
