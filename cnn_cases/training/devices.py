"""The one home of pmap and of jax.distributed: how devices, and processes, share the work of one training.

The state goes in and comes out as an ordinary pytree that is replicated over the devices, without a leading
device axis: `in_axes=None` and `out_axes=None`. With `out_axes=None` nothing checks that the devices agree,
so a step must reduce over the axis all that depends on its share of the batch.

Several processes, on one host or on many, can do one training (`join`). Each has its local devices and feeds
them its share of every batch; the pmap axis goes over the devices of all processes, in the order of the
processes. All of them run the same lines of the loop, so they meet in every collective. Process 0 leads: it
alone reads and writes the workdir, and the others get from it what they need to know. Where one dies, falls
silent or never comes, all others end: with exit code LOST, or where JAX or Gloo is quicker, by its abort.
"""

import contextlib
import faulthandler
import importlib.util
import json
import os
import re
import signal
import sys
import threading
import time

import jax
import jaxlib
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import multihost

AXIS = "batch"
LOST = 4  # exit code of a process whose training another one has left

# Seconds: between two signs of life; for process 0 to tell that another one gives none; for the others to end
# before process 0; and by which JAX, which aborts, is more patient than what is here.
_PAUSE, _TO_TELL, _TO_END, _JAX_LATER = 1, 3, 3, 30
_left = threading.Event()  # this process has come to its end, with the others or without them

# What XLA is told for CPUs, and the versions of jaxlib that know it: to give sums to YNNPACK, and to leave
# the barriers in its program that say what is computed once.
CPU_FLAGS = {
    "xla_cpu_experimental_ynn_fusion_type": "REDUCE",
    "xla_disable_hlo_passes": "cse_barrier_expander",
}
_KNOWN_BY = ("0.10.", "0.11.")
DETERMINISTIC_FLAG = "--xla_gpu_deterministic_ops=true"

# Launchers that `jax.distributed.initialize` knows: the variable that tells how many processes there are, and
# those that it needs besides. Slurm counts where `srun` started the process, not in the job's batch script.
_LAUNCHERS = {
    "Open MPI": ("OMPI_COMM_WORLD_SIZE", ("OMPI_MCA_orte_hnp_uri",)),
    "Slurm": ("SLURM_NTASKS", ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")),
}
_TPU_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")  # of a TPU pod: names, with commas between


def choose_cpu_flags():
    """Sets CPU_FLAGS for XLA, in this process and in those that it starts; to be called before JAX is used.

    XLA has two libraries for CPUs, YNNPACK and Eigen. Left alone it gives convolutions to the one and sums to
    neither; with the flag, Eigen has the convolutions and YNNPACK the sums. And it computes activations again
    wherever they are used, which costs more than to keep them; `models.layers.conv_general_dilated` marks
    those to be kept by barriers, which it would remove too early. What all that brings, `python -m
    benchmarks.flags` measures.

    A flag that XLA_FLAGS has already stays as it is. Nothing is set in other versions of jaxlib, which
    may not know it and abort; nor where JAX is installed for accelerators, whose compilers need no barriers
    to be left, or are those of another XLA.
    """
    for_cpus = not any(map(importlib.util.find_spec, ("libtpu", "jax_plugins")))
    if for_cpus and jaxlib.__version__.startswith(_KNOWN_BY):
        for name, value in CPU_FLAGS.items():
            if name not in os.environ.get("XLA_FLAGS", ""):
                _add_xla_flag(f"--{name}={value}")


def make_deterministic():
    """Makes runs on GPUs the same to the bit, in this process and in those that it starts.

    To be called before JAX is used. XLA then takes no kernel whose result depends on which thread is done
    first, and chooses kernels without timing them, so that each start takes the same. That costs speed.
    Another kind of GPU, number of devices or version of a package still gives other bits. CPUs and TPUs need
    no such switch, and for them nothing changes. Neither effect nor cost has been measured on a GPU yet.
    """
    _add_xla_flag(DETERMINISTIC_FLAG)


def _add_xla_flag(flag):
    # Behind what the user says: XLA takes the last of two.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()


def launched_processes(environment):
    """How many processes a launcher has started for this job, as far as it tells; 1 where it says nothing.

    Args:
      environment: `os.environ`.

    Raises:
      ValueError: a launcher's variable is no number, or Open MPI does not tell enough.
    """
    for launcher, (count, others) in _LAUNCHERS.items():
        if count in environment and all(name in environment for name in others):
            if not environment[count].isdecimal():
                raise ValueError(f"{count} = {environment[count]!r}, set by {launcher}, is not a number")
            # A shell in an allocation of Slurm's is a step of one task, and has the allocation's number.
            if launcher == "Slurm" and environment.get("SLURM_STEP_NUM_TASKS") == "1":
                return 1
            return int(environment[count])
    size = environment.get("OMPI_COMM_WORLD_SIZE", "1")
    if size != "1":
        raise ValueError(
            f"OMPI_COMM_WORLD_SIZE = {size!r}, set by Open MPI, which from version 5 on does not say where "
            "its processes meet: name coordinator_address, num_processes and process_id, or distributed = "
            "'off'"
        )
    hosts = next((environment[name] for name in _TPU_HOSTS if name in environment), "")
    return len(hosts.split(","))


def join(
    mode="auto",
    *,
    coordinator_address=None,
    num_processes=None,
    process_id=None,
    heartbeat_timeout_seconds=100,
    meeting_timeout_seconds=300,
):
    """Makes this process one of several that do one training, where it is; to be called before JAX is used.

    Args:
      mode: "auto", to join where the other arguments or a launcher's variables name more than one process;
        "on", to let `jax.distributed.initialize` find out, which also asks Kubernetes or the host of a TPU;
        "off", to be one process whatever a launcher says.
      coordinator_address, num_processes, process_id: see `jax.distributed.initialize`; all three, or none
        where a launcher tells.
      heartbeat_timeout_seconds: after which a process that is not heard of counts as dead, which ends all
        with exit code LOST.
      meeting_timeout_seconds: after which a process that has waited for the others to come ends likewise.

    Raises:
      ValueError: the arguments do not go together, or there is no launcher to ask.
    """
    explicit = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    missing = [name for name, value in explicit.items() if value is None]
    if 0 < len(missing) < len(explicit):
        raise ValueError(f"{', '.join(explicit)} go together; {' and '.join(missing)} missing")
    if not missing and mode == "off":
        raise ValueError("distributed = 'off' is for one process: name no coordinator_address with it")
    if not missing and not 0 <= process_id < num_processes:
        raise ValueError(f"process_id = {process_id} must be in [0, num_processes = {num_processes})")
    if not missing and not re.fullmatch(r".+:\d+", coordinator_address):
        raise ValueError(f"coordinator_address = {coordinator_address!r} must be host:port")
    for name, seconds in (("heartbeat", heartbeat_timeout_seconds), ("meeting", meeting_timeout_seconds)):
        if seconds < 1:
            raise ValueError(f"{name}_timeout_seconds = {seconds} must be 1 or more")
    if mode == "off" or (mode == "auto" and missing and launched_processes(os.environ) == 1):
        return
    # Its handler of SIGTERM would take the place of the loop's, which saves.
    jax.config.update("jax_enable_preemption_service", False)
    # JAX says why it aborts, and the stacks of all threads would bury that.
    faulthandler.disable()
    # Process 0 ends last (see `lose`); where a launcher counts, which one that is is not known yet.
    patience = meeting_timeout_seconds + (_TO_END if process_id == 0 else 0)
    with _alarm(patience, f"not all processes have come within {meeting_timeout_seconds} s"):
        try:
            jax.distributed.initialize(
                **explicit,
                heartbeat_timeout_seconds=heartbeat_timeout_seconds + _JAX_LATER,
                initialization_timeout=meeting_timeout_seconds + _JAX_LATER,
            )
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"the processes of this job cannot meet: {error}; name coordinator_address, num_processes "
                "and process_id, or use a launcher that JAX knows"
            ) from error
    # Here the devices start, and tell each other of themselves.
    with _alarm(
        patience, f"the devices of all processes have not started within {meeting_timeout_seconds} s"
    ):
        try:
            is_several = is_one_of_several()
        except RuntimeError as error:  # at once, for Python's way out would wait for the others
            tell(f"error: the devices of this process do not start: {error}")
            exit_at_once(2)
    if is_several:
        threading.Thread(target=_watch, args=[heartbeat_timeout_seconds], daemon=True).start()


def _watch(patience_seconds):
    """Meets the other processes every now and then; ends this one where another stays away."""
    meet = multihost.get_barrier_sync_fn()
    while not _left.wait(_PAUSE):
        try:
            # Where process 0 is silent, nobody tells that the time is over.
            with _alarm(patience_seconds + _TO_TELL, f"process 0 is silent for {patience_seconds} s"):
                meet(key="watch", timeout_ms=1000 * patience_seconds)
        except jax.errors.JaxRuntimeError as error:
            lose(f"another process died, or is silent for {patience_seconds} s: {error}")


@contextlib.contextmanager
def _alarm(seconds, message):
    """What is done within must be done in so many seconds, or this process ends with `message`."""
    timer = threading.Timer(seconds, _end, [message])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def lose(message):
    """Ends this process, as another one of its training is lost.

    Process 0 ends last: JAX aborts those who lose it.

    Args:
      message: of which the first sentence is told.
    """
    _let_the_others_end()
    _end(re.split(r"\. |\n", message)[0])


def _end(message):
    """Ends this process at once, whatever its main thread waits for."""
    if not _left.is_set():
        tell(f"error: {message}; start all again to go on")
        exit_at_once(LOST)


def _let_the_others_end():
    if is_lead():
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
                signal.signal(number, signal.SIG_IGN)  # there is nothing more to save
        time.sleep(_TO_END)


def leave(code, patience_seconds):
    """Called at the end of a process: ends it together with the other processes of its job, if it has any.

    Where they do not end as well, as after a mistake of this host alone, it ends without them. In either case
    it ends at once, without Python's way out, and process 0 ends last. On that way JAX waits for all as well,
    but then process 0, whom the others ask how it is, may be gone before they are, and they abort.

    Args:
      code: exit code.
      patience_seconds: how long to wait for the others.
    """
    if not is_one_of_several():
        return
    try:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            multihost.get_barrier_sync_fn()(key="leave", timeout_ms=1000 * patience_seconds)
        _left.set()
        _let_the_others_end()
    finally:  # on Ctrl-C, too
        exit_at_once(code)


def tell(message):
    """Prints a line on the standard error output; no reason to stop where nobody reads it any more."""
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)


def exit_at_once(code):
    """Ends this process without Python's way out, also where nobody reads any more what it has said."""
    try:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
    finally:
        os._exit(code)


def is_loss(error):
    """Whether an error means that another process has died or left. `_watch` finds out the rest."""
    # The second is NCCL's text for ncclRemoteError.
    signs = "Gloo", "remote process exited or there was a network error"
    return is_one_of_several() and any(sign in str(error) for sign in signs)


def refusal(error):
    """What to tell of an error that the user can mend; None for one of this project or of a package."""
    if isinstance(error, ValueError | OSError):
        return str(error)
    if not isinstance(error, jax.errors.JaxRuntimeError) or "RESOURCE_EXHAUSTED" not in str(error):
        return None
    return (
        f"a device has no memory left ({str(error).splitlines()[0]}); take a smaller batch_size or "
        "evaluation.batch_size, a larger num_microbatches, data.feed = 'stream', or fewer processes at a time"
    )


def is_one_of_several():
    """Whether several processes do this training; asks no device, which may take long to start."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_lead():
    """Whether this process is the one that reads and writes the workdir."""
    return not is_one_of_several() or jax.process_index() == 0


def process():
    """(index, count): which process this is, of how many."""
    return (jax.process_index(), jax.process_count()) if is_one_of_several() else (0, 1)


def gather(value):
    """What every process has, [value of process 0, value of process 1, ...], of what JSON can hold."""
    if not is_one_of_several():
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(text)))
    # A power of two, so that few shapes are compiled.
    padded = np.zeros(1 << int(sizes.max()).bit_length(), np.uint8)
    padded[: len(text)] = text
    texts = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(texts, sizes, strict=True)]


def from_lead(function):
    """What `function()` gives in process 0, which alone calls it, for all processes.

    Args:
      function: () -> what JSON can hold.

    Raises:
      ValueError: `function` raised ValueError or OSError; in all processes.
    """
    if not is_one_of_several():
        return function()
    outcome = gather(_outcome(function) if is_lead() else None)[0]
    if "error" in outcome:
        raise ValueError(outcome["error"])
    return outcome["value"]


def lead_first(function):
    """What `function()` gives here; process 0 calls it first, and the others when it is done.

    Raises:
      ValueError: `function` raised ValueError or OSError in any of the processes; in all of them.
    """
    if not is_one_of_several():
        return function()
    outcome = None
    for turn in (True, False):
        if is_lead() == turn:
            outcome = _outcome(function)
        for index, error in enumerate(gather(outcome and outcome.get("error"))):
            if error:
                raise ValueError(error if index == 0 else f"process {index}: {error}")
    return outcome["value"]


def _outcome(function):
    try:
        return {"value": function()}
    except (ValueError, OSError) as error:
        return {"error": str(error)}


def broadcast(tree):
    """The arrays of process 0 for all, bit for bit; in the others those of `tree` say shapes and types."""
    if not is_one_of_several():
        return tree
    leaves, structure = jax.tree.flatten(jax.device_get(tree))
    data = np.concatenate([np.frombuffer(leaf.tobytes(), np.uint8) for leaf in leaves])
    data = np.asarray(multihost_utils.broadcast_one_to_all(data))
    parts = np.split(data, np.cumsum([leaf.nbytes for leaf in leaves])[:-1])
    leaves = [
        np.frombuffer(part.tobytes(), leaf.dtype).reshape(leaf.shape)
        for part, leaf in zip(parts, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, leaves)


def of_all_processes(devices):
    """The devices of the pmap axis: those of the first process, then those of the second, and so on.

    Args:
      devices: the local ones that are used; with several processes, all there are.

    Raises:
      ValueError: the processes have not equally many.
    """
    if not is_one_of_several():
        return list(devices)
    counts = [len(jax.local_devices(index)) for index in range(jax.process_count())]
    if set(counts) != {len(devices)}:
        raise ValueError(f"the processes of a job must have equally many devices; they have {counts}")
    return [device for index in range(jax.process_count()) for device in jax.local_devices(index)]


def check_batch_size(key, batch_size, num_devices, num_microbatches=1):
    """Raises ValueError, with the nearest sizes that work, unless the batch can be split evenly."""
    parts = num_devices * num_microbatches
    if batch_size < 1 or batch_size % parts:
        lower = max(batch_size, 0) // parts * parts
        nearest = [size for size in (lower, lower + parts) if size > 0]
        over = f"{num_devices} devices" + (
            f" and num_microbatches = {num_microbatches}" * (num_microbatches > 1)
        )
        raise ValueError(
            f"{key} = {batch_size} cannot be split evenly over {over}; "
            f"the nearest sizes that can: {' and '.join(map(str, nearest))}"
        )


def pmap_train(train_steps, devices):
    """`steps.make_train_steps`' function over devices; the state that goes in is donated.

    (state, arrays, batches) -> (state, metrics), batches as `shard(..., axis=1)` gives them.
    """
    return jax.pmap(
        train_steps,
        AXIS,
        in_axes=(None, None, 0),
        out_axes=None,
        donate_argnums=0,
        devices=of_all_processes(devices),
    )


def vmap_train(train_steps):
    """The same function on one device, which takes the shares of all devices in turn; it donates nothing.

    For `jax.debug_nans`, which loses its way in a pmap (RecursionError, JAX 0.10). What comes back has the
    leading axis of the shares.
    """
    return jax.jit(jax.vmap(train_steps, in_axes=(None, None, 0), axis_name=AXIS))


def pmap_eval(eval_step, devices):
    """`steps.make_eval_step`'s function over devices; the batch as `shard(..., axis=0)` gives it."""
    return jax.pmap(
        eval_step, AXIS, in_axes=(None, None, 0), out_axes=None, devices=of_all_processes(devices)
    )


def pmap_predict(predict_step, devices):
    """`steps.make_predict_step`'s function over local devices; images as `shard(..., axis=0)` gives them.

    What comes back has the leading axis of the devices, too. Other processes have no part in it.
    """
    return jax.pmap(predict_step, AXIS, in_axes=(None, None, 0), out_axes=0, devices=devices)


def pmap_largest(devices):
    """(number, after) -> the largest of all processes' numbers, int32 on the devices: it may be read later.

    So a signal that comes to one process stops all at the same step, and no step waits for it. It is computed
    after the arrays `after`: where those of a step fail, as another process has died, this must not meet what
    is left of the step in the network, which Gloo aborts at.
    """

    def largest(number, after):
        number, _ = lax.optimization_barrier((number, after))  # what is not used, jit would leave out
        return lax.pmax(number, AXIS)

    over_devices = jax.pmap(
        largest, AXIS, in_axes=(0, None), out_axes=None, devices=of_all_processes(devices)
    )
    return lambda number, after: over_devices(np.full(len(devices), number, np.int32), after)


def shard(batch, num_devices, axis=0):
    """Splits the leaves of a process's batch along `axis`; its devices become the leading axis.

    [..., B, ...] -> [num_devices, ..., B / num_devices, ...]; the order of the examples is kept.
    """

    def split(leaf):
        shape = (*leaf.shape[:axis], num_devices, -1, *leaf.shape[axis + 1 :])
        return np.moveaxis(leaf.reshape(shape), axis, 0)  # no copy: images that stream are large

    return jax.tree.map(split, batch)


def replicate(tree, devices):
    """Puts a whole copy of every leaf on every one of the local devices."""
    sharding = NamedSharding(Mesh(np.array(devices), (AXIS,)), PartitionSpec())
    return jax.device_put(tree, sharding)


def calls_ahead(devices):
    """How many calls may be under way before the host waits for the first of them.

    Virtual CPU devices share threads: collectives of several calls at once can wait for each other for ever.
    """
    return 0 if devices[0].platform == "cpu" and len(of_all_processes(devices)) > 1 else 2
