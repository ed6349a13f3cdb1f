"""Hyperparameters that no network of GRL can have; each check raises `ValueError` naming them."""

from __future__ import annotations

from collections.abc import Sequence


def check_sizes(
    channels: int, out: int, dim: int, img_range: float, img_size: int, hidden: int
) -> None:
    """Channels of pictures and features, the range of values and the size of training crops."""
    if min(channels, out, img_size) < 1:
        raise ValueError("in_channels, out_channels and img_size must be positive")
    if dim < 4 or hidden < 1:
        raise ValueError("embed_dim must be at least 4, and mlp_ratio leave a channel or more")
    if not 0 < img_range < float("inf"):
        raise ValueError("img_range must be positive")


def check_stages(
    dim: int, depths: Sequence[int], window: Sequence[int], stripe: Sequence[int]
) -> None:
    """Blocks of each stage, and the heads of its attention within windows and stripes."""
    if not 1 <= len(depths) == len(window) == len(stripe):
        raise ValueError(
            "depths, num_heads_window and num_heads_stripe must have the same number of stages, "
            f"at least 1, not {len(depths)}, {len(window)} and {len(stripe)}"
        )
    if min(*depths, *window, *stripe) < 1:
        raise ValueError("depths, num_heads_window and num_heads_stripe must be positive")
    if dim % 2 or any(dim // 2 % heads for heads in (*window, *stripe)):
        raise ValueError(
            "embed_dim must be even, and half of it divide into num_heads_window and into "
            "num_heads_stripe"
        )


def check_windows(
    window: int, sizes: Sequence[int | None], groups: Sequence[int | None], down: int
) -> None:
    """Sizes of windows, stripes and the cells of anchors."""
    if window < 1 or down < 1:
        raise ValueError("window_size and anchor_window_down_factor must be positive")
    if len(sizes) != 2 or len(groups) != 2:
        raise ValueError("stripe_size and stripe_groups must each have a height and a width")
    for size, group in zip(sizes, groups, strict=True):
        if group is None and (size is None or size < 1 or size % down):
            raise ValueError(
                "stripe_size must be a multiple of anchor_window_down_factor along an axis without "
                f"stripe_groups, not {size} of {down}"
            )
        if group is not None and group < 1:
            raise ValueError("stripe_groups must be positive")
