"""Worker processes: tasks run in other processes, or at once in the calling one, through the same interface."""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

import torch

from .errors import UserError

FEW_TASKS = 200  # are done in less time than workers need to start
MOST_WORKERS = 16


class InThisProcess(Executor):
    """Runs each task when it is submitted."""

    def submit(self, fn: Callable, /, *args: Any, **kwargs: Any) -> Future:
        """A future that is done."""
        future: Future = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def read_ahead(items: Iterable, count: int) -> Iterator:
    """The items in their order, each when up to `count` further ones were requested: those can be tasks of workers."""
    waiting: deque = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()


def usable_cores(local_processes: int) -> int:
    """Cores for each of the processes of a run on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // local_processes)


def default_workers(device: torch.device | str, num_tasks: int) -> tuple[int, str]:
    """The number of workers for the tasks of this process, and the reason for it."""
    cores = usable_cores(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))  # set by launchers
    if num_tasks < FEW_TASKS:
        return 0, f"only {num_tasks} slices"
    if torch.device(device).type == "cpu":
        return min(1, cores - 1), f"{cores} cores, on which the model runs too"
    return min(cores - 1, MOST_WORKERS), f"{cores} cores beside {torch.device(device).type}"


def worker_context(module: str) -> Any:
    """How workers are started: not by forking this process, whose CUDA and locked locks would not survive that.

    Args:
        module: imported once, by the server that the workers are forked from. Otherwise each would import it for
            itself, and PyTorch's `DataLoader` would wait for one worker after the other. Without effect where there
            is no such server.
    """
    name = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(name)
    if name == "forkserver":
        context.set_forkserver_preload([module])
    return context


@contextmanager
def start_workers(count: int) -> Iterator[Executor]:
    """An executor with `count` worker processes; with 0 the tasks run in this process.

    Functions and arguments must be picklable. Exceptions of a task are raised by its future.

    Raises:
        UserError: a worker process ended before its task was done.
    """
    if count == 0:
        yield InThisProcess()
        return
    try:
        context = worker_context("probabilistic_sam.evaluation")
        with ProcessPoolExecutor(count, mp_context=context, initializer=_set_up) as executor:
            try:
                yield executor
            except BaseException:
                executor.shutdown(cancel_futures=True)
                raise
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process ended before its task was done, perhaps for lack of memory; accepted: fewer workers"
        ) from error


def _set_up() -> None:
    torch.set_num_threads(1)
    # A killed parent cannot end its workers, which would wait for tasks for ever
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
