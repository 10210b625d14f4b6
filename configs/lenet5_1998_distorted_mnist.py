"""The LeNet-5 of 1998 on distorted MNIST.

Paper: LeCun et al. 1998, section III.B, where 540,000 randomly distorted images, added to the training set,
reduce the test error from 0.95 % to 0.8 % (as recalled).
Command: make data DATASET=mnist
         python train.py --config=configs/lenet5_1998_distorted_mnist.py --workdir=runs/lenet5_1998_distorted
To add the elastic distortions of Simard et al. 2003, with their values:
         python train.py --config=configs/lenet5_1998_distorted_mnist.py --config.data.augment.elastic=34 \
             --config.data.augment.elastic_sigma=4 --workdir=runs/lenet5_1998_elastic
To use them alone, also set shift, scale, squeeze and shear of data.augment to 0.

Recipe: that of `lenet5_1998_mnist`, plus the paper's kinds of distortion, combined in one planar affine map:
horizontal and vertical shifts, scaling, squeezing (thinner and taller, or the reverse), horizontal shearing.
Where the paper is silent: how strong they are. Here: up to 2 pixels, 15 %, 15 % and a slant of 0.3.
Departures, besides those of `lenet5_1998_mnist`: every image is distorted anew each time it is used, whereas
the paper made ten times as many images once and kept the originals among them.
Result: 0.80, 0.80 and 0.90 % test error after the last pass with seeds 0, 1 and 2 (the paper's: 0.8 %, as
recalled); 14 to 25 minutes a run on two busy CPU cores, 2026-11-25
(results/lenet5_1998_distorted_mnist.json).
"""

from configs import lenet5_1998_mnist


def get_config():
    """LeNet-5 of 1998 on distorted MNIST."""
    config = lenet5_1998_mnist.get_config()
    config.unlock()
    config.data.augment.shift = 2.0
    config.data.augment.scale = 0.15
    config.data.augment.squeeze = 0.15
    config.data.augment.shear = 0.3
    config.lock()
    return config
