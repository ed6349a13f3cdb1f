"""Pairs of pictures, and small networks to study on them."""

from __future__ import annotations

import numpy as np
import pytest
import pyvips
import torch
from torch import nn

from fullres.networks.spec import Network, Spec


class Gated(nn.Module):
    """A picture weighed by what a module makes of it."""

    def __init__(self, aggregate: nn.Module) -> None:
        super().__init__()
        self.aggregate = aggregate

    def forward(self, x):
        return x * (0.5 + 0.5 * self.aggregate(x))


@pytest.fixture
def gated():
    """Wraps a global operation on three channels in a network trained on crops of `train_size`."""

    def make(aggregate, train_size=16):
        return Network(Gated(aggregate).eval(), Spec("gated", {}, 3, 3, train_size=train_size))

    return make


@pytest.fixture
def pairs(tmp_path):
    """Writes pairs of pictures of these sizes to a folder; gives it and the degraded pictures."""

    def make(*sizes, folder="pairs", noise=8):
        random = np.random.default_rng(sum(map(sum, sizes)))
        degraded = []
        for index, (height, width) in enumerate(sizes):
            ramp = np.linspace(0, 150, width)[None, :, None] + 40 * random.random(3)
            clean = ramp + 40 * random.random((height, width, 3))
            noisy = clean + noise * random.standard_normal(clean.shape)
            for role, values in (("target", clean), ("input", noisy)):
                place = tmp_path / folder / role / f"{index}.png"
                place.parent.mkdir(parents=True, exist_ok=True)
                stored = values.clip(0, 255).round().astype(np.uint8)
                pyvips.Image.new_from_array(stored).write_to_file(str(place))
            degraded.append(torch.from_numpy(stored / 255).permute(2, 0, 1).float())
        return tmp_path / folder, degraded

    return make


@pytest.fixture
def leaves(tmp_path):
    """Whether a study has left its three files in a folder."""

    def look(folder, name):
        picture = pyvips.Image.new_from_file(str(folder / f"{name}.png"), fail_on="error")
        text = (folder / f"{name}.md").read_text(encoding="utf-8")
        return picture.avg() < 255 and picture.width > 400 and text.startswith("# ")

    return look
