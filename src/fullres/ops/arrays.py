"""Tensors as the arrays that compiled kernels take, which share their memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def as_array(x: Tensor) -> Any:
    """The same as an array; bfloat16, which numpy does not have, by its bits as uint16."""
    x = x.detach()
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


def as_rows(x: Tensor) -> Any:
    """A channels-last map as an array of its rows, (B, H, W * C)."""
    return as_array(x.permute(0, 2, 3, 1).flatten(2))


def spanned(x: Tensor) -> Tensor:
    """The memory that a tensor spans, from its first element to its last, in one dimension."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.detach().as_strided((span,), (1,))


def share_memory(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are views of the same memory."""
    return bool(x.untyped_storage()._cdata == y.untyped_storage()._cdata)


def written(x: Tensor) -> Tensor:
    """The same, which torch is told that a kernel writes to."""
    torch.autograd.graph.increment_version(x)
    return x


def traced() -> bool:
    """Whether a compiler or a tracer records what is computed: it sees calls of torch alone."""
    return torch.compiler.is_compiling() or jit_traced()


def jit_traced() -> bool:
    """The same of `torch.jit.trace`, which has tensors for sizes."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def transformed() -> bool:
    """Whether `torch.func` maps or derives what is computed, or forward derivatives are recorded.

    Tensors then stand for others, which kernels do not see.
    """
    mapped: Any = torch._C._functorch.peek_interpreter_stack()
    return mapped is not None or forward_ad._current_level >= 0


def derives() -> bool:
    """Whether torch derives or transforms what is computed: nothing is written over."""
    return torch.is_grad_enabled() or transformed()


def recorded() -> bool:
    """The same, or a graph is recorded: only calls of torch, of whole maps, serve."""
    return derives() or traced()


def refuse_forward_derivatives(what: str) -> None:
    """Of operators that know those of reverse mode only, torch makes zeros without a word.

    Raises:
        NotImplementedError: forward derivatives are recorded.
    """
    if forward_ad._current_level >= 0:
        raise NotImplementedError(
            f"{what} has no forward derivatives: derive in reverse mode, by backward(), "
            "torch.func.vjp or torch.func.jacrev"
        )


def for_kernel(x: Tensor, *others: Tensor | None, dtypes: tuple[torch.dtype, ...]) -> bool:
    """Whether a kernel for channels-last maps on the CPU may take a map, with other tensors.

    It has one of these types, and records no derivatives and no graph.
    """
    if traced() or transformed() or type(x) is not Tensor or x.device.type != "cpu":
        return False
    given = (x, *others)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
        return False
    return x.dtype in dtypes and x.is_contiguous(memory_format=torch.channels_last)
