"""ResNet-18, the ImageNet net, on scikit-learn's digits enlarged to 32x32 pixels.

Paper: He et al. 2015, table 1; the schedule is ours.
Command: python train.py --config=configs/resnet18_digits.py --workdir=runs/resnet18_digits
Result: 2.0, 3.1 and 2.5 % test error with seeds 0, 1 and 2, in 18, 10 and 9 s on two CPU cores, 2026-11-27
(results/digits/resnet18_digits.json).
"""

from configs import common


def get_config():
    """ResNet-18 on digits."""
    config = common.get_config()
    config.num_steps = 160
    config.batch_size = 32
    config.model.name = "resnet"
    config.model.depth = 18
    config.model.plain = False
    config.model.shortcut = "B"
    config.model.stride_placement = "v1"
    config.model.zero_init_last_gamma = False
    config.data.image_size = 32
    config.optimizer.learning_rate = 0.02
    config.schedule.name = "cosine"
    config.evaluation.every_steps = 40
    config.checkpoint.every_steps = 40
    config.lock()
    return config
