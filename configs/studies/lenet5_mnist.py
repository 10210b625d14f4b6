"""The lecture's LeNet-5 on MNIST, with three seeds.

Paper: LeCun et al. 1998, in the lecture's form.
Command: python -m cnn_cases.data.prepare mnist
         python -m cnn_cases.studies.sweep --config=configs/studies/lenet5_mnist.py \
             --workdir=runs/lenet5_mnist
"""

from ml_collections import ConfigDict

from configs import lenet5_mnist


def get_config():
    """One point with every seed."""
    config = ConfigDict()
    config.base = lenet5_mnist.get_config()
    config.grid = ()
    config.seeds = (0, 1, 2)
    config.lock()
    return config
