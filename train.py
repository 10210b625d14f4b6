"""Trains one network: `python train.py --config=configs/lenet5_digits.py --workdir=runs/lenet5`.

Every key of the config can be overridden: `--config.optimizer.learning_rate=0.01`. A second start with the
same workdir resumes. Exit codes: 0 finished; 2 bad input; 3 the training diverged; 143 and 130 after SIGTERM
and SIGINT, when all is saved.
"""

import sys

from absl import app, flags, logging
from ml_collections import config_flags

from cnn_cases.training import loop

_CONFIG = config_flags.DEFINE_config_file("config", help_string="A file of configs/.")
_WORKDIR = flags.DEFINE_string("workdir", None, "The directory of this run.")
flags.mark_flags_as_required(["config", "workdir"])


def main(_):
    """Runs the loop and turns its exceptions into messages and exit codes."""
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells of every save in a dozen lines
    try:
        loop.train_and_evaluate(_CONFIG.value, _WORKDIR.value)
    except ValueError as error:
        logging.debug("where it was raised", exc_info=True)  # shown with --verbosity=1
        _leave(f"error: {error}", 2)
    except loop.DivergedError as error:
        _leave(f"error: {error}", 3)
    except loop.InterruptedRun as interruption:
        _leave(str(interruption), 128 + interruption.signal_number)


def _leave(message, code):
    print(f"train.py: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    app.run(main)
