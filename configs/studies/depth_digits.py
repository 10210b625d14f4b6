"""Plain against residual nets as depth grows, on scikit-learn's digits: five depths, three seeds.

Paper: He et al. 2015, section 4.2 and figure 6, on 8x8 pixels and with a schedule of seconds.
Command: python -m cnn_cases.studies.depth_curves --config=configs/studies/depth_digits.py \
             --workdir=runs/depth_digits
Result: mean test errors of 1.88, 2.54, 23.38, 72.11 and 82.72 % with plain nets of 8, 20, 32, 44 and 56
layers, and of 2.35, 2.25, 2.07, 1.88 and 1.69 % with residual ones, 2026-11-28 (results/depth_digits.json);
with --jobs=2, 69 s, 2026-12-01 (results/end_to_end_cpu.json); both on two CPU cores.
"""

from ml_collections import ConfigDict

from configs import common, resnet_digits


def get_config():
    """The grid: every depth, plain and residual, with every seed."""
    config = ConfigDict()
    config.base = resnet_digits.get_config()
    with config.base.unlocked():
        config.base.evaluation.every_steps = 25
        config.base.evaluation.batch_size = 120
        config.base.checkpoint.every_steps = 0  # in runs of seconds, a single one saves time
        common.follow_test_error(config.base)
    config.grid = (
        ("model.depth", (8, 20, 32, 44, 56)),
        ("model.plain", (True, False)),
    )
    config.seeds = (0, 1, 2)
    config.lock()
    return config
