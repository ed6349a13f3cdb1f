"""What a local conversion would do to a network: every global operation and what becomes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fullres.errors import ConversionError
from fullres.local.agreement import disagreement, options_of, own_local
from fullres.local.calibrate import Arguments, Shadow, Shape, calibrate, first_words
from fullres.local.called import called
from fullres.local.deferred import ChangedInPlaceError
from fullres.local.forms import (
    CountsCalls,
    Form,
    Gives,
    LocalForm,
    LocalModule,
    form_of,
    mixed,
    take_form,
)
from fullres.local.functional import LocalCalls
from fullres.local.operations import NOT_TAKEN, Operation, Plan, windows_of
from fullres.local.pooled import Pooled, calls_on_pooled
from fullres.local.rules import RULES, LocalAvgPool2d, LocalMaxPool2d, Stays
from fullres.local.settings import Local
from fullres.local.watch import Call, Watch

__all__ = ["Operation", "Plan", "forms_taken", "plan"]


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
    tried: dict[Any, str | None] = {}
    operations = [
        _planned(op, calibration.seen[op.name], calibration.arguments.get(op.name), local, tried)
        for op in found
    ]
    shadow = calibration.shadow
    larger = _Larger(shadow, shadow.enlarged(calibration.inputs, 2), local)
    operations += called(module, operations, shadow.module, calibration.calls, larger.calls, local)
    _check_used(local, operations)
    name = module._get_name()  # type: ignore[no-untyped-call]
    return Plan(name, local, _that_run(operations, larger))


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
    if local.stride is not None and not any("stride" in options_of(op.module) for op in operations):
        raise ConversionError(
            "there is a stride, but nothing in the network attends within overlapping windows"
        )


def _planned(
    op: Operation,
    shapes: Sequence[Shape],
    arguments: Arguments | None,
    local: Local,
    tried: dict[Any, str | None],
) -> Operation:
    """The operation with its windows and local form, or with the reason it stays global."""
    op = replace(op, shapes=tuple(shapes))
    if op.reason is not None:
        return op
    if arguments is None:
        return replace(op, reason="is not called in a forward pass", is_global=False)
    if not local.takes(op.names, op.module):
        return replace(op, reason=NOT_TAKEN)
    own = callable(getattr(op.module, "to_local", None))
    rule = None if own else next(rule for rule in RULES if rule.look(op.module) is not None)
    for shape in shapes:
        if len(shape) not in ((4,) if rule is None else rule.dims):
            return replace(op, reason=f"is called on {len(shape)} dimensions, not on a map")
    if rule is None:
        return _with_own_form(op, arguments, local, tried)
    windows = windows_of(op.kind, shapes, local)
    mixin = rule.look(op.module)
    assert isinstance(mixin, type)
    form = Form(mixed(mixin, type(op.module)), {"local_windows": windows})
    return replace(op, windows=windows, form=form)


def _with_own_form(
    op: Operation, arguments: Arguments, local: Local, tried: dict[Any, str | None]
) -> Operation:
    """The operation with the form that its module's `to_local` gives, if that holds."""
    features = {(shape[-2], shape[-1]) for shape in op.shapes}
    if len(features) > 1:
        return replace(op, reason="is called at several sizes, its local form has one window")
    (feature,) = features
    windows = windows_of(op.kind, op.shapes, local)
    try:
        own = own_local(op.module, windows[0], feature, local.stride_at(feature))
        form = form_of(op.module, own)
    except Exception as error:  # noqa: BLE001 - a stranger's method may raise anything
        return replace(op, reason=f"its `to_local` fails ({first_words(error, 110)})")
    parameters = tuple(tuple(p.shape) for p in op.module.parameters())
    alike = (type(op.module), repr(op.module), parameters, op.shapes[0])
    if alike not in tried:
        tried[alike] = disagreement(op.module, arguments, feature)
    if tried[alike] is not None:
        return replace(op, reason=tried[alike])
    return replace(op, windows=windows, form=form)


class _Larger:
    """The shadow at a larger size: its inputs there, and what it gives while it is global.

    Windows on trial are at most the training size, so that no window covers the inputs.
    """

    def __init__(self, shadow: Shadow, inputs: tuple[Any, ...], local: Local) -> None:
        self.shadow, self.inputs = shadow, inputs
        self.local = local.narrowed()
        self.wanted: Any
        watch, result = Watch(inputs), None
        try:
            result = shadow.run(inputs, watch)
            self.wanted = _shapes(result)
        except Exception as error:  # noqa: BLE001 - a stranger's network may raise anything
            self.wanted = error
        self.calls: tuple[Call, ...] = watch.calls(result)

    def trial(self, operations: Sequence[Operation]) -> Any:
        """Shapes that the shadow gives with these operations local, or what it raises."""
        there = [self._there(op) for op in operations]
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

    def _there(self, op: Operation) -> Operation:
        """The operation in the shadow, with windows that do not cover its map there."""
        op = replace(op, module=self.shadow.module.get_submodule(op.name))
        if op.form is None or not issubclass(op.form.cls, LocalModule | LocalCalls):
            return op  # a form that a module makes of itself is tried by itself
        windows = windows_of(op.kind, op.shapes, self.local)
        held = (
            {"local_windows": windows} if op.site is None else {"local_sites": {op.site: windows}}
        )
        form = Form(op.form.cls, {**op.form.attributes, **held})
        return replace(op, windows=windows, form=form)


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
    itself = any(op.name == "" and op.form is not None and _pools(op.form) for op in operations)
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


def _pools(form: Form) -> bool:
    """Whether it gives a map where one value a channel came out."""
    return issubclass(form.cls, LocalAvgPool2d | LocalMaxPool2d)


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
