import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from cnn_cases.training import devices


@pytest.mark.parametrize(("size", "nearest"), [(30, "28 and 32"), (3, "4"), (0, "4"), (-5, "4")])
def test_a_batch_that_cannot_be_split_is_refused_with_the_nearest_sizes(size, nearest):
    with pytest.raises(ValueError, match=f"batch_size = {size} .* over 4 devices; .*: {nearest}$"):
        devices.check_batch_size("batch_size", size, 4)


@pytest.mark.parametrize("size", [4, 128])
def test_a_batch_that_can_be_split_is_accepted(size):
    devices.check_batch_size("batch_size", size, 4)


def test_shards_keep_the_order_of_examples():
    batch = {"index": np.arange(8), "image": np.arange(16).reshape(8, 2)}
    shards = devices.shard(batch, 4)
    assert shards["image"].shape == (4, 2, 2)
    np.testing.assert_array_equal(shards["index"].reshape(-1), batch["index"])
    steps = devices.shard({"index": np.arange(24).reshape(3, 8)}, 4, axis=1)["index"]
    assert steps.shape == (4, 3, 2)
    np.testing.assert_array_equal(steps[1], [[2, 3], [10, 11], [18, 19]])


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
    assert devices.launched_processes(environment) == count


def test_a_launchers_count_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="SLURM_NTASKS = 'two', set by Slurm, is not a number"):
        devices.launched_processes(SLURM | {"SLURM_NTASKS": "two"})


def test_an_open_mpi_that_does_not_tell_where_to_meet_is_refused():
    with pytest.raises(ValueError, match=r"OMPI_COMM_WORLD_SIZE = '2', .* name coordinator_address"):
        devices.launched_processes({"OMPI_COMM_WORLD_SIZE": "2", "PMIX_RANK": "0"})


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
        devices.join(**(settings if "num_processes" in settings else whole | settings))


@pytest.mark.parametrize("flags", [None, "--xla_gpu_deterministic_ops=false --xla_cpu_use_onednn=true"])
def test_the_switch_for_reproducible_bits_is_xlas_and_keeps_what_the_user_says(flags, monkeypatch):
    if flags is None:
        monkeypatch.delenv("XLA_FLAGS")
    else:
        monkeypatch.setenv("XLA_FLAGS", flags)
    devices.make_deterministic()
    words = os.environ["XLA_FLAGS"].split()
    assert words == [*(flags or "").split(), "--xla_gpu_deterministic_ops=true"]


YNNPACK = "--xla_cpu_experimental_ynn_fusion_type=REDUCE"
BARRIERS = "--xla_disable_hlo_passes=cse_barrier_expander"


@pytest.mark.parametrize(
    ("version", "flags", "added"),
    [
        ("0.10.2", "", [YNNPACK, BARRIERS]),
        ("0.11.2", "--xla_cpu_use_onednn=true", [YNNPACK, BARRIERS]),
        ("0.10.2", "--xla_cpu_experimental_ynn_fusion_type=DOT", [BARRIERS]),
        ("0.10.2", "--xla_disable_hlo_passes=dce", [YNNPACK]),
        ("0.12.0", "", []),
        ("0.9.1", "", []),
    ],
)
def test_flags_for_cpus_are_set_where_xla_knows_them_and_the_user_says_nothing(
    version, flags, added, monkeypatch
):
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setattr("jaxlib.__version__", version)
    devices.choose_cpu_flags()
    assert os.environ["XLA_FLAGS"].split() == [*flags.split(), *added]


@pytest.mark.parametrize("package", ["libtpu", "jax_plugins"])
def test_there_are_none_where_jax_is_installed_for_accelerators(package, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == package)
    devices.choose_cpu_flags()
    assert os.environ["XLA_FLAGS"] == ""


def test_a_barrier_is_kept_until_xla_has_chosen_what_to_compute_twice():
    def twice(x):
        kept = lax.optimization_barrier(jnp.maximum(x * x + 1, 3))
        return kept.T, kept * 2

    program = jax.jit(twice).lower(jnp.ones((64, 64))).compile().as_text()
    assert len(re.findall(r" maximum\(", program)) == 1


def test_a_process_alone_leads_and_asks_nobody():
    assert devices.is_lead()
    assert devices.process() == (0, 1)
    assert devices.gather("own") == ["own"]
    assert devices.from_lead(lambda: (1, 2)) == devices.lead_first(lambda: (1, 2)) == (1, 2)
    tree = {"leaf": jnp.ones(2)}
    assert devices.broadcast(tree) is tree


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
    monkeypatch.setattr(devices, "is_one_of_several", lambda: several)
    assert devices.is_loss(RuntimeError(text)) is lost


def test_a_full_memory_is_told_from_other_errors():
    with pytest.raises(jax.errors.JaxRuntimeError) as full:
        jnp.zeros(2**50, jnp.uint8)
    assert re.match(
        r"a device has no memory left \(.*\); take a smaller batch_size", devices.refusal(full.value)
    )
    assert devices.refusal(jax.errors.JaxRuntimeError("INTERNAL: a bug")) is None
    assert devices.refusal(TypeError("RESOURCE_EXHAUSTED")) is None
    assert devices.refusal(ValueError("RESOURCE_EXHAUSTED")) == "RESOURCE_EXHAUSTED"


def test_the_state_goes_round_as_an_ordinary_replicated_tree():
    four = jax.devices()[:4]

    def step(state, arrays, batch):
        return state + lax.psum((arrays[0] * batch).sum(), devices.AXIS), lax.psum(1, devices.AXIS)

    train = devices.pmap_train(step, four)
    state = devices.replicate(jnp.float32(0), four)
    arrays = devices.replicate(np.float32([2]), four)
    for _ in range(3):
        donated = state
        state, count = train(state, arrays, devices.shard(np.arange(8, dtype=np.float32), 4))
        assert donated.is_deleted()
    assert state.shape == ()
    assert (float(state), int(count)) == (3 * 2 * 28, 4)
    assert state.sharding.is_fully_replicated
    assert len(state.devices()) == 4
