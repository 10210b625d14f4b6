"""jax.distributed: how several processes, on one or more hosts, share one run.

Each process feeds its own devices their share of every batch (see `devices`). All processes run the same code
of the loop, so they meet in every collective. Only process 0 reads and writes the workdir; the others get
from it what they need to know. If a process dies, falls silent or never arrives, all others end: with exit
code LOST, or, if JAX or Gloo is quicker, by its abort.
"""

import contextlib
import faulthandler
import json
import os
import re
import signal
import sys
import threading
import time

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from cnn_cases import stopping

LOST = 4  # exit code after another process of the run is lost
HEARTBEAT_TIMEOUT_SECONDS, MEETING_TIMEOUT_SECONDS = 100, 300  # unless others are given; see `join`

# Seconds: between two signs of life; for process 0 to report that another process gives none; for the others
# to end before process 0; and by which JAX, which aborts, waits longer than this module.
_PAUSE, _TO_TELL, _TO_END, _JAX_LATER = 1, 3, 3, 30
_left = threading.Event()  # this process has reached its end, with or without the others

# Launchers that `jax.distributed.initialize` knows: the variable with the number of processes, and the others
# that it needs. Slurm counts only if `srun` started the process, not in the job's batch script.
_LAUNCHERS = {
    "Open MPI": ("OMPI_COMM_WORLD_SIZE", ("OMPI_MCA_orte_hnp_uri",)),
    "Slurm": ("SLURM_NTASKS", ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")),
}
_OPEN_MPI_LOCAL = ("OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")  # tasks on a node, and which
_TPU_HOSTS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")  # of a TPU slice: names, separated by commas
_TPU_SLICES = "MEGASCALE_NUM_SLICES"  # of equal size; a job can have several
_PIECE = 2**26  # bytes per broadcast: a device holds them several times, and counts in int32


def launched_processes(environment):
    """Returns how many processes a launcher has started for this job; 1 if no launcher says.

    Args:
      environment: `os.environ`.

    Raises:
      ValueError: a launcher's variable is not a number, or Open MPI does not provide enough.
    """
    for launcher, (count, others) in _LAUNCHERS.items():
        if count in environment and all(name in environment for name in others):
            if not environment[count].isdecimal():
                raise ValueError(f"{count} = {environment[count]!r}, set by {launcher}, is not a number")
            # A shell in a Slurm allocation is a step of one task, but has the allocation's number of tasks.
            if launcher == "Slurm" and environment.get("SLURM_STEP_NUM_TASKS") == "1":
                return 1
            return int(environment[count])
    size = environment.get("OMPI_COMM_WORLD_SIZE", "1")
    if size != "1":
        raise ValueError(
            f"OMPI_COMM_WORLD_SIZE = {size!r}, set by Open MPI, which since version 5 does not say where its "
            "processes connect: set coordinator_address, num_processes and process_id, or distributed = 'off'"
        )
    hosts = next((environment[name] for name in _TPU_HOSTS if name in environment), "")
    slices = environment.get(_TPU_SLICES, "1")
    if not slices.isdecimal():
        raise ValueError(f"{_TPU_SLICES} = {slices!r} is not a number")
    return len(hosts.split(",")) * max(1, int(slices))


def own_gpus(environment):
    """Returns which of its visible GPUs a process uses: "all", or numbers as in "2,3"; None: let JAX choose.

    JAX gives the first task of Slurm or Open MPI on a node the first GPU that it sees, the second task the
    second, and so on. That leaves GPUs idle if there are fewer tasks, and finds none if Slurm shows each task
    only its own GPU. This function divides the GPUs that all tasks of a node see evenly among them, if a
    variable lists them; else each task has one.

    Args:
      environment: `os.environ`.
    """
    _, of_slurm = _LAUNCHERS["Slurm"]
    if "JAX_LOCAL_DEVICE_IDS" in environment:
        return None
    if all(name in environment for name in _OPEN_MPI_LOCAL):  # perhaps in a shell of Slurm's
        tasks, index = (int(environment[name]) for name in _OPEN_MPI_LOCAL)
    elif all(name in environment for name in of_slurm):
        tasks, index = _tasks_on_node(environment), int(environment["SLURM_LOCALID"])
    else:
        return "all"
    if tasks == 1:
        return "all"
    seen = environment.get("CUDA_VISIBLE_DEVICES", environment.get("ROCR_VISIBLE_DEVICES"))
    if tasks is None:
        return None
    if seen is None:
        return str(index)
    count, of_node = len(seen.split(",")), environment.get("SLURM_GPUS_ON_NODE", "")
    if count == 1 or (of_node.isdecimal() and count < int(of_node)):
        return "all"  # other tasks see the other GPUs
    if count < tasks:
        return None
    return ",".join(map(str, share_of(range(count), index, tasks)))


def share_of(devices, index, count):
    """Returns the devices of one of `count` processes: equally many for each, or one that several share."""
    each = max(1, len(devices) // count)
    first = index * each % len(devices)
    return devices[first : first + each]


def _tasks_on_node(environment):
    """Returns how many tasks of this Slurm step run on this node; None if Slurm does not say."""
    counts = []  # "2(x3),1" means three nodes with two tasks each, and one with one
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(count)] * int(times or 1)
    node = environment.get("SLURM_NODEID", "")
    return counts[int(node)] if node.isdecimal() and int(node) < len(counts) else None


def join(
    mode="auto",
    *,
    coordinator_address=None,
    num_processes=None,
    process_id=None,
    heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_SECONDS,
    meeting_timeout_seconds=MEETING_TIMEOUT_SECONDS,
):
    """Connects this process to the other processes of its run, if there are any. Call it before JAX is used.

    Args:
      mode: "auto" connects if the other arguments or a launcher's variables name more than one process; "on"
        lets `jax.distributed.initialize` find out, which also asks Kubernetes or the TPU's host; "off" runs
        one process, whatever a launcher says.
      coordinator_address, num_processes, process_id: see `jax.distributed.initialize`; give all three, or
        none if a launcher provides them.
      heartbeat_timeout_seconds: after this time, a silent process counts as dead, which ends all processes
        with exit code LOST.
      meeting_timeout_seconds: after this time, a process that still waits for the others to arrive ends with
        the same code.

    Raises:
      ValueError: the arguments contradict each other, or there is no launcher to ask.
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
    if not missing and not _is_address(coordinator_address):
        raise ValueError(
            f"coordinator_address = {coordinator_address!r} must be host:port, with a port from 1 to 65535"
        )
    for name, seconds in (("heartbeat", heartbeat_timeout_seconds), ("meeting", meeting_timeout_seconds)):
        if seconds < 1:
            raise ValueError(f"{name}_timeout_seconds = {seconds} must be 1 or more")
    if mode == "off" or (mode == "auto" and missing and launched_processes(os.environ) == 1):
        return
    # Its SIGTERM handler would replace the loop's, which saves.
    jax.config.update("jax_enable_preemption_service", False)
    # The stacks of all threads would bury JAX's message about why it aborts.
    faulthandler.disable()
    # Process 0 ends last (see `end_after_loss`); with a launcher, it is not known yet which process that is.
    patience = meeting_timeout_seconds + (_TO_END if process_id == 0 else 0)
    where = "" if missing else f" to {coordinator_address}"
    late = f"not all processes have connected{where} within {meeting_timeout_seconds} s"
    with _ended_by_signals(), _alarm(patience, late):
        try:
            jax.distributed.initialize(
                **explicit,
                heartbeat_timeout_seconds=heartbeat_timeout_seconds + _JAX_LATER,
                initialization_timeout=meeting_timeout_seconds + _JAX_LATER,
            )
        except (ValueError, RuntimeError) as error:
            raise ValueError(
                f"the processes of this job cannot connect: {error}; set coordinator_address, num_processes "
                "and process_id, or use a launcher that JAX knows"
            ) from error
    gpus = own_gpus(os.environ)
    if gpus:
        for maker in ("cuda", "rocm"):
            jax.config.update(f"jax_{maker}_visible_devices", gpus)
    # The devices start here, and the processes learn of each other's devices.
    late = f"not all processes have started their devices within {meeting_timeout_seconds} s"
    with _ended_by_signals(), _alarm(patience, late):
        try:
            is_several = is_one_of_several()
        except RuntimeError as error:  # Python's normal exit would wait for the other processes
            tell(f"error: the devices of this process failed to start: {error}")
            exit_at_once(2)
    if is_several:
        if jax.default_backend() == "gpu":
            # JAX caches only what process 0 compiles. If the others use another directory, they find nothing
            # there, compile, and wait forever for process 0's share of XLA's autotuning: it has none to do.
            jax.config.update("jax_enable_compilation_cache", False)
        threading.Thread(target=_watch, args=[heartbeat_timeout_seconds], daemon=True).start()


def _watch(patience_seconds):
    """Meets the other processes at regular intervals; ends this process if another one stays away."""
    meet = multihost.get_barrier_sync_fn()
    while not _left.wait(_PAUSE):
        try:
            # If process 0 is silent, nobody reports the timeout.
            with _alarm(patience_seconds + _TO_TELL, f"process 0 has been silent for {patience_seconds} s"):
                meet(key="watch", timeout_ms=1000 * patience_seconds)
        except jax.errors.JaxRuntimeError as error:
            end_after_loss(f"another process died, or has been silent for {patience_seconds} s: {error}")


@contextlib.contextmanager
def _alarm(seconds, message):
    """Ends this process with `message` unless the body finishes within `seconds`."""
    timer = threading.Timer(seconds, _end, [message])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def _ended_by_signals():
    """Lets Ctrl-C and SIGTERM end this process in the body, where JAX waits and no Python handler runs."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():
        numbers = ()
    before = {one: signal.getsignal(one) for one in numbers if callable(signal.getsignal(one))}
    for one in before:
        signal.signal(one, signal.SIG_DFL)
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def end_after_loss(message):
    """Ends this process because another process of its run is lost.

    Process 0, where all processes meet, ends last: JAX aborts the processes that lose it.

    Args:
      message: only its first sentence is printed.
    """
    _let_the_others_end()
    _end(re.split(r"\. |\n", message)[0])


def _is_address(text):
    found = re.fullmatch(r".+:(\d{1,5})", text)
    return found is not None and 1 <= int(found[1]) <= 65535


def _end(message):
    """Ends this process at once, even if its main thread is waiting."""
    if not _left.is_set():
        tell(f"error: {message}; start all processes again to resume")
        exit_at_once(LOST)


def _let_the_others_end():
    # On TPUs, the processes need not meet at process 0. No public name says where they meet.
    if distributed.global_state.service is not None:
        if threading.current_thread() is threading.main_thread():
            for number in stopping.SIGNALS:
                signal.signal(number, signal.SIG_IGN)  # there is nothing more to save
        time.sleep(_TO_END)


def end_together(code, patience_seconds):
    """Ends this process together with the other processes of its job, if it has any. Call it last.

    If the others do not end, for example after an error on this host alone, it ends without them. Either way
    it ends at once, without Python's normal exit, and process 0 ends last. In a normal exit JAX waits for all
    processes, too, but process 0, which the others keep polling, may end before they do, and they abort.

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
    """Prints a line to standard error, and does not fail if nobody reads it any more."""
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)


def exit_at_once(code):
    """Ends this process without Python's normal exit, even if nobody reads its output any more."""
    try:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
    finally:
        os._exit(code)


def is_loss(error):
    """Returns whether an error means that another process has died or left. `_watch` detects other losses."""
    # The second is NCCL's text for ncclRemoteError.
    signs = "Gloo", "remote process exited or there was a network error"
    return is_one_of_several() and any(sign in str(error) for sign in signs)


def loss_in_words(error):
    """Returns what an error of `is_loss` means."""
    if "Gloo context initialization failed" in str(error):
        return (
            "the processes cannot connect, or one has died (on CPUs, a host must resolve its own name to an "
            f"address that the other hosts reach, not to 127.0.1.1; see /etc/hosts): {error}"
        )
    return f"another process died or left: {error}"


def is_one_of_several():
    """Returns whether several processes share this run; starts devices only if jax.distributed is in use."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_lead():
    """Returns whether this is process 0, which reads and writes the workdir."""
    return not is_one_of_several() or jax.process_index() == 0


def process():
    """Returns (index, count): the index of this process, and the number of processes."""
    return (jax.process_index(), jax.process_count()) if is_one_of_several() else (0, 1)


def gather(value):
    """Returns the values of all processes, [of process 0, of process 1, ...], which JSON can hold."""
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
    """Calls `function` in process 0 only, and returns its result in all processes.

    Args:
      function: () -> a value that JSON can hold.

    Raises:
      ValueError: in all processes, if `function` raised ValueError or OSError.
    """
    if not is_one_of_several():
        return function()
    outcome = gather(_outcome(function) if is_lead() else None)[0]
    if "error" in outcome:
        raise ValueError(outcome["error"])
    return outcome["value"]


def lead_first(function):
    """Calls `function` in process 0, then in the others; returns its result in this process.

    Raises:
      ValueError: in all processes, if `function` raised ValueError or OSError in any of them.
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
        return {"error": str(error) or repr(error)}


def broadcast(tree):
    """Sends process 0's arrays to all processes, bit for bit; the others' `tree` gives shapes and types."""
    if not is_one_of_several():
        return tree
    leaves, structure = jax.tree.flatten(jax.device_get(tree))
    data = np.concatenate([np.frombuffer(leaf.tobytes(), np.uint8) for leaf in leaves])
    pieces = [data[first : first + _PIECE] for first in range(0, len(data), _PIECE)]
    data = np.concatenate([multihost_utils.broadcast_one_to_all(piece) for piece in pieces])
    parts = np.split(data, np.cumsum([leaf.nbytes for leaf in leaves])[:-1])
    leaves = [
        np.frombuffer(part.tobytes(), leaf.dtype).reshape(leaf.shape)
        for part, leaf in zip(parts, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, leaves)
