"""Local mean, variance and maximum of feature maps, which test-time local conversion needs.

For a map of H × W and a window kh × kw, clipped to the map: statistics over every fully contained
window at stride 1, then edge replication back to H × W, with (kh - 1) // 2 rows on top and the
rest below, columns alike (TLC: Chu et al., ECCV 2022, section 4.2).

The custom operators `fullres::local_mean`, `fullres::local_mean_var` and
`fullres::local_normalise` have fast kernels on the CPU and on GPUs and the reference elsewhere,
shapes for `torch.compile` and `torch.export`, and derivatives of any order.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from shutil import which
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fullres.ops.arrays import for_kernel, transformed


def local_mean(x: Tensor, window: tuple[int, int], *, replicate: bool = True) -> Tensor:
    """Mean over the window around every position.

    Args:
        x: maps (B, C, H, W) of a floating-point type, any values, any strides.
        window: height and width of the window in positions, clipped to H and W.
        replicate: extend the windows that the map contains to H × W; otherwise return those
            alone, (B, C, H - kh + 1, W - kw + 1).

    Returns:
        Means in the type and memory format of `x`, summed in float64. One rounding away from
        exact, plus about 1e-16 of the plane's largest magnitude. A NaN or infinity may reach any
        position of its plane.

    Raises:
        ValueError: `x` is not a batch of floating-point maps or the window is below 1.

    >>> local_mean(torch.arange(5.0).reshape(1, 1, 1, 5), (1, 3))
    tensor([[[[1., 1., 2., 3., 3.]]]])
    """
    kh, kw = _clipped(x, window)
    if transformed():  # of which torch's operators know nothing
        return local_mean_reference(x, window, replicate=replicate)
    at_once = for_kernel(x, dtypes=(torch.float32, torch.bfloat16))  # torch's dispatch takes 0.1 ms
    operator = _local_mean_cpu if at_once else torch.ops.fullres.local_mean
    mean: Tensor = operator(x, kh, kw, replicate)
    return mean


def local_mean_var(
    x: Tensor, window: tuple[int, int], *, replicate: bool = True
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over the window around every position.

    Shapes, types and errors as `local_mean`; the variance is never negative, and is summed about
    a value of the plane, so that a large mean costs it no digits.

    >>> local_mean_var(torch.tensor([1.0, 3.0, 3.0]).reshape(1, 1, 1, 3), (1, 2))[1].flatten()
    tensor([1., 0., 0.])
    """
    kh, kw = _clipped(x, window)
    if transformed():
        mean, var = local_mean_var_reference(x, window)
    else:
        mean, var = torch.ops.fullres.local_mean_var(x, kh, kw)
    if not replicate:
        mean, var = _contained(mean, kh, kw), _contained(var, kh, kw)
    return mean, var


def local_normalise(
    x: Tensor,
    window: tuple[int, int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Maps normalised by the windows around them: `(x - mean) / sqrt(var + eps) * weight + bias`.

    Type, shape and errors as `local_mean`; statistics and arithmetic in float32 or better, one
    rounding to the type of `x`. On a GPU in one pass, without maps of statistics.

    Args:
        x: maps (B, C, H, W).
        window: as `local_mean`.
        weight: factor of each channel, (C,).
        bias: summand of each channel, (C,).
        eps: added to the variance.

    >>> local_normalise(torch.tensor([1.0, 3.0, 3.0]).reshape(1, 1, 1, 3), (1, 2), eps=0).flatten()
    tensor([-1., nan, nan])
    """
    kh, kw = _clipped(x, window)
    if transformed():
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, var = local_mean_var_reference(wide, window)
        scale = (var + eps).rsqrt() * _by_channel(weight, x, 1)
        return ((wide - mean) * scale + _by_channel(bias, x, 0)).to(x.dtype)
    y: Tensor = torch.ops.fullres.local_normalise(x, weight, bias, kh, kw, eps)
    return y


def runs_triton(x: Tensor) -> bool:
    """Whether Triton's kernels serve a tensor: on a GPU, or anywhere in Triton's interpreter."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return _has_triton()
    return x.is_cuda and _has_triton() and _can_build()


@cache
def _has_triton() -> bool:
    if find_spec("triton") is None:
        return False
    import triton

    return tuple(int(n) for n in triton.__version__.split(".")[:2]) >= (3, 5)


@cache
def _can_build() -> bool:
    # what launches a kernel is built by the machine's C compiler; Triton for Windows has its own
    return os.name == "nt" or any((os.environ.get("CC"), which("gcc"), which("clang")))


def local_mean_reference(x: Tensor, window: tuple[int, int], *, replicate: bool = True) -> Tensor:
    """`local_mean` in plain torch: differences of cumulative sums, in float64 where there is one.

    Differentiable by itself, on any device; takes several float64 copies of the map.
    """
    kh, kw = _clipped(x, window)
    wide = _wide(x)
    # about a value of the plane, which keeps the digits where there is no float64
    pivot = wide[..., :1, :1].detach()
    mean = (_window_sums(wide - pivot, kh, kw) / (kh * kw) + pivot).to(x.dtype)
    return _replicated(mean, x.shape, kh, kw) if replicate else mean


def local_mean_var_reference(x: Tensor, window: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """`local_mean_var` in plain torch."""
    kh, kw = _clipped(x, window)
    wide = _wide(x)
    pivot = wide[..., :1, :1].detach()
    centre = _window_sums(wide - pivot, kh, kw) / (kh * kw)
    square = _window_sums((wide - pivot).square(), kh, kw) / (kh * kw)
    var = (square - centre.square()).clamp_min(0)
    mean = (centre + pivot).to(x.dtype)
    return _replicated(mean, x.shape, kh, kw), _replicated(var.to(x.dtype), x.shape, kh, kw)


def local_max(x: Tensor, window: tuple[int, int], *, replicate: bool = True) -> Tensor:
    """Maximum over the window around every position, in time that does not depend on the window.

    Shapes, types and errors as `local_mean`. Each axis is cut into blocks of the window's length:
    a window is the end of one block and the beginning of the next, whose running maxima are known
    (van Herk, Gil and Werman).

    >>> local_max(torch.tensor([1.0, 5.0, 2.0, 0.0, 3.0]).reshape(1, 1, 1, 5), (1, 3)).flatten()
    tensor([5., 5., 5., 3., 3.])
    """
    kh, kw = _clipped(x, window)
    if _has_fast_max(x):
        maxima: Tensor = torch.ops.fullres.local_max(x, kh, kw)
    else:
        maxima = _window_maxima(_window_maxima(x, 3, kw), 2, kh)
    return _replicated(maxima, x.shape, kh, kw) if replicate else maxima


def _has_fast_max(x: Tensor) -> bool:
    differentiated = torch.is_grad_enabled() and x.requires_grad
    wide = x.dtype in (torch.float32, torch.float64)
    return x.device.type == "cpu" and wide and not (differentiated or transformed())


@torch.library.custom_op("fullres::local_max", mutates_args=(), device_types="cpu")
def _local_max(x: Tensor, kh: int, kw: int) -> Tensor:
    from fullres.ops import max_cpu

    maxima = max_cpu.local_max(x, kh, kw)
    return maxima.clone() if maxima.data_ptr() == x.data_ptr() else maxima


@_local_max.register_fake
def _local_max_fake(x: Tensor, kh: int, kw: int) -> Tensor:
    return _result(x, kh, kw, False)


def _window_maxima(x: Tensor, dim: int, k: int) -> Tensor:
    x = x.transpose(dim, -1)
    length = x.shape[-1]
    blocks = F.pad(x, (0, -length % k), value=-torch.inf)
    blocks = blocks.reshape(*x.shape[:-1], -1, k)
    from_start = blocks.cummax(-1).values.flatten(-2)
    to_end = blocks.flip(-1).cummax(-1).values.flip(-1).flatten(-2)
    windows = length - k + 1
    maxima = torch.maximum(to_end[..., :windows], from_start[..., k - 1 : k - 1 + windows])
    return maxima.transpose(dim, -1)


def _clipped(x: Tensor, window: tuple[int, int]) -> tuple[int, int]:
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"expected floating-point maps (B, C, H, W), got {x.dtype} {[*x.shape]}")
    kh, kw = window
    if kh < 1 or kw < 1:
        raise ValueError(f"a window is at least 1 × 1, got {kh} × {kw}")
    return min(kh, x.shape[2]), min(kw, x.shape[3])


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def _window_sums(x: Tensor, kh: int, kw: int) -> Tensor:
    """Sums over contained windows, (B, C, H - kh + 1, W - kw + 1)."""
    for dim, k in ((2, kh), (3, kw)):
        sums = F.pad(x.cumsum(dim), (1, 0) if dim == 3 else (0, 0, 1, 0))
        x = sums.narrow(dim, k, sums.shape[dim] - k) - sums.narrow(dim, 0, sums.shape[dim] - k)
    return x


def _replicated(x: Tensor, shape: torch.Size, kh: int, kw: int) -> Tensor:
    bottom, right = shape[2] - x.shape[2] - (kh - 1) // 2, shape[3] - x.shape[3] - (kw - 1) // 2
    return F.pad(x, ((kw - 1) // 2, right, (kh - 1) // 2, bottom), mode="replicate")


def _contained(x: Tensor, kh: int, kw: int) -> Tensor:
    """Of a statistic at every position, that of the contained windows."""
    top, left = (kh - 1) // 2, (kw - 1) // 2
    return x[..., top : top + x.shape[2] - kh + 1, left : left + x.shape[3] - kw + 1]


def _result_shape(x: Tensor, kh: int, kw: int, replicate: bool) -> tuple[int, ...]:
    b, c, h, w = x.shape
    return (b, c, h, w) if replicate else (b, c, h - kh + 1, w - kw + 1)


def _result(x: Tensor, kh: int, kw: int, replicate: bool) -> Tensor:
    """Room for a result in the memory format of `x`."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    pixels_contiguous = channels_last or (x.shape[1] > 1 and x.stride(1) == 1 != x.stride(3))
    return torch.empty(
        _result_shape(x, kh, kw, replicate),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last if pixels_contiguous else torch.contiguous_format,
    )


def _kernels(x: Tensor) -> Any:
    """The module with the fast kernels for a map."""
    if runs_triton(x):
        from fullres.ops import box_cuda

        return box_cuda
    from fullres.ops import box_cpu

    return box_cpu


@torch.library.custom_op("fullres::local_mean", mutates_args=())
def _local_mean(x: Tensor, kh: int, kw: int, replicate: bool) -> Tensor:
    out = _result(x, kh, kw, replicate)
    if runs_triton(x):
        _kernels(x).local_mean(x, kh, kw, replicate, out)
        return out
    return out.copy_(local_mean_reference(x, (kh, kw), replicate=replicate))


@_local_mean.register_kernel("cpu")
def _local_mean_cpu(x: Tensor, kh: int, kw: int, replicate: bool) -> Tensor:
    out = _result(x, kh, kw, replicate)
    if x.numel():
        _kernels(x).local_mean(x, kh, kw, replicate, out)
    return out


_local_mean.register_fake(_result)


@torch.library.custom_op("fullres::local_mean_var", mutates_args=())
def _local_mean_var(x: Tensor, kh: int, kw: int) -> tuple[Tensor, Tensor]:
    mean, var = _result(x, kh, kw, True), _result(x, kh, kw, True)
    if runs_triton(x):
        _kernels(x).local_mean_var(x, kh, kw, True, mean, var)
        return mean, var
    exact_mean, exact_var = local_mean_var_reference(x, (kh, kw))
    return mean.copy_(exact_mean), var.copy_(exact_var)


@_local_mean_var.register_kernel("cpu")
def _local_mean_var_cpu(x: Tensor, kh: int, kw: int) -> tuple[Tensor, Tensor]:
    mean, var = _result(x, kh, kw, True), _result(x, kh, kw, True)
    if x.numel():
        _kernels(x).local_mean_var(x, kh, kw, True, mean, var)
    return mean, var


@_local_mean_var.register_fake
def _local_mean_var_fake(x: Tensor, kh: int, kw: int) -> tuple[Tensor, Tensor]:
    return _result(x, kh, kw, True), _result(x, kh, kw, True)


@torch.library.custom_op("fullres::local_normalise", mutates_args=())
def _local_normalise(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, kh: int, kw: int, eps: float
) -> Tensor:
    out = _result(x, kh, kw, True)
    if not x.numel():
        return out
    if runs_triton(x):
        weight, bias = (v if v is None else v.contiguous() for v in (weight, bias))
        _kernels(x).local_normalise(x, kh, kw, weight, bias, eps, out)
        return out
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean, var = local_mean_var(wide, (kh, kw))
    scale = var.add_(eps).rsqrt_().mul_(_by_channel(weight, x, 1))
    y = torch.sub(wide, mean, out=out if out.dtype == wide.dtype else None)
    y.mul_(scale).add_(_by_channel(bias, x, 0))
    return y if y is out else out.copy_(y)


@_local_normalise.register_fake
def _local_normalise_fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, kh: int, kw: int, eps: float
) -> Tensor:
    return _result(x, kh, kw, True)


def _by_channel(vector: Tensor | None, x: Tensor, default: float) -> Tensor:
    return x.new_full((), default) if vector is None else vector[:, None, None]


def _adjoint(grad: Tensor, shape: torch.Size, kh: int, kw: int, replicate: bool) -> Tensor:
    """Transpose of the local mean, itself a local mean: of the gradient in a border of zeros."""
    if replicate:
        grad = _folded(grad, 2, (kh - 1) // 2, shape[2] - kh + 1)
        grad = _folded(grad, 3, (kw - 1) // 2, shape[3] - kw + 1)
    padded = F.pad(grad, (kw - 1, kw - 1, kh - 1, kh - 1))
    return local_mean(padded, (kh, kw), replicate=False)


def _folded(grad: Tensor, dim: int, before: int, windows: int) -> Tensor:
    """Add the gradient of replicated edges to the windows that they replicate."""
    after = grad.shape[dim] - before - windows
    first = grad.narrow(dim, 0, before + 1).sum(dim, keepdim=True)
    last = grad.narrow(dim, grad.shape[dim] - after - 1, after + 1).sum(dim, keepdim=True)
    if windows == 1:
        return grad.sum(dim, keepdim=True)
    return torch.cat([first, grad.narrow(dim, before + 1, windows - 2), last], dim)


def _keep_shape(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *ctx.options = inputs
    ctx.shape = x.shape


def _local_mean_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _adjoint(grad, ctx.shape, *ctx.options), None, None, None


def _keep_map(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, ctx.kh, ctx.kw = inputs
    ctx.save_for_backward(x, output[0])


def _local_mean_var_backward(
    ctx: Any, grad_mean: Tensor, grad_var: Tensor
) -> tuple[Tensor | None, ...]:
    x, mean = ctx.saved_tensors
    return _mean_var_adjoint(x, mean, ctx.kh, ctx.kw, grad_mean, grad_var), None, None


def _mean_var_adjoint(
    x: Tensor, mean: Tensor, kh: int, kw: int, grad_mean: Tensor, grad_var: Tensor
) -> Tensor:
    pivot = x[..., :1, :1].detach()
    window = (x.shape, kh, kw, True)
    # d var / d x = 2 (x - mean) / n, both about the pivot to keep their digits
    grad = _adjoint(grad_mean - 2 * grad_var * (mean - pivot), *window)
    return grad + 2 * (x - pivot) * _adjoint(grad_var, *window)


def _keep_normalised(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, *ctx.options = inputs
    ctx.save_for_backward(x, weight, bias)


def _local_normalise_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    kh, kw, eps = ctx.options
    wide, grad = (z.to(torch.promote_types(x.dtype, torch.float32)) for z in (x, grad))
    mean, var = local_mean_var(wide, (kh, kw))
    scale, factor = torch.rsqrt(var + eps), _by_channel(weight, wide, 1)
    normalised = (wide - mean) * scale
    direct = grad * factor * scale
    grad_var = -0.5 * direct * normalised * scale
    grads: list[Tensor | None] = [None, None, None]
    if ctx.needs_input_grad[0]:
        grad_x = direct + _mean_var_adjoint(wide, mean, kh, kw, -direct, grad_var)
        grads[0] = grad_x.to(x.dtype)
    if ctx.needs_input_grad[1]:
        grads[1] = (grad * normalised).sum((0, 2, 3)).to(weight.dtype)
    if ctx.needs_input_grad[2]:
        grads[2] = grad.sum((0, 2, 3)).to(bias.dtype)
    return *grads, None, None, None


_local_mean.register_autograd(_local_mean_backward, setup_context=_keep_shape)
_local_mean_var.register_autograd(_local_mean_var_backward, setup_context=_keep_map)
_local_normalise.register_autograd(_local_normalise_backward, setup_context=_keep_normalised)
