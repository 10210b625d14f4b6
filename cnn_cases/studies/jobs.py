"""Runs the groups of a sweep: one after another in this process, or several side by side in processes.

Both ways yield (name of the run, its outcome in words) as runs end. Processes share the cores of a CPU, each
with threads for its share. XLA's rounding of sums depends on how its threads split them, so a run gives the
same bits both ways only with equally many threads. Processes divide several GPUs, and share a single one.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys

import jax

from cnn_cases import stopping
from cnn_cases.training import devices, logbook, loop, processes, programs, provenance, runtime

_POLL_SECONDS = 0.2


def run_here(groups, workdir, local=None):
    """Runs the groups one after another in this process.

    Args:
      groups: lists of runs (`plan.Run`) that differ only in the seed, and so share a compilation.
      workdir: the directory that holds a directory for each run, named after it.
      local: the devices to use; None for all devices of this machine.

    Raises:
      ValueError: a run is invalid, or its directory belongs to another config.
      InterruptedRun: SIGTERM, SIGINT or SIGUSR2 arrived and the current run was saved.
    """
    for runs in groups:
        program = None
        for run in runs:
            run_dir = workdir / run.name
            done = logbook.read_result(run_dir) is not None
            if not done and program is None:
                program = programs.make_program(run.config, local)
            try:
                result = loop.train_and_evaluate(run.config, run_dir, program=program, show_progress=False)
            except loop.DivergedError as error:
                result = {"status": "diverged", "step": error.step}
            yield run.name, format_outcome(result, finished_before=done)
        if program is not None:
            program = None
            jax.clear_caches()  # otherwise JAX would keep compiled code and, with it, the data set


def format_outcome(result, *, finished_before=False):
    """The outcome of a run, from its result.json, in words."""
    if result["status"] == "diverged":
        return f"diverged at step {result['step']}"
    metrics = loop.format_metrics(result["metrics"])
    return metrics + (" (finished before)" if finished_before else f" ({result['seconds']:.1f} s)")


def share_accelerators():
    """Keeps processes that share an accelerator from each reserving most of its memory.

    Call this before JAX is used, since this process takes a part of the memory too.

    Raises:
      ValueError: the accelerator is a TPU, which has room for one process only: this one.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if jax.default_backend() == "tpu":
        raise ValueError("several processes cannot share a TPU; leave --jobs or --cluster=local out")


def run_side_by_side(groups, workdir, num_jobs):
    """Runs `num_jobs` groups at a time, each in a process; see `run_here`.

    Raises:
      ChildProcessError: a process died, or ended after a signal that was sent to it alone.
      RuntimeError: a process failed with an error that is not the user's, and has printed it.
    """
    context = multiprocessing.get_context("spawn")  # a forked process can hang if JAX runs in its parent
    todo = context.Queue()
    for runs in (*groups, *[None] * num_jobs):
        todo.put(runs)
    arguments = (workdir, _threads_each(num_jobs), num_jobs)
    workers = {}  # by pipe, one each: a worker that is killed while sending does not block the rest
    with stopping.stop_signals() as stop:
        # Ctrl-C in a terminal also reaches the workers that have not come to `setpgrp` yet.
        with stopping.blocked(signal.SIGINT):
            for index in range(num_jobs):
                news, telling = context.Pipe(duplex=False)
                workers[news] = context.Process(target=_work, args=(todo, telling, index, *arguments))
                workers[news].start()
                telling.close()  # in this process, so that the pipe closes when the worker ends
        try:
            yield from _collect(workers, stop)
        finally:
            for worker in workers.values():
                worker.terminate()  # a run that gets SIGTERM saves and ends
            for worker in workers.values():
                worker.join()
            todo.cancel_join_thread()  # otherwise this process would wait until the queue is emptied
    if stop.number:
        for news in workers:
            while _take(news):  # reports still in the pipe, for example that the disk is full
                pass
        name = signal.Signals(stop.number).name
        raise stopping.InterruptedRun(
            f"{name}: the current runs were saved; start again to resume", stop.number
        )


def _threads_each(num_jobs):
    """The number of XLA's threads per process: an equal share, since more threads slow all processes down.

    None leaves the number to the user, if they have set it, or to XLA, if virtual devices need more threads
    or if threads only compile for an accelerator.
    """
    if jax.default_backend() != "cpu":
        return None
    if "PJRT_NPROC" in os.environ or "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return None
    return max(1, provenance.cpu_threads() // num_jobs)


def own_devices(index, num_jobs):
    """The local devices for one of several processes; on a CPU None, for all of them.

    CPU devices are virtual: processes share the cores whichever devices they use.
    """
    if jax.default_backend() == "cpu":
        return None
    return processes.share_of(devices.local_devices(), index, num_jobs)


def _collect(workers, stop):
    """Yields what the workers report until all have ended or a signal has arrived."""
    running = set(workers)
    while running and not stop.number:
        for news in multiprocessing.connection.wait(running, timeout=_POLL_SECONDS):
            if words := _take(news):
                yield words
                continue
            running.remove(news)
            workers[news].join()
            code = workers[news].exitcode
            if code == 1 and not stop.number:
                raise RuntimeError("a process of the sweep failed, see above")
            if code and not stop.number:
                hint = ", perhaps for lack of memory: try fewer --jobs" if code == -signal.SIGKILL else ""
                raise ChildProcessError(
                    f"a process of the sweep died with exit code {code}{hint}; start again to resume"
                )


def _take(news):
    """The next report of a worker, None if there are no more; raises ValueError if it is a refusal."""
    try:
        kind, *words = news.recv()
    except (EOFError, OSError):  # the worker ended between two messages, or within one
        return None
    if kind == "refused":
        raise ValueError(*words)
    return words


def _work(todo, telling, index, workdir, num_threads, num_jobs):
    """Runs groups until none are left; the main function of a process of `run_side_by_side`."""
    os.setpgrp()  # Ctrl-C in a terminal reaches only the parent, which then sends SIGTERM
    # Otherwise the runs of a parent that was killed would go on and stay locked.
    stopping.end_with_parent(by=lambda: os.kill(os.getpid(), signal.SIGTERM))
    if num_threads:
        os.environ["PJRT_NPROC"] = str(num_threads)  # XLA reads it when it starts, later
    runtime.collect_garbage_rarely()
    runtime.separate_compilation_cache()
    try:
        while (runs := todo.get()) is not None:
            for ended in run_here([runs], workdir, own_devices(index, num_jobs)):
                telling.send(("ended", *ended))
    except Exception as error:
        refusal = devices.message_for_user(error)
        if refusal is None:
            raise
        with contextlib.suppress(BrokenPipeError):  # the parent was killed
            telling.send(("refused", refusal))
    except stopping.InterruptedRun as interruption:
        processes.tell(interruption)
        sys.exit(128 + interruption.signal_number)
