"""GoogLeNet, as its paper has it, on Imagenette, ten easy classes of ImageNet, in crops of 96 pixels that
stream from the disk.

Paper: Szegedy et al. 2014. Kept: the net of table 1, with 5x5 windows, local response normalisation and side
branches that weigh 0.3, and crops of any size and shape (section 6). The size of the crops is ours, and so is
the recipe, without the paper's photometric distortions and average of parameters.
Command: make data DATASET=imagenette/320px-v2
         python train.py --config=configs/googlenet_imagenette.py --workdir=runs/googlenet_imagenette
Result: 75.5 % validation error with seed 0, on a subset of 2,000 images to train on, five epochs of it, and
        600 for validation; 4 minutes on two CPU cores, beside other work, 2026-11-28
        (results/googlenet_imagenette.json). The study side_branches trains it for ten epochs.

310 steps of 32 images are an epoch of the published set and 14 steps, for it has 9,469 images to train on
and 3,925 for validation: long enough to see on a CPU that all works. For a figure that counts, take 20 epochs
or more: --config.num_steps=6000.
"""

from configs import common


def get_config():
    """GoogLeNet on Imagenette."""
    config = common.get_config()
    config.model.name = "googlenet"
    config.model.batch_norm = False
    config.model.side_branches = True
    common.imagenette(config, image_size=96)
    config.data.crop.name = "area"
    config.data.crop.eval_shorter_side = 110
    config.optimizer.learning_rate = 0.01
    config.optimizer.weight_decay = 2e-4
    config.optimizer.decayed = "kernels"
    config.schedule.warmup_steps = 30
    config.lock()
    return config
