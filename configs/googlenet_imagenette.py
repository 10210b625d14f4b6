"""GoogLeNet, as in its paper, on Imagenette, ten easy ImageNet classes, streamed in crops of 96 pixels.

Paper: Szegedy et al. 2014. Kept: the net of table 1, with 5x5 kernels, local response normalisation and side
branches with weight 0.3, and crops of varying size and shape (section 6). The size of the crops and the
recipe are ours; the paper's photometric distortions and average of parameters are left out.
Command: make data DATASET=imagenette/320px-v2
         python train.py --config=configs/googlenet_imagenette.py --workdir=runs/googlenet_imagenette
Result: 75.5 % error on 600 validation images with seed 0, after five epochs of a subset of 2,000 training
images; 4 minutes on two CPU cores that ran other jobs too, 2026-11-28 (results/googlenet_imagenette.json).
The study side_branches trains it for ten epochs.

The published set has 9,469 training and 3,925 validation images, so 310 steps of 32 images are one epoch and
14 steps: enough to see on a CPU that everything works. For a meaningful figure, train for 20 epochs or more:
--config.num_steps=6000.
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
