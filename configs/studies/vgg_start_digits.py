"""VGG-16 from the beginning, and from layers of a trained net A, on digits enlarged to 32x32 pixels.

Paper: Simonyan and Zisserman 2014, section 3.1: the deeper nets took A's first four convolutions and dense
layers; as the authors found later, initial values of Glorot and Bengio 2010 would have done.
Command: python train.py --config=configs/vgg_digits.py --config.model.batch_norm=False \
             --config.num_steps=200 --workdir=runs/vgg_a
         python -m cnn_cases.studies.sweep --config=configs/studies/vgg_start_digits.py \
             --workdir=runs/vgg_start_digits --jobs=2

The recipe is that of `vgg_digits` without batch normalisation, which the paper's nets do not have; what is
drawn, is drawn as Glorot and Bengio say.
Result: test errors of 90.1, 89.9, 89.9, 78.0 and 67.0 % from the beginning, with seeds 0 to 4, and of 41.1,
90.1, 90.1, 89.9 and 30.1 % from A: either way it depends on the seed whether a net learns in these 200
steps; with --jobs=2, 17 minutes on two CPU cores, beside other work, 2026-11-28
(results/vgg_start_digits.json).
"""

from ml_collections import ConfigDict

from configs import common, vgg_digits


def get_config():
    """The grid: the start of net D."""
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
