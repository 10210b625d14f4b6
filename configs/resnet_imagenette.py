"""ResNet-18 on Imagenette, ten easy ImageNet classes, streamed in crops of 96 pixels.

Paper: He et al. 2015, table 1; the crops are those of Szegedy et al. 2014, section 6; the schedule is ours.
Command: make data DATASET=imagenette/320px-v2
         python train.py --config=configs/resnet_imagenette.py --workdir=runs/resnet_imagenette
Result: 45.8 % error on 600 validation images with seed 0, after five epochs of a subset of 2,000 training
images; 4 minutes on two shared CPU cores, 2026-11-24 (results/resnet_imagenette.json).

The published set has 9,469 training and 3,925 validation images, so 310 steps of 32 images are one epoch and
14 steps: enough to see on a CPU that everything works. For a meaningful figure, train for 20 epochs or more:
--config.num_steps=6000.
"""

from configs import common


def get_config():
    """ResNet-18 on Imagenette."""
    config = common.get_config()
    config.model.name = "resnet"
    config.model.depth = 18
    config.model.plain = False
    config.model.shortcut = "B"
    config.model.stride_placement = "v1"
    config.model.zero_init_last_gamma = False
    common.imagenette(config, image_size=96)
    config.data.crop.name = "area"
    config.data.crop.eval_shorter_side = 110
    config.optimizer.learning_rate = 0.01
    config.schedule.warmup_steps = 30
    config.lock()
    return config
