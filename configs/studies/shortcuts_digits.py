"""The three shortcut options of a residual net as depth grows, on scikit-learn's digits.

Paper: He et al. 2015, section 4.1 and table 3, with 34 layers on ImageNet; and He et al. 2016, section 3, for
projections in place of all identities in 110 layers on CIFAR-10.
Command: python -m cnn_cases.studies.sweep --config=configs/studies/shortcuts_digits.py \
             --workdir=runs/shortcuts_digits --jobs=2

The recipe is that of `resnet_digits`.
Result: with 20, 32, 44 and 56 layers, mean test errors of 2.25, 2.07, 1.88 and 1.69 % with option A, of 2.35,
1.60, 2.91 and 2.25 % with B, and of 2.16, 3.85, 10.33 and 46.67 % with C, which has no identity shortcuts;
with --jobs=2, about two minutes on two CPU cores that ran other jobs too, 2026-11-28
(results/shortcuts_digits.json).
"""

from ml_collections import ConfigDict

from configs import common, resnet_digits


def get_config():
    """The grid: four depths with shortcuts of options A, B and C."""
    config = ConfigDict()
    config.base = resnet_digits.get_config()
    with config.base.unlocked():
        common.follow_test_error(config.base)
    config.grid = (("model.depth", (20, 32, 44, 56)), ("model.shortcut", ("A", "B", "C")))
    config.compare = "model.shortcut"
    config.against = "model.depth"
    config.seeds = (0, 1, 2)
    config.lock()
    return config
