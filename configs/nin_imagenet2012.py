"""Network in Network on ImageNet of 2012.

Paper: Lin et al. 2013, which has no experiment on ImageNet; the net is the authors' later definition for
Caffe.
Command: make data DATASET=imagenet2012
         python train.py --config=configs/nin_imagenet2012.py --workdir=runs/nin_imagenet2012

Recipe: for want of a paper's, one in AlexNet's manner. SGD with momentum 0.9, batch 128, rate 0.01 divided
by 10 after 40, 60 and 80 of 90 epochs, weight decay 5e-4 without biases, random 224-pixel crops of images
whose shorter side is 256, flips, the mean image subtracted from pixels that range over 256 values, for which
the first weights were chosen. They and dropout are those of the authors' definition, in the model. The mean
image is that of a sample, of central crops.
Not run yet.
"""

from configs import common


def get_config():
    """NIN on ImageNet."""
    config = common.get_config()
    common.imagenet2012(config, image_size=224, batch_size=128, num_epochs=90)
    config.model.name = "nin"
    config.model.variant = "imagenet"
    config.data.crop.name = "shorter_side"
    config.data.normalization = "pixel_mean_255"
    config.optimizer.learning_rate = 0.01
    config.optimizer.weight_decay = 5e-4
    config.optimizer.decayed = "kernels"
    config.schedule.boundaries = (40 / 90, 60 / 90, 80 / 90)  # epochs
    config.schedule.factors = (0.1, 0.1, 0.1)
    config.lock()
    return config
