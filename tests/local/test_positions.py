"""Functions of vectors give, at every position in one go, what they give for each vector."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

from fullres.local.pooled import Pooled
from fullres.local.positions import at_all_positions

B, C, H, W = 2, 6, 3, 5
PLAIN = torch.rand(C)
LINEAR, BIAS = torch.rand(4, C), torch.rand(4)
ALONG = torch.rand(2, 3, 3)

KNOWN = {
    "sigmoid": lambda x: x.sigmoid(),
    "leaky relu": lambda x: F.leaky_relu(x - 0.5, 0.2),
    "softplus": lambda x: F.softplus(x),
    "clamp": lambda x: x.clamp(0.2, max=0.6),
    "power": lambda x: x**2,
    "negative": lambda x: -x,
    "to": lambda x: x.to(torch.float32),
    "times a number": lambda x: 2 * x,
    "one minus": lambda x: 1 - x,
    "plus a vector": lambda x: x + PLAIN,
    "vector over": lambda x: PLAIN / x,
    "by itself": lambda x: x * x.flip(1),
    "higher": lambda x: x[:, None] * x[:, :, None],
    "where": lambda x: torch.where(x > 0.5, x, -x),
    "maximum": lambda x: torch.maximum(x, PLAIN),
    "in place": lambda x: x.clone().mul_(3).add_(PLAIN).relu_(),
    "softmax": lambda x: x.softmax(-1),
    "softmax by name": lambda x: F.softmax(x, dim=1),
    "sum": lambda x: x.sum(1, keepdim=True),
    "mean of all": lambda x: x.mean(),
    "amax": lambda x: x.amax(-1),
    "std": lambda x: x.std(1),
    "chunk": lambda x: x.chunk(3, -1),
    "chunk by name": lambda x: torch.chunk(x, chunks=3, dim=-1),
    "chunk of the first": lambda x: x.chunk(2),
    "split": lambda x: torch.split(x, [2, 4], dim=1),
    "unbind": lambda x: x.unbind(1),
    "narrow": lambda x: x.narrow(-1, 1, 3),
    "cat": lambda x: torch.cat([x, 2 * x], -1),
    "stack": lambda x: torch.stack((x, 2 * x), -1),
    "unsqueeze": lambda x: x.unsqueeze(-1),
    "squeeze": lambda x: x.view(B, 1, C, 1).squeeze(),
    "squeeze one": lambda x: x.view(B, 1, C, 1).squeeze(-1),
    "linear": lambda x: F.linear(x, LINEAR, BIAS),
    "linear of three": lambda x: F.linear(x.view(B, 1, C), LINEAR),
    "linear of one": lambda x: F.linear(x[0], LINEAR),
    "conv1d": lambda x: F.conv1d(x.view(B, 3, C // 3), ALONG, padding=1),
    "strided conv1d": lambda x: F.conv1d(x.view(B, 3, C // 3), ALONG, None, 2, 2),
    "view": lambda x: x.view(-1, 2, C // 2),
    "reshape": lambda x: x.reshape((B, C, 1, 1)),
    "flatten": lambda x: x.view(B, 2, C // 2).flatten(1),
    "unflatten": lambda x: x.unflatten(-1, (2, C // 2)),
    "transpose": lambda x: x.transpose(-1, 0),
    "permute": lambda x: x.view(B, 2, C // 2).permute(0, -1, 1),
    "expand": lambda x: x[:, None].expand(-1, 3, -1),
    "item": lambda x: x[:, 1:4, None],
    "ellipsis": lambda x: x[..., None, 0],
    "prelu": lambda x: F.prelu(x - 0.5, PLAIN),
}


@torch.no_grad()
@pytest.mark.parametrize("name", KNOWN)
def test_known_functions_agree_with_each_vector(name, monkeypatch):
    def unknown(*_):
        raise AssertionError("is left to vmap")

    monkeypatch.setattr("fullres.local.pooled._mapped", unknown)
    vectors = torch.rand(B, C, H, W)
    got = tree_leaves(KNOWN[name](Pooled(vectors.clone())))
    for i in range(H):
        for j in range(W):
            want = tree_leaves(KNOWN[name](vectors[..., i, j].clone()))
            assert len(want) == len(got)
            for g, w in zip(got, want, strict=True):
                assert g.shape == w.shape
                torch.testing.assert_close(g.vectors[..., i, j], w)


def test_what_is_not_known_is_said_so():
    x = Pooled(torch.rand(B, C, H, W))
    for func, args in (
        (torch.cumsum, (x, 1)),
        (torch.cat, ([x, torch.rand(B, C)], 1)),
        (F.linear, (torch.rand(B, C), x)),
        (torch.Tensor.__getitem__, (x, torch.tensor([0]))),
        (torch.Tensor.mul_, (torch.rand(B, C), x)),
    ):
        assert at_all_positions(func, args, {}, Pooled) is NotImplemented


@torch.no_grad()
def test_vectors_land_on_maps_in_other_orders():
    x, vectors = torch.rand(B, C, H, W), torch.rand(B, C, H, W)
    wanted = x * vectors
    pooled = Pooled(vectors[:, :, None, None])
    tokens = x.flatten(2)
    pixels = x.permute(0, 2, 3, 1)
    assert torch.equal(pixels * pooled.permute(0, 2, 3, 1), wanted.permute(0, 2, 3, 1))
    assert torch.equal(pooled.flatten(2) * tokens, wanted.flatten(2))
    assert torch.equal(tokens.mT * pooled.view(B, 1, C), wanted.flatten(2).mT)
