"""A local conversion carried out, and undone."""

from __future__ import annotations

from typing import Any

from torch import nn

from fullres.errors import ConversionError
from fullres.local.forms import Form, take_form
from fullres.local.plan import Operation, Plan, forms_taken, plan
from fullres.local.rules import SOUGHT
from fullres.local.settings import Local


class NothingToConvert(ConversionError):  # noqa: N818 - a finding more than a fault
    """The network has no global operation that can become local; `plan` says what it has."""

    def __init__(self, message: str, plan: Plan) -> None:
        super().__init__(message)
        self.plan = plan


def convert(module: nn.Module, local: Local, example: Any = None) -> Conversion:
    """Make the global operations of a network local, in place.

    Same module objects, parameters, hooks and state-dict keys; any batch, device, type and memory
    format; nothing is written during a forward pass. Where the window covers the picture, the
    network computes what it did before.

    Args and errors as `plan`.

    Returns:
        The conversion, which `revert()` undoes exactly; also a context manager that reverts.

    Raises:
        NothingToConvert: no global operation can become local; the network is unchanged.

    >>> import torch
    >>> pool = torch.nn.AdaptiveAvgPool2d(1)
    >>> with convert(pool, Local(train_size=2, window=2)):
    ...     pool(torch.arange(4.0).expand(1, 3, 2, 4)).shape
    torch.Size([1, 3, 2, 4])
    >>> pool(torch.ones(1, 3, 2, 4)).shape
    torch.Size([1, 3, 1, 1])
    """
    planned = plan(module, local, example)
    if not planned.converted:
        kept = "".join(f"; {op.label} stays: {op.reason}" for op in planned.kept)
        raise NothingToConvert(
            f"nothing to convert in {planned.network}: looked for {SOUGHT}{kept}",
            planned,
        )
    return Conversion(module, planned)


class Conversion:
    """A plan carried out. Printed, it is the plan's table."""

    def __init__(self, module: nn.Module, plan: Plan) -> None:
        self.module = module
        self.plan = plan
        self._originals: list[tuple[nn.Module, Form, Form]] = []
        for part, form in forms_taken(module, plan.operations):
            self._originals.append((part, take_form(part, form), form))

    @property
    def converted(self) -> tuple[Operation, ...]:
        """The operations that are local."""
        return self.plan.converted

    @property
    def kept(self) -> tuple[Operation, ...]:
        """The operations that stayed global, each with its reason."""
        return self.plan.kept

    def revert(self) -> None:
        """Undo the conversion exactly; a second call does nothing.

        Raises:
            ConversionError: a module was changed since by somebody else; nothing is undone.
        """
        for part, _, form in self._originals:
            if type(part) is not form.cls:
                raise ConversionError(
                    f"cannot revert: a {form.cls.__name__} was turned into a "
                    f"{type(part).__name__} since the conversion; undo that first"
                )
        while self._originals:
            part, original, _ = self._originals.pop()
            take_form(part, original)

    def __enter__(self) -> Conversion:
        return self

    def __exit__(self, *error: object) -> None:
        self.revert()

    def __str__(self) -> str:
        return str(self.plan)
