"""The global operations of a network that are calls of functions, or torch's own modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from fullres.local.forms import Form, mixed
from fullres.local.functional import LocalCalls
from fullres.local.operations import NOT_TAKEN, Operation, windows_of
from fullres.local.settings import Local
from fullres.local.sites import Site
from fullres.local.watch import Call, compared

NO_RULE = "acts over all positions, and no rule covers it"


def called(
    module: nn.Module,
    operations: Sequence[Operation],
    shadow: nn.Module,
    calls: Sequence[Call],
    later: Sequence[Call],
    local: Local,
) -> list[Operation]:
    """Those that none of the operations found already is or holds.

    Args:
        module: the network.
        operations: those found already.
        shadow: the copy of the network that made the calls.
        calls: in a pass at the training size.
        later: in a pass at a larger size.
        local: how they become local.
    """
    # what a module's own local form or rule covers is not found a second time
    known = {id(part) for op in operations for part in shadow.get_submodule(op.name).modules()}
    names: dict[int, list[str]] = {}
    for name, part in shadow.named_modules(remove_duplicate=False):
        names.setdefault(id(part), []).append(name)
    seen: dict[tuple[int, Site | None], list[tuple[Call, bool]]] = {}
    for call, grows in compared(calls, later):
        if id(call.module) not in known and id(call.module) in names:
            seen.setdefault((id(call.module), call.site), []).append((call, grows))
    return [
        _operation(module.get_submodule(names[owner][0]), tuple(names[owner]), site, these, local)
        for (owner, site), these in seen.items()
        if any(grows for _, grows in these)
    ]


def _operation(
    part: nn.Module,
    names: tuple[str, ...],
    site: Site | None,
    seen: Sequence[tuple[Call, bool]],
    local: Local,
) -> Operation:
    """What becomes of the calls at one site."""
    kind = type(part).__name__ if site is None else next(c.name for c, grows in seen if grows)
    op = Operation(names, kind, part, site=site)
    if not local.takes(op.names, part):
        return replace(op, reason=NOT_TAKEN)
    shapes = tuple(call.map for call, grows in seen if grows and call.map is not None)
    if site is None or len(shapes) < len(seen):
        return replace(op, reason=NO_RULE)
    windows = windows_of(op.kind, shapes, local)
    form = Form(mixed(LocalCalls, type(part)), {"local_sites": {site: windows}})
    return replace(op, shapes=shapes, windows=windows, form=form)
