"""AlexNet with two groups and dense layers of 512 units, on scikit-learn's digits enlarged to 67x67 pixels.

Paper: Krizhevsky et al. 2012. Kept: the net, its initial values, dropout, and pixels from 0 to 255 with the
mean subtracted. The recipe is ours: Adam with a short warm-up, because with the paper's learning rate and
momentum this net makes no progress for hundreds of steps.
Command: python train.py --config=configs/alexnet_digits.py --workdir=runs/alexnet_digits
Result: 2.0, 2.5 and 2.0 % test error with seeds 0, 1 and 2, in 26, 24 and 23 s on two CPU cores, 2026-11-27
(results/digits/alexnet_digits.json).
"""

from configs import common


def get_config():
    """AlexNet of two groups on digits."""
    config = common.get_config()
    config.num_steps = 500
    config.batch_size = 32
    config.model.name = "alexnet"
    config.model.variant = "two_groups"
    config.model.dense_features = 512
    config.data.image_size = 67
    config.data.normalization = "pixel_mean_255"
    config.optimizer.name = "adam"
    config.optimizer.weight_decay = 0.0
    config.schedule.name = "cosine"
    config.optimizer.learning_rate = 5e-4
    config.schedule.warmup_steps = 20
    config.evaluation.every_steps = 100
    config.checkpoint.every_steps = 100
    config.lock()
    return config
