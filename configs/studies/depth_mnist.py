"""Plain against residual nets as depth grows, on MNIST: larger images than digits, the same nets.

Paper: He et al. 2015, section 4.2 and figure 6, on maps of 28, 14 and 7 pixels and with our schedule.
Command: make data DATASET=mnist
         python -m cnn_cases.studies.depth_curves --config=configs/studies/depth_mnist.py \
             --workdir=runs/depth_mnist
Result: mean test errors of 1.75, 0.81, 0.82, 1.61 and 3.22 % with plain nets of 8, 20, 32, 44 and 56 layers,
and of 1.90, 0.89, 0.81, 0.84 and 0.87 % with residual ones, on two CPU cores, 2026-11-27 and 28; with
--jobs=2, 83 minutes for seed 0, while other jobs ran part of the time (results/depth_mnist.json).
"""

from ml_collections import ConfigDict

from configs import common, resnet_digits


def get_config():
    """The grid: every depth, plain and residual, with every seed."""
    config = ConfigDict()
    config.base = resnet_digits.get_config()
    with config.base.unlocked():
        config.base.num_steps = 1_200
        config.base.batch_size = 128
        config.base.data.name = "mnist"
        common.split_training_set(config.base, "held_out", size=60_000, num_held_out=5_000)
        config.base.evaluation.every_steps = 100
        config.base.checkpoint.every_steps = 400
        common.follow_test_error(config.base)
    config.grid = (
        ("model.depth", (8, 20, 32, 44, 56)),
        ("model.plain", (True, False)),
    )
    config.seeds = (0, 1, 2)
    config.lock()
    return config
