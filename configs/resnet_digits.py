"""Residual nets of depth 6n + 2, and their plain twins, on scikit-learn's digits of 8x8 pixels.

Paper: He et al. 2015, section 4.2, with maps of 8, 4 and 2 pixels instead of 32, 16 and 8 and a shorter
recipe.
Command: python train.py --config=configs/resnet_digits.py --workdir=runs/resnet20
         python train.py --config=configs/resnet_digits.py --config.model.depth=56 --config.model.plain=True \
             --workdir=runs/plain56
Result: 2.8, 2.3 and 2.0 % test error with seeds 0, 1 and 2, in 6, 2 and 2 s on two CPU cores, 2026-11-27
(results/digits/resnet_digits.json).
"""

from configs import common


def get_config():
    """ResNet-20 on digits."""
    config = common.get_config()
    config.num_steps = 200
    config.batch_size = 32
    config.model.name = "resnet_cifar"
    config.model.depth = 20
    config.model.plain = False
    config.model.shortcut = "A"
    config.model.scan_blocks = False
    config.optimizer.learning_rate = 0.02
    config.evaluation.every_steps = 25
    config.checkpoint.every_steps = 100
    config.log_every_steps = 10
    config.lock()
    return config
