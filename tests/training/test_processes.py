import jax.numpy as jnp
import numpy as np
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
        ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, 2),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "MEGASCALE_NUM_SLICES": "3"}, 6),
    ],
)
def test_launchers_tell_how_many_processes_there_are(environment, count):
    assert processes.launched_processes(environment) == count


def test_a_launchers_count_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="SLURM_NTASKS = 'two', set by Slurm, is not a number"):
        processes.launched_processes(SLURM | {"SLURM_NTASKS": "two"})
    with pytest.raises(ValueError, match="MEGASCALE_NUM_SLICES = 'two' is not a number"):
        processes.launched_processes({"MEGASCALE_NUM_SLICES": "two"})


def of_slurm(tasks, node="0", local="0", **others):
    return SLURM | {
        "SLURM_STEP_TASKS_PER_NODE": tasks,
        "SLURM_NODEID": node,
        "SLURM_LOCALID": local,
        **others,
    }


def of_open_mpi(tasks, local, **others):
    return {"OMPI_COMM_WORLD_LOCAL_SIZE": tasks, "OMPI_COMM_WORLD_LOCAL_RANK": local, **others}


@pytest.mark.parametrize(
    ("environment", "gpus"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, "all"),  # without a launcher
        (of_open_mpi("1", "0", CUDA_VISIBLE_DEVICES="0,1,2,3"), "all"),
        (of_open_mpi("4", "2", CUDA_VISIBLE_DEVICES="0,1,2,3"), "2"),
        (of_open_mpi("2", "1", CUDA_VISIBLE_DEVICES="4,5,6,7"), "2,3"),
        (of_open_mpi("4", "3"), "3"),
        (
            of_open_mpi("4", "3") | of_slurm("1", CUDA_VISIBLE_DEVICES="0,1,2,3"),
            "3",
        ),  # mpirun in Slurm's shell
        (of_slurm("1(x2)", CUDA_VISIBLE_DEVICES="0,1,2,3"), "all"),  # one task a node
        (of_slurm("1(x2)"), "all"),
        (of_slurm("4(x2)", local="2", CUDA_VISIBLE_DEVICES="0,1,2,3", SLURM_GPUS_ON_NODE="4"), "2"),
        (of_slurm("2", local="1", CUDA_VISIBLE_DEVICES="4,5,6,7", SLURM_GPUS_ON_NODE="4"), "2,3"),
        (of_slurm("4", local="3", CUDA_VISIBLE_DEVICES="0", SLURM_GPUS_ON_NODE="4"), "all"),  # a task's own
        (of_slurm("2", local="1", CUDA_VISIBLE_DEVICES="0,1", SLURM_GPUS_ON_NODE="4"), "all"),
        (of_slurm("2(x2),1", node="2", CUDA_VISIBLE_DEVICES="0,1"), "all"),
        (of_slurm("1,2(x2)", node="2", local="1", CUDA_VISIBLE_DEVICES="0,1"), "1"),
        (of_slurm("2", local="1", ROCR_VISIBLE_DEVICES="0,1"), "1"),
        (of_slurm("4", local="3"), "3"),
        (of_slurm("4", local="3", CUDA_VISIBLE_DEVICES="0,1"), None),  # fewer than tasks
        (SLURM | {"CUDA_VISIBLE_DEVICES": "0,1"}, None),
        (of_slurm("1", JAX_LOCAL_DEVICE_IDS="1"), None),
    ],
)
def test_the_tasks_of_a_node_share_its_gpus(environment, gpus):
    assert processes.own_gpus(environment) == gpus


def test_an_open_mpi_that_does_not_tell_where_to_meet_is_refused():
    with pytest.raises(ValueError, match=r"OMPI_COMM_WORLD_SIZE = '2', .* set coordinator_address"):
        processes.launched_processes({"OMPI_COMM_WORLD_SIZE": "2", "PMIX_RANK": "0"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_processes": 2}, "go together; coordinator_address and process_id missing"),
        ({"process_id": 2}, r"process_id = 2 must be in \[0, num_processes = 2\)"),
        ({"coordinator_address": "here"}, "coordinator_address = 'here' must be host:port"),
        ({"coordinator_address": "12345"}, "coordinator_address = '12345' must be host:port"),
        ({"coordinator_address": ":12345"}, "coordinator_address = ':12345' must be host:port"),
        ({"coordinator_address": "here:0"}, "'here:0' must be host:port, with a port from 1 to 65535"),
        ({"coordinator_address": "here:65536"}, "'here:65536' must be host:port, with a port from 1 to"),
        ({"mode": "off"}, "distributed = 'off' is for one process"),
        ({"heartbeat_timeout_seconds": 0}, "heartbeat_timeout_seconds = 0 must be 1 or more"),
        ({"meeting_timeout_seconds": 0}, "meeting_timeout_seconds = 0 must be 1 or more"),
    ],
)
def test_processes_that_cannot_meet_are_refused(settings, message):
    whole = {"coordinator_address": "localhost:1234", "num_processes": 2, "process_id": 0}
    with pytest.raises(ValueError, match=message):
        processes.join(**(settings if "num_processes" in settings else whole | settings))


@pytest.mark.parametrize(
    ("platform", "cache"), [("gpu", {"jax_enable_compilation_cache": False}), ("tpu", {})]
)
def test_processes_that_join_take_their_gpus_and_compile_them_anew(platform, cache, monkeypatch):
    """Of several processes with GPUs, those that find nothing in the cache would wait for ever."""
    updates = {}
    monkeypatch.setattr(processes.jax.config, "update", updates.__setitem__)
    monkeypatch.setattr(processes.jax.distributed, "initialize", lambda **_: None)
    monkeypatch.setattr(processes.jax, "default_backend", lambda: platform)
    monkeypatch.setattr(processes.faulthandler, "disable", lambda: None)
    monkeypatch.setattr(processes, "is_one_of_several", lambda: True)
    monkeypatch.setattr(processes, "own_gpus", lambda _: "2,3")
    monkeypatch.setattr(processes, "_watch", lambda _: None)
    processes.join(coordinator_address="localhost:1234", num_processes=2, process_id=1)
    gpus = dict.fromkeys(("jax_cuda_visible_devices", "jax_rocm_visible_devices"), "2,3")
    assert updates == {"jax_enable_preemption_service": False} | gpus | cache


def test_a_process_alone_leads_and_asks_nobody():
    assert processes.is_lead()
    assert processes.process() == (0, 1)
    assert processes.gather("own") == ["own"]
    assert processes.from_lead(lambda: (1, 2)) == processes.lead_first(lambda: (1, 2)) == (1, 2)
    tree = {"leaf": jnp.ones(2)}
    assert processes.broadcast(tree) is tree


def test_what_is_broadcast_goes_in_pieces_and_comes_whole(monkeypatch):
    sent = []
    monkeypatch.setattr(processes, "is_one_of_several", lambda: True)
    monkeypatch.setattr(processes, "_PIECE", 16)
    monkeypatch.setattr(
        processes.multihost_utils, "broadcast_one_to_all", lambda piece: sent.append(len(piece)) or piece
    )
    tree = {"many": np.arange(9, dtype=np.float32), "one": np.int32(7)}
    found = processes.broadcast(tree)
    assert sent == [16, 16, 8]
    np.testing.assert_array_equal(found["many"], tree["many"])
    assert found["one"] == 7


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


def test_processes_that_never_met_are_told_of_the_names_of_their_hosts():
    met, never_met = "Gloo all-reduce failed: closed", "UNKNOWN: Gloo context initialization failed: refused"
    assert processes.loss_in_words(RuntimeError(met)) == f"another process died or left: {met}"
    assert "not to 127.0.1.1" in processes.loss_in_words(RuntimeError(never_met))


@pytest.mark.parametrize("share", [processes.lead_first, processes.from_lead])
def test_an_error_without_a_message_reaches_all_processes_too(share, monkeypatch):
    monkeypatch.setattr(processes, "is_one_of_several", lambda: True)
    monkeypatch.setattr(processes, "is_lead", lambda: True)
    monkeypatch.setattr(processes, "gather", lambda value: [value, None])

    def fail():
        raise ValueError

    with pytest.raises(ValueError, match=r"^ValueError\(\)$"):
        share(fail)
