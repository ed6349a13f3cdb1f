"""Jobs of compiled kernels, shared among the threads that torch computes with.

Torch's OpenMP workers wait for their next turn by spinning. Threads beside them would find the
cores taken for the first milliseconds, which is as long as a local mean lasts; so the jobs run on
the workers themselves wherever GNU's interface to them can be found, and on our own threads
elsewhere. Numba's pool serves neither: two threads must not enter it at once.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import torch

Job = tuple[Any, ...]
"""A kernel that lets go of Python's lock, and its arguments."""

_Region = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def split(count: int, parts: int) -> list[tuple[int, int]]:
    """`count` things in at most `parts` runs of nearly equal length, as (first, last + 1)."""
    parts = max(1, min(parts, count))
    edges = [count * part // parts for part in range(parts + 1)]
    return list(pairwise(edges))


def spread(jobs: list[Job]) -> None:
    """Run the jobs on as many threads as torch uses, each taking the next one, until all ended.

    Raises what the first failing job raises; its thread takes no further job.
    """
    threads = torch.get_num_threads()
    waiting = iter(jobs)
    if min(threads, len(jobs)) < 2:
        _work(waiting)
        return
    failures: list[BaseException] = []

    def work(_: int | None) -> None:
        try:
            _known_to_python()
            _work(waiting)
        except BaseException as failure:  # noqa: BLE001 - must not leave a thread that is not ours
            failures.append(failure)

    _parallel()(work, threads)
    if failures:
        raise failures[0]


def _work(waiting: Iterator[Job]) -> None:
    for kernel, *arguments in waiting:
        kernel(*arguments)


_here = threading.local()


def _known_to_python() -> None:
    """Have Python remember a thread that it did not start.

    It forgets such a thread when a call returns, and setting it up anew at the next takes as long
    as a short job.
    """
    if not hasattr(_here, "known"):
        ctypes.pythonapi.PyGILState_Ensure()  # which, released never, lets go of nothing
        _here.known = True


@cache
def _parallel() -> Callable[[Callable[[int | None], None], int], None]:
    """What calls a function once on each of a number of threads, and returns when all have."""
    try:
        region = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):  # another OpenMP, or a system without a namespace
        return _pooled
    region.argtypes = (_Region, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    region.restype = None

    def parallel(work: Callable[[int | None], None], threads: int) -> None:
        region(_Region(work), None, threads, 0)

    return parallel


_pool: ThreadPoolExecutor | None = None


def _pooled(work: Callable[[int | None], None], threads: int) -> None:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="fullres")
    begun = [_pool.submit(work, None) for _ in range(threads - 1)]
    work(None)
    for future in begun:
        future.result()


def _forget_pool() -> None:
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)  # a forked child has none of the threads
