"""Mosaics interpolated by Malvar's filters, beside a form written pixel by pixel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fullres.ops.bayer import REACH, interpolated, sparse

COLOURS = "RGGB"


def at(i, j):
    return COLOURS[2 * (i % 2) + j % 2]


def pixel(m, i, j, colour):
    """The paper's estimates (sections 3 and 4, with gains 1/2, 5/8 and 3/4) at one pixel."""
    here = m[i][j]
    if at(i, j) == colour:
        return here
    ring = m[i - 2][j] + m[i + 2][j], m[i][j - 2] + m[i][j + 2]
    if colour == "G":
        near = (m[i - 1][j] + m[i + 1][j] + m[i][j - 1] + m[i][j + 1]) / 4
        return near + (here - sum(ring) / 4) / 2
    corners = m[i - 1][j - 1] + m[i - 1][j + 1] + m[i + 1][j - 1] + m[i + 1][j + 1]
    if at(i, j) != "G":
        return corners / 4 + 3 / 4 * (here - sum(ring) / 4)
    beside = at(i, j + 1) == colour
    near = (m[i][j - 1] + m[i][j + 1] if beside else m[i - 1][j] + m[i + 1][j]) / 2
    across, along = ring if beside else ring[::-1]
    return near + 5 / 8 * here - along / 8 - corners / 8 + across / 16


sides = st.integers(1, 5)


@given(sides, sides, st.integers(0, 99))
def test_it_is_the_papers_estimate_at_every_pixel(height, width, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (1, 1, height + 2 * REACH, width + 2 * REACH)
    mosaic = torch.rand(shape, generator=generator, dtype=torch.float64)
    found = interpolated(mosaic)[0]
    values = mosaic[0, 0].tolist()
    for channel, colour in enumerate("RGB"):
        for i in range(height):
            for j in range(width):
                exact = min(max(pixel(values, i + REACH, j + REACH, colour), 0), 1)
                assert abs(found[channel, i, j].item() - exact) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_grey_ramps_come_back_exactly(dtype):
    i, j = torch.meshgrid(torch.arange(12.0), torch.arange(9.0), indexing="ij")
    ramp = (0.2 + 0.03 * i + 0.02 * j).to(dtype)[None, None]
    inner = ramp[..., REACH:-REACH, REACH:-REACH]
    torch.testing.assert_close(interpolated(ramp), inner.expand(-1, 3, -1, -1))


def test_interpolation_keeps_every_sample():
    mosaic = torch.rand(2, 1, 10, 14)
    inner = mosaic[..., REACH:-REACH, REACH:-REACH]
    samples = sparse(inner)
    assert torch.equal(interpolated(mosaic)[samples > 0], samples[samples > 0])
    assert torch.equal(samples.sum(1, keepdim=True), inner)


def test_reflection_keeps_the_colours():
    colours = torch.tensor([0.9, 0.5, 0.1]).reshape(1, 3, 1, 1).expand(1, 3, 8, 10)
    mosaic = (colours * sparse(torch.ones(1, 1, 8, 10))).sum(1, keepdim=True)
    padded = F.pad(mosaic, (REACH,) * 4, mode="reflect")
    torch.testing.assert_close(interpolated(padded), colours)
