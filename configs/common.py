"""Every key of a training config, with its default and its unit.

The other files change what their experiment needs and lock the result, so that a mistyped key is an error.
"""

from ml_collections import ConfigDict

IMAGENET2012_TRAIN = 1_281_167  # training examples
PROTOCOLS = ("held_out", "full_train")  # see split_training_set


def get_config():
    """The defaults; not yet a whole config: the network named here takes larger images than the digits."""
    config = ConfigDict()
    config.seed = 0  # of the initial parameters, the data order, augmentation and dropout
    config.start = ConfigDict()  # layers of another training to begin with, in the place of those drawn
    config.start.workdir = ""  # of that one; "": none
    config.start.step = "last"  # which of its checkpoints: its step, "last" or "best"
    config.start.layers = ("*",)  # patterns of their names, as cnn_cases/training/transfer.py has them
    config.num_steps = 1_000  # training steps
    config.batch_size = 128  # examples of one step, over all devices
    # Steps in one call to the devices; divides num_steps and the intervals of log, evaluations, checkpoints
    # and profile. 0: one on a CPU, where a call costs little and a loop takes longer to compile; else, with a
    # resident feed, the most that divides all of them, up to 50, which saves launches.
    config.steps_per_call = 0
    config.dtype = "float32"  # compute type, "float32" or "bfloat16"; parameters are float32
    config.sync_batch_norm = True  # batch statistics over the global batch; False: over each device's share

    config.model = ConfigDict()  # the name of an architecture and its own settings
    config.model.name = "lenet5"

    config.data = ConfigDict()
    config.data.name = "digits"  # a TFDS name
    config.data.data_dir = ""  # where TFDS keeps its sets; "": $TFDS_DATA_DIR, else ~/tensorflow_datasets
    # "resident": the whole set lives on each device, decoded once. "stream": for sets that do not fit there;
    # images are read, decoded and cropped on the host for each step.
    config.data.feed = "resident"
    config.data.splits = ConfigDict()  # what each part is made of, as TFDS split expressions; "": none of it
    config.data.splits.train = "train"
    config.data.splits.validation = "validation"
    config.data.splits.test = "test"
    # Pixels, height and width to which images, or the crops of a stream, are resized; 0: images as they are.
    config.data.image_size = 0
    config.data.border = 0  # zero pixels then added on every side
    config.data.crop = ConfigDict()  # what of an image is seen
    # "squeeze": all of it, resized to a square; all that a resident feed can do. A stream can also crop, in
    # evaluation the centre and in training at random, "shorter_side": a square of the resized image (AlexNet,
    # VGG, ResNet), or "area": a patch of any size and shape (GoogLeNet).
    config.data.crop.name = "squeeze"
    # Of "shorter_side": pixels that the shorter side is resized to before the crop, drawn from here to there.
    config.data.crop.shorter_side = (256, 256)
    config.data.crop.area = (0.08, 1.0)  # of "area": share of the image's area, drawn from here to there
    config.data.crop.aspect = (3 / 4, 4 / 3)  # of "area": width / height, likewise
    # Pixels of the shorter side before the central crop of evaluation; "squeeze" does not use it.
    config.data.crop.eval_shorter_side = 256
    config.data.stream = ConfigDict()  # of the feed "stream"
    # Processes that make training batches; 0: threads of this process, enough for a few cores. Workers keep
    # their batches in shared memory (/dev/shm), workers * buffer of them and a few more, of which a container
    # may have too little (`docker run --shm-size`).
    config.data.stream.workers = 0
    # Batches that each worker makes in advance; without workers, the number of threads, one batch each.
    # Evaluation always uses threads, max(buffer, workers) of them.
    config.data.stream.buffer = 2
    # Fraction of a split's records that may be unreadable; they are named in warnings and left out. 0: the
    # first one ends the run. Each of several processes counts those that it meets.
    config.data.stream.max_damaged = 0.0
    # "none", "channel", "pixel_mean", "pixel_mean_255", "lenet5_1998", "imagenet" or "gcn_zca"
    config.data.normalization = "channel"
    config.data.augment = ConfigDict()  # of the training images, inside the step
    config.data.augment.pad = 0  # pixels around the image before a random crop; 0: no crop
    config.data.augment.flip = False  # mirror left and right at random
    # The others are off at 0. Colours, of images in [0, 1]; lighting and saturation need 3 channels.
    config.data.augment.lighting = 0.0  # standard deviation of the multiples of the principal colours
    config.data.augment.lighting_basis = "train"  # whose these are: of the training images, or "imagenet"
    config.data.augment.brightness = 0.0  # s: a factor in [1 - s, 1 + s]
    config.data.augment.contrast = 0.0  # the same
    config.data.augment.saturation = 0.0  # the same
    config.data.augment.shift = 0.0  # pixels, at most, to any side
    config.data.augment.scale = 0.0  # s: enlarged by a factor in [1 - s, 1 + s]
    config.data.augment.squeeze = 0.0  # s: widened by a factor in [1 - s, 1 + s], and flattened by the same
    config.data.augment.shear = 0.0  # pixels to the side for each pixel of height, at most
    config.data.augment.elastic = 0.0  # pixels by which smoothed noise in [-1, 1] is multiplied
    config.data.augment.elastic_sigma = 4.0  # pixels, standard deviation of the Gaussian that smooths it
    # Pixels, side of a square that is set to 0, which for all normalisations but "none" and "lenet5_1998" is
    # the mean.
    config.data.augment.cutout = 0
    # Each example is mixed with the one before it in the batch; not both.
    config.data.augment.mixup = 0.0  # alpha: their shares are of Beta(alpha, alpha)
    config.data.augment.cutmix = 0.0  # alpha: the share of a box cut out of the other, of Beta(alpha, alpha)

    config.loss = ConfigDict()
    config.loss.name = "cross_entropy"  # or "rbf_mean_squared", "rbf_map" for LeNet-5 of 1998
    config.loss.label_smoothing = 0.0  # of "cross_entropy", share of the target spread over all classes
    config.loss.map_constant = 1.0  # the j of "rbf_map"
    config.loss.side_weight = 0.3  # weight of each side branch's loss, where the model has any

    config.optimizer = ConfigDict()
    config.optimizer.name = "sgd"  # "sgd", "rmsprop", "adam" or "adamw"
    config.optimizer.learning_rate = 0.1  # after the warm-up
    config.optimizer.momentum = 0.9  # the beta1 of Adam
    config.optimizer.nesterov = False
    config.optimizer.second_moment = 0.999  # the beta2 of Adam, the decay of "rmsprop"
    config.optimizer.epsilon = 1e-8  # of "rmsprop" and Adam
    config.optimizer.weight_decay = 1e-4  # times a parameter, added to its gradient
    config.optimizer.decayed = "all"  # which parameters: "all", or "kernels" without biases and normalisation
    config.optimizer.clip_norm = 0.0  # greatest norm of the gradient; 0: no limit
    # Patterns of names of parameters, as in "*/bias" or "conv1/*", whose learning rate is multiplied by
    # `rate_factors`, one for each pattern; by all of them where several fit.
    config.optimizer.rate_patterns = ()
    config.optimizer.rate_factors = ()
    # Patterns of the names of layers whose parameters stay as they are at the start. Their batch statistics
    # do not.
    config.optimizer.frozen = ()
    # What to do where the loss, the gradient or the state is no longer finite: "stop" the run; "skip" the
    # update of such a step, up to ten in a row; or "rewind" to the last checkpoint and go on from there with
    # other batches, up to three times from each.
    config.on_nonfinite = "stop"
    config.num_microbatches = 1  # parts of a device's share of the batch, computed one after another
    # Decay of the exponential moving average of parameters and running statistics, with which the net is
    # evaluated (less in the first steps). 0: no average.
    config.ema_decay = 0.0

    config.schedule = ConfigDict()
    config.schedule.name = "piecewise"  # "constant", "piecewise", "cosine" or "polynomial"
    config.schedule.boundaries = (0.5, 0.75)  # of "piecewise", as fractions of num_steps
    config.schedule.factors = (0.1, 0.1)  # of "piecewise", one for each boundary
    config.schedule.power = 0.5  # of "polynomial": (1 - progress) ** power
    config.schedule.warmup = "linear"  # "linear" or "constant"
    config.schedule.warmup_steps = 0  # steps; 0: no warm-up
    config.schedule.warmup_factor = 0.1  # of the learning rate, where the warm-up begins

    config.evaluation = ConfigDict()
    config.evaluation.batch_size = 512  # examples, over all devices; rounded up to their number
    config.evaluation.every_steps = 100  # steps; 0: only at the end
    config.evaluation.splits = ("validation",)  # parts of data.splits to evaluate on the way
    config.evaluation.final_splits = ("train", "validation", "test")  # and at the end
    # What a network is shown of each image at the end and by `cnn_cases.evaluate`: "single", "flip",
    # "centre_crop", "ten_crop", "multi_scale_dense", "resnet_dense" or "googlenet_144"
    # (cnn_cases/data/views.py). On the way it is "single"; another one adds figures of its own to those,
    # "<split>/<protocol>/error" and so on, but of the split "train".
    config.evaluation.protocol = "single"

    config.checkpoint = ConfigDict()
    config.checkpoint.every_steps = 500  # steps; 0: only at the end
    config.checkpoint.keep_last = 2  # the latest ones, besides the best
    # The split whose error tells the best of those that were saved; "": keep no best.
    config.checkpoint.best_on = "validation"

    config.log_every_steps = 20  # steps between rows of the running metrics
    # First and last step to profile, as in (10, 15); the trace goes to the workdir. (): none. With
    # steps_per_call = 0, the profile covers the whole calls that contain these steps.
    config.profile_steps = ()
    return config


def split_training_set(config, protocol, *, size, num_held_out):
    """Sets the training and validation splits, so that nothing is trained on or chosen by test images.

    Args:
      protocol: what stands behind the colon in `--config=configs/<name>.py:<protocol>`. "held_out", the
        default: the last `num_held_out` training images are for validation. "full_train": all are trained
        on; then nothing is evaluated on the way and no checkpoint is chosen.
      size: number of training images.

    Raises:
      ValueError: the protocol is unknown.
    """
    check_choice("protocol", protocol, PROTOCOLS)
    if protocol == "held_out":
        config.data.splits.train = f"train[:{size - num_held_out}]"
        config.data.splits.validation = f"train[{size - num_held_out}:]"
        return
    config.data.splits.validation = ""
    config.evaluation.every_steps = 0
    config.evaluation.splits = ()
    config.evaluation.final_splits = ("train", "test")
    config.checkpoint.best_on = ""


def follow_test_error(config):
    """Evaluates on the test set during training, for curves as in figure 6 of He et al. 2015.

    Nothing is chosen by it: no best checkpoint is kept, and the final figures are reported.
    """
    config.evaluation.splits = ("test",)
    config.evaluation.final_splits = ("train", "test")
    config.checkpoint.best_on = ""
    config.checkpoint.keep_last = 1


def check_choice(what, choice, known):
    """Raises ValueError unless `choice`, the word behind the colon in `--config=...:<choice>`, is known."""
    if choice not in known:
        raise ValueError(f"the config's {what} {choice!r} is unknown; known: {', '.join(known)}")


def imagenet2012(config, *, image_size, batch_size, num_epochs):
    """Sets the data and the length of a training on ImageNet's 1,000 classes.

    The 50,000 validation images are the ones that papers report on, since the labels of the test images are
    not public: they choose no checkpoint here.
    """
    steps_per_epoch = IMAGENET2012_TRAIN / batch_size
    config.batch_size = batch_size
    config.num_steps = round(num_epochs * steps_per_epoch)
    config.data.name = "imagenet2012"
    config.data.feed = "stream"
    config.data.stream.workers = 8  # some hundred images a second each (results/pipeline.json)
    config.data.splits.test = ""
    config.data.image_size = image_size
    config.data.augment.flip = True
    config.evaluation.every_steps = round(steps_per_epoch)
    config.evaluation.final_splits = ("validation",)
    config.checkpoint.every_steps = round(steps_per_epoch)
    config.checkpoint.best_on = ""
    config.log_every_steps = 100


def imagenette(config, *, image_size):
    """Sets the data and the length of a training on Imagenette, ten easy classes of ImageNet.

    It has no third split: its validation images are those that are reported on, and choose no checkpoint.
    The steps are an epoch of the published set and a few more.
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
