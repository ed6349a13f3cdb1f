"""Measuring calls on this machine: time side by side, peak memory, and what the machine is."""

from __future__ import annotations

import gc
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from fullres.errors import FullresError
from fullres.memory import return_freed_memory, use_huge_pages

Size = tuple[int, int]
Pass = Callable[[Size], Tensor]
"""Restores a picture of a height and width."""
Make = Callable[..., AbstractContextManager[Pass]]

TOO_LARGE = "memory does not hold a pass of that size; give a smaller --size"

# Time -----------------------------------------------------------------------------------------


def interleaved(
    calls: Mapping[str, Callable[[], object]], repeats: int, *, warm_up: bool = True
) -> dict[str, list[float]]:
    """Seconds of each call, turn by turn: every turn makes each call once, in changing order.

    One call of each beforehand is not counted, with `warm_up`.

    >>> {name: len(times) for name, times in interleaved({"a": int, "b": str}, 3).items()}
    {'a': 3, 'b': 3}
    """
    for call in calls.values() if warm_up else ():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats):
        for name in list(calls)[:: 1 if turn % 2 == 0 else -1]:
            times[name].append(seconds(calls[name]))
    return times


def seconds(call: Callable[[], object]) -> float:
    """Time that a call takes, work that it leaves to a GPU included."""
    _synchronise()
    start = time.perf_counter()
    call()
    _synchronise()
    return time.perf_counter() - start


def _uses_cuda() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _synchronise() -> None:
    if _uses_cuda():
        torch.cuda.synchronize()


def median_ratio(times: Mapping[str, Sequence[float]], over: str, under: str) -> float:
    """Median over turns of the ratio of two calls' times.

    >>> median_ratio({"a": [2.0, 3.0, 8.0], "b": [1.0, 1.0, 2.0]}, "a", "b")
    3.0
    """
    return statistics.median(a / b for a, b in zip(times[over], times[under], strict=True))


# Memory ---------------------------------------------------------------------------------------


def peak_memory_of(make: Make, *arguments: object, size: Size) -> int:
    """Bytes that a pass adds at its highest to what a process holds that is ready to run it.

    Measured, with arguments and errors, as by `first_pass`.
    """
    return first_pass(make, *arguments, size=size)[0]


def first_pass(make: Make, *arguments: object, size: Size) -> tuple[int, float]:
    """Bytes that a pass adds at its highest to what a process holds, and seconds that it takes.

    The pass runs in a process of its own, once at half the height and width, so that libraries
    are loaded and kernels compiled, and then at `size`. On the CPU it is resident memory, as the
    operating system counts it; on CUDA the memory that torch has allocated.

    Args:
        make: a function of a module that can be imported, which makes the pass.
        arguments: its arguments; they are pickled.
        size: height and width of the picture in pixels.

    Raises:
        FullresError: memory does not hold the pass, or the pass fails.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(_first_pass, make, arguments, size).result()
        except BrokenProcessPool:
            raise FullresError(TOO_LARGE) from None


def _first_pass(make: Make, arguments: Sequence[object], size: Size) -> tuple[int, float]:
    use_huge_pages()
    with make(*arguments) as run:
        run((max(size[0] // 2, 1), max(size[1] // 2, 1)))
        gc.collect()
        if _uses_cuda():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            took = seconds(lambda: run(size))
            return torch.cuda.max_memory_allocated() - held, took
        return_freed_memory()
        _forget_high_water()
        held = _resident()
        took = seconds(lambda: run(size))
        return max(_high_water() - held, 0), took


def _forget_high_water() -> None:
    """Have the kernel measure the highest resident memory from now on, where it can."""
    if sys.platform.startswith("linux"):
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return  # the first pass took less than the second will


def _resident() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def _high_water() -> int:
    """Most bytes of resident memory so far."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(ln for ln in status.read_text().splitlines() if ln.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import psutil

    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):  # Windows
        return int(info.peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


# Report ---------------------------------------------------------------------------------------


def machine(device: str = "auto") -> str:
    """Processor, cores, memory, GPU if it is used, and versions, in one line."""
    import psutil

    threads, cores = torch.get_num_threads(), psutil.cpu_count(logical=False) or 0
    facts = [
        f"{_processor()} ({torch.backends.cpu.get_cpu_capability()}, {cores} cores)",
        f"{threads} thread{'' if threads == 1 else 's'}",
        f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
    ]
    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        facts.append(torch.cuda.get_device_name(None if device == "auto" else device))
    facts += [f"torch {torch.__version__}", f"Python {platform.python_version()}"]
    return ", ".join([*facts, platform.system()])


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    r"""Lines of a Markdown table, each as soon as its row is known.

    >>> print(*table(["a", "b"], [["1", "2"]]), sep="\n")
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    yield f"| {' | '.join(header)} |"
    yield f"|{'---|' * len(header)}"
    for cells in rows:
        yield f"| {' | '.join(cells)} |"
