"""The runs of a sweep, in groups: one after another here, or several groups side by side in processes.

Both ways yield (name of the run, what it gave in words) as runs end. Processes share the cores of a CPU, each
with threads for its part of them, and XLA rounds its sums as its threads split them: a run gives the same
bits either way only with as many threads. Several GPUs are divided among them; a single one they all use.
"""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading

import jax

from cnn_cases import command
from cnn_cases.training import devices, logbook, loop, processes, programs, provenance, stopping

_POLL_SECONDS = 0.2


def run_here(groups, workdir, local=None):
    """Runs the groups one after another in this process.

    Args:
      groups: lists of runs (`plan.Run`) that differ in the seed alone, and so share a compilation.
      workdir: the directory in which each run has one of its name.
      local: the devices to use; None for all of this machine.

    Raises:
      ValueError: a run is not possible, or its directory belongs to another config.
      InterruptedRun: SIGTERM, SIGINT or SIGUSR2 came and the run at hand was saved.
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
            jax.clear_caches()  # or JAX would keep what was compiled, and with it the data set


def format_outcome(result, *, finished_before=False):
    """What a run gave, of its result.json, in words."""
    if result["status"] == "diverged":
        return f"diverged at step {result['step']}"
    metrics = loop.format_metrics(result["metrics"])
    return metrics + (" (finished before)" if finished_before else f" ({result['seconds']:.1f} s)")


def share_accelerators():
    """Has processes that share an accelerator not each reserve most of its memory.

    To be called before JAX is used, for this process has a part of the memory too.

    Raises:
      ValueError: it is a TPU, which has room for one process, and that is this one.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if jax.default_backend() == "tpu":
        raise ValueError("processes side by side cannot share a TPU; leave --jobs or --cluster=local out")


def run_side_by_side(groups, workdir, num_jobs):
    """Runs `num_jobs` groups at a time, each in a process; see `run_here`.

    Raises:
      ChildProcessError: a process died, or was ended by a signal of its own.
      RuntimeError: a process failed by an error that is no user's, and has told it.
    """
    context = multiprocessing.get_context("spawn")  # a fork of a process in which JAX runs can hang
    todo = context.Queue()
    for runs in (*groups, *[None] * num_jobs):
        todo.put(runs)
    arguments = (workdir, _threads_each(num_jobs), num_jobs)
    workers = {}  # by what they tell, a pipe each: one that is ended while it tells holds up no other
    for index in range(num_jobs):
        news, telling = context.Pipe(duplex=False)
        workers[news] = context.Process(target=_work, args=(todo, telling, index, *arguments))
        workers[news].start()
        telling.close()  # here, so that the pipe ends with the process
    with stopping.stop_signals() as stop:
        try:
            yield from _collect(workers, stop)
        finally:
            for worker in workers.values():
                worker.terminate()  # a training that gets SIGTERM saves and ends
            for worker in workers.values():
                worker.join()
            todo.cancel_join_thread()  # or this process would wait for somebody to take what is left of it
    if stop.number:
        for news in workers:
            while _take(news):  # what was still to be told, as that the disk is full
                pass
        name = signal.Signals(stop.number).name
        raise stopping.InterruptedRun(
            f"{name}: the runs at hand were saved; start again to go on", stop.number
        )


def _threads_each(num_jobs):
    """XLA's threads of each of so many processes: their share, for threads beyond it make all of them slower.

    None leaves their number to the user, who has set it, or to XLA, where virtual devices need more, or where
    threads do not compute, but compile for an accelerator.
    """
    if jax.default_backend() != "cpu":
        return None
    if "PJRT_NPROC" in os.environ or "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return None
    return max(1, provenance.cpu_threads() // num_jobs)


def own_devices(index, num_jobs):
    """The local devices for one of several processes; None, for all, where they are a CPU's.

    Those are virtual: processes share its cores, whichever they take.
    """
    return (
        None
        if jax.default_backend() == "cpu"
        else processes.share_of(devices.local_devices(), index, num_jobs)
    )


def _collect(workers, stop):
    """Yields what the workers tell until all have ended or a signal has come."""
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
                hint = ", as where memory is full: try fewer --jobs" if code == -signal.SIGKILL else ""
                raise ChildProcessError(
                    f"a process of the sweep died with exit code {code}{hint}; start again to go on"
                )


def _take(news):
    """What a worker tells next, None where it tells no more; raises ValueError where that is a refusal."""
    try:
        kind, *words = news.recv()
    except (EOFError, OSError):  # between two messages, or within one
        return None
    if kind == "refused":
        raise ValueError(*words)
    return words


def _work(todo, telling, index, workdir, num_threads, num_jobs):
    """Runs groups until there are no more: the life of a process of `run_side_by_side`."""
    os.setpgrp()  # Ctrl-C on a terminal goes to the parent alone, which then asks for an end by SIGTERM
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if num_threads:
        os.environ["PJRT_NPROC"] = str(num_threads)  # what XLA, which starts later, looks at
    command.collect_garbage_rarely()
    command.separate_compilation_cache()
    try:
        while (runs := todo.get()) is not None:
            for ended in run_here([runs], workdir, own_devices(index, num_jobs)):
                telling.send(("ended", *ended))
    except Exception as error:
        refusal = devices.message_for_user(error)
        if refusal is None:
            raise
        with contextlib.suppress(BrokenPipeError):  # of a parent that was killed
            telling.send(("refused", refusal))
    except stopping.InterruptedRun as interruption:
        processes.tell(interruption)
        sys.exit(128 + interruption.signal_number)


def _end_with_parent():
    """Asks for an end in place of a parent that was killed; else the runs would go on, and stay locked."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)
