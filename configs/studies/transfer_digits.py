"""Transfer learning: LeNet-5 on a few of scikit-learn's digits, from random values or from layers of MNIST.

Source: the lecture's advice for small data sets: take a trained network without its softmax layer, and freeze
more of its layers the smaller the set is. The recipe is that of `lenet5_digits`, with batches of 50.
Command: make data DATASET=mnist
         python train.py --config=configs/lenet5_mnist.py --workdir=runs/lenet5_mnist
         python -m cnn_cases.studies.sweep --config=configs/studies/transfer_digits.py \
             --workdir=runs/transfer_digits

All layers but `logits` start from MNIST or from random values. The study freezes none of them, the
convolutions, or all of them. Layers that are both random and frozen give random features, for comparison.
Result: with no layer frozen, mean test errors of 25.07, 8.92 and 2.25 % on 50, 200 and 1,257 images from
random values, and of 21.69, 5.26 and 1.97 % from MNIST; with --jobs=2, 50 s on two CPU cores after the run on
MNIST, 2026-11-28 (results/transfer_digits.json; docs/training.md has the rest).
"""

from ml_collections import ConfigDict

from configs import common, lenet5_digits


def get_config():
    """The grid: number of training images, start, and what is frozen."""
    config = ConfigDict()
    config.base = lenet5_digits.get_config()
    with config.base.unlocked():
        config.base.batch_size = 50
        config.base.start.layers = ("conv*", "dense*")
        common.follow_test_error(config.base)
    config.grid = (
        ("data.splits.train", ("train[:50]", "train[:200]", "train")),
        ("start.workdir", ("", "runs/lenet5_mnist")),
        ("optimizer.frozen", ((), ("conv*",), ("conv*", "dense*"))),
    )
    config.compare = "start.workdir"
    config.seeds = (0, 1, 2)
    config.lock()
    return config
