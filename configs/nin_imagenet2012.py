"""Network in Network on ImageNet 2012.

Paper: Lin et al. 2013, which has no experiment on ImageNet; net and recipe are those of the authors' later
release for Caffe, whose weights have an error of 40.64 % on the validation images.
Command: make data DATASET=imagenet2012
         python train.py --config=configs/nin_imagenet2012.py --workdir=runs/nin_imagenet2012

The release's recipe, item by item:
- SGD with momentum 0.9, batch size 64, weight decay 5e-4 without biases, whose learning rate is twice that of
  the weights;
- learning rate 0.01, divided by 10 after 200,000 and 400,000 of 450,000 steps (22 epochs), according to a
  copy of its solver file;
- random 224-pixel crops, flips, the mean image subtracted from pixels that range over 256 values;
- initial weights and dropout: in the model.

Departures: crops are of images whose shorter side is 256 pixels; the mean image is that of central crops of a
sample of the training images.
Not run yet.
"""

from configs import common


def get_config():
    """NIN on ImageNet."""
    config = common.get_config()
    batch_size = 64
    num_epochs = 450_000 * batch_size / common.IMAGENET2012_TRAIN
    common.imagenet2012(config, image_size=224, batch_size=batch_size, num_epochs=num_epochs)
    config.model.name = "nin"
    config.model.variant = "imagenet"
    config.data.crop.name = "shorter_side"
    config.data.normalization = "pixel_mean_255"
    config.optimizer.learning_rate = 0.01
    config.optimizer.weight_decay = 5e-4
    config.optimizer.decayed = "kernels"
    config.optimizer.rate_patterns = ("*/bias",)
    config.optimizer.rate_factors = (2.0,)
    config.schedule.boundaries = (20 / 45, 40 / 45)
    config.schedule.factors = (0.1, 0.1)
    config.lock()
    return config
