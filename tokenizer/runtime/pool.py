"""Processes that take jobs of a command, and end with it."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager


@contextmanager
def process_pool(workers: int, begin: Callable[[], object] | None = None) -> Iterator[ProcessPoolExecutor]:
    """A pool of spawned processes, each of which calls `begin` first.

    Whatever ends the body early, Ctrl-C included, ends them at once: their jobs may take an hour, and nobody waits for
    the results any more. A command that is killed takes them along as well.
    """
    # spawn: a fork of a process whose threads have started may hang
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_begin,
                             initargs=(begin,)) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


def _begin(begin: Callable[[], object] | None) -> None:
    """In a worker."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent:
            parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
    if begin:
        begin()
