"""The calls of a pass that take many positions together, as functions or within torch's modules."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fullres.local.functional import Aliases, note_aliases, reduction
from fullres.local.reach import Reach
from fullres.local.sites import Site, calling

_RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}


@dataclass(frozen=True)
class Call:
    """A call that may be global, as seen in one pass."""

    module: nn.Module
    """The module whose forward made it."""
    site: Site | None
    """Where; None if the module is one of torch's own."""
    name: str
    """Of the function."""
    extents: Mapping[str, int]
    """How much the operations that it comes down to take together, by their names."""
    map: tuple[int, ...] | None
    """Shape (B, C, H, W) of the map that it reduces, where it has a local form."""
    failed: bool = False
    """Whether it raised."""


@dataclass
class _Record:
    """A call under way."""

    name: str
    map: tuple[int, ...] | None = None
    completes: Tensor | None = None
    """What another call has reduced along one axis already."""
    extents: dict[str, int] = field(default_factory=dict)

    def add(self, operation: str, extent: int) -> None:
        self.extents[operation] = max(extent, self.extents.get(operation, 0))


@dataclass
class _Half:
    """A map reduced along one axis, and what became of it."""

    result: Tensor
    call: Call
    completed: bool = False
    used: bool = False
    """Whether by anything but the call that completes it."""


class Watch(TorchFunctionMode):
    """Notes the calls of a pass that may be global.

    Args:
        inputs: what the pass is made on.

    `beneath` sees the operations that calls come down to; it belongs inside of every other mode.
    """

    def __init__(self, inputs: Any) -> None:
        super().__init__()
        self.beneath = Reach(inputs, self._seen, self._used)
        self._aliases = Aliases()
        self._now: _Record | None = None
        self._calls: list[Call] = []
        self._halves: dict[int, _Half] = {}

    def calls(self, result: Any) -> tuple[Call, ...]:
        """All calls of a pass with this result, but for those that others complete."""
        self._used([x for x in tree_leaves(result) if isinstance(x, Tensor)])
        parts = {id(h.call) for h in self._halves.values() if h.completed and not h.used}
        return tuple(call for call in self._calls if id(call) not in parts)

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        found = reduction(name, args, kwargs, self._aliases)
        record = _Record(name.partition(".")[0])
        if found is not None:
            record.map, record.completes = tuple(found.map.shape), found.half
        if name in _RECURRENT and isinstance(args[-1], bool):
            record.add(name, args[0].shape[1 if args[-1] else 0])
        self._now = record
        try:
            result = func(*args, **kwargs)
        except Exception:
            self._note(record, failed=True)
            raise
        finally:
            self._now = None
        call = self._note(record)
        half = note_aliases(name, args, kwargs, result, self._aliases)
        if half is not None and call is not None:
            self._halves[id(half)] = _Half(half, call)
        if found is not None and found.half is not None and id(found.half) in self._halves:
            self._halves[id(found.half)].completed = True
        return result

    def _note(self, record: _Record, failed: bool = False) -> Call | None:
        if not record.extents and not failed:
            return None
        at = calling(sys._getframe(2))
        if at is None:
            return None
        call = Call(*at, record.name, record.extents, record.map, failed)
        self._calls.append(call)
        return call

    def _seen(self, operation: str, extent: int) -> None:
        if self._now is not None:
            self._now.add(operation, extent)
        else:
            self._note(_Record(operation, extents={operation: extent}))

    def _used(self, tensors: Sequence[Tensor]) -> None:
        if not self._halves:
            return
        completed = None if self._now is None else self._now.completes
        for x in tensors:
            if id(x) in self._halves and x is not completed:
                self._halves[id(x)].used = True


def compared(calls: Sequence[Call], later: Sequence[Call]) -> list[tuple[Call, bool]]:
    """Each call of a pass, and whether it takes more together in a pass on a larger picture.

    A call that the larger map breaks is bound to the picture's size; of one that does not happen
    there it is not known, and only what has a local form counts.
    """
    before, after = _by_place(calls), _by_place(later)
    grown: dict[int, bool] = {}
    for place, ours in before.items():
        theirs = after.get(place, [])
        for at, call in enumerate(ours):
            # in loops of other lengths, the largest of each pass
            few, many = ([call], [theirs[at]]) if len(theirs) == len(ours) else (ours, theirs)
            grown[id(call)] = _grows(few, many) if theirs else call.map is not None
    return [(call, grown[id(call)]) for call in calls if not call.failed]


def _by_place(calls: Iterable[Call]) -> dict[tuple[int, Site | None, str], list[Call]]:
    places: dict[tuple[int, Site | None, str], list[Call]] = {}
    for call in calls:
        places.setdefault((id(call.module), call.site, call.name), []).append(call)
    return places


def _grows(calls: Sequence[Call], later: Sequence[Call]) -> bool:
    if any(call.failed for call in later):
        return True
    before, after = _largest(calls), _largest(later)
    return any(size > before.get(operation, 0) for operation, size in after.items())


def _largest(calls: Sequence[Call]) -> dict[str, int]:
    record = _Record("")
    for call in calls:
        for operation, size in call.extents.items():
            record.add(operation, size)
    return record.extents
