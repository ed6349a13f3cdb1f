"""What architectures other than the simplest ask: tables, shared weights, names to drop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import nn

from fullres.errors import NetworkError
from fullres.io.checkpoint import read_checkpoint
from fullres.networks.instantiate import create, load
from fullres.networks.spec import Architecture, Spec


class Upscaler(nn.Module):
    """One convolution, beside a table that is not saved and a weight under two names."""

    def __init__(
        self,
        scale: int = 2,
        stripes: Sequence[int | None] = (None, 4),
        ratio: float = 2.66,
        kind: Literal["plain", "direct"] = "plain",
    ) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 3 * scale * scale, 1)
        self.activation = nn.PReLU()
        self.same = self.activation
        self.register_buffer("table", torch.arange(4.0), persistent=False)


UPSCALER = Architecture(
    name="upscaler",
    title="Upscaler",
    paper="None",
    authors="Nobody",
    weights="nowhere",
    licence="none",
    tasks=("super-resolution",),
    train_size=48,
    build=Upscaler,
    hyperparameters=lambda state: (
        {"scale": round((len(state["body.weight"]) / 3) ** 0.5)} if "body.weight" in state else None
    ),
    spec=lambda h: Spec("upscaler", h, in_channels=3, out_channels=3, scale=h["scale"]),
    adapt=lambda state: {n: v for n, v in state.items() if n != "table"},
)


def opened(state, path, *architectures):
    torch.save(state, path)
    return load(read_checkpoint(path), architectures)


def test_buffers_shared_weights_and_names_to_drop(tmp_path):
    module = create(UPSCALER, {"scale": 3}).module
    state = module.state_dict() | {"table": torch.zeros(4)}
    network = opened({"net": state}, tmp_path / "w.pth", UPSCALER)
    assert network.module.table.equal(torch.arange(4.0))
    assert network.module.same.weight is network.module.activation.weight
    assert (network.spec.scale, network.spec.task, network.spec.train_size) == (
        3,
        "super-resolution",
        48,
    )


def test_types_of_hyperparameters():
    options = {"stripes": [8, None], "ratio": 2, "kind": "direct"}
    spec = create(UPSCALER, options).spec
    assert spec.hyperparameters == {"scale": 2, "stripes": (8, None), "ratio": 2, "kind": "direct"}
    for wrong, words in {
        "stripes": "a list (each a whole number or none)",
        "ratio": "a number",
        "kind": "one of 'plain', 'direct'",
    }.items():
        with pytest.raises(NetworkError) as caught:
            create(UPSCALER, {wrong: ["x"]})
        assert words in str(caught.value)


def test_a_hyperparameter_without_default_is_asked_for():
    class Required(Upscaler):
        def __init__(self, scale: int) -> None:
            super().__init__(scale)

    with pytest.raises(NetworkError, match="needs the hyperparameter 'scale': a whole number"):
        create(replace(UPSCALER, build=Required), {})


def test_the_better_fit_of_two_claims_decides(tmp_path):
    state = create(UPSCALER, {"scale": 3}).module.state_dict()
    greedy = replace(UPSCALER, name="greedy", hyperparameters=lambda state: {"scale": 2})
    for architectures in ((greedy, UPSCALER), (UPSCALER, greedy)):
        assert opened(state, tmp_path / "w.pth", *architectures).spec.scale == 3


def test_averaged_weights_that_do_not_fit_are_not_passed_over(tmp_path):
    state = create(UPSCALER, {}).module.state_dict()
    damaged = {name: value for name, value in state.items() if name != "body.bias"}
    with pytest.raises(NetworkError, match=r"lacks 1 \(body\.bias\)"):
        opened({"params": state, "params_ema": damaged}, tmp_path / "w.pth", UPSCALER)
