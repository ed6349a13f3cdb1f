"""Plain forms of the networks: what speed, memory and the overhead of conversion are held against.

A plain form is its paper's equations, one call of torch for each operation, eager, in NCHW memory:
nothing fused, nothing reordered, no memory format chosen. It has the parameters of our network
under the same names, as its modules take other classes. A file here has the forms of one network;
of one without a file, the plain form is its own form in NCHW.

`plain_local` gives the conversion of the papers besides (TLC: Chu et al., ECCV 2022): means and
variances by summed-area tables, attention in windows that are cut out one by one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import nn

from fullres.local import Local
from fullres.networks.spec import Network
from plain.local import NoLocalForm, local_forms

__all__ = ["NoLocalForm", "plain", "plain_local"]


def plain(network: Network) -> nn.Module:
    """The plain form of a network, a copy with the same weights, in eval mode."""
    module = copy.deepcopy(network.module).eval().requires_grad_(False)
    module = module.to(memory_format=torch.contiguous_format)
    forms = _forms(network.spec.architecture)
    for part in list(module.modules()):
        if type(part) in forms:
            _take(part, forms[type(part)])
    return module


def plain_local(network: Network, local: Local) -> nn.Module:
    """The plain form, its global operations made local as the paper makes them.

    Raises:
        NoLocalForm: the paper has none of an operation.
    """
    module = plain(network)
    for part, forward, window in local_forms(network, module, local):
        _take(part, forward)
        part.plain_window = window
    return module


def _forms(architecture: str) -> dict[type[nn.Module], Callable]:
    name = f"{__name__}.{architecture}"
    return import_module(name).FORMS if find_spec(name) else {}


def _take(module: nn.Module, forward: Callable) -> None:
    cls = type(module)
    module.__class__ = type(f"Plain{cls.__name__}", (cls,), {"forward": forward})
