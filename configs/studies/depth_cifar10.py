"""Plain against residual nets as depth grows, on CIFAR-10: the experiment of figure 6 of He et al.

Paper: He et al. 2015, section 4.2 and figure 6.
Command: make data DATASET=cifar10
         python -m cnn_cases.studies.depth_curves --config=configs/studies/depth_cifar10.py \
             --workdir=runs/depth_cifar10
A tenth of the schedule, for a first look:
         python -m cnn_cases.studies.depth_curves --config=configs/studies/depth_cifar10.py:short \
             --workdir=runs/depth_cifar10_short

The recipe is that of `resnet_cifar10`, on 45,000 images. Plain-110 is expected to fail: the paper's, as
recalled, stays above 60 %.
Result: 9.89, 10.30, 12.22 and 14.38 % test error with plain nets of depths 20, 32, 44 and 56, and 8.84, 7.74,
7.70 and 7.37 % with residual ones, with seed 0, in bfloat16; side by side on one H100, 2026-11-27
(results/depth_cifar10.json; README.md has the command and the time). Depth 110 was not run yet.
After 1,000 steps, with five seeds, plain nets of 20 and 32 layers have 4.1 and 10.3 points more test error
than residual nets. With 8 layers they have 0.8 points less, but the 95 % interval, -1.73 to 0.13, contains
zero (two CPU cores, 2026-11-28, results/depth_cifar10_1000_steps.json).
"""

from ml_collections import ConfigDict

from cnn_cases import checks
from configs import common, resnet_cifar10

STEPS = {"paper": 64_000, "short": 6_400}


def get_config(schedule="paper"):
    """The grid: every depth, plain and residual, with every seed."""
    checks.one_of("schedule", schedule, STEPS)
    config = ConfigDict()
    config.base = resnet_cifar10.get_config()
    with config.base.unlocked():
        config.base.num_steps = STEPS[schedule]
        config.base.evaluation.every_steps = STEPS[schedule] // 64
        common.follow_test_error(config.base)
    config.grid = (("model.depth", (20, 32, 44, 56, 110)), ("model.plain", (True, False)))
    warmup = (("schedule.warmup", "constant"), ("schedule.warmup_steps", 400))
    config.adjust = ((("model.depth", 110), warmup),)
    config.seeds = (0, 1, 2)
    config.lock()
    return config
