"""GoogLeNet, as its paper has it, on ImageNet of 2012.

Paper: Szegedy et al. 2014, section 6 (training) and 5 (side branches).
Command: make data DATASET=imagenet2012
         python train.py --config=configs/googlenet_imagenet2012.py --workdir=runs/googlenet_imagenet2012

The paper's recipe, item by item:
- SGD with momentum 0.9, on many machines that do not wait for each other;
- a rate that falls by 4 % every 8 epochs;
- Polyak averaging of the parameters for the final net;
- side branches that weigh 0.3, dropout 0.7 in them and 0.4 before the logits;
- patches of 8 % to 100 % of the image's area and sides of 3:4 to 4:3; photometric distortions of Howard
  2013, who changes brightness, contrast and colour by factors of 0.5 to 1.5 in random order and then shifts
  colours as AlexNet's training does (as recalled); the mean subtracted (section 5);
- 144 crops and seven nets in the test; one net has a top-5 error of 7.89 % by these crops (table 3).

Where the paper is silent: the batch (256), the first rate (0.02), the length (240 epochs, at whose end the
rate is 0.31 times the first), the weight decay (2e-4, without biases), the kind of average (exponential,
keeping 0.9999 at each step), initialisation (He's, in the model), and how a patch's ratio of sides is drawn
(its logarithm evenly).
Departures: synchronous steps; one net in the test, of 144 crops; pixels are divided by each channel's
deviation, too; images are resized by area or linearly, where the paper came to draw the interpolation at
random late in its work.
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
