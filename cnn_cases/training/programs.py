"""Builds what a config describes: data set, network, optimizer, and their compiled functions.

This module needs no workdir and leaves nothing in one; `loop` trains with the programs built here.
"""

import collections
import contextlib
import functools
import logging
import math
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import errors as flax_errors
from flax import linen as nn
from tqdm import tqdm

from cnn_cases import checks, settings
from cnn_cases.data import inputs
from cnn_cases.data.feeds import class_names, make_feed
from cnn_cases.data.views import make_views
from cnn_cases.models import fast, layers, make_model
from cnn_cases.training import devices as devices_lib
from cnn_cases.training import predictions, processes, provenance, steps, transfer
from cnn_cases.training.logbook import is_watched
from cnn_cases.training.losses import make_loss, of_classes
from cnn_cases.training.optimizer import make_optimizer, make_schedule
from cnn_cases.training.state import init_state, shapes_of_state

# Evaluation batches are padded to their full size, however small the split, so a huge one would be allocated.
MAX_EVAL_BATCH_SIZE = 100_000

ON_NONFINITE = ("stop", "skip", "rewind")
# If the config does not say. On a CPU, a signal waits for a call of several steps, which must not take
# minutes: it has at most the pixels of ten batches of 128 images of 32x32.
MAX_STEPS_PER_CALL, MAX_STEPS_PER_CALL_ON_CPU = 50, 10
MAX_PIXELS_PER_CALL_ON_CPU = 10 * 128 * 32 * 32
# On a CPU, of the images that are evaluated at a time: in all, and, if that is more, for each thread.
MAX_BYTES_OF_MAPS, MAX_BYTES_OF_MAPS_PER_THREAD = 33_000_000, 16_000_000


class Program(NamedTuple):
    """Everything in a run that does not depend on its seed; runs that share it share the compiled steps.

    Attributes:
      model, tx, loss, schedule: Linen module, optax optimizer, loss of `losses`, and step -> learning rate.
      with_ema: whether the state has a moving average of the parameters.
      start: arguments of `transfer.trained_layers`; with the workdir "", no layers are taken.
      feed, arrays: see `data.feeds`; the arrays are replicated over the devices.
      steps_per_call: number of batches that the loop passes to `train` at once; it does one step for each.
      train_steps, train: (state, arrays, batches) -> (state, metrics), for one device's share, and its pmap.
      evaluate: (state, arrays, batch) -> {"loss", "error", "count"}, sums over the batch.
      predict: (state, arrays, image) -> log-probabilities, float32 [devices, B, K].
      devices: those of this process.
    """

    model: Any
    tx: Any
    with_ema: bool
    start: dict
    schedule: Any
    loss: Any
    feed: Any
    arrays: Any
    steps_per_call: int
    train_steps: Any
    train: Any
    evaluate: Any
    predict: Any
    devices: list

    @property
    def loops_on_cpu(self):
        """Whether a call does several steps, on a CPU."""
        return self.steps_per_call > 1 and self.devices[0].platform == "cpu"

    def init_state(self, seed):
        """Returns the state before the first step.

        Of several processes, only process 0 reads the layers that the run starts from; it must broadcast them
        to the others.

        Raises:
          ValueError: the network rejects its images, or cannot start from the layers of the other network.
        """
        # First, since the rest takes a while: a run that is still training deletes its older checkpoints.
        taken = self.layers_to_start_from() if processes.is_lead() else None
        with _noting_modules() as modules:
            state = init_state(self.model, self.tx, self.feed.image_shape, seed, with_ema=self.with_ema)
        if self.loops_on_cpu and any(isinstance(module, nn.Conv) for module in modules):
            logging.getLogger(__name__).warning(
                "%s uses Flax's Conv, whose gradients are slow in a call of several steps on a CPU; take "
                "layers.Conv, or set steps_per_call = 1 in a new workdir",
                type(self.model).__name__,
            )
        return transfer.put_layers(state, taken) if taken else state

    def layers_to_start_from(self):
        """Returns `transfer.trained_layers`; None if the run starts from no other."""
        if not self.start["workdir"]:
            return None
        return transfer.trained_layers(self.shapes_of_state(), **self.start)

    def starting_from(self, step):
        """Returns the same program, but starting from the checkpoint of `step` instead of the config's."""
        return self._replace(start=self.start | {"step": str(step)})

    def inputs(self, config):
        """Returns the content of the file that `data.inputs` reads, for a run of `config`."""
        names = class_names(config.data.name, config.data.data_dir)
        return inputs.to_bytes(inputs.Inputs(self.feed.image_shape, names, self.feed.pixels.statistics))

    def shapes_of_state(self):
        """Returns the shapes and types of the state; computes nothing."""
        return shapes_of_state(self.model, self.tx, self.feed.image_shape, with_ema=self.with_ema)


def make_program(config, devices=None, *, replicate=devices_lib.replicate):
    """Builds what a config describes.

    Args:
      config: from `configs/`.
      devices: the local devices to use; None for all.
      replicate: (arrays, devices) -> the arrays on the devices; `devices.shapes` if the devices do not exist.

    Raises:
      ValueError: a value of the config is invalid; the message names it and says what is valid.
    """
    settings.check(config)
    devices = devices or devices_lib.local_devices()
    num_devices = len(devices_lib.of_all_processes(devices))
    check_numbers(config, num_devices)
    process_index, process_count = processes.process()
    feed = make_feed(
        **config.data,
        batch_size=config.batch_size,
        # Rounded up, so that a run can resume with more or fewer devices: padding is not counted.
        eval_batch_size=-(-config.evaluation.batch_size // num_devices) * num_devices,
        axis_name=devices_lib.AXIS,
        process_index=process_index,
        process_count=process_count,
    )
    frozen = transfer.is_any_of(config.optimizer.frozen)
    model, tx, schedule = make_network(config, feed.num_classes)
    loss_settings = dict(**config.loss)
    side_weight = loss_settings.pop("side_weight")
    loss = of_classes(make_loss(**loss_settings), feed.num_classes)
    train_steps = steps.make_train_steps(
        model.apply,
        tx,
        feed.prepare,
        loss,
        devices_lib.AXIS,
        side_weight=side_weight,
        num_microbatches=config.num_microbatches,
        ema_decay=config.ema_decay,
        per_device_dropout=not config.sync_batch_norm,
        frozen=frozen,
        skip_nonfinite=config.on_nonfinite == "skip",
    )
    at_once = images_at_once(model.apply)
    eval_step = steps.make_eval_step(model.apply, feed.prepare, loss, devices_lib.AXIS, at_once)
    predict_step = steps.make_predict_step(model.apply, feed.pixels.evaluate, at_once)
    program = Program(
        model=model,
        tx=tx,
        with_ema=config.ema_decay > 0,
        start=dict(**config.start),
        schedule=schedule,
        loss=loss,
        feed=feed,
        arrays=replicate(feed.arrays, devices),
        steps_per_call=steps_per_call(config, devices[0].platform, feed.image_shape),
        train_steps=train_steps,
        train=devices_lib.pmap_train(train_steps, devices),
        evaluate=devices_lib.pmap_eval(eval_step, devices),
        predict=devices_lib.pmap_predict(predict_step, devices),
        devices=devices,
    )
    if frozen:
        transfer.check_frozen(config.optimizer.frozen, sorted(program.shapes_of_state().params))
    return program


def make_network(config, num_classes):
    """Builds what needs no data: the network, its optimizer, and step -> learning rate.

    Raises:
      ValueError: a value of the config is invalid.
    """
    model = make_model(
        **config.model,
        num_classes=num_classes,
        dtype=config.dtype,
        axis_name=devices_lib.AXIS if config.sync_batch_norm else None,
    )
    optimizer = dict(**config.optimizer)
    optimizer["frozen"] = transfer.is_any_of(optimizer["frozen"])
    # Compiled: the first row of the log would otherwise wait a third of a second for five small compilations.
    schedule = jax.jit(make_schedule(optimizer.pop("learning_rate"), config.num_steps, **config.schedule))
    return model, make_optimizer(schedule, **optimizer), schedule


def steps_per_call(config, platform, image_shape):
    """Returns how many steps one call to the devices does.

    If the config says 0, it is the largest number up to `max_steps_per_call` that divides all intervals of
    the run. So one launch serves many steps, and on a CPU the memory of their activations is asked for, and
    cleared by the operating system, only once.

    Args:
      config: from `configs/`.
      platform: "cpu", "gpu" or "tpu".
      image_shape: (H, W, C).
    """
    if config.steps_per_call:
        return config.steps_per_call
    others = config.evaluation.every_steps, config.checkpoint.every_steps  # gcd ignores a 0
    common = math.gcd(config.num_steps, config.log_every_steps, *others)
    most = max_steps_per_call(platform, config.data.feed, config.batch_size, image_shape)
    return max(count for count in range(1, most + 1) if common % count == 0)


def max_steps_per_call(platform, feed, batch_size, image_shape):
    """Returns how many steps one call may do if the config does not say.

    Args:
      platform: "cpu", "gpu" or "tpu".
      feed: "resident" or "stream".
      batch_size: over all devices.
      image_shape: (H, W, C).
    """
    if platform == "cpu":
        pixels = batch_size * math.prod(image_shape[:2])
        return max(1, min(MAX_STEPS_PER_CALL_ON_CPU, MAX_PIXELS_PER_CALL_ON_CPU // pixels))
    # The images of a stream's call would all be in the device's memory.
    return 1 if feed == "stream" else MAX_STEPS_PER_CALL


def images_at_once(apply):
    """Returns the function (images or their shape, variables) -> how many a device should evaluate at a time.

    On a CPU, so many that their activations probably fit into the 32 MiB up to which glibc keeps memory: for
    a larger block it asks Linux anew in each call (see `steps_per_call`). With fewer images at a time, a
    network would read its kernels more often; with more than two threads, each would have too little to do.
    Elsewhere, and of small images, all of them.

    Args:
      apply: `model.apply` of a Linen module.
    """

    def at_once(image, variables):
        number, *shape = image.shape
        # Small images have small maps, and tracing a deep network takes time.
        if fast.platform() != "cpu" or number * math.prod(shape) <= 2**16:
            return number
        noting = functools.partial(apply, train=False, capture_intermediates=True, mutable=["intermediates"])
        _, noted = jax.eval_shape(noting, variables, jax.ShapeDtypeStruct((1, *shape), np.float32))
        sizes = sorted(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(noted))
        most = max(MAX_BYTES_OF_MAPS, MAX_BYTES_OF_MAPS_PER_THREAD * provenance.cpu_threads())
        # XLA needs 0.5 to 1.4 times as much for an image (eleven networks, two threads, 2026-12-01).
        each = max(sum(sizes[-4:]), 2.5 * sizes[-1])
        return max(1, int(most / each))

    return at_once


def check(config, devices=None):
    """Raises ValueError unless a run of this config could start; loads its data, but compiles nothing."""
    check_program(make_program(config, devices), config)


def check_program(program, config):
    """Does the same for the program of a config; returns the shapes and types of its state."""
    like = program.shapes_of_state()
    check_network(program, like, config)
    program.layers_to_start_from()
    return like


def check_network(program, state, config):
    """Raises ValueError unless the network suits its evaluation protocol and the devices of its run.

    Args:
      program: of `config`.
      state: a state of its network, or the shapes and types of one.
      config: from `configs/`.
    """
    check_protocol(program, state, config.evaluation.protocol)
    num_devices = len(devices_lib.of_all_processes(program.devices))
    if not config.sync_batch_norm or num_devices == 1:
        return
    # Each device could compute its own batch statistics, or all could drop the same.
    what, remedy = f"model.name = {config.model.name!r}", "or set sync_batch_norm = False"
    with _noting_modules() as modules:
        program.shapes_of_state()
    alone = [module for module in modules if getattr(module, "axis_name", "none of its own") is None]
    if (state.batch_stats and not hasattr(program.model, "axis_name")) or any(
        isinstance(module, nn.BatchNorm | layers.BatchNorm) for module in alone
    ):
        raise ValueError(
            f"{what} would compute separate batch statistics on each of the {num_devices} devices; "
            f"give it a field axis_name, and pass that to layers.BatchNorm, {remedy}"
        )
    if any(isinstance(module, nn.Dropout) for module in modules):
        raise ValueError(
            f"{what} uses Flax's Dropout, which would draw the same mask on each of the {num_devices} "
            f"devices; give it a field axis_name, and pass that to layers.Dropout instead, {remedy}"
        )
    if any(isinstance(module, layers.Dropout) and module.rate for module in alone):
        raise ValueError(
            f"{what} would draw the same dropout mask on each of the {num_devices} devices; "
            f"give it a field axis_name, and pass that to layers.Dropout, {remedy}"
        )


@contextlib.contextmanager
def _noting_modules():
    """Yields a list to which each module is added whose method is traced in the context."""
    modules = []

    def note(function, args, kwargs, context):
        modules.append(context.module)
        return function(*args, **kwargs)

    with nn.intercept_methods(note):
        yield modules


def check_protocol(program, state, protocol):
    """Returns the shape of each view that a protocol makes of a training-size image; computes nothing.

    Args:
      program: from `make_program`.
      state: a state of its network, or the shapes and types of one.
      protocol: see `views.make_views`.

    Raises:
      ValueError: there is no such protocol, or the network cannot take its views.
    """
    feed = program.feed
    predict = steps.make_predict_step(program.model.apply, feed.pixels.evaluate)
    shown = make_views(protocol, feed.image_shape, feed.view, feed.border)
    return check_views(predict, state, feed.arrays, protocol, feed.image_shape, shown)


def check_views(predict, state, arrays, protocol, image_shape, views):
    """Does the same for a function of `steps.make_predict_step` and one of `views.make_views`."""
    shapes = [view.shape for view in views(np.zeros(image_shape, np.uint8))]
    for shape in sorted(set(shapes) - {tuple(image_shape)}):
        try:
            jax.eval_shape(predict, state, arrays, jax.ShapeDtypeStruct((1, *shape), np.uint8))
        except (TypeError, ValueError, flax_errors.FlaxError) as error:
            reason = str(error).partition("\n")[0].partition(" (https://")[0].rstrip(".")
            raise ValueError(
                f"evaluation.protocol = {protocol!r} has views of {shape[0]}x{shape[1]} pixels, which this "
                f"network cannot take: {reason}; use 'single', 'flip' or 'ten_crop'"
            ) from error
    return shapes


def evaluate(program, state, split, *, check_stop=lambda: None):
    """Returns {"<split>/loss": mean, "<split>/error": fraction} of a state, counting every example once.

    `check_stop()` is called before each batch; an exception that it raises ends the evaluation.
    """
    totals = collections.Counter()
    for batch in _stoppable(program.feed.eval_batches(split), check_stop):
        batch = devices_lib.shard(batch, len(program.devices))
        totals.update(jax.tree.map(float, program.evaluate(state, program.arrays, batch)))
    return {f"{split}/{name}": totals[name] / totals["count"] for name in ("loss", "error")}


def _stoppable(items, check_stop):
    for item in items:
        check_stop()
        yield item


def predict(program, state, split, protocol, *, batch_size, show_progress=False, check_stop=lambda: None):
    """Predicts this process's examples of a split, averaged over the views of a protocol.

    Args:
      program: from `make_program`.
      state: a state of its network.
      split: a part of data.splits.
      protocol: one that has passed `check_protocol`.
      batch_size: see `views_at_once`.
      show_progress: draw a progress bar on a terminal.
      check_stop: called before each example; an exception that it raises ends the prediction.

    Returns:
      See `predictions.average_views`; in the order of `feed.examples`.
    """
    num_devices, image_shape = len(program.devices), program.feed.image_shape
    num_of_all = len(devices_lib.of_all_processes(program.devices))
    hidden = not (show_progress and is_watched())
    examples = _stoppable(program.feed.examples(split), check_stop)
    return predictions.average_views(
        tqdm(examples, desc=split, unit=" images", disable=hidden, leave=False),
        make_views(protocol, image_shape, program.feed.view, program.feed.border),
        lambda images: program.predict(state, program.arrays, devices_lib.shard(images, num_devices)),
        batch_size=lambda shape: num_devices * views_at_once(image_shape, shape, batch_size, num_of_all),
        ahead=devices_lib.max_in_flight(program.devices),
    )


def views_at_once(image_shape, shape, batch_size, num_devices=1):
    """Returns how many views of a shape, at least one, each device takes at once.

    Args:
      image_shape: (H, W, C) of the training images.
      shape: (h, w, C) of the views.
      batch_size: number of views of the training images' size in one batch, over all devices of all
        processes. Batches of other views have as many pixels, so that larger views fit into memory, too.
      num_devices: of all processes.
    """
    height, width, _ = image_shape
    return max(1, batch_size * height * width // (shape[0] * shape[1] * num_devices))


def check_numbers(config, num_devices):
    """Raises ValueError for impossible numbers of steps, batch sizes, splits and other values of a config."""
    if not 1 <= config.num_steps < 2**31:
        raise ValueError(f"num_steps = {config.num_steps} must be 1 or more and below 2**31")
    if not 0 <= config.seed < 2**31:
        raise ValueError(f"seed = {config.seed} must be in [0, 2**31)")
    if config.steps_per_call < 0:
        raise ValueError(f"steps_per_call = {config.steps_per_call} must be 0 or more")
    per_call = config.steps_per_call or 1
    for key, value, least, zero in (
        ("num_steps", config.num_steps, 1, ""),
        ("log_every_steps", config.log_every_steps, 1, ""),
        ("evaluation.every_steps", config.evaluation.every_steps, 0, "0 or "),
        ("checkpoint.every_steps", config.checkpoint.every_steps, 0, "0 or "),
    ):
        if value < least or value % per_call:
            raise ValueError(
                f"{key} = {value} must be {zero}a positive multiple of steps_per_call = {per_call}"
            )
    if config.profile_steps and not _are_ends(config.profile_steps, config.num_steps, per_call):
        raise ValueError(
            f"profile_steps = {config.profile_steps} must be (first, last) step, from 1 to num_steps = "
            f"{config.num_steps}, of whole calls of steps_per_call = {per_call}; or ()"
        )
    if config.checkpoint.keep_last < 1:
        raise ValueError(f"checkpoint.keep_last = {config.checkpoint.keep_last} must be 1 or more")
    parts = settings.parts(config)
    for role in parts:
        if not role.isidentifier():  # it becomes part of a file's name
            raise ValueError(f"data.splits names {role!r}; such a name must be a word, as 'test' is")
    for key in ("splits", "final_splits"):
        for split in config.evaluation[key]:
            if split not in parts:
                raise ValueError(f"evaluation.{key} names {split!r}; data.splits has {', '.join(parts)}")
    best_on, splits = config.checkpoint.best_on, config.evaluation.splits
    if best_on and best_on not in splits:
        raise ValueError(
            f"checkpoint.best_on = {best_on!r} is not evaluated during training; "
            f"set it to '' or to one of evaluation.splits = {splits}"
        )
    checks.one_of("on_nonfinite", config.on_nonfinite, ON_NONFINITE)
    if config.start.step not in ("last", "best") and not config.start.step.isdecimal():
        raise ValueError(f"start.step = {config.start.step!r} must be 'last', 'best' or a step, as in '1000'")
    if config.num_microbatches < 1:
        raise ValueError(f"num_microbatches = {config.num_microbatches} must be 1 or more")
    if not 0 <= config.ema_decay < 1:
        raise ValueError(f"ema_decay = {config.ema_decay} must be in [0, 1)")
    for key in ("mixup", "cutmix"):
        if config.data.augment[key] and config.loss.name != "cross_entropy":
            raise ValueError(
                f"data.augment.{key} = {config.data.augment[key]} gives an example shares of two classes, "
                f"but loss.name = {config.loss.name!r} supports only one class per example; set the first to "
                "0 or the loss to 'cross_entropy'"
            )
    checks.not_negative("loss.side_weight", config.loss.side_weight)
    if not 1 <= config.evaluation.batch_size <= MAX_EVAL_BATCH_SIZE:
        raise ValueError(
            f"evaluation.batch_size = {config.evaluation.batch_size} must be between 1 and "
            f"{MAX_EVAL_BATCH_SIZE:,}"
        )
    devices_lib.check_batch_size(config.batch_size, num_devices, config.num_microbatches)


def _are_ends(steps, num_steps, per_call):
    """Returns whether `steps` are the first and last steps of whole calls."""
    if len(steps) != 2:
        return False
    first, last = steps
    return 1 <= first <= last <= num_steps and (first - 1) % per_call == last % per_call == 0
