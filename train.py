"""Trains one network: `python train.py --config=configs/lenet5_digits.py --workdir=runs/lenet5`.

Any key of the config can be overridden: `--config.optimizer.learning_rate=0.01`. Starting again with the same
workdir resumes the run. `cnn_cases/command.py` lists the exit codes.

Several processes can share one training run, on one host or on many. Start the same command for each process,
by `srun`, by `mpirun`, or on every host of a TPU pod (on Compute Engine with --distributed=on); or set the
three flags --coordinator_address, --num_processes and --process_id.
"""

from absl import flags
from ml_collections import config_flags

from cnn_cases import command
from cnn_cases.training import loop, processes

_CONFIG = config_flags.DEFINE_config_file("config", help_string="A file of configs/.")
_WORKDIR = flags.DEFINE_string("workdir", None, "The directory of this run; process 0 alone uses it.")
_DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    "auto",
    ["auto", "on", "off"],
    "auto: one of several processes where variables of Slurm, Open MPI 4 or a TPU pod say so, or the flags "
    "below; on: ask JAX, which also knows Kubernetes and Compute Engine's pods; off: one process.",
)
_COORDINATOR = flags.DEFINE_string("coordinator_address", None, "host:port, a free port of process 0.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "The number of processes of this run.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "The number of this process, from 0.")
_HEARTBEAT = flags.DEFINE_integer(
    "heartbeat_timeout_seconds",
    processes.HEARTBEAT_TIMEOUT_SECONDS,
    "Seconds of silence after which a process counts as dead and all others end.",
)
_MEETING = flags.DEFINE_integer(
    "meeting_timeout_seconds",
    processes.MEETING_TIMEOUT_SECONDS,
    "Seconds that a process waits for the others at the start.",
)


def main():
    """Trains, or resumes, according to the flags."""
    processes.join(
        _DISTRIBUTED.value,
        coordinator_address=_COORDINATOR.value,
        num_processes=_NUM_PROCESSES.value,
        process_id=_PROCESS_ID.value,
        heartbeat_timeout_seconds=_HEARTBEAT.value,
        meeting_timeout_seconds=_MEETING.value,
    )
    loop.train_and_evaluate(_CONFIG.value, _WORKDIR.value)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    command.run(main)
