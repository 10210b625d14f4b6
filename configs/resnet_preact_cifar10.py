"""Pre-activation residual nets of depth 9n + 2 on CIFAR-10.

Paper: He et al. 2016, "Identity mappings in deep residual networks", section 4 and appendix.
Command: make data DATASET=cifar10
         python train.py --config=configs/resnet_preact_cifar10.py --workdir=runs/preact164_cifar10
         python train.py --config=configs/resnet_preact_cifar10.py --config.model.depth=1001 \
             --config.model.scan_blocks=True --workdir=runs/preact1001_cifar10

The paper's recipe, item by item:
- SGD with momentum 0.9, batch size 128, weight decay 1e-4;
- learning rate 0.1, divided by 10 after 32,000 and 48,000 steps; the first 400 steps at 0.01, which the paper
  says this net does not need;
- He initialisation, batch normalisation, no dropout;
- random crops with 4 pixels of padding, and flips;
- what the appendix leaves to He et al. 2015, as in `resnet_cifar10`: 64,000 steps, the mean image subtracted.

Where both papers are silent: whether biases and batch normalisation decay (here they do, as in
fb.resnet.torch, on which the authors' released code builds).
Departures, as in `resnet_cifar10`: the last 5,000 images are held out for validation, unless the config is
resnet_preact_cifar10.py:full_train; batch statistics are those of the global batch, whereas the paper trained
on two GPUs, each with its own.
Not run yet.
"""

from configs import common


def get_config(training_set="held_out"):
    """Pre-activation ResNet-164 on CIFAR-10."""
    config = common.get_config()
    config.num_steps = 64_000
    config.batch_size = 128
    config.model.name = "resnet_preact_cifar"
    config.model.depth = 164
    config.model.scan_blocks = False
    config.data.name = "cifar10"
    config.data.normalization = "pixel_mean"
    config.data.augment.pad = 4
    config.data.augment.flip = True
    config.optimizer.learning_rate = 0.1
    config.optimizer.weight_decay = 1e-4
    config.schedule.boundaries = (32 / 64, 48 / 64)
    config.schedule.factors = (0.1, 0.1)
    config.schedule.warmup = "constant"
    config.schedule.warmup_steps = 400
    config.schedule.warmup_factor = 0.1
    config.evaluation.every_steps = 1_000
    config.checkpoint.every_steps = 4_000
    config.log_every_steps = 100
    common.split_training_set(config, training_set, size=50_000, num_held_out=5_000)
    config.lock()
    return config
