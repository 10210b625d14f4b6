"""VGG's net A with and without local response normalisation, on digits enlarged to 32x32 pixels.

Paper: Simonyan and Zisserman 2014, section 4.1 and table 3, A against A-LRN.
Command: python -m cnn_cases.studies.sweep --config=configs/studies/response_norm_digits.py \
             --workdir=runs/response_norm_digits --jobs=2

The recipe is that of `vgg_digits` without batch normalisation, which the paper's nets do not have.
Result: mean test errors of 9.46 % without and of 15.61 % with response normalisation. The difference of 6.14
points has a 95 % interval of -1.68 to 13.96; with --jobs=2, 6 minutes on two CPU cores that ran other jobs
too, 2026-11-28 (results/response_norm_digits.json).
"""

from ml_collections import ConfigDict

from configs import common, vgg_digits


def get_config():
    """The grid: net A without and with response normalisation."""
    config = ConfigDict()
    config.base = vgg_digits.get_config()
    with config.base.unlocked():
        config.base.num_steps = 200
        config.base.model.batch_norm = False
        common.follow_test_error(config.base)
    config.grid = (("model.variant", ("A", "A-LRN")),)
    config.compare = "model.variant"
    config.seeds = (0, 1, 2, 3, 4)
    config.lock()
    return config
