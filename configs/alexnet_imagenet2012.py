"""AlexNet, with the two groups of its paper, on ImageNet 2012.

Paper: Krizhevsky et al. 2012, sections 5 (training) and 4 (augmentation, dropout).
Command: make data DATASET=imagenet2012
         python train.py --config=configs/alexnet_imagenet2012.py --workdir=runs/alexnet_imagenet2012

The paper's recipe, item by item:
- SGD with momentum 0.9, batch size 128, weight decay 5e-4, about 90 epochs;
- learning rate 0.01, divided by 10 three times, whenever the validation error stopped improving;
- weights from a normal distribution with standard deviation 0.01, biases 0 or 1 by layer, dropout 0.5: all in
  the model;
- random 224-pixel crops of images of 256 pixels, flips, PCA lighting; the mean image subtracted from pixels
  that range over 256 values; the mean of ten crops in the test.

Where the paper is silent: whether biases decay (here they do not), and the range of the pixels to which PCA
lighting is applied (here [0, 1], with the publicly available principal colours of ImageNet).
Departures: the learning rate falls after 30, 60 and 80 epochs, which is our choice. A new rate takes effect
at once; in the paper it is inside the velocity, where a change takes some ten steps. Images have 227 pixels,
as the net needs, and are therefore cropped from 259 pixels instead of 256. The shorter side is resized and
the crop lies anywhere in the image; the paper crops from the central square. The mean image is that of
central crops of a sample of the training images. Not run yet.
"""

from configs import common


def get_config():
    """AlexNet on ImageNet."""
    config = common.get_config()
    common.imagenet2012(config, image_size=227, batch_size=128, num_epochs=90)
    config.model.name = "alexnet"
    config.model.variant = "two_groups"
    config.model.dense_features = 4096
    config.data.crop.name = "shorter_side"
    config.data.crop.shorter_side = (259, 259)  # 227 of 259 pixels match 224 of 256, also in the test
    config.data.crop.eval_shorter_side = 259
    config.data.normalization = "pixel_mean_255"
    config.data.augment.lighting = 0.1
    config.data.augment.lighting_basis = "imagenet"
    config.optimizer.learning_rate = 0.01
    config.optimizer.weight_decay = 5e-4
    config.optimizer.decayed = "kernels"
    config.schedule.boundaries = (30 / 90, 60 / 90, 80 / 90)  # epochs
    config.schedule.factors = (0.1, 0.1, 0.1)
    config.evaluation.protocol = "ten_crop"
    config.lock()
    return config
