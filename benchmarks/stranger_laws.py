"""A stranger's network under examination: what must hold when it becomes local.

Each law is a function that says in words how the network breaks it, "" where it does not.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fullres as fr
from fullres.memory import peak_memory
from fullres.networks import foreign
from fullres.networks.spec import Network

TRAIN_SIZE = 32
LARGE = 512
"""Training sizes from which a network is planned but not run."""
FAR = 768
"""Length in pixels of the picture on which is seen how far a change reaches."""
TOLERANCE = 1e-5
"""Of float32 results, relative to the largest magnitude in them."""


@dataclass
class Stranger:
    """A network to examine, its training size and pictures for it."""

    module: nn.Module
    channels: int
    scale: int
    size: int
    """Side of its training crops in pixels."""
    square: bool = False

    @classmethod
    def of_descriptor(cls, descriptor: Any) -> Stranger:
        """A network of spandrel's, those among them that `open_network` refuses too."""
        module = foreign.wrapped(descriptor).eval().requires_grad_(False)
        channels = descriptor.input_channels + foreign.is_conditioned(descriptor)
        if descriptor.purpose == "Inpainting":
            call, channels = module.call, 4
            module.call = lambda model, x: call(model, x[:, :3], x[:, 3:].round())
        least = max(TRAIN_SIZE, module.minimum)
        size = least + -least % module.multiple
        return cls(module, channels, module.scale, size, module.square)

    @classmethod
    def of_network(cls, network: Network) -> Stranger:
        """A network that is open already."""
        module, spec = network.module.requires_grad_(False), network.spec
        return cls(module, spec.in_channels, spec.scale, TRAIN_SIZE)

    def run(self, x: Tensor) -> Tensor:
        torch.manual_seed(0)  # for networks that draw random numbers
        y: Tensor = self.module(x)
        return y

    def picture(self, height: int, width: int) -> Tensor:
        generator = torch.Generator().manual_seed(height * width)
        return torch.rand(1, self.channels, height, width, generator=generator)

    def example(self) -> Tensor:
        return self.picture(self.size, self.size)

    def larger(self) -> Tensor:
        return self.picture(self.size + self.size // 2 + 3, 2 * self.size + 5)

    def plan(self) -> fr.Plan:
        return fr.plan(self.module, fr.Local(self.size), self.example())

    @contextmanager
    def local(self, window: int | None = None) -> Iterator[None]:
        """The network local, or as it is where nothing can become local."""
        example = self.example().to(next(self.module.parameters()).dtype)
        try:
            conversion = fr.convert(self.module, fr.Local(self.size, window), example)
        except fr.NothingToConvert:
            yield
            return
        with conversion:
            yield

    def copied(self, kind: torch.dtype) -> Stranger:
        """The same with a copy of the network in another data type."""
        copied = copy.copy(self)
        copied.module = copy.deepcopy(self.module).to(kind)
        return copied


def examined(stranger: Stranger, plan: fr.Plan) -> tuple[str, list[str]]:
    """What cannot be checked, and what does not hold."""
    note, laws = _limits(stranger)
    faults = []
    for law in laws:
        fault = _tried(LAWS[law], stranger, plan)
        if fault:
            faults.append(f"{law}: {fault}")
    return note, faults


def _limits(stranger: Stranger) -> tuple[str, Iterable[str]]:
    """Why not every law can be checked, and those that can."""
    if stranger.size >= LARGE:
        return f"planned only, for it takes {stranger.size} × {stranger.size} or more", ()
    with torch.inference_mode():
        x = stranger.example()
        if not stranger.module(x).equal(stranger.module(x)):
            return "draws random numbers", [law for law in LAWS if law != "batch"]
        try:
            stranger.run(stranger.larger())
        except Exception:  # noqa: BLE001 - the answer is: it does not run there
            return f"takes only {stranger.size} × {stranger.size}", ["agreement"]
    return "", LAWS


def _tried(holds: Callable[[Stranger, fr.Plan], str], stranger: Stranger, plan: fr.Plan) -> str:
    try:
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return holds(stranger, plan)
    except Exception as error:  # noqa: BLE001 - the answer is: it does not hold
        return in_words(error)


def in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _compared(y: Tensor, wanted: Tensor) -> str:
    if y.shape != wanted.shape:
        return f"{tuple(y.shape)} in place of {tuple(wanted.shape)}"
    if not y.isfinite().all():
        return "NaN or infinity" if wanted.isfinite().all() else ""
    error = (y - wanted).abs().max().item() / wanted.abs().max().item()
    return "" if error <= TOLERANCE else f"differs by {error:.1e}"


def agrees(stranger: Stranger, plan: fr.Plan) -> str:
    """Local and global are the same at the training size, where the window covers the map."""
    x = stranger.example()
    wanted = stranger.run(x)
    with stranger.local():
        return _compared(stranger.run(x), wanted)


def covers(stranger: Stranger, plan: fr.Plan) -> str:
    """They are the same at a larger size too, if the window is as large."""
    x = stranger.larger()
    wanted = stranger.run(x)
    with stranger.local(4 * stranger.size):
        return _compared(stranger.run(x), wanted)


def reverts(stranger: Stranger, plan: fr.Plan) -> str:
    """After `revert` the network is what it was, bit for bit, and while local its keys are."""
    before = stranger.run(stranger.larger())
    kinds = [type(part) for part in stranger.module.modules()]
    keys = list(stranger.module.state_dict())
    with stranger.local():
        stranger.run(stranger.larger())
        if list(stranger.module.state_dict()) != keys:
            return "other state-dict keys while local"
    if [type(part) for part in stranger.module.modules()] != kinds:
        return "other classes"
    return "" if stranger.run(stranger.larger()).equal(before) else "other values"


def takes_sizes(stranger: Stranger, plan: fr.Plan) -> str:
    """Local, it takes other sizes, and gives pictures of the right size, finite."""
    with stranger.local():
        for x in (stranger.larger(), stranger.picture(stranger.size + 1, stranger.size // 2)):
            height, width = (side * stranger.scale for side in x.shape[-2:])
            y = stranger.run(x)
            if y.shape[-2:] != (height, width) or not y.isfinite().all():
                return f"gives {tuple(y.shape)} of {tuple(x.shape)}"
    return ""


def takes_batches(stranger: Stranger, plan: fr.Plan) -> str:
    """Local, a batch of two is two batches of one."""
    x = torch.cat([stranger.larger(), 1 - stranger.larger()])
    with stranger.local():
        return _compared(stranger.run(x), torch.cat([stranger.run(one[None]) for one in x]))


def memory_is_told(stranger: Stranger, plan: fr.Plan) -> str:
    """What a pass takes is told beforehand, and asking changes nothing."""
    x = stranger.larger()
    with stranger.local():
        before = stranger.run(x)
        peak = peak_memory(stranger.module, tuple(x.shape), torch.float32, "cpu")
        if peak < x.nbytes:
            return f"{peak} bytes"
        return _compared(stranger.run(x), before)


def reaches_as_planned(stranger: Stranger, plan: fr.Plan) -> str:
    """What a change far away does tells whether the plan found what is global, and no more."""
    change = _change(stranger)
    found = any(op.is_global for op in plan.operations)
    if bool(change) != found:
        return "is global, nothing was found" if change else "is not global, something was found"
    still = change > 0 and _change(stranger, local=True) > 1e-3 * change
    if still != bool(plan.still_global):
        return "is global still" if still else "what stays is not global"
    return ""


def _change(stranger: Stranger, local: bool = False) -> float:
    """How much the left end of a long picture changes the middle of its result.

    Not the right end: windows that are shifted cyclically join the ends.
    """
    side = stranger.size
    height = FAR if stranger.square else side
    columns = slice(*(stranger.scale * (FAR // 2 + shift) for shift in (0, side)))
    for kind in (torch.float64, torch.float32):
        copied = stranger.copied(kind)
        x = stranger.picture(height, FAR).to(kind)
        other = x.clone()
        other[..., :side] = 1 - other[..., :side]
        try:
            with copied.local(side // 4) if local else nullcontext():
                y, z = (copied.run(picture)[..., columns] for picture in (x, other))
        except (RuntimeError, fr.ConversionError):  # makes float32 of its own accord
            if kind == torch.float32:
                raise
            continue
        return (y - z).abs().max().item()
    raise AssertionError


LAWS: dict[str, Callable[[Stranger, fr.Plan], str]] = {
    "agreement": agrees,
    "window over all": covers,
    "revert": reverts,
    "sizes": takes_sizes,
    "batch": takes_batches,
    "memory": memory_is_told,
    "reach": reaches_as_planned,
}
