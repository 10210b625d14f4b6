"""Residual nets of depth 6n + 2, and their plain twins, on CIFAR-10.

Paper: He et al. 2015, section 4.2.
Command: make data DATASET=cifar10
         python train.py --config=configs/resnet_cifar10.py --workdir=runs/resnet20_cifar10
         python train.py --config=configs/resnet_cifar10.py --config.model.depth=56 \
             --config.model.plain=True --workdir=runs/plain56_cifar10
Depth 110 starts with a learning rate of 0.01; the paper keeps it until the training error is below 80 %,
about 400 steps:
         python train.py --config=configs/resnet_cifar10.py --config.model.depth=110 \
             --config.schedule.warmup=constant --config.schedule.warmup_steps=400 \
             --config.schedule.warmup_factor=0.1 --workdir=runs/resnet110_cifar10
Depth 1202 is trained like depth 110, and needs --config.model.scan_blocks=True to compile in seconds.

The paper's recipe, item by item:
- SGD with momentum 0.9, batch size 128, weight decay 1e-4, 64,000 steps;
- learning rate 0.1, divided by 10 after 32,000 and 48,000 steps;
- He initialisation, batch normalisation, no dropout;
- the mean image subtracted, then 4 pixels of padding and random 32-pixel crops, flips; one view in the test.

Where the paper is silent: whether biases and batch normalisation decay (here they do, as in fb.resnet.torch,
whose README counts that as a departure from the paper).
Departures: the last 5,000 images are held out for validation, as many as when the paper chose its schedule.
As section 4.2 reads, the nets of the paper's tables were trained on all 50,000, as with
--config=configs/resnet_cifar10.py:full_train. Batch statistics are those of the global batch; the paper
trained on two GPUs, each with its own.
Result: 8.84 % test error (the paper's: 8.75 %) and 0.22 % training error with seed 0 and
--config.dtype=bfloat16, a run of the study depth_cifar10; one H100, 2026-11-27 (results/depth_cifar10.json).
The study has other depths and plain nets too. The whole schedule was not run in float32 yet.
"""

from configs import common


def get_config(training_set="held_out"):
    """ResNet-20 on CIFAR-10."""
    config = common.get_config()
    config.num_steps = 64_000
    config.batch_size = 128
    config.model.name = "resnet_cifar"
    config.model.depth = 20
    config.model.plain = False
    config.model.shortcut = "A"
    config.model.scan_blocks = False
    config.data.name = "cifar10"
    config.data.normalization = "pixel_mean"
    config.data.augment.pad = 4
    config.data.augment.flip = True
    config.optimizer.learning_rate = 0.1
    config.optimizer.weight_decay = 1e-4
    config.schedule.boundaries = (32 / 64, 48 / 64)
    config.schedule.factors = (0.1, 0.1)
    config.evaluation.every_steps = 1_000
    config.checkpoint.every_steps = 4_000
    config.log_every_steps = 100
    common.split_training_set(config, training_set, size=50_000, num_held_out=5_000)
    config.lock()
    return config
