"""Draws the first images of a training step as the network sees them, augmented, with their labels.

    python -m cnn_cases.preview --config=configs/resnet_cifar10.py --step=1 --out=preview.png

Except for the normalisation, the images are, to the pixel, those that a run with this config trains on.
Padding and cut-out squares are drawn black, although for the network they may be the mean. If examples are
mixed and num_microbatches is above 1, a run mixes each part of a batch separately. The preview does not check
the normalisation, network and optimizer, so a run may still reject the config.
"""

import math
import pathlib

import jax
import matplotlib
import numpy as np
from absl import flags
from matplotlib.figure import Figure
from ml_collections import config_flags

from cnn_cases import command, settings
from cnn_cases.data import feeds
from cnn_cases.training import programs, steps

COLUMNS = (4, 8)  # of a sheet, minimum and maximum; fewer leave no room for its heading

# A class may be called "5$"; between two dollars, Matplotlib would read a formula. This also holds for the
# figures of `evaluate`, which draws its sheets with `draw_sheet`.
matplotlib.rcParams["text.parse_math"] = False


def training_images(config, step):
    """Returns the batch of a training step as the network sees it, before normalisation.

    Args:
      config: from `configs/`.
      step: number of the training step; the first is 1, as in the log.

    Returns:
      image float32 [B, H, W, C] in [0, 1], and label int32 [B], or float32 [B, K] if examples are mixed.
    """
    settings.check(config)
    programs.check_numbers(config, num_devices=1)
    if not 1 <= step <= config.num_steps:
        raise ValueError(f"step = {step} must be between 1 and num_steps = {config.num_steps}")
    data = dict(**config.data) | {"normalization": "none"}
    feed = feeds.make_feed(**data, batch_size=config.batch_size, eval_batch_size=config.evaluation.batch_size)
    batches = feed.train_batches(config.seed, step - 1)
    batch = next(batches)
    batches.close()
    augment_key, _ = steps.step_keys(config.seed, step - 1)
    image, label = jax.jit(feed.prepare)(feed.arrays, batch, augment_key)
    return np.clip(image, 0, 1), np.asarray(label)


def draw_sheet(images, titles, heading):
    """Draws a figure of images, with a title above each.

    Args:
      images: a list of uint8 [H, W, C], or of floats in [0, 1].
      titles: a text for each image.
      heading: title of the figure.
    """
    columns = min(max(len(images), COLUMNS[0]), COLUMNS[1])
    rows = max(1, math.ceil(len(images) / columns))
    lines = max([title.count("\n") + 1 for title in titles], default=1)
    size = (1.5 * columns, (1.5 + 0.17 * lines) * rows + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, title in zip(axes.flat, images, titles, strict=False):
        axis.imshow(
            image.squeeze(-1) if image.shape[-1] == 1 else image,
            cmap="gray",
            vmin=0,
            vmax=255 if image.dtype == np.uint8 else 1,
            # Keep the pixels of small images visible.
            interpolation="nearest" if max(image.shape[:2]) < 100 else "auto",
        )
        axis.set_title(title, fontsize=8)
    figure.suptitle(heading, fontsize=10)
    return figure


def title_of(label, names):
    """A label in words; for a mixture, each class with its share in percent."""
    if label.ndim == 0:
        return names[label]
    parts = [(label[k], names[k]) for k in np.argsort(-label)[:2] if label[k] > 0]
    return "\n".join(f"{100 * share:.0f} % {name}" for share, name in parts)


def main():
    """Draws the sheet."""
    config, step, count = flags.FLAGS.config, flags.FLAGS.step, flags.FLAGS.images
    out = pathlib.Path(flags.FLAGS.out)
    if out.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"out = {out} must end in .png, .svg or .pdf")
    images, labels = training_images(config, step)
    names = feeds.class_names(config.data.name, config.data.data_dir)
    titles = [title_of(label, names) for label in labels[:count]]
    heading = f"{config.data.name}: images of training step {step}, as the network is shown them"
    figure = draw_sheet(images[:count], titles, heading)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    print(f"{len(titles)} images of {images.shape[1]}x{images.shape[2]} pixels: {out}")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", help_string="A file of configs/.")
    flags.DEFINE_string("out", "preview.png", "Where to write the sheet; .png, .svg or .pdf.")
    flags.DEFINE_integer("step", 1, "The number of the training step; the first is 1.")
    flags.DEFINE_integer("images", 40, "How many images at most.", lower_bound=1)
    flags.mark_flag_as_required("config")
    command.run(main)
