"""How much memory is free, how much a pass of a network needs, and cheaper pages."""

from __future__ import annotations

import ctypes
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

if TYPE_CHECKING:
    from torch._subclasses import FakeTensorMode


def free_memory(device: torch.device) -> int:
    """Bytes that a pass on `device` may still take.

    On the CPU this is what the operating system calls available, or what the control group that
    holds the process leaves if that is less; on CUDA what the driver has left, plus what torch
    keeps in its cache unused.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    import psutil

    available = int(psutil.virtual_memory().available)
    if device.type == "mps":
        left = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
        available = min(available, left)
    return min([available, *_control_group_rooms()])


def _control_group_rooms(
    groups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")
) -> list[int]:
    """Bytes left under the memory limit of each control group around this process."""
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return []
    rooms = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, files = mount, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = mount / "memory"
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        inner = base / path.lstrip("/")
        for folder in (inner, *inner.parents):
            if folder.is_relative_to(base):
                rooms += _room(folder, *files)
    return rooms


def _room(group: Path, limit: str, used: str, cache: str) -> list[int]:
    try:
        most = int((group / limit).read_text())  # "max" is no limit
        statistics = (group / "memory.stat").read_text().split()
        reclaimable = dict(zip(statistics[::2], statistics[1::2], strict=True)).get(cache, "0")
        return [most - int((group / used).read_text()) + int(reclaimable)]
    except (OSError, ValueError):
        return []


def use_huge_pages() -> None:
    """Have torch ask for huge pages, where Linux grants them, unless the user decided otherwise.

    The kernel clears every page of a new tensor when it is first touched. With pages of 4 KB that
    took more than half of the time of a 12-megapixel restoration, measured on a virtual machine.
    Has to come before torch allocates its first tensor; later it has no effect.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # of glibc's malloc.h
_SMALL, _LARGE = 128 * 2**10, 32 * 2**20
"""Bytes from which on glibc returns a block at first, and once it has seen such blocks freed."""
_keepers = 0
_keepers_lock = Lock()


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Have the C library keep what tensors free for the tensors that follow.

    By default glibc returns every large block to the kernel, which clears each of its pages anew
    when the next tensor touches it: a third to a half of the time of a pass, measured on a virtual
    machine. Kept blocks save that, but fragment: the process takes 1.7 to 3.2 times the memory of
    the tensors alive. When the last of those who asked leaves, all is returned. Does nothing
    without glibc.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    _keep(libc, +1)
    try:
        yield
    finally:
        _keep(libc, -1)


def _keep(libc: Any, more: int) -> None:
    global _keepers
    with _keepers_lock:
        _keepers += more
        if _keepers:
            libc.mallopt(_M_MMAP_MAX, 0)
            libc.mallopt(_M_TRIM_THRESHOLD, -1)
        else:
            _return(libc, _LARGE)
            libc.malloc_trim(0)


def _return(libc: Any, size: int) -> None:
    """Return blocks from a size on."""
    libc.mallopt(_M_MMAP_MAX, 65536)
    libc.mallopt(_M_MMAP_THRESHOLD, size)
    libc.mallopt(_M_TRIM_THRESHOLD, 2 * size)


@contextmanager
def freed_memory_returned(*, all_of_it: bool = False) -> Iterator[None]:
    """Within `freed_memory_kept`, go back to what the C library does by itself.

    It returns blocks of 32 MB and more: a pass takes little more than its tensors, and parts of
    maps still find memory that is ready. With `all_of_it` blocks of 128 KB and more, which shows
    what a pass needs.
    """
    libc = _glibc()
    if libc is None or not _keepers:
        yield
        return
    _return(libc, _SMALL if all_of_it else _LARGE)
    try:
        yield
    finally:
        _keep(libc, 0)


def return_freed_memory() -> None:
    """Give back to the kernel what the C library has kept of freed memory."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


@cache
def _glibc() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None


def peak_memory(
    forward: Callable[[Tensor], Tensor], shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> int:
    """Most bytes of tensors alive at once during `forward`, input and output included.

    The pass runs on fake tensors: it computes nothing and allocates nothing, however large the
    shape (B, C, H, W). A network that looks at values cannot run so: it is measured in a real pass
    on a part of at most 256 × 256, and the result is scaled by the number of pixels.
    """
    from torch._subclasses import FakeTensorMode

    from fullres.shadow import quiet

    try:
        with quiet():
            mode = FakeTensorMode(allow_non_fake_inputs=True)
            return _measured(forward, shape, dtype, device, mode)
    except (RuntimeError, TypeError, ValueError):
        # tensors without values fail in any of these ways; a true fault the real pass raises again
        height, width = (min(side, 256) for side in shape[-2:])
        small = _measured(forward, (*shape[:-2], height, width), dtype, device, None)
        return small * shape[-2] * shape[-1] // (height * width)


def _measured(
    forward: Callable[[Tensor], Tensor],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    mode: FakeTensorMode | None,
) -> int:
    from fullres.shadow import shadow

    run = shadow(forward, mode) if isinstance(forward, nn.Module) else forward
    live = _LiveStorages()
    with torch.inference_mode(), mode or nullcontext(), live:
        run(torch.zeros(shape, dtype=dtype, device=device))
    return live.peak


class _LiveStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums the storages that operators return, from their first use until they are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive: dict[int, int] = {}
        self.total = 0
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._enter(value.untyped_storage())
        return result

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.alive:
            return
        self.alive[key] = storage.nbytes()
        self.total += storage.nbytes()
        self.peak = max(self.peak, self.total)
        weakref.finalize(storage, self._leave, key)

    def _leave(self, key: int) -> None:
        self.total -= self.alive.pop(key)
