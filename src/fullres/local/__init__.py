"""Test-time local conversion of any `nn.Module` (TLC: Chu et al., ECCV 2022)."""

from fullres.local.conversion import Conversion, NothingToConvert, convert
from fullres.local.plan import Operation, Plan, plan
from fullres.local.settings import Local

__all__ = ["Conversion", "Local", "NothingToConvert", "Operation", "Plan", "convert", "plan"]
