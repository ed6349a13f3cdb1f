"""Overhead of conversion, by what conversion changes: each part local over global, in its place.

    python benchmarks/parts.py [CASE…] [--size 720x1280] [--repeats 9] [--threads N]

Passes take seconds and vary by 10 %, more than what is to be measured. Here a pass of the global
network stops at every part that is another one in the local network, the smallest that takes and
gives ordinary tensors, and times both on copies of what comes in, in turn and in changing order.
The differences, medians over turns, add up to what conversion costs; the overhead is one plus
their sum over the time of a global pass, the median of three.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_leaves, tree_map_only

from cases import SMALLER, Form, cases, form, options, size_of, times
from fullres.measure import Size, interleaved, seconds, table

HEADER = (
    "network",
    "picture",
    "global pass",
    "parts",
    "global parts",
    "local parts",
    "overhead",
)
CASES = [case for case in cases() if case not in SMALLER]
Times = dict[str, list[float]]


def changed(globally: Form, locally: Form, size: Size) -> list[str]:
    """Names of the parts that differ, none within another."""
    own = dict(globally.module.named_modules())
    usable = _ordinary(globally, size) & _ordinary(locally, size)
    found = set()
    for name, part in locally.module.named_modules():
        if type(part) is type(own[name]):
            continue
        while name not in usable:
            if not name:
                raise SystemExit("no part of the network holds what conversion changes")
            name = name.rpartition(".")[0]
        found.add(name)
    return [n for n in found if not any(_within(n, other) for other in found)]


def _within(name: str, other: str) -> bool:
    return name != other and (other == "" or name.startswith(f"{other}."))


def _ordinary(run: Form, size: Size) -> set[str]:
    """Names of the modules that are called, and take and give ordinary tensors."""
    met: dict[nn.Module, bool] = {}

    def look(part: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        met[part] = met.get(part, True) and all(type(x) is Tensor for x in tensors)

    # a hook of their own would make local pools give whole maps
    hook = register_module_forward_hook(look, with_kwargs=True)
    run(size)
    hook.remove()
    return {name for name, part in run.module.named_modules() if met.get(part)}


def differences(globally: Form, locally: Form, size: Size, repeats: int) -> list[Times]:
    """Seconds of both forms, turn by turn, of each call of each part."""
    local_parts = dict(locally.module.named_modules())
    found: list[Times] = []

    def both(name: str, part: nn.Module, args: Any, kwargs: Any) -> None:
        forms = {"global": part.forward, "local": local_parts[name].forward}
        took: Times = defaultdict(list)
        for turn in range(-1, repeats):
            for kind in list(forms)[:: 1 if turn % 2 else -1]:
                a, k = tree_map_only(Tensor, Tensor.clone, (args, kwargs))  # they may be changed
                took[kind].append(seconds(partial(forms[kind], *a, **k)))
        found.append({kind: t[1:] for kind, t in took.items()})

    hooks = [
        globally.module.get_submodule(name).register_forward_pre_hook(
            partial(both, name), with_kwargs=True
        )
        for name in changed(globally, locally, tuple(min(n, 448) for n in size))
    ]
    globally(size)
    for hook in hooks:
        hook.remove()
    return found


@torch.inference_mode()
def row(case: str, size: Size, repeats: int) -> tuple[str, ...]:
    with ExitStack() as stack:
        globally = stack.enter_context(form(case, "global"))
        locally = stack.enter_context(form(case, "local"))
        whole = interleaved({"global": partial(globally, size)}, 3)["global"]
        found = differences(globally, locally, size, repeats)
    sums = {k: sum(statistics.median(t[k]) for t in found) for k in ("global", "local")}
    more = sum(
        statistics.median(b - a for a, b in zip(t["global"], t["local"], strict=True))
        for t in found
    )
    return (
        case,
        f"{size[0]} × {size[1]}",
        times(whole),
        f"{len(found)}",
        times([sums["global"]]),
        times([sums["local"]]),
        f"{1 + more / statistics.median(whole):.3f}",
    )


def main() -> None:
    given = options(__doc__, size=(720, 1280), repeats=9)

    def rows() -> Iterator[tuple[str, ...]]:
        for case in given.cases or CASES:
            yield row(case, size_of(case, given), given.repeats)

    for line in table(HEADER, rows()):
        print(line, flush=True)


if __name__ == "__main__":
    main()
