"""Plain-18 and plain-34 against ResNet-18 and ResNet-34 on ImageNet 2012.

Paper: He et al. 2015, section 4.1, table 2 and figure 4; the shortcuts have no parameters (option A).
Command: make data DATASET=imagenet2012
         python -m cnn_cases.studies.depth_curves --config=configs/studies/depth_imagenet.py \
             --workdir=runs/depth_imagenet

The recipe is that of `resnet_imagenet2012`. As in the paper, the nets are tested on the validation images,
with the single centre crop during training (figure 4) and ten crops at the end (table 2). Four runs of 90
epochs, one seed.
Not run yet.
"""

from ml_collections import ConfigDict

from configs import common, resnet_imagenet2012


def get_config():
    """The grid: both depths, plain and residual."""
    config = ConfigDict()
    config.base = resnet_imagenet2012.get_config()
    with config.base.unlocked():
        config.base.model.depth = 18
        config.base.model.shortcut = "A"
        config.base.data.splits.update({"validation": "", "test": "validation"})
        common.follow_test_error(config.base)
    config.grid = (
        ("model.depth", (18, 34)),
        ("model.plain", (True, False)),
    )
    config.seeds = (0,)
    config.lock()
    return config
