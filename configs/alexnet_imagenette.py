"""AlexNet of two groups, with dense layers of 512, on Imagenette, ten easy classes of ImageNet, as a stream.

Paper: Krizhevsky et al. 2012. Kept: the net, its initial values, dropout, random crops of images whose
shorter side is resized, pixels less their mean in the range of 0 to 255. The sizes are ours, crops of 131
pixels from 148, and so is the recipe: Adam, for with the paper's rate and momentum this net stays for
hundreds of steps where it starts.
Command: make data DATASET=imagenette/320px-v2
         python train.py --config=configs/alexnet_imagenette.py --workdir=runs/alexnet_imagenette
Result: 71.7 % validation error with seed 0 (chance is 90 %), on a subset of 2,000 images to train on, five
epochs of it, and 600 for validation; 6 minutes on two shared CPU cores, 2026-11-24
(results/alexnet_imagenette.json).

310 steps of 32 images are an epoch of the published set and 14 steps, for it has 9,469 images to train on
and 3,925 for validation: long enough to see on a CPU that all works. For a figure that counts, take 20 epochs
or more: --config.num_steps=6000.
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
