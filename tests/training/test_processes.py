import jax.numpy as jnp
import pytest

from cnn_cases.training import processes

SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
OPEN_MPI = {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:99", "OMPI_COMM_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("environment", "count"),
    [
        ({}, 1),
        (SLURM | {"SLURM_NTASKS": "8"}, 8),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, 1),  # in the batch script, not by srun
        (SLURM | {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8"}, 8),
        (SLURM | {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, 1),  # in the shell of salloc
        (OPEN_MPI, 2),
        (OPEN_MPI | SLURM | {"SLURM_NTASKS": "1"}, 2),  # by mpirun in a shell of Slurm's
        ({"TPU_WORKER_HOSTNAMES": "a,b,c,d"}, 4),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, 1),
    ],
)
def test_launchers_tell_how_many_processes_there_are(environment, count):
    assert processes.launched_processes(environment) == count


def test_a_launchers_count_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="SLURM_NTASKS = 'two', set by Slurm, is not a number"):
        processes.launched_processes(SLURM | {"SLURM_NTASKS": "two"})


def test_an_open_mpi_that_does_not_tell_where_to_meet_is_refused():
    with pytest.raises(ValueError, match=r"OMPI_COMM_WORLD_SIZE = '2', .* name coordinator_address"):
        processes.launched_processes({"OMPI_COMM_WORLD_SIZE": "2", "PMIX_RANK": "0"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_processes": 2}, "go together; coordinator_address and process_id missing"),
        ({"process_id": 2}, r"process_id = 2 must be in \[0, num_processes = 2\)"),
        ({"coordinator_address": "here"}, "coordinator_address = 'here' must be host:port"),
        ({"coordinator_address": "12345"}, "coordinator_address = '12345' must be host:port"),
        ({"coordinator_address": ":12345"}, "coordinator_address = ':12345' must be host:port"),
        ({"mode": "off"}, "distributed = 'off' is for one process"),
        ({"heartbeat_timeout_seconds": 0}, "heartbeat_timeout_seconds = 0 must be 1 or more"),
        ({"meeting_timeout_seconds": 0}, "meeting_timeout_seconds = 0 must be 1 or more"),
    ],
)
def test_processes_that_cannot_meet_are_refused(settings, message):
    whole = {"coordinator_address": "localhost:1234", "num_processes": 2, "process_id": 0}
    with pytest.raises(ValueError, match=message):
        processes.join(**(settings if "num_processes" in settings else whole | settings))


def test_a_process_alone_leads_and_asks_nobody():
    assert processes.is_lead()
    assert processes.process() == (0, 1)
    assert processes.gather("own") == ["own"]
    assert processes.from_lead(lambda: (1, 2)) == processes.lead_first(lambda: (1, 2)) == (1, 2)
    tree = {"leaf": jnp.ones(2)}
    assert processes.broadcast(tree) is tree


@pytest.mark.parametrize(
    ("text", "several", "lost"),
    [
        ("Gloo all-reduce failed: connection closed by peer", True, True),
        ("NCCL operation failed: remote process exited or there was a network error.", True, True),
        ("NCCL operation failed: unhandled cuda error", True, False),
        ("Gloo all-reduce failed: connection closed by peer", False, False),
    ],
)
def test_what_the_collectives_say_when_another_process_is_gone(text, several, lost, monkeypatch):
    monkeypatch.setattr(processes, "is_one_of_several", lambda: several)
    assert processes.is_loss(RuntimeError(text)) is lost
