"""AlexNet with two groups and dense layers of 512 units, on Imagenette, ten easy ImageNet classes, streamed.

Paper: Krizhevsky et al. 2012. Kept: the net, its initial values, dropout, random crops of images whose
shorter side is resized, and pixels from 0 to 255 with the mean subtracted. The image sizes are ours (crops of
131 pixels from 148), and so is the recipe: Adam, because with the paper's learning rate and momentum this net
makes no progress for hundreds of steps.
Command: make data DATASET=imagenette/320px-v2
         python train.py --config=configs/alexnet_imagenette.py --workdir=runs/alexnet_imagenette
Result: 71.7 % error on 600 validation images (chance is 90 %) with seed 0, after five epochs of a subset of
2,000 training images; 6 minutes on two shared CPU cores, 2026-11-24 (results/alexnet_imagenette.json).

The published set has 9,469 training and 3,925 validation images, so 310 steps of 32 images are one epoch and
14 steps: enough to see on a CPU that everything works. For a meaningful figure, train for 20 epochs or more:
--config.num_steps=6000.
"""

from configs import common


def get_config():
    """AlexNet on Imagenette."""
    config = common.get_config()
    config.model.name = "alexnet"
    config.model.variant = "two_groups"
    config.model.dense_features = 512
    common.imagenette(config, image_size=131)
    config.data.normalization = "pixel_mean_255"
    config.data.crop.name = "shorter_side"
    config.data.crop.shorter_side = (148, 148)
    config.data.crop.eval_shorter_side = 148
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 3e-4
    config.optimizer.weight_decay = 0.0
    config.lock()
    return config
