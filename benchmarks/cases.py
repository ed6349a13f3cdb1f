"""What the benchmarks measure: networks in their published configurations, in several forms."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fullres.bench import as_picture_network, picture, running
from fullres.local import Local
from fullres.measure import Pass, Size, machine
from fullres.memory import (
    freed_memory_kept,
    freed_memory_returned,
    peak_memory,
    use_huge_pages,
)
from fullres.networks.catalog import create_network, networks
from fullres.networks.spec import Network, Spec
from plain import plain, plain_local

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "hinet": ("hinet", {"hin_position_left": 3, "hin_position_right": 4}),
    "mprnet": ("mprnet", {}),
    "restormer": ("restormer", {}),
    "nafnet": ("nafnet", {}),
    "ffanet": ("ffanet", {}),
    "spdnet": ("spdnet", {}),
    "rnn_mbp": ("rnn_mbp", {}),
    "unet-se": ("unet", {"attention": "se"}),
    "unet-cbam": ("unet", {"attention": "cbam"}),
    "unet-ge": ("unet", {"attention": "ge"}),
    "unet-in": ("unet", {"norm": "in"}),
    "unet-gn": ("unet", {"norm": "gn"}),
    "grl": ("grl", {}),
    "panet": ("panet", {}),
    "pa_edsr": ("pa_edsr", {}),
}
"""Architecture and hyperparameters by name of the case."""

SMALLER: dict[str, Size] = {"grl": (256, 256), "panet": (96, 96), "pa_edsr": (96, 96)}
"""Pictures of networks whose plain form needs a matrix of far more than memory holds."""

WINDOW = 384
"""Pixels along the side of the local window."""

CHANGE = 0.1
"""What the last convolution adds to a picture, root mean square, where white is 1."""


def cases() -> tuple[str, ...]:
    """Those whose architecture fullres has."""
    return tuple(name for name, (architecture, _) in CASES.items() if architecture in networks())


def network(case: str) -> Network:
    """The network of a case, with random weights that let no part of it idle."""
    architecture, hyperparameters = CASES[case]
    found = as_picture_network(create_network(architecture, **hyperparameters))
    draw_weights(found)
    return found


@torch.no_grad()
def draw_weights(network: Network) -> None:
    """Random weights that keep the size of features, and a last convolution that changes a little.

    As trained networks do, the result differs from the picture by about `CHANGE`.
    """
    generator = torch.Generator().manual_seed(0)
    free = [(n, p) for n, p in network.module.named_parameters() if p.requires_grad]
    for name, weight in free:
        z = torch.randn(weight.shape, generator=generator)
        fan_in = math.prod(weight.shape[1:])
        if weight.dim() > 1 and fan_in > 1:
            weight.copy_(0.7 * z / math.sqrt(fan_in))
        else:
            weight.copy_(0.1 * z if name.endswith("bias") else 1 + 0.1 * z)
    last, added = _last_convolution(network)
    factor = CHANGE * network.spec.value_range / added.square().mean().sqrt()
    for weight in last.parameters():
        weight.mul_(factor)


def _last_convolution(network: Network) -> tuple[nn.Module, Tensor]:
    """The last one with weights that are learnt, and what it gives for a small picture."""
    calls: list[tuple[nn.Module, Tensor]] = []
    hooks = [
        part.register_forward_hook(lambda module, _, y: calls.append((module, y)))
        for part in network.module.modules()
        if isinstance(part, nn.Conv2d) and part.weight.requires_grad
    ]
    network.module(picture(network.spec, (64, 64)) * network.spec.value_range)
    for hook in hooks:
        hook.remove()
    return calls[-1]


def local_of(network: Network) -> Local:
    """How its operations become local: windows of `WINDOW`."""
    assert network.spec.train_size is not None
    return Local(network.spec.train_size, WINDOW)


@dataclass(frozen=True)
class Form:
    """One form of a network, ready to run: a `Pass`."""

    module: nn.Module
    spec: Spec
    run: Pass
    peak: Callable[[int, int], int]
    """Bytes of tensors that a pass at a height and width holds at most, found without running."""

    def __call__(self, size: Size) -> Tensor:
        return self.run(size)


@contextmanager
def form(case: str, kind: str, device: str = "cpu", dtype: str = "float32") -> Iterator[Form]:
    """One form of a case: `global` or `local`, `plain`, `plain kept` or `plain local`.

    The first two are ours, as `fullres.restore` runs them, the others the papers'. Those leave it
    to the C library what becomes of freed memory, but for `plain kept`, which keeps it as ours do.

    Raises:
        NoLocalForm: the papers have none of this network.
    """
    found = network(case)
    spec, kind_of = found.spec, getattr(torch, dtype)
    if kind in ("global", "local"):
        settings = local_of(found) if kind == "local" else None
        with running(found, settings, device, dtype) as (run, restorer):
            yield Form(restorer.module, spec, run, restorer.peak)
        return
    module = plain_local(found, local_of(found)) if kind == "plain local" else plain(found)
    memory = nullcontext if kind == "plain kept" else freed_memory_returned
    module = module.to(device, kind_of)

    @torch.inference_mode()
    def plainly(size: Size) -> Tensor:
        x = picture(spec, size).to(device, kind_of) * spec.value_range
        with memory():
            y: Tensor = module(x)
            return y.float().cpu() / spec.value_range

    def peak(*size: int) -> int:
        return peak_memory(module, (1, spec.in_channels, *size), kind_of, device)

    with freed_memory_kept() if kind == "plain kept" else nullcontext():
        yield Form(module, spec, plainly, peak)


@contextmanager
def lean(case: str, kind: str, all_of_it: bool = True) -> Iterator[Form]:
    """A form of a case that returns freed memory: all of it, or large blocks only."""
    with form(case, kind) as found, freed_memory_returned(all_of_it=all_of_it):
        yield found


def options(description: str, size: Size, repeats: int) -> argparse.Namespace:
    """The command line that the benchmarks share: cases, size, repeats, threads.

    Sets the number of threads and prints the machine.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(cases())}")
    parser.add_argument(
        "--size", type=_size, help=f"height x width; {size[0]}x{size[1]} where memory holds it"
    )
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    found = parser.parse_args()
    unknown = set(found.cases) - set(cases())
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known are {', '.join(cases())}")
    found.default_size = size
    use_huge_pages()
    torch.set_num_threads(found.threads)
    print(f"{machine('cpu')}; medians of {found.repeats} turns\n")
    return found


def _size(text: str) -> Size:
    height, width = map(int, text.lower().split("x"))
    return height, width


def size_of(case: str, options: argparse.Namespace) -> Size:
    """Height and width at which a case is measured."""
    return options.size or SMALLER.get(case, options.default_size)


def times(found: Sequence[float]) -> str:
    """A time to read."""
    middle = sorted(found)[len(found) // 2]
    return f"{middle:.2f} s" if middle >= 1 else f"{1000 * middle:.0f} ms"
