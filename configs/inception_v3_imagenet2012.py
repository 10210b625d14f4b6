"""Inception-v3 on ImageNet 2012.

Paper: Szegedy et al. 2015b, "Rethinking the Inception architecture for computer vision", sections 8
(training), 7 (label smoothing) and 4 (side branch).
Command: make data DATASET=imagenet2012
         python train.py --config=configs/inception_v3_imagenet2012.py --workdir=runs/inception_v3

The paper's recipe, item by item:
- RMSProp with a decay of 0.9 and an epsilon of 1.0, on 50 replicas with batches of 32, for 100 epochs;
- learning rate 0.045, multiplied by 0.94 every two epochs;
- gradients clipped at a norm of 2.0;
- label smoothing 0.1; batch normalisation in the side branch too;
- evaluation with a running average of the parameters.

Where the paper is silent (*: as in the authors' training code): RMSProp's momentum (0.9*), the weight of the
side branch (0.4*; the GoogLeNet paper has 0.3), the weight decay (4e-5 without biases and batch
normalisation*), dropout (0.2*, in the model), the average (a decay of 0.9999, less in the first steps*),
initialisation (He's, in the model), augmentation (flips and the patches of Szegedy et al. 2014, section 6;
that code takes patches from a twentieth of the image on, and distorts colours), the test crop (the central
square, 299 of 342 pixels; that code resizes the central seven eighths of both sides to a square), and the
scale of the pixels (normalised by the mean and standard deviation of their channel; that code scales them to
[-1, 1]).
Departures: one synchronous step on 1,600 images replaces the steps of 50 replicas on 32 images each, with
batch statistics over all 1,600 (--config.sync_batch_norm=False: over each device's share); the weight decay
is part of the gradient that is clipped.
Not run yet.
"""

from configs import common


def get_config():
    """Inception-v3 on ImageNet."""
    config = common.get_config()
    num_epochs = 100
    common.imagenet2012(config, image_size=299, batch_size=1_600, num_epochs=num_epochs)
    config.model.name = "inception_v3"
    config.model.side_branches = True
    config.data.crop.name = "area"
    config.data.crop.eval_shorter_side = 342
    config.loss.label_smoothing = 0.1
    config.loss.side_weight = 0.4
    config.optimizer.name = "rmsprop"
    config.optimizer.learning_rate = 0.045
    config.optimizer.momentum = 0.9
    config.optimizer.second_moment = 0.9
    config.optimizer.epsilon = 1.0
    config.optimizer.weight_decay = 4e-5
    config.optimizer.decayed = "kernels"
    config.optimizer.clip_norm = 2.0
    config.ema_decay = 0.9999
    falls = range(2, num_epochs, 2)
    config.schedule.boundaries = tuple(epoch / num_epochs for epoch in falls)
    config.schedule.factors = (0.94,) * len(falls)
    config.lock()
    return config
