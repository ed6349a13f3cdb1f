"""What a plan is made of: the global operations of a network, and what becomes of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from fullres.local.calibrate import Shape
from fullres.local.forms import Form, Window
from fullres.local.settings import Local
from fullres.local.sites import Site
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


def windows_of(kind: str, shapes: Sequence[Shape], local: Local) -> tuple[Window, ...]:
    """The window of each call, or the one that they share."""
    windows = tuple(local.window_at((shape[-2], shape[-1]), kind) for shape in shapes)
    return windows[:1] if len(set(windows)) == 1 else windows
