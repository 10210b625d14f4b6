"""VGG-16 against VGG-19 on digits enlarged to 32x32 pixels.

Paper: Simonyan and Zisserman 2014, nets D and E of table 1.
Command: python -m cnn_cases.studies.sweep --config=configs/studies/vgg_depth_digits.py \
             --workdir=runs/vgg_depth_digits --jobs=2

The recipe is that of `vgg_digits`, with batch normalisation, for 200 steps.
Result: mean test errors of 0.87 % with D and 1.07 % with E over ten seeds; the difference of 0.20 points has
a 95 % interval of -0.12 to 0.51. With --jobs=2, a run takes 80 to 105 s on two CPU cores, 2026-12-01
(results/vgg_depth_digits.json).
"""

from ml_collections import ConfigDict

from configs import common, vgg_digits


def get_config():
    """The grid: nets D and E."""
    config = ConfigDict()
    config.base = vgg_digits.get_config()
    with config.base.unlocked():
        config.base.num_steps = 200
        common.follow_test_error(config.base)
    config.grid = (("model.variant", ("D", "E")),)
    config.compare = "model.variant"
    config.seeds = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)
    config.lock()
    return config
