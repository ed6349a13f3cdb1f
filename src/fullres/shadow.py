"""Shadows of networks: copies that run for their shapes, on fake tensors that hold no values.

The network itself is not touched: some write to parameters or keep what a pass made.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch._subclasses import FakeTensorMode


def shadow(module: nn.Module, mode: FakeTensorMode | None) -> nn.Module:
    """A copy of a network without its hooks, to be run within `mode`.

    Its parameters and buffers are fakes of the mode; without a mode parameters are shared and
    buffers copied.
    """
    stand_ins: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        stand_ins[id(tensor)] = tensor if mode is None else mode.from_tensor(tensor)
    if mode is None:  # a real pass may write to buffers
        stand_ins |= {id(buffer): buffer.detach().clone() for buffer in module.buffers()}
    copied = copy.deepcopy(module, stand_ins).eval()
    for original, twin in zip(module.modules(), copied.modules(), strict=True):
        for name, value in vars(original).items():
            if name.startswith("local_"):  # some leave away what conversion added
                vars(twin).setdefault(name, value)
        twin._forward_hooks.clear()
        twin._forward_pre_hooks.clear()
    return copied


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
