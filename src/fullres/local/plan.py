"""What a local conversion would do to a network: every global operation and what becomes of it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fullres.errors import ConversionError
from fullres.local.calibrate import Calibration, Shadow, Shape, calibrate, first_words
from fullres.local.forms import (
    CountsCalls,
    Form,
    Gives,
    LocalForm,
    LocalModule,
    Window,
    form_of,
    mixed,
    take_form,
)
from fullres.local.functional import Call, LocalCalls, Site
from fullres.local.pooled import ChangedInPlaceError, Pooled, calls_on_pooled
from fullres.local.rules import RULES, LocalAvgPool2d, LocalMaxPool2d, Stays
from fullres.local.settings import Local
from fullres.local.table import table

NOT_TAKEN = "is not among those that `only` asks for"


@dataclass(frozen=True)
class Operation:
    """One global operation of a network, and what becomes of it."""

    names: tuple[str, ...]
    """Every name under which the network holds the module ("" for the network itself)."""
    kind: str
    """Average pool, instance norm, …"""
    module: nn.Module
    shapes: tuple[Shape, ...] = ()
    """Shape of its input in each call at calibration."""
    windows: tuple[Window, ...] = ()
    """Its window, or one a call where they differ; in positions of its own map."""
    form: Form | None = None
    """Its local form; None where it stays global."""
    reason: str | None = None
    """Why it stays as it is."""
    is_global: bool = True
    """Whether its result, as it is, depends on the whole picture."""
    site: Site | None = None
    """Where the module's forward calls it, if it is a function and not the module itself."""

    @property
    def name(self) -> str:
        """The first name of its module."""
        return self.names[0]

    @property
    def label(self) -> str:
        """What a report calls it."""
        names = " = ".join(name or "(the network)" for name in self.names)
        return names if self.site is None else f"{names}, {self.site}"


@dataclass(frozen=True)
class Plan:
    """What `convert` would do to a network. Printed, it is a table."""

    network: str
    """Class of the network."""
    local: Local
    operations: tuple[Operation, ...]
    """Every global operation found, in the order of the network's modules."""

    @property
    def converted(self) -> tuple[Operation, ...]:
        """The operations that become local."""
        return tuple(op for op in self.operations if op.form is not None)

    @property
    def kept(self) -> tuple[Operation, ...]:
        """The operations that stay global, each with its reason."""
        return tuple(op for op in self.operations if op.form is None)

    @property
    def still_global(self) -> tuple[Operation, ...]:
        """The operations whose result goes on to depend on the whole picture."""
        return tuple(op for op in self.kept if op.is_global)

    def __str__(self) -> str:
        return table(self)


def plan(module: nn.Module, local: Local, example: Any = None) -> Plan:
    """Find every global operation of a network, its window, or the reason it stays global.

    The network is not changed, nor run: shapes come from a pass on fake tensors. Whatever would
    break the network once local, at another size than the training size, is left global.

    Args:
        module: any network.
        local: training size and window.
        example: input, or tuple of inputs, of one call at the training size; needed only where
            the network takes something other than one picture (B, C, H, W).

    Raises:
        ConversionError: the network does not run at its training size, is local already, or has
            nothing that a setting of `local` is meant for.

    >>> from torch import nn
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8))
    >>> print(plan(net, Local(train_size=64)))
    Sequential: training size 64 × 64, window 96 × 96
    <BLANKLINE>
    operation   kind            map at training size   window
    1           instance norm   62 × 62                93 × 93
    <BLANKLINE>
    1 of 1 global operation becomes local.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise ConversionError(
            f"{type(module).__name__} is a TorchScript module, whose operations cannot be "
            "replaced; convert the network before scripting it"
        )
    if any(isinstance(part, LocalForm) for part in module.modules()):
        raise ConversionError(
            f"{type(module).__name__} is local already; revert that conversion first"
        )
    found = _find(module)
    size = local.train_size
    assert isinstance(size, tuple)
    calibration = calibrate(module, [op.name for op in found], size, example)
    operations = [_planned(op, calibration.seen[op.name], local) for op in found]
    larger = _Larger(calibration.shadow, calibration.shadow.enlarged(calibration.inputs, 2))
    operations += _called(module, operations, calibration, larger, local)
    _check_used(local, operations)
    return Plan(type(module).__name__, local, _that_run(operations, larger))


def _find(module: nn.Module) -> list[Operation]:
    """Every module that a rule knows or that brings its own local form, once per identity."""
    found: dict[int, Operation] = {}
    for name, part in module.named_modules(remove_duplicate=False):
        if id(part) in found:
            known = found[id(part)]
            found[id(part)] = replace(known, names=(*known.names, name))
        elif callable(getattr(part, "to_local", None)):
            found[id(part)] = Operation((name,), type(part).__name__, part)
        else:
            for rule in RULES:
                look = rule.look(part)
                if look is not None:
                    op = Operation((name,), rule.kind, part)
                    if isinstance(look, Stays):
                        op = replace(op, reason=look.reason, is_global=look.is_global)
                    found[id(part)] = op
                    break
    return list(found.values())


def _check_used(local: Local, operations: Sequence[Operation]) -> None:
    """Settings that reach no operation are mistakes."""
    kinds = dict.fromkeys(op.kind for op in operations)
    for kind in local.windows:
        if kind not in kinds:
            raise ConversionError(
                f"there is a window for {kind!r}, but the network's operations are of the kinds "
                f"{', '.join(map(repr, kinds)) or '(none found)'}"
            )
    if local.stride is not None and not any("stride" in _options(op.module) for op in operations):
        raise ConversionError(
            "there is a stride, but nothing in the network attends within overlapping windows"
        )


def _options(module: nn.Module) -> Iterable[str]:
    """Names of what a module's `to_local` takes, if it has one."""
    own = getattr(module, "to_local", None)
    return inspect.signature(own).parameters if callable(own) else ()


def _planned(op: Operation, shapes: Sequence[Shape], local: Local) -> Operation:
    """The operation with its windows and local form, or with the reason it stays global."""
    op = replace(op, shapes=tuple(shapes))
    if op.reason is not None:
        return op
    if not shapes:
        return replace(op, reason="is not called in a forward pass", is_global=False)
    if not local.takes(op.names, op.module):
        return replace(op, reason=NOT_TAKEN)
    own = callable(getattr(op.module, "to_local", None))
    rule = None if own else next(rule for rule in RULES if rule.look(op.module) is not None)
    for shape in shapes:
        if len(shape) not in ((4,) if rule is None else rule.dims):
            return replace(op, reason=f"is called on {len(shape)} dimensions, not on a map")
    windows = _windows(op.kind, shapes, local)
    if rule is not None:
        mixin = rule.look(op.module)
        assert isinstance(mixin, type)
        form = Form(mixed(mixin, type(op.module)), {"local_windows": windows})
    elif len({shape[-2:] for shape in shapes}) == 1:
        form = _own_form(op.module, windows[0], shapes[0][-2:], local)
    else:
        return replace(op, reason="is called at several sizes, its local form has one window")
    return replace(op, windows=windows, form=form)


def _own_form(module: Any, window: Window, feature: Shape, local: Local) -> Form:
    """The form that a module's `to_local` gives, told what it asks for by its parameters."""
    options = {"feature_size": feature, "stride": local.stride_at((feature[0], feature[1]))}
    taken = {name: value for name, value in options.items() if name in _options(module)}
    return form_of(module, module.to_local(window, **taken))


class _Larger:
    """The shadow at a larger size: its inputs there, and what it gives while it is global."""

    def __init__(self, shadow: Shadow, inputs: tuple[Any, ...]) -> None:
        self.shadow, self.inputs = shadow, inputs
        self.calls: tuple[Call, ...] = ()
        self.wanted: Any
        try:
            result, self.calls = shadow.watched(inputs)
            self.wanted = _shapes(result)
        except Exception as error:  # noqa: BLE001 - a stranger's network may raise anything
            self.wanted = error

    def trial(self, operations: Sequence[Operation]) -> Any:
        """Shapes that the shadow gives with these operations local, or what it raises."""
        there = [replace(op, module=self.shadow.module.get_submodule(op.name)) for op in operations]
        taken = [
            (part, take_form(part, form)) for part, form in forms_taken(self.shadow.module, there)
        ]
        try:
            return _shapes(self.shadow.run(self.inputs))
        except Exception as error:  # noqa: BLE001 - the answer is: it breaks
            return error
        finally:
            for part, original in reversed(taken):
                take_form(part, original)


def _called(
    module: nn.Module,
    operations: Sequence[Operation],
    calibration: Calibration,
    larger: _Larger,
    local: Local,
) -> list[Operation]:
    """Global operations that the forwards of modules call as functions."""
    shadow = calibration.shadow.module
    # what a module's own local form or rule covers is not found a second time
    known = {id(part) for op in operations for part in shadow.get_submodule(op.name).modules()}
    names: dict[int, list[str]] = {}
    for name, part in shadow.named_modules(remove_duplicate=False):
        names.setdefault(id(part), []).append(name)
    calls: dict[tuple[int, Site], list[tuple[Call, bool]]] = {}
    for call, grows in _compared(calibration.calls, larger.calls):
        if id(call.module) not in known and id(call.module) in names:
            calls.setdefault((id(call.module), call.site), []).append((call, grows))
    found = []
    for (owner, site), seen in calls.items():
        if not any(grows for _, grows in seen):
            continue
        part = module.get_submodule(names[owner][0])
        op = Operation(tuple(names[owner]), seen[0][0].name, part, site=site)
        if not local.takes(op.names, part):
            found.append(replace(op, reason=NOT_TAKEN))
        elif all(grows and call.map is not None for call, grows in seen):
            shapes = tuple(call.map for call, _ in seen if call.map is not None)
            windows = _windows(op.kind, shapes, local)
            form = Form(mixed(LocalCalls, type(part)), {"local_sites": {site: windows}})
            found.append(replace(op, shapes=shapes, windows=windows, form=form))
        else:
            found.append(replace(op, reason="acts over all positions, and no rule covers it"))
    return found


def _compared(calls: Sequence[Call], later: Sequence[Call]) -> list[tuple[Call, bool]]:
    """Each call of a pass, and whether it reduces over more in the pass at the larger size.

    Where the passes do not compare, a call that reduces a map counts as one that grows.
    """
    alike = [c.name for c in calls] == [c.name for c in later]
    if not alike:
        return [(call, call.map is not None) for call in calls]
    return [
        (a, math.prod(b.reduced) > math.prod(a.reduced)) for a, b in zip(calls, later, strict=True)
    ]


def _windows(kind: str, shapes: Sequence[Shape], local: Local) -> tuple[Window, ...]:
    """The window of each call, or the one that they share."""
    windows = tuple(local.window_at((shape[-2], shape[-1]), kind) for shape in shapes)
    return windows[:1] if len(set(windows)) == 1 else windows


def forms_taken(module: nn.Module, operations: Sequence[Operation]) -> list[tuple[nn.Module, Form]]:
    """The forms that the modules of a network take, those of its operations and its own."""
    forms: dict[int, tuple[nn.Module, Form]] = {}
    several = False
    for op in operations:
        if op.form is None:
            continue
        several |= len(op.windows) > 1
        form = op.form
        if id(op.module) in forms:  # several calls in one forward
            sites = forms[id(op.module)][1].attributes["local_sites"]
            sites = {**sites, **form.attributes["local_sites"]}
            form = Form(form.cls, {**form.attributes, "local_sites": sites})
        forms[id(op.module)] = (op.module, form)
    if several:
        own = forms.get(id(module), (module, Form(type(module), {})))[1]
        forms[id(module)] = (module, Form(mixed(CountsCalls, own.cls), own.attributes))
    return list(forms.values())


def _that_run(operations: list[Operation], larger: _Larger) -> tuple[Operation, ...]:
    """The operations with those left global that would break the network at a larger size.

    All together first; only if that fails, one after the other, which names the culprits.
    """
    itself = any(op.name == "" and op.site is None for op in operations)
    if isinstance(larger.wanted, Exception) or itself:
        return tuple(operations)  # it takes no other size, or is itself the one operation
    as_vectors = [_giving(op, "vectors") for op in operations]
    deferring = [_giving(op, "vectors", defers=True) for op in operations]
    defers = not isinstance(larger.trial(deferring), ChangedInPlaceError)
    with calls_on_pooled() as maps_would_do:
        runs = larger.trial(as_vectors) == larger.wanted
    if runs:
        maps_too = maps_would_do() and larger.trial(operations) == larger.wanted
        what: Gives = "either" if maps_too else "vectors"
        return tuple(_giving(op, what, defers) for op in operations)
    accepted: list[Operation] = []
    for op in as_vectors:
        if op.form is not None:
            result = larger.trial([*accepted, op])
            if result != larger.wanted:
                op = replace(op, form=None, windows=(), reason=_blame(result))
        accepted.append(op)
    return tuple(accepted)


def _giving(op: Operation, what: Gives, defers: bool = False) -> Operation:
    """The operation with a form that gives vectors or either, if it pools."""
    pools = LocalAvgPool2d | LocalMaxPool2d | LocalCalls
    if op.form is None or not issubclass(op.form.cls, pools):
        return op
    more: dict[str, Any] = {"local_gives": what}
    if issubclass(op.form.cls, LocalModule):
        more["local_defers"] = defers
    return replace(op, form=Form(op.form.cls, {**op.form.attributes, **more}))


def _shapes(value: Any) -> Any:
    if isinstance(value, Pooled):
        return "pooled values"
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    if isinstance(value, dict):
        return {key: _shapes(v) for key, v in value.items()}
    return [_shapes(v) for v in value] if isinstance(value, list | tuple) else None


def _blame(result: Any) -> str:
    if isinstance(result, Exception):
        return f"what follows does not run at each position ({first_words(result, 110)})"
    return "its result reaches the network's output, which would change shape"
