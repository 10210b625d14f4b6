"""Running means of the training metrics for the log, and the check that all values are finite."""

import math

import numpy as np

NAMES = ("loss", "error", "grad_norm")
MAX_SKIPPED = 10  # steps in a row; after that, the cause is not a single bad batch


class DivergedError(ArithmeticError):
    """The loss, the gradient or the state is not finite; `step` says at which step."""

    def __init__(self, message, step):
        super().__init__(message)
        self.step = step


class RunningMetrics:
    """The metrics of the steps since the last row of the log.

    Attributes:
      window: for each step that was not skipped, a list in the order of NAMES.
      nonfinite: the numbers of all steps of the run that were skipped or led to a rewind.
      rewound_to: for each step that led to a rewind, the step of the checkpoint that the run went back to.

    All three are saved with the state, so that a resumed run writes the same rows as an uninterrupted one.
    """

    def __init__(self, window, nonfinite, rewound_to):
        """Continues from saved values."""
        self.window, self.nonfinite, self.rewound_to = window, nonfinite, rewound_to

    def add(self, last_step, metrics):
        """Adds the metrics of the steps of one call.

        Args:
          last_step: number of the last of these steps.
          metrics: {name: array [steps]}, as in `steps.make_train_steps`.

        Returns:
          A message for each step that was skipped.

        Raises:
          DivergedError: a metric is not finite and the step was not skipped, or too many steps in a row were.
        """
        rows = np.stack([metrics[name] for name in NAMES], axis=1).tolist()
        said = []
        for step, row, skipped in zip(
            range(last_step - len(rows) + 1, last_step + 1), rows, metrics["skipped"], strict=True
        ):
            values = dict(zip(NAMES, row, strict=True))
            if not skipped:
                check_finite(step, values)
                self.window.append(row)
                continue
            self.nonfinite.append(step)
            said.append(f"step {step}: skipped, with {_listed(values)}")
            if self.nonfinite[-MAX_SKIPPED:] == list(range(step - MAX_SKIPPED + 1, step + 1)):
                reason = f"{MAX_SKIPPED} steps in a row were skipped, this one with"
                raise DivergedError(f"{reason} {_listed(values)}", step)
        return said

    def take(self):
        """Returns {"running/<name>": mean since the last call of `take`}; {} if all steps were skipped."""
        columns = list(zip(*self.window, strict=True))
        self.window.clear()
        return {f"running/{name}": math.fsum(c) / len(c) for name, c in zip(NAMES, columns, strict=False)}


def check_finite(step, values):
    """Raises DivergedError unless all values of {name: number} are finite."""
    if not all(map(math.isfinite, values.values())):
        raise DivergedError(_listed(values), step)


def _listed(values):
    return ", ".join(f"{name} {value}" for name, value in values.items())
