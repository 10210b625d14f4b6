"""Network in Network, the CIFAR net, on scikit-learn's digits enlarged to 16x16 pixels.

Paper: Lin et al. 2013. The recipe is ours: Adam.
Command: python train.py --config=configs/nin_digits.py --workdir=runs/nin_digits
Result: 21.7 % test error with seed 0; 123 s on two shared CPU cores, 2026-11-23
"""

from configs import common


def get_config():
    """Network in Network on digits."""
    config = common.get_config()
    config.num_steps = 250
    config.batch_size = 32
    config.model.name = "nin"
    config.model.variant = "cifar"
    config.data.image_size = 16
    config.data.normalization = "pixel_mean_255"
    config.optimizer.name = "adam"
    config.optimizer.weight_decay = 0.0
    config.schedule.name = "cosine"
    config.optimizer.learning_rate = 3e-4
    config.evaluation.every_steps = 50
    config.checkpoint.every_steps = 50
    config.lock()
    return config
