"""VGG-16 from random initial values, and from layers of a trained net A, on digits enlarged to 32x32 pixels.

Paper: Simonyan and Zisserman 2014, section 3.1: the deeper nets started from A's first four convolutions and
dense layers; the authors found later that Glorot initialisation (Glorot and Bengio 2010) would have done.
Command: python train.py --config=configs/vgg_digits.py --config.model.batch_norm=False \
             --config.num_steps=200 --workdir=runs/vgg_a
         python -m cnn_cases.studies.sweep --config=configs/studies/vgg_start_digits.py \
             --workdir=runs/vgg_start_digits --jobs=2

The recipe is that of `vgg_digits` without batch normalisation, which the paper's nets do not have. Layers
that do not come from A have Glorot initialisation.
Result: with seeds 0 to 4, test errors of 90.1, 89.9, 89.9, 78.0 and 67.0 % from random values, and of 41.1,
90.1, 90.1, 89.9 and 30.1 % from A. Either way it depends on the seed whether a net learns in these 200 steps;
with --jobs=2, 17 minutes on two CPU cores that ran other jobs too, 2026-11-28
(results/vgg_start_digits.json).
"""

from ml_collections import ConfigDict

from configs import common, vgg_digits


def get_config():
    """The grid: net D from random values and from net A."""
    config = ConfigDict()
    config.base = vgg_digits.get_config()
    with config.base.unlocked():
        config.base.num_steps = 200
        config.base.model.variant = "D"
        config.base.model.batch_norm = False
        config.base.start.layers = ("conv[123]_1", "conv3_2", "dense*", "logits")
        common.follow_test_error(config.base)
    config.grid = (("start.workdir", ("", "runs/vgg_a")),)
    config.compare = "start.workdir"
    config.seeds = (0, 1, 2, 3, 4)
    config.lock()
    return config
