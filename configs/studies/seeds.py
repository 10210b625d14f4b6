"""Any training config with three seeds; the name of its file follows the colon.

Command: python -m cnn_cases.studies.sweep --config=configs/studies/seeds.py:lenet5_mnist \
             --workdir=runs/seeds_lenet5_mnist

The argument of that config, if it takes one, follows another colon, as in seeds.py:resnet_cifar10:full_train.
`--config.seeds="(3, 4)"` sets other seeds, and `--config.base.<key>` sets any key of the config.
"""

import importlib
import pathlib

from ml_collections import ConfigDict


def get_config(which="lenet5_digits"):
    """One point with every seed.

    Args:
      which: a file of configs/, and its own argument, if it takes one, after a colon.

    Raises:
      ValueError: there is no such file.
    """
    name, _, choice = which.partition(":")
    configs = pathlib.Path(__file__).parents[1].glob("[!_]*.py")
    files = sorted(path.stem for path in configs if path.stem != "common")
    if name not in files:
        raise ValueError(f"{name!r} is no file of configs/; after the colon may follow: {', '.join(files)}")
    config = ConfigDict()
    config.base = importlib.import_module(f"configs.{name}").get_config(*([choice] if choice else []))
    config.grid = ()
    config.seeds = (0, 1, 2)
    config.lock()
    return config
