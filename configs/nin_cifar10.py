"""Network in Network on CIFAR-10.

Paper: Lin et al. 2013, section 4.
Command: make data DATASET=cifar10
         python train.py --config=configs/nin_cifar10.py --workdir=runs/nin_cifar10

The paper's recipe, item by item:
- AlexNet's procedure (section 4.1), so SGD with momentum 0.9, and batch 128; the rate chosen by hand, divided
  by 10 when the accuracy on the training set stands still, and once more, to end at a hundredth;
- weight decay, tuned on the images held out, and dropout 0.5 between the mlpconv layers;
- global contrast normalisation and ZCA whitening, as in Goodfellow et al. 2013; crops and flips for its
  better figure, of whitened images padded with zeros;
- the last 10,000 training images held out to choose by, then trained on as well.

Where the paper is silent: the first rate and the decay's value (0.02, and 5e-4 without biases: what the
authors' parameter file for CIFAR-100 amounts to, whose loss counts twice; that for SVHN amounts to 0.1 and
1e-4), the rate of biases (twice that of weights, as in both files), the number of steps (80,000; the rate
falls after 60,000 and 70,000), the padding (4 pixels) and the constants of the whitening (those of pylearn2,
Goodfellow's library). Initialisation is that of the authors' definition, in the model.
Departures: 5,000 images are held out and not trained on.
The whitening's matrix, of 3,072 x 3,072, is computed at the first start, which then takes 47 s on two shared
CPU cores, and kept beside the data set: later starts take 1.1 s, 2026-11-25.
Not run yet.
"""

from configs import common


def get_config(protocol="held_out"):
    """NIN on CIFAR-10."""
    config = common.get_config()
    config.num_steps = 80_000
    config.batch_size = 128
    config.model.name = "nin"
    config.model.variant = "cifar"
    config.data.name = "cifar10"
    config.data.normalization = "gcn_zca"
    config.data.augment.pad = 4
    config.data.augment.flip = True
    config.optimizer.learning_rate = 0.02
    config.optimizer.weight_decay = 5e-4
    config.optimizer.decayed = "kernels"
    config.optimizer.rate_patterns = ("*/bias",)
    config.optimizer.rate_factors = (2.0,)
    config.schedule.boundaries = (60 / 80, 70 / 80)
    config.schedule.factors = (0.1, 0.1)
    config.evaluation.every_steps = 1_000
    config.checkpoint.every_steps = 4_000
    config.log_every_steps = 100
    common.split_training_set(config, protocol, size=50_000, num_held_out=5_000)
    config.lock()
    return config
