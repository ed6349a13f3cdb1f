"""Copies of networks; among them shadows, which run for their shapes on fake tensors.

The network itself is not touched: some write to parameters or keep what a pass made.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode

from fullres.errors import ConversionError


class CopyError(ConversionError):
    """A module that cannot be copied."""


def copied(module: nn.Module) -> nn.Module:
    """A copy of a module that shares nothing with it, with its hooks.

    As `copy.deepcopy`, but also of modules that keep a tensor which a graph has computed, a weight
    under weight norm for instance: in the copy it is one without a graph.

    Raises:
        CopyError: it holds something that cannot be copied, an open file or a lock.
    """
    return _copied(module, {}, lambda x: x.detach().clone())


def shadow(module: nn.Module, mode: FakeTensorMode | None) -> nn.Module:
    """A copy of a network without its hooks, to be run within `mode`.

    Its parameters and buffers are fakes of the mode; without a mode parameters are shared and
    buffers copied.

    Raises:
        CopyError: as `copied`.
    """
    stand_ins: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        stand_ins[id(tensor)] = tensor if mode is None else mode.from_tensor(tensor)
    if mode is None:  # a real pass may write to buffers
        stand_ins |= {id(buffer): buffer.detach().clone() for buffer in module.buffers()}

    def computed(x: Tensor) -> Tensor:
        return x.detach().clone() if mode is None else mode.from_tensor(x.detach())

    twin = _copied(module, stand_ins, computed).eval()
    for original, part in zip(module.modules(), twin.modules(), strict=True):
        for name, value in vars(original).items():
            if name.startswith("local_"):  # some leave away what conversion added
                vars(part).setdefault(name, value)
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    return twin


def _copied(
    module: nn.Module, known: dict[int, Any], computed: Callable[[Tensor], Tensor]
) -> nn.Module:
    try:
        with _Detached(computed):
            return copy.deepcopy(module, known)
    except Exception as error:
        raise CopyError(
            f"{type(module).__name__} cannot be copied for {_culprit(module)} "
            f"({' '.join(str(error).split())}), and only a copy is run; give what holds it a "
            "`__deepcopy__`, or create it on first use"
        ) from error


def _culprit(module: nn.Module) -> str:
    """Name of the attribute that keeps a module from being copied."""
    for name, part in module.named_modules():
        for attribute, value in vars(part).items():
            if attribute == "_modules":  # whose own attributes have their turn
                continue
            try:
                with _Detached(Tensor.detach):
                    copy.deepcopy(value)
            except Exception:  # noqa: BLE001 - whatever it is, this is the one
                path = f"{name}.{attribute}" if name else attribute
                return f"the attribute `{path}`"
    return "the way it is put together"


class _Detached(TorchFunctionMode):
    """Copies tensors that a graph has computed, which torch refuses to, without the graph."""

    def __init__(self, computed: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._computed = computed

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            x, memo = args
            if id(x) not in memo:
                memo[id(x)] = self._computed(x)
            return memo[id(x)]
        return func(*args, **(kwargs or {}))


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch from logging failures of fake passes that only mean: try another way."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    logger.addFilter(_drop)
    try:
        yield
    finally:
        logger.removeFilter(_drop)


def _drop(record: logging.LogRecord) -> bool:
    return False
