"""The keys that all training configs share, with their defaults and units; `model` has more in each config.

The other configs change what their experiment needs and lock the result, so that a mistyped key is an error.
"""

from ml_collections import ConfigDict

from cnn_cases import checks

IMAGENET2012_TRAIN = 1_281_167  # training examples
TRAINING_SETS = ("held_out", "full_train")  # see split_training_set


def get_config():
    """The defaults; not a complete config, since LeNet-5 needs larger images than the digits."""
    config = ConfigDict()
    config.seed = 0  # of the initial parameters, data order, augmentation and dropout
    config.start = ConfigDict()  # layers copied from another run, in place of random initial values
    config.start.workdir = ""  # workdir of the other run; "": copy nothing
    config.start.step = "last"  # its checkpoint: a step as a string, "last" or "best"
    config.start.layers = ("*",)  # shell patterns of layer names; see cnn_cases/training/transfer.py
    config.num_steps = 1_000  # training steps
    config.batch_size = 128  # examples per step, over all devices
    # Steps per call to the devices; must divide num_steps and the intervals of logging, evaluation,
    # checkpoints and profile. 0: the largest common divisor (without profile) up to 50 on accelerators, to
    # save launches, or 1 for a stream; on a CPU, where a call costs memory traffic, up to 10, or fewer if a
    # call would then see more than 1.3 million pixels.
    config.steps_per_call = 0
    config.dtype = "float32"  # compute type, "float32" or "bfloat16"; parameters are float32
    config.sync_batch_norm = True  # batch statistics over the global batch; False: over each device's share

    config.model = ConfigDict()  # the name of an architecture, and the architecture's own settings
    config.model.name = "lenet5"

    config.data = ConfigDict()
    config.data.name = "digits"  # name of a TFDS data set
    config.data.data_dir = ""  # TFDS's directory; "": $TFDS_DATA_DIR, else ~/tensorflow_datasets
    # "resident": the whole set is decoded once and lives on each device. "stream": for sets that do not fit
    # on a device; the host reads, decodes and crops the images of each step.
    config.data.feed = "resident"
    config.data.splits = ConfigDict()  # a TFDS split expression for each split; "": no such split
    config.data.splits.train = "train"
    config.data.splits.validation = "validation"
    config.data.splits.test = "test"
    # Height and width, in pixels, to which images (or a stream's crops) are resized; 0: not resized.
    # A resident feed smooths what it shrinks, a stream only beyond a factor of 2, so their pixels differ.
    config.data.image_size = 0
    config.data.border = 0  # zero pixels then added to every side
    config.data.crop = ConfigDict()  # the part of an image that the network sees
    # "squeeze": the whole image, resized to a square; the only choice for a resident feed. A stream can also
    # crop, at random in training and at the centre in evaluation: "shorter_side" takes a square of the
    # resized image (AlexNet, VGG, ResNet), and "area" a patch of random size and shape (GoogLeNet).
    config.data.crop.name = "squeeze"
    # For "shorter_side": range of the shorter side's length, in pixels, after resizing and before the crop.
    config.data.crop.shorter_side = (256, 256)
    config.data.crop.area = (0.08, 1.0)  # for "area": range of the crop's share of the image's area
    config.data.crop.aspect = (3 / 4, 4 / 3)  # for "area": range of the crop's width / height
    # Length of the shorter side, in pixels, before evaluation's central crop; not used by "squeeze".
    config.data.crop.eval_shorter_side = 256
    config.data.stream = ConfigDict()  # for the feed "stream"
    # Processes that make training batches; 0: threads of this process, enough for a few cores. Workers keep
    # up to workers * (2 * buffer + 2) batches in shared memory (/dev/shm), which may be too small in a
    # container (see `docker run --shm-size`); a run whose batches cannot fit is refused.
    config.data.stream.workers = 0
    # Batches that each worker makes in advance; without workers, the number of threads, one batch each.
    # Evaluation always uses max(buffer, workers) threads.
    config.data.stream.buffer = 2
    # Fraction of a split's records that may be unreadable; they are left out, and a warning names each. 0:
    # the first one ends the run. With several processes, each counts only the records that it reads.
    config.data.stream.max_damaged = 0.0
    # "none", "channel", "pixel_mean", "pixel_mean_255", "lenet5_1998", "imagenet" or "gcn_zca"
    config.data.normalization = "channel"
    config.data.augment = ConfigDict()  # augmentation of training images, inside the step
    config.data.augment.pad = 0  # zero pixels added to every side before a random crop; 0: no crop
    config.data.augment.flip = False  # mirror images left to right with probability 1/2
    # The following are off at 0. Colours are in [0, 1]; lighting and saturation need 3 channels.
    config.data.augment.lighting = 0.0  # standard deviation of the multiples of the principal colours
    config.data.augment.lighting_basis = "train"  # principal colours of the training images, or "imagenet"
    config.data.augment.brightness = 0.0  # s: changed by a factor in [1 - s, 1 + s]
    config.data.augment.contrast = 0.0  # the same
    config.data.augment.saturation = 0.0  # the same
    config.data.augment.shift = 0.0  # maximum translation along each axis, in pixels
    config.data.augment.scale = 0.0  # s: enlarged by a factor in [1 - s, 1 + s]
    config.data.augment.squeeze = 0.0  # s: width times, and height divided by, a factor in [1 - s, 1 + s]
    config.data.augment.shear = 0.0  # maximum horizontal displacement, in pixels per row from the centre
    config.data.augment.elastic = 0.0  # pixels by which smoothed noise in [-1, 1] is multiplied
    config.data.augment.elastic_sigma = 4.0  # standard deviation, in pixels, of the Gaussian that smooths it
    # Side, in pixels, of a square that is set to 0, which is the mean for all normalisations except "none"
    # and "lenet5_1998".
    config.data.augment.cutout = 0
    # Each example is mixed with the one before it in the batch; use mixup or cutmix, not both.
    config.data.augment.mixup = 0.0  # alpha: the shares are drawn from Beta(alpha, alpha)
    config.data.augment.cutmix = 0.0  # alpha: the area pasted from the other image, from Beta(alpha, alpha)

    config.loss = ConfigDict()
    config.loss.name = "cross_entropy"  # or "rbf_mean_squared", "rbf_map" for LeNet-5 of 1998
    config.loss.label_smoothing = 0.0  # for "cross_entropy": share of the target spread over all classes
    config.loss.map_constant = 1.0  # for "rbf_map": the constant j
    # Weight of the loss of each side branch (auxiliary classifier), if the model has any.
    config.loss.side_weight = 0.3

    config.optimizer = ConfigDict()
    config.optimizer.name = "sgd"  # "sgd", "rmsprop", "adam" or "adamw"
    config.optimizer.learning_rate = 0.1  # after the warm-up
    config.optimizer.momentum = 0.9  # momentum; Adam's beta1
    config.optimizer.nesterov = False  # use Nesterov's form of the momentum
    config.optimizer.second_moment = 0.999  # Adam's beta2; the decay of "rmsprop"
    config.optimizer.epsilon = 1e-8  # for "rmsprop" and Adam
    # Multiple of a parameter that is added to its gradient; decoupled from the gradient in "adamw".
    config.optimizer.weight_decay = 1e-4
    config.optimizer.decayed = "all"  # decay "all" parameters, or "kernels": not biases and normalisation
    config.optimizer.clip_norm = 0.0  # maximum global norm of the gradient; 0: no clipping
    # Shell patterns of parameter names, such as "*/bias" or "conv1/*", and for each a factor by which it
    # multiplies the learning rate; if several patterns match, by all their factors.
    config.optimizer.rate_patterns = ()
    config.optimizer.rate_factors = ()
    # Shell patterns of layer names: these layers' parameters are not trained; their batch statistics change.
    config.optimizer.frozen = ()
    # Reaction to a loss, gradient or state that is not finite: "stop" the run; "skip" that step's update (ten
    # in a row end the run); or "rewind" to the last checkpoint and continue with other batches, up to three
    # times from each checkpoint.
    config.on_nonfinite = "stop"
    config.num_microbatches = 1  # parts of a device's share of the batch, computed one after another
    # Decay per step (lower in the first steps) of the exponential moving average of the parameters and
    # running statistics, which evaluation then uses. 0: no average.
    config.ema_decay = 0.0

    config.schedule = ConfigDict()
    config.schedule.name = "piecewise"  # "constant", "piecewise", "cosine" or "polynomial"
    config.schedule.boundaries = (0.5, 0.75)  # for "piecewise": fractions of num_steps
    config.schedule.factors = (0.1, 0.1)  # for "piecewise": multiplies the rate at each boundary
    config.schedule.power = 0.5  # for "polynomial": the rate is times (1 - progress) ** power
    config.schedule.warmup = "linear"  # "linear" or "constant"
    config.schedule.warmup_steps = 0  # steps; 0: no warm-up
    config.schedule.warmup_factor = 0.1  # initial fraction of the learning rate in the warm-up

    config.evaluation = ConfigDict()
    # Examples per step, over all devices; rounded up to a multiple of the number of devices. A CPU computes
    # them in parts, so that a large batch takes little memory.
    config.evaluation.batch_size = 512
    config.evaluation.every_steps = 100  # interval in steps; 0: only at the end
    config.evaluation.splits = ("validation",)  # names in data.splits to evaluate during training
    config.evaluation.final_splits = ("train", "validation", "test")  # the same at the end of the run
    # Test protocol at the end of the run and in `cnn_cases.evaluate` (see cnn_cases/data/views.py): "single",
    # "flip", "centre_crop", "ten_crop", "multi_scale_dense", "resnet_dense" or "googlenet_144". The training
    # loop always evaluates with "single". Any other protocol adds its own metrics at the end,
    # "<split>/<protocol>/error" and so on, except on the split "train".
    config.evaluation.protocol = "single"

    config.checkpoint = ConfigDict()
    config.checkpoint.every_steps = 500  # interval in steps; 0: only at the end
    config.checkpoint.keep_last = 2  # number of latest checkpoints to keep, in addition to the best
    # Split whose error decides which of the saved checkpoints is the best; "": keep no best checkpoint.
    config.checkpoint.best_on = "validation"

    config.log_every_steps = 20  # interval between rows of training metrics, in steps
    # First and last step to profile, such as (10, 15); the trace is written to the workdir. (): no profile.
    # With steps_per_call = 0, the profile covers the whole calls that contain these steps.
    config.profile_steps = ()
    return config


def split_training_set(config, training_set, *, size, num_held_out):
    """Sets the training and validation splits, so that no run trains on test images or chooses by them.

    Args:
      training_set: the word after the colon in `--config=configs/<name>.py:<word>`. "held_out", the default,
        holds out the last `num_held_out` training images for validation. "full_train" trains on all of them;
        the run then evaluates only at the end and chooses no checkpoint.
      size: number of training images.
      num_held_out: number of validation images, for "held_out".

    Raises:
      ValueError: the word is unknown.
    """
    checks.one_of("training_set", training_set, TRAINING_SETS)
    if training_set == "held_out":
        config.data.splits.train = f"train[:{size - num_held_out}]"
        config.data.splits.validation = f"train[{size - num_held_out}:]"
        return
    config.data.splits.validation = ""
    config.evaluation.every_steps = 0
    config.evaluation.splits = ()
    config.evaluation.final_splits = ("train", "test")
    config.checkpoint.best_on = ""


def follow_test_error(config):
    """Evaluates on the test set during training, for curves like those in figure 6 of He et al. 2015.

    Nothing is chosen by the test error: no best checkpoint is kept, and the final results are reported.
    """
    config.evaluation.splits = ("test",)
    config.evaluation.final_splits = ("train", "test")
    config.checkpoint.best_on = ""
    config.checkpoint.keep_last = 1


def imagenet2012(config, *, image_size, batch_size, num_epochs):
    """Sets the data and the length of a run on ImageNet's 1,000 classes.

    Papers report results on the 50,000 validation images, since the labels of the test images are not public.
    They therefore choose no checkpoint here.
    """
    steps_per_epoch = IMAGENET2012_TRAIN / batch_size
    config.batch_size = batch_size
    config.num_steps = round(num_epochs * steps_per_epoch)
    config.data.name = "imagenet2012"
    config.data.feed = "stream"
    config.data.stream.workers = 8  # each makes several hundred images a second (results/pipeline.json)
    config.data.splits.test = ""
    config.data.image_size = image_size
    config.data.augment.flip = True
    config.evaluation.every_steps = round(steps_per_epoch)
    config.evaluation.final_splits = ("validation",)
    config.checkpoint.every_steps = round(steps_per_epoch)
    config.checkpoint.best_on = ""
    config.log_every_steps = 100


def imagenette(config, *, image_size):
    """Sets the data and the length of a run on Imagenette, ten easy classes of ImageNet.

    It has no third split: results are reported on its validation images, which choose no checkpoint. The run
    is slightly longer than one epoch of the published set.
    """
    config.num_steps = 310
    config.batch_size = 32
    config.data.name = "imagenette/320px-v2"
    config.data.feed = "stream"
    config.data.splits.test = ""
    config.data.image_size = image_size
    config.data.augment.flip = True
    config.schedule.name = "cosine"
    config.evaluation.batch_size = 200
    config.evaluation.every_steps = 62
    config.evaluation.final_splits = ("validation",)
    config.checkpoint.every_steps = 62
    config.checkpoint.best_on = ""
    config.log_every_steps = 10
