"""Calibration: the shapes that modules see when a network runs at a given picture size.

Shapes are all that is wanted, so the network runs on fake tensors, which hold no values and cost
nothing; a network that looks at values runs once for real instead. Either way it is a shadow that
runs: a copy of the modules that shares (or fakes) their parameters and drops their hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from fullres.errors import ConversionError
from fullres.local.watch import Call, Watch
from fullres.shadow import CopyError, quiet, shadow

Shape = tuple[int, ...]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and by name, of one call."""

FRAMES = 5
"""Of the video that a network is tried on."""


@dataclass(frozen=True)
class Shadow:
    """A copy of a network to run for its shapes; the network itself is not touched."""

    module: nn.Module
    mode: FakeTensorMode | None
    """Mode of the fake tensors, None where the shadow computes for real."""

    def run(self, inputs: tuple[Any, ...], watch: Watch | None = None) -> Any:
        """Run once, without gradients."""
        context: AbstractContextManager[Any] = self.mode or nullcontext()
        above: AbstractContextManager[Any] = watch or nullcontext()
        beneath: AbstractContextManager[Any] = watch.beneath if watch else nullcontext()
        with torch.no_grad(), above, context, quiet(), beneath:
            return self.module(*inputs)

    def enlarged(self, inputs: tuple[Any, ...], factor: int) -> tuple[Any, ...]:
        """Inputs like these at `factor` times their height and width."""
        context: AbstractContextManager[Any] = self.mode or nullcontext()
        with context:
            return tuple(
                v.new_empty(*v.shape[:-2], *(factor * n for n in v.shape[-2:])).fill_(0.5)
                if isinstance(v, Tensor)
                else v
                for v in inputs
            )


@dataclass(frozen=True)
class Calibration:
    """What a pass at the training size showed."""

    shadow: Shadow
    inputs: tuple[Any, ...]
    """Inputs that the shadow runs on, at the training size."""
    seen: dict[str, list[Shape]]
    """Shapes of the calls of each module, by its name."""
    arguments: dict[str, Arguments]
    """Those of the first call of each module, by its name."""
    calls: tuple[Call, ...]
    """Calls that may be global."""


@contextmanager
def _recorded(
    module: nn.Module, names: Sequence[str]
) -> Iterator[tuple[dict[str, list[Shape]], dict[str, Arguments]]]:
    """Of the named modules: shapes of the first tensor of each call, arguments of the first."""
    seen: dict[str, list[Shape]] = {name: [] for name in names}
    arguments: dict[str, Arguments] = {}

    def recorder(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            first = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
            seen[name].append(() if first is None else tuple(first.shape))
            arguments.setdefault(name, (args, kwargs))

        return record

    handles = [
        module.get_submodule(name).register_forward_pre_hook(recorder(name), with_kwargs=True)
        for name in names
    ]
    try:
        yield seen, arguments
    finally:
        for handle in handles:
            handle.remove()


def calibrate(
    module: nn.Module, names: Sequence[str], size: tuple[int, int], example: Any = None
) -> Calibration:
    """Run a shadow of the network once at the given size and note what the named modules see.

    Without an example the network is tried on one picture (1, C, H, W) with the numbers of
    channels that restorers take, and on a video (1, T, 3, H, W) of `FRAMES` frames.

    Raises:
        ConversionError: it runs on none of them; says why.
    """
    guesses = _inputs(module, size, example)
    failure: Exception | None = None
    for fake in (True, False):
        for guess in guesses:
            try:
                mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else None
                found = Shadow(shadow(module, mode), mode)
                inputs = guess if mode is None else _faked(guess, mode)
                watch = Watch(inputs)
                with _recorded(found.module, names) as (seen, arguments):
                    calls = watch.calls(found.run(inputs, watch))
            except CopyError:
                raise
            except Exception as error:  # noqa: BLE001 - any failure only means: try the next way
                failure = failure or error
            else:
                return Calibration(found, inputs, seen, arguments, calls)
    tried = "the example"
    if example is None:
        channels = " or ".join(str(x.shape[1]) for (x,) in guesses if x.dim() == 4)
        tried = f"a picture of {channels} channels or a video of {FRAMES} frames"
    raise ConversionError(
        f"{type(module).__name__} does not run at its training size of {size[0]} × {size[1]} on "
        f"{tried} ({first_words(failure)}); pass an `example`: the input, or the tuple of inputs, "
        "of one call at that size"
    ) from failure


def first_words(error: Exception | None, limit: int = 160) -> str:
    """An error on one line, shortened."""
    line = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return line if len(line) <= limit else f"{line[:limit]}…"


def _inputs(module: nn.Module, size: tuple[int, int], example: Any) -> list[tuple[Any, ...]]:
    if example is not None:
        inputs = example if isinstance(example, tuple) else (example,)
        first = next((v for v in inputs if isinstance(v, Tensor)), None)
        if first is None or tuple(first.shape[-2:]) != size:
            got = "no tensor" if first is None else f"{first.shape[-2]} × {first.shape[-1]}"
            raise ConversionError(
                f"the example must have the training size, {size[0]} × {size[1]}, got {got}"
            )
        return [inputs]
    floating = (p for p in module.parameters() if p.is_floating_point())
    like = next(floating, torch.empty(0))
    convolution = next((m for m in module.modules() if isinstance(m, nn.Conv2d)), None)
    channels = [3, *([convolution.in_channels] if convolution else []), 1, 4, 6]
    shapes = [*((1, c, *size) for c in dict.fromkeys(channels)), (1, FRAMES, 3, *size)]
    generator = torch.Generator().manual_seed(0)  # the caller's random numbers stay as they are
    return [(torch.rand(shape, generator=generator).to(like),) for shape in shapes]


def _faked(inputs: tuple[Any, ...], mode: FakeTensorMode) -> tuple[Any, ...]:
    return tuple(mode.from_tensor(v) if isinstance(v, Tensor) else v for v in inputs)
