"""What feeds and the loop cost: `python -m benchmarks.pipeline [--data_dir=DIR] [--out=FILE.json]`.

resident   A training step of ResNet-20 with the resident feed, compared with the same step on one prepared
           batch that stays on the device. CIFAR-10 if it is prepared, else the digits.
training   A step of a whole training run, which prepares batches, logs its metrics and saves checkpoints,
           compared with the step on one prepared batch: the extra time of a run with twice the steps, so
           that start and end do not count. CIFAR-10 on a GPU or TPU if it is prepared, else the digits.
stream     Images per second that one core reads, decodes, crops (area 8 to 100 %, aspect 3:4 to 4:3, to 224
           pixels), mirrors and batches: the streaming feed, compared with tf.data, which reads the same files
           from TFRecord, and with PyTorch's DataLoader, whose images PIL decodes. For generated pictures of
           ImageNet's usual size, and for Imagenette if it is prepared. Our feed leaves mirroring to the
           device; in this benchmark OpenCV does it. The peers get boxes drawn by our code, so that all crop
           alike. PIL resizes with antialiasing, the feed and tf.data mostly without. Neither peer is part of
           our requirements: pip install tensorflow-cpu torch. The output says which is missing.

The contenders take turns. Values are medians over the turns, with the lowest and the highest. Where the CPU
computes, time is the CPU time of the whole process, so that other load on the machine counts less; a stream
is also pinned to one core.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import io
import itertools
import os
import pathlib
import tempfile
import time

import cv2
import jax
import numpy as np
import simplejpeg
import tensorflow_datasets as tfds
from PIL import Image

from benchmarks import contenders
from benchmarks.record import check, devices_here, output, write_section
from cnn_cases import parsing
from cnn_cases.data import decode, feeds, sources, splits
from cnn_cases.training import devices as devices_lib
from cnn_cases.training import loop, programs, runtime, steps
from configs import common, resnet_cifar10, resnet_digits

IMAGE_SIZE = 224
BATCH_SIZE = 64
PEERS = ("tensorflow-cpu", "torch", "pillow")
STEPS_A_TURN = {  # whole calls
    "resident": {"cpu": 10, "accelerator": 500},
    "training": {"cpu": 500, "accelerator": 4000},
}


class BenchmarkPhotos(tfds.core.GeneratorBasedBuilder):
    """512 generated pictures of 500x375 pixels and 100 kB each, about the average of ImageNet's."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(num_classes=10),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing is downloaded
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for index in range(512):
            rng = np.random.default_rng(index)
            shapes = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
            pixels = np.asarray(shapes.resize((500, 375), Image.Resampling.BICUBIC), np.float32)
            pixels += rng.normal(0, 14, (375, 500, 1))
            file = io.BytesIO()
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
            file.seek(0)
            yield index, {"image": file, "label": index % 10}


def resident_feed(data_dir, turns, steps_a_turn, dtype):
    """Seconds per step with the feed and with a fixed batch, and the overhead in percent, over the turns."""
    config = _cifar10_or_digits(data_dir)
    config.dtype = dtype
    program = programs.make_program(config, jax.local_devices()[:1])
    batches = _calls(program, program.feed.train_batches(0, 0))
    run = _runner(program, program.train, program.arrays, batches, steps_a_turn)
    return _beside_bare(run, config, program, turns, steps_a_turn)


def whole_training(data_dir, turns, steps_a_turn, dtype):
    """Like `resident_feed`, but includes the training loop around the feed."""
    on_cpu = jax.default_backend() == "cpu"
    config = _config(resnet_digits, data_dir) if on_cpu else _cifar10_or_digits(data_dir)
    config.dtype, config.num_steps = dtype, 2 * steps_a_turn
    config.evaluation.every_steps, config.checkpoint.every_steps = 0, steps_a_turn
    program = programs.make_program(config, jax.local_devices()[:1])
    clock = _clock(program)

    def seconds(num_steps):
        shorter = config.copy_and_resolve_references()
        shorter.num_steps = num_steps
        with tempfile.TemporaryDirectory() as workdir:
            started = clock()
            loop.train_and_evaluate(shorter, workdir, program=program, show_progress=False)
            return clock() - started

    def run():
        return (seconds(2 * steps_a_turn) - seconds(steps_a_turn)) / steps_a_turn

    seconds(steps_a_turn)  # compiles
    return _beside_bare(run, config, program, turns, steps_a_turn)


def _cifar10_or_digits(data_dir):
    config = _config(resnet_cifar10, data_dir)
    prepared = sources.is_prepared(sources.make_builder(config.data.name, data_dir))
    return config if prepared else _config(resnet_digits, data_dir)


def _config(module, data_dir):
    config = module.get_config()
    config.data.data_dir = data_dir
    return config


def _clock(program):
    return time.process_time if program.devices[0].platform == "cpu" else time.perf_counter


def _calls(program, batches):
    """Yields batches as a call of `program.train` takes them: several steps, on one device."""
    while True:
        of_call = itertools.islice(batches, program.steps_per_call)
        yield devices_lib.shard(jax.tree.map(lambda *arrays: np.stack(arrays), *of_call), 1, axis=1)


def _runner(program, train, arrays, calls, num_steps):
    """Makes a function that does `num_steps` steps and returns the seconds per step."""
    clock = _clock(program)
    state = devices_lib.replicate(program.init_state(0), program.devices)

    def run():
        nonlocal state
        started = clock()
        for batch in itertools.islice(calls, num_steps // program.steps_per_call):
            state, metrics = train(state, arrays, batch)
        jax.block_until_ready(metrics)
        return (clock() - started) / num_steps

    run()  # compiles
    return run


def _bare(program, num_steps):
    """A `_runner` of the same steps, all on one prepared batch."""
    feed = program.feed
    prepare = jax.jit(feed.prepare)
    image, label = prepare(feed.arrays, next(feed.train_batches(0, 0)), jax.random.key(0))
    fixed = devices_lib.replicate({"image": image, "label": label}, program.devices)
    train = devices_lib.pmap_train(
        steps.make_train_steps(
            program.model.apply,
            program.tx,
            lambda arrays, _, __: (arrays["image"], arrays["label"]),
            program.loss,
            devices_lib.AXIS,
        ),
        program.devices,
    )
    nothing = np.zeros((1, program.steps_per_call, 1), np.int32)
    return _runner(program, train, fixed, itertools.repeat(nothing), num_steps)


def _beside_bare(run, config, program, turns, num_steps):
    times = _take_turns([run, _bare(program, num_steps)], turns)
    overhead = [100 * (a / b - 1) for a, b in zip(*times, strict=True)]
    return {
        "set": config.data.name,
        "batch_size": config.batch_size,
        "dtype": config.dtype,
        "steps_per_call": program.steps_per_call,
        "seconds_a_step": contenders.summary(times[0]),
        "fixed_seconds_a_step": contenders.summary(times[1]),
        "overhead_percent": contenders.summary(overhead),
    }


def streams(name, data_dir, turns, batches_a_turn):
    """Images per second on one core, for our feed and for its peers, over the turns."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})  # this thread and those that it starts
    try:
        with tempfile.TemporaryDirectory() as directory:
            runs = {"stream": _timed(lambda: _our_batches(name, data_dir), batches_a_turn)}
            with contextlib.suppress(ImportError):
                dataset = _tf_dataset(name, data_dir, pathlib.Path(directory) / "records")
                runs["tf.data"] = _timed(dataset.as_numpy_iterator, batches_a_turn)
            with contextlib.suppress(ImportError):
                loader = _torch_loader(name, data_dir)
                runs["DataLoader"] = _timed(lambda: iter(loader), batches_a_turn)
            figures = _take_turns(list(runs.values()), turns)
    finally:
        os.sched_setaffinity(0, before)
    summaries = {peer: contenders.summary(values) for peer, values in zip(runs, figures, strict=True)}
    missing = dict.fromkeys(("tf.data", "DataLoader"), "not installed")
    return {"stream": None} | missing | summaries


def _timed(make_iterator, count):
    """Makes a function that takes `count` batches from a new iterator; returns images per CPU second."""

    def run():
        iterator = make_iterator()
        next(iterator)  # a batch may be made in advance; from one batch to another this evens out
        started = time.process_time()
        for _ in range(count):
            next(iterator)
        seconds = time.process_time() - started
        del iterator
        time.sleep(0.5)  # let its remaining work end
        return count * BATCH_SIZE / seconds

    run()
    return run


def _our_batches(name, data_dir):
    feed = _our_feed(name, data_dir)
    rng = np.random.default_rng(0)
    for batch in feed.train_batches(0, 0):
        for row in np.flatnonzero(rng.random(BATCH_SIZE) < 0.5):
            batch["image"][row] = cv2.flip(batch["image"][row], 1)
        yield batch


@functools.cache
def _our_feed(name, data_dir):
    data = common.get_config().data
    data.name, data.data_dir, data.feed, data.image_size = name, data_dir, "stream", IMAGE_SIZE
    data.splits = {"train": "train"}
    data.crop.name = "area"
    data.stream.buffer = 1
    return feeds.make_feed(**data, batch_size=BATCH_SIZE, eval_batch_size=BATCH_SIZE)


def _tf_dataset(name, data_dir, path):
    """The same work by tf.data, in one thread; copies the records to TFRecord first."""
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    records, _ = splits.open_split(name, "train", data_dir)
    with tf.io.TFRecordWriter(str(path)) as writer:
        for record in records:
            image = tf.train.Feature(bytes_list=tf.train.BytesList(value=[record["image"]]))
            label = tf.train.Feature(int64_list=tf.train.Int64List(value=[record["label"]]))
            features = tf.train.Features(feature={"image": image, "label": label})
            writer.write(tf.train.Example(features=features).SerializeToString())
    kinds = {"image": tf.io.FixedLenFeature([], tf.string), "label": tf.io.FixedLenFeature([], tf.int64)}

    def example(record, box):
        record = tf.io.parse_single_example(record, kinds)
        image = tf.io.decode_and_crop_jpeg(record["image"], box, channels=3)
        image = tf.image.random_flip_left_right(tf.image.resize(image, (IMAGE_SIZE, IMAGE_SIZE)))
        return {"image": tf.cast(tf.round(image), tf.uint8), "label": record["label"]}

    boxes = tf.data.Dataset.from_tensor_slices(_boxes(records))
    dataset = tf.data.Dataset.zip((tf.data.TFRecordDataset(str(path)), boxes)).repeat()
    dataset = dataset.map(example).batch(BATCH_SIZE)
    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    options.threading.max_intra_op_parallelism = 1
    return dataset.with_options(options)


def _torch_loader(name, data_dir):
    """The same work by PyTorch's DataLoader in this process, as torchvision's transforms do it with PIL."""
    import torch

    torch.set_num_threads(1)
    records, _ = splits.open_split(name, "train", data_dir)
    boxes = _boxes(records)

    class Photos(torch.utils.data.Dataset):
        def __len__(self):
            return len(records) * 100  # no epoch ends during the measurement

        def __getitem__(self, index):
            record, (top, left, height, width) = records[index % len(records)], boxes[index % len(records)]
            image = Image.open(io.BytesIO(record["image"])).convert("RGB")
            image = image.crop((left, top, left + width, top + height))
            image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR)
            if torch.rand(()) < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            return torch.from_numpy(np.array(image)), int(record["label"])

    return torch.utils.data.DataLoader(Photos(), BATCH_SIZE)


def _boxes(records):
    """A box for each record, drawn as the feed draws them. -> int32 [N, 4]."""
    rng = np.random.default_rng(0)
    crop = dict(**common.get_config().data.crop) | {"name": "area"}
    shapes = [simplejpeg.decode_jpeg_header(record["image"])[:2] for record in records]
    return np.array([decode.training_box(*shape, IMAGE_SIZE, rng, crop) for shape in shapes], np.int32)


def _take_turns(runs, turns):
    """The values of every run, one list each; the order alternates from turn to turn."""
    figures = [[] for _ in runs]
    for turn in range(turns):
        for number in range(len(runs)) if turn % 2 == 0 else reversed(range(len(runs))):
            figures[number].append(runs[number]())
    return figures


def _version(package):
    """The version of a package, None if it is not installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)


def _line(title, figures, unit):
    if isinstance(figures, str):
        return f"{title:42} {figures}"
    numbers = " to ".join(f"{figures[key]:,.4g}" for key in ("lowest", "highest"))
    return f"{title:42} {figures['median']:,.4g} {unit} ({numbers})"


def main():
    """Measures, prints the results, and writes them to --out."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pipeline", description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir", default="", help="default: $TFDS_DATA_DIR, else ~/tensorflow_datasets")
    parser.add_argument("--out", type=output, help="a JSON file")
    parser.add_argument("--only", choices=(*STEPS_A_TURN, "stream"), help="one of the three")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the steps")
    parser.add_argument("--turns", type=parsing.positive_number, default=9)
    options = parser.parse_args()
    wanted = [name for name in (*STEPS_A_TURN, "stream") if options.only in (None, name)]
    runtime.choose_cpu_flags()  # first: the check may use JAX
    check(parser, options.out, {name: _command(options, name) for name in wanted}, devices_here)
    for name, of_turn in STEPS_A_TURN.items():
        if name in wanted:
            num_steps = of_turn["cpu" if jax.default_backend() == "cpu" else "accelerator"]
            measure = resident_feed if name == "resident" else whole_training
            row = measure(options.data_dir, options.turns, num_steps, options.dtype)
            print(_line(f"{row['set']}, {name}", row["seconds_a_step"], "s a step"))
            print(_line(f"{row['set']}, a fixed batch", row["fixed_seconds_a_step"], "s a step"))
            print(_line("overhead", row["overhead_percent"], "%"))
            _record(options, name, row)
    if "stream" in wanted:
        rows = {}
        with tempfile.TemporaryDirectory() as directory:
            sets = [(sources.prepare(BenchmarkPhotos.name, directory).name, directory)]
            if sources.is_prepared(sources.make_builder("imagenette/320px-v2", options.data_dir)):
                sets.append(("imagenette/320px-v2", options.data_dir))
            for name, data_dir in sets:
                rows[name] = streams(name, data_dir, options.turns, batches_a_turn=8)
                for peer, figures in rows[name].items():
                    print(_line(f"{name}, {peer}", figures, "images a second and core"))
        peers = {one: _version(one) for one in PEERS}
        _record(options, "stream", {"peers": peers, "images_a_second_a_core": rows})


def _command(options, name):
    dtype = "" if name == "stream" else f" --dtype={options.dtype}"
    return f"python -m benchmarks.pipeline --only={name} --turns={options.turns}{dtype}"


def _record(options, name, figures):
    if options.out:
        write_section(options.out, name, _command(options, name), figures)


if __name__ == "__main__":
    main()
