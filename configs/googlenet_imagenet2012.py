"""GoogLeNet, as in its paper, on ImageNet 2012.

Paper: Szegedy et al. 2014, sections 6 (training) and 5 (side branches).
Command: make data DATASET=imagenet2012
         python train.py --config=configs/googlenet_imagenet2012.py --workdir=runs/googlenet_imagenet2012

The paper's recipe, item by item:
- SGD with momentum 0.9, asynchronous on many machines;
- a learning rate that falls by 4 % every 8 epochs;
- Polyak averaging of the parameters for the final net;
- side branches with weight 0.3, dropout 0.7 in them and 0.4 before the logits;
- patches of 8 % to 100 % of the image's area with aspect ratios from 3:4 to 4:3; the photometric distortions
  of Howard 2013, who changes brightness, contrast and colour by factors of 0.5 to 1.5 in random order and
  then shifts colours as AlexNet's training does (as recalled); the mean subtracted (section 5);
- 144 crops and seven nets in the test; one net with these crops has a top-5 error of 7.89 % (table 3).

Where the paper is silent: the batch size (256), the initial learning rate (0.02), the length (240 epochs, at
the end of which the rate is 0.31 times the initial one), the weight decay (2e-4, without biases), the kind of
average (exponential, with a decay of 0.9999), initialisation (He's, in the model), and the distribution of
the aspect ratio of patches (its logarithm is uniform).
Departures: synchronous steps; one net in the test, with 144 crops; pixels are also divided by each channel's
standard deviation; images are resized by area averaging or linearly, whereas the paper, late in its work,
drew the interpolation at random.
Not run yet.
"""

from configs import common


def get_config():
    """GoogLeNet on ImageNet."""
    config = common.get_config()
    num_epochs = 240
    common.imagenet2012(config, image_size=224, batch_size=256, num_epochs=num_epochs)
    config.model.name = "googlenet"
    config.model.batch_norm = False
    config.model.side_branches = True
    config.data.augment.brightness = 0.5
    config.data.augment.contrast = 0.5
    config.data.augment.saturation = 0.5
    config.data.augment.lighting = 0.1
    config.data.augment.lighting_basis = "imagenet"
    config.loss.side_weight = 0.3
    config.data.crop.name = "area"
    config.optimizer.learning_rate = 0.02
    config.optimizer.weight_decay = 2e-4
    config.optimizer.decayed = "kernels"
    config.ema_decay = 0.9999
    falls = range(8, num_epochs, 8)
    config.schedule.boundaries = tuple(epoch / num_epochs for epoch in falls)
    config.schedule.factors = (0.96,) * len(falls)
    config.evaluation.protocol = "googlenet_144"
    config.lock()
    return config
