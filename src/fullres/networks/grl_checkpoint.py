"""What a checkpoint of GRL tells of its hyperparameters, and what only its publication tells.

Sizes of windows and stripes leave no trace in the parameters. Few files hold the tables made from
them; for the others they are those that weights of that kind were published with.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fullres.networks.spec import Spec, State, count

_ANCHOR_CELL = 4
_WINDOWS: dict[str, dict[str, Any]] = {
    "denoise": {"window_size": 16, "stripe_size": (64, 128), "img_size": 256},
    "deblur": {"window_size": 12, "stripe_size": (48, 96), "img_size": 480},
    "defocus": {"window_size": 16, "stripe_size": (48, 96), "img_size": 480},
    "jpeg": {"window_size": 36, "stripe_size": (72, 144), "img_size": 288},
    "demosaic": {"window_size": 8, "stripe_size": (32, 32), "img_size": 64},
    "super-resolution": {"window_size": 32, "stripe_size": (64, 64), "img_size": 256},
    "real-world super-resolution": {"window_size": 16, "stripe_size": (32, 64), "img_size": 128},
}
"""By task, as in the published option files and test commands; the base size differs in two."""
_BASE: dict[str, dict[str, Any]] = {
    "denoise": {"window_size": 32, "anchor_window_down_factor": 2},
    "super-resolution": {"anchor_window_down_factor": 2},
}

TASKS = tuple(_WINDOWS)
"""Tasks that weights were published for."""

_FILES = {
    "dn": "denoise",
    "db_motion": "deblur",
    "db_defocus": "defocus",
    "jpeg": "jpeg",
    "dm": "demosaic",
    "sr": "super-resolution",
    "bsr": "real-world super-resolution",
}
"""What names of published files begin with, and their task."""

_TABLES = {
    *("table_w", "table_sh", "table_sv", "index_w", "mask_w"),
    *(f"index_s{d}_{way}" for d in "hv" for way in ("a2w", "w2a")),
    *(f"mask_s{d}_{way}" for d in "hv" for way in ("a2w", "w2a")),
}
"""Buffers of the published code, made anew for every picture size."""


def published(task: str, *, base: bool) -> dict[str, Any]:
    """Sizes of windows and stripes that the weights for a task were published with."""
    cell = {"anchor_window_down_factor": _ANCHOR_CELL}
    return {**_WINDOWS[task], **cell, **(_BASE.get(task, {}) if base else {})}


def published_as(stem: str, content: Mapping[Any, Any]) -> dict[str, Any]:
    """Sizes of windows and stripes of a published file, by its name without suffix.

    Empty where the name is none of the publication's.

    >>> published_as("jpeg_grl_small_c3q40", {})["window_size"]
    36
    """
    found = re.match(r"([a-z_]+?)(?:_(?:single|dual)_pixel)?_grl_(tiny|small|base)", stem)
    if found is None or found[1] not in _FILES:
        return {}
    return published(_FILES[found[1]], base=found[2] == "base")


class _WithoutTables(dict[str, Tensor]):
    """A state dict whose tables were taken out."""

    tables: dict[str, Tensor]


def without_tables(state: State) -> State:
    """The state dict as the network has it; `hyperparameters_of` still sees what was dropped."""
    kept = _WithoutTables({name: x for name, x in state.items() if name not in _TABLES})
    kept.tables = {name: x for name, x in state.items() if name in _TABLES}
    return kept


def hyperparameters_of(state: State) -> dict[str, Any] | None:
    """Hyperparameters from names and shapes, and those of the publication for what these hide.

    Small and base weights that keep the picture's size and channels may be for several tasks; they
    are taken for denoising.
    """
    first = _shape(state, "conv_first.weight", 4)
    hidden = _shape(state, "layers.0.blocks.0.mlp.fc1.weight", 2)
    stages = range(count(state, "layers."))
    attention = [f"layers.{n}.blocks.0.attn." for n in stages]
    windows = [_shape(state, f"{a}window_attn.attn_transform.logit_scale", 3) for a in attention]
    stripes = [_shape(state, f"{a}stripe_attn.attn_transform1.logit_scale", 3) for a in attention]
    anchor = _anchor(state)
    result = None if first is None else _result(state, first[1])
    if not first or not hidden or not stages or None in (*windows, *stripes, anchor, result):
        return None
    assert anchor is not None
    assert result is not None
    qkv = "layers.0.blocks.0.attn.qkv.body."
    separable = f"{qkv}0.weight" in state
    local = "layers.0.blocks.0.conv.cab.0.weight" in state
    task = _task_of_shapes(first[1], result)
    sizes = {**published(task, base=local), **_from_tables(getattr(state, "tables", {}))}
    return {
        **sizes,
        **result,
        **anchor,
        "in_channels": first[1],
        "embed_dim": first[0],
        "depths": tuple(count(state, f"layers.{n}.blocks.") for n in stages),
        "num_heads_window": tuple(shape[0] for shape in windows if shape),
        "num_heads_stripe": tuple(shape[0] for shape in stripes if shape),
        "mlp_ratio": _ratio(hidden[0], first[0]),
        "qkv_bias": f"{qkv}0.bias" in state if separable else f"{qkv}bias" in state,
        "qkv_proj_type": "separable_conv" if separable else "linear",
        "conv_type": _conv_type(state),
        "local_connection": local,
    }


def _shape(state: State, name: str, ndim: int) -> tuple[int, ...] | None:
    """Shape of a tensor, None where it is missing, empty or of other dimensions."""
    tensor = state.get(name)
    wanted = tensor is not None and tensor.ndim == ndim and tensor.numel() > 0
    return tuple(tensor.shape) if tensor is not None and wanted else None


def _ratio(hidden: int, dim: int) -> float:
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else (hidden + 0.5) / dim


def _conv_type(state: State) -> str:
    weight = state.get("conv_after_body.weight")
    if weight is None:
        return "3conv"
    if weight.ndim == 2:
        return "linear"
    return "1conv1x1" if weight.shape[-1:] == (1,) else "1conv"


def _anchor(state: State) -> dict[str, Any] | None:
    """How anchors are made; pooled ones do not tell over how many positions, nor of what kind."""
    body = "layers.0.blocks.0.attn.anchor.body."
    stages = count(state, body)
    if _shape(state, f"{body}0.reduction.weight", 2):
        if f"{body}0.reduction.bias" in state:
            return {"anchor_proj_type": "avgpool", "anchor_one_stage": True}
        kind, kernel = "patchmerging", 3
    elif conv := _shape(state, f"{body}0.weight", 4):
        kind, kernel = "conv2d", conv[2]
    elif conv := _shape(state, f"{body}0.0.weight", 4):
        kind, kernel = "separable_conv", conv[2]
    else:
        return None
    return {
        "anchor_proj_type": kind,
        "anchor_one_stage": stages == 1,
        "anchor_window_down_factor": kernel - 1 if stages == 1 else 2**stages,
    }


def _result(state: State, channels: int) -> dict[str, Any] | None:
    """How the result is made, of a picture of so many channels."""
    up = _shape(state, "upsample.up.0.weight", 4)
    last = _shape(state, "conv_last.weight", 4)
    if up and "conv_before_upsample.0.weight" not in state:
        outs = (out for out in (channels, 3, 1) if _root(up[0], out))
        out = next(outs, None)
        kind, scale = "pixelshuffledirect", 1 if out is None else _root(up[0], out)
    else:
        out = last[0] if last else None
        if up:
            steps = sum(bool(re.fullmatch(r"upsample\.up\.\d+\.weight", n)) for n in state)
            kind, scale = "pixelshuffle", _root(up[0], up[1]) ** steps
        elif "conv_up1.weight" in state:
            kind, scale = "nearest+conv", 4
        else:
            kind, scale = "", 1
    if out is None:
        return None
    return {
        "upsampler": kind,
        "upscale": scale,
        "out_channels": None if out == channels else out,
    }


def _root(rows: int, out: int) -> int:
    """The factor by which `rows` channels make a picture of `out` channels larger, or 0."""
    root = math.isqrt(rows // out)
    return root if root**2 * out == rows else 0


def _task_of_shapes(channels: int, result: Mapping[str, Any]) -> str:
    if result["upsampler"] == "nearest+conv":
        return "real-world super-resolution"
    if result["upsampler"]:
        return "super-resolution"
    return "denoise" if result["out_channels"] is None else "defocus"


def _from_tables(tables: Mapping[str, Tensor]) -> dict[str, Any]:
    """Sizes of windows and stripes from the buffers of the published code, as far as they go."""
    sizes: dict[str, Any] = {}
    window, mask = _shape(tables, "table_w", 4), _shape(tables, "mask_w", 3)
    if window:
        sizes["window_size"] = (window[1] + 1) // 2
        if mask:
            sizes["img_size"] = sizes["window_size"] * math.isqrt(mask[0])
    stripe, index = _shape(tables, "table_sh", 4), _shape(tables, "index_sh_a2w", 2)
    if stripe and index:
        down = math.isqrt(index[1] // index[0])
        sizes["anchor_window_down_factor"] = down
        sizes["stripe_size"] = tuple((n + 1) * down // (down + 1) for n in stripe[1:3])
    return sizes


def spec_of(hyperparameters: Mapping[str, Any]) -> Spec:
    """The spec of a network with these hyperparameters."""
    channels, out = hyperparameters["in_channels"], hyperparameters["out_channels"]
    out = channels if out is None else out
    return Spec(
        architecture="grl",
        hyperparameters=hyperparameters,
        in_channels=channels,
        out_channels=out,
        scale=hyperparameters["upscale"],
        views=2 if channels == 2 * out else 1,
        mosaic="interpolated",
        task=_task_of(hyperparameters),
        train_size=hyperparameters["img_size"],
    )


def _task_of(hyperparameters: Mapping[str, Any]) -> str | None:
    """The task whose published weights have windows and stripes of these sizes."""
    if hyperparameters["upscale"] > 1:
        realistic = hyperparameters["upsampler"] == "nearest+conv"
        return "real-world super-resolution" if realistic else "super-resolution"
    for task in TASKS:
        sizes = published(task, base=hyperparameters["local_connection"])
        names = ("window_size", "stripe_size")
        if all(hyperparameters[name] == sizes[name] for name in names):
            return task
    return None
