"""Test-time local conversion of any `nn.Module` (TLC: Chu et al., ECCV 2022)."""

from fullres.local.plan import Conversion, Local, NothingToConvert, Operation, Plan, convert, plan

__all__ = ["Conversion", "Local", "NothingToConvert", "Operation", "Plan", "convert", "plan"]
