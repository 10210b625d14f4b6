"""VGG-16, the paper's net D, on ImageNet 2012.

Paper: Simonyan, Zisserman 2014, sections 3.1 (training), 3.2 and 4.2 (testing).
Command: make data DATASET=imagenet2012
         python train.py --config=configs/vgg_imagenet2012.py --workdir=runs/vgg_imagenet2012

The paper's recipe, item by item:
- SGD with momentum 0.9, batch size 256, weight decay 5e-4, 370,000 steps (74 epochs);
- learning rate 0.01, divided by 10 three times, whenever the validation accuracy stopped improving;
- dropout 0.5 after the hidden dense layers: in the model;
- random 224-pixel crops of images whose shorter side is 256, 384 or drawn from 256 to 512; flips; AlexNet's
  colour shift; the training set's mean colour subtracted; dense evaluation over whole images of three sizes
  and their mirror images in the test.

Where the paper is silent: whether biases decay (here they do not), and when the learning rate fell.
Departures: Glorot initialisation, which the paper's authors recommend in hindsight, instead of a start from
net A (see docs/case_studies.md); the learning rate falls after 2/6, 4/6 and 5/6 of the steps, which is our
choice; pixels are also divided by each channel's standard deviation; the longer side of a test image is cut
so that shapes repeat; the shorter side is drawn from 256 to 512 pixels from the start, without first training
at 384 as the paper does.
Not run yet.
"""

from configs import common


def get_config():
    """VGG-16 on ImageNet."""
    config = common.get_config()
    common.imagenet2012(config, image_size=224, batch_size=256, num_epochs=74)
    config.model.name = "vgg"
    config.model.variant = "D"
    config.model.batch_norm = False
    config.model.image_size = 224
    config.model.dense_features = 4096
    config.data.crop.name = "shorter_side"
    config.data.crop.shorter_side = (256, 512)
    config.data.augment.lighting = 0.1
    config.data.augment.lighting_basis = "imagenet"
    config.optimizer.learning_rate = 0.01
    config.optimizer.weight_decay = 5e-4
    config.optimizer.decayed = "kernels"
    config.schedule.boundaries = (2 / 6, 4 / 6, 5 / 6)
    config.schedule.factors = (0.1, 0.1, 0.1)
    config.evaluation.protocol = "multi_scale_dense"
    config.lock()
    return config
