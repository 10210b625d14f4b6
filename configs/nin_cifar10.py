"""Network in Network on CIFAR-10.

Paper: Lin et al. 2013, section 4.
Command: make data DATASET=cifar10
         python train.py --config=configs/nin_cifar10.py --workdir=runs/nin_cifar10

The paper's recipe, item by item:
- AlexNet's procedure (section 4.1), so SGD with momentum 0.9, and batch size 128; the learning rate is chosen
  by hand and divided by 10 when the training accuracy stops improving, and once more, so that it ends at a
  hundredth;
- weight decay, tuned on the held-out images, and dropout 0.5 between the mlpconv layers;
- global contrast normalisation and ZCA whitening, as in Goodfellow et al. 2013; for its better figure, random
  crops and flips of whitened images padded with zeros;
- the last 10,000 training images held out for choices, then trained on as well.

Where the paper is silent: the initial learning rate and the weight decay (0.02, and 5e-4 without biases,
equivalent to the authors' parameter file for CIFAR-100, which counts the loss twice; their file for SVHN
amounts to 0.1 and 1e-4), the learning rate of biases (twice that of weights, as in both files), the number of
steps (80,000; the rate falls after 60,000 and 70,000), the padding (4 pixels) and the constants of the
whitening (those of pylearn2, Goodfellow's library). Initialisation follows the authors' definition, in the
model.
Departures: 5,000 images are held out and not trained on.
The first start computes the whitening matrix of 3,072 x 3,072 and therefore takes 47 s on two shared CPU
cores; the matrix is kept next to the data set, and later starts take 1.1 s, 2026-11-25.
Not run yet.
"""

from configs import common


def get_config(training_set="held_out"):
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
    common.split_training_set(config, training_set, size=50_000, num_held_out=5_000)
    config.lock()
    return config
