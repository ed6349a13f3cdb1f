"""Where a call stands: the module whose forward makes it, and the place in the code."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from torch import nn

_TORCH = str(Path(torch.__file__).parent) + os.sep
_STOCK = str(Path(nn.__file__).parent / "modules") + os.sep
_OURS = str(Path(__file__).parent) + os.sep
_CALL = nn.Module._call_impl.__code__
"""Of what runs the forward of every module."""


@dataclass(frozen=True)
class Site:
    """Where a call stands in the code."""

    file: str
    line: int
    instruction: int

    def __str__(self) -> str:
        return f"{Path(self.file).name}:{self.line}"


def calling(frame: FrameType | None) -> tuple[nn.Module, Site | None] | None:
    """The module whose forward makes the call that is being handled, and where.

    Torch's own modules have no site: they are one operation, known by their class. None for calls
    outside of any module.
    """
    site, stock = None, False
    while frame is not None:
        code = frame.f_code
        if code is _CALL and (site is not None or stock):
            return frame.f_locals["self"], site
        if site is None and not stock:
            if not code.co_filename.startswith((_OURS, _TORCH)):
                site = Site(code.co_filename, frame.f_lineno, frame.f_lasti)
            # `module.py` runs every forward, those of containers run other modules'
            stock = code.co_filename.startswith(_STOCK) and code.co_name == "forward"
        frame = frame.f_back
    return None
