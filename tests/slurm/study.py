"""The study of check.sh: LeNet-5 on digits, two points with two seeds, long enough to be interrupted."""

from ml_collections import ConfigDict

from configs import lenet5_digits


def get_config():
    """Four runs of a few seconds each."""
    config = ConfigDict()
    config.base = lenet5_digits.get_config()
    with config.base.unlocked():
        config.base.num_steps = 2_000
        config.base.log_every_steps = 100
        config.base.evaluation.every_steps = 1_000
        config.base.checkpoint.every_steps = 100
    config.grid = (("optimizer.momentum", (0.0, 0.9)),)
    config.seeds = (0, 1)
    config.lock()
    return config
