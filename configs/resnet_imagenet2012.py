"""Residual nets of depth 18 to 152 on ImageNet 2012.

Paper: He et al. 2015, section 3.4 (training) and 4.1.
Command: make data DATASET=imagenet2012
         python train.py --config=configs/resnet_imagenet2012.py --workdir=runs/resnet_imagenet2012
The plain twins of figure 4: --config.model.depth=34 --config.model.plain=True --config.model.shortcut=A.

The paper's recipe, item by item:
- SGD with momentum 0.9, batch size 256, weight decay 1e-4, up to 600,000 steps (120 epochs);
- learning rate 0.1, divided by 10 whenever the error stopped improving;
- He initialisation, batch normalisation, no dropout;
- the shorter side drawn from 256 to 480 pixels, a random 224-pixel crop, flips, AlexNet's colour shift; the
  mean image subtracted;
- ten crops in the test (tables 2 and 3), and for the best figures whole images at five scales (tables 4 and
  5), which --config.evaluation.protocol=resnet_dense applies.

Where the paper is silent: when the learning rate fell (here after 30 and 60 epochs, as in the appendix of the
authors' paper of 2016), and whether biases and batch normalisation decay (here they do, as in
fb.resnet.torch, whose README counts that as a departure from the paper).
Departures: 90 epochs, as is usual since fb.resnet.torch; batch statistics are those of the global batch
(--config.sync_batch_norm=False: of each device's share); the mean image is that of central crops of a sample
of the training images.
Not run yet.
"""

from configs import common


def get_config():
    """ResNet-50 on ImageNet."""
    config = common.get_config()
    common.imagenet2012(config, image_size=224, batch_size=256, num_epochs=90)
    config.model.name = "resnet"
    config.model.depth = 50
    config.model.plain = False
    config.model.shortcut = "B"
    config.model.stride_placement = "v1"
    config.model.zero_init_last_gamma = False
    config.data.crop.name = "shorter_side"
    config.data.crop.shorter_side = (256, 480)
    config.data.normalization = "pixel_mean"
    config.data.augment.lighting = 0.1
    config.data.augment.lighting_basis = "imagenet"
    config.optimizer.learning_rate = 0.1
    config.optimizer.weight_decay = 1e-4
    config.schedule.boundaries = (30 / 90, 60 / 90)  # epochs
    config.schedule.factors = (0.1, 0.1)
    config.evaluation.protocol = "ten_crop"
    config.lock()
    return config
