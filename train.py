"""Trains one network: `python train.py --config=configs/lenet5_digits.py --workdir=runs/lenet5`.

Every key of the config can be overridden: `--config.optimizer.learning_rate=0.01`. A second start with the
same workdir resumes. `cnn_cases/command.py` lists the exit codes.
"""

from absl import flags
from ml_collections import config_flags

from cnn_cases import command
from cnn_cases.training import loop

_CONFIG = config_flags.DEFINE_config_file("config", help_string="A file of configs/.")
_WORKDIR = flags.DEFINE_string("workdir", None, "The directory of this run.")


def main():
    """Trains, or goes on, as the flags say."""
    loop.train_and_evaluate(_CONFIG.value, _WORKDIR.value)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    command.run(main)
