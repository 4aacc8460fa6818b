"""Recordings shared among processes, each with a session of its own; results in order."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import TypeVar

from cnngru_edge.models.errors import SessionError
from cnngru_edge.runtime.backends.open import open_session
from cnngru_edge.runtime.machine.libraries import import_fault
from cnngru_edge.runtime.session import Session

Group = TypeVar("Group")
Part = TypeVar("Part")

_STOPS = {signal.SIGINT, signal.SIGTERM}


def in_order(
    work: Callable[[Session, Group], Part], artefact: Path, groups: Sequence[Group], workers: int
) -> Iterator[Part]:
    """What `work` makes of each group, in their order, however many workers share them.

    Args:
        work: to be pickled if there are several workers: a function of a module, or a partial.
        artefact: opened once by each worker.
        groups: what is given to `work` at a time.
        workers: processes; with 1 it is this one.

    Raises:
        SessionError: a worker ended before its work.
    """
    if workers == 1:
        with open_session(artefact) as session:
            yield from (work(session, group) for group in groups)
        return
    # A spawned worker shares nothing, so ONNX Runtime's threads are not forked.
    context = get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _open_in_worker, (artefact,))
    # Workers are started from a thread that has the signals blocked: they are born with that, and
    # no stop interrupts it half-way.
    blocked = (signal.SIG_BLOCK, _STOPS)
    try:
        with ThreadPoolExecutor(1, "start", signal.pthread_sigmask, blocked) as starter:
            parts = starter.submit(pool.map, partial(_in_worker, work), groups).result()
        yield from parts
    except BrokenProcessPool as e:
        raise SessionError(
            "a worker ended before its work, as it does when memory is short; take fewer --workers"
        ) from e
    finally:
        pool.shutdown(cancel_futures=True)


_worker_session: Session


def _open_in_worker(artefact: Path) -> None:
    global _worker_session
    # A stop of the whole group is the parent's to answer: a worker that died of it while it sends
    # its result would leave the parent waiting for the rest.
    os.setsid()
    Thread(target=_end_with_parent, daemon=True).start()
    for number in _STOPS:
        signal.signal(number, signal.SIG_IGN)  # forgets one that came before
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the pool ends its workers with it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
    _worker_session = open_session(artefact)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _in_worker(work: Callable[[Session, Group], Part], group: Group) -> Part:
    try:
        return work(_worker_session, group)
    except Exception as e:
        if fault := import_fault(e):  # told from the frames, which the parent does not get
            raise fault from e
        raise
