"""What tests of several parts share.

`golden("nafnet")` is a reference: a network configuration with weights and outputs.
"""

from __future__ import annotations

import json
import math
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from torch import Tensor, nn

hypothesis.settings.register_profile("fullres", deadline=None)  # machines may be busy
hypothesis.settings.load_profile("fullres")

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"


@dataclass(frozen=True)
class Golden:
    config: dict
    """Hyperparameters of the published option file, and the window of a local case."""
    parameters: dict[str, tuple[int, ...]]
    """Names and shapes in state-dict order."""
    state: dict[str, Tensor]
    """Weights by name, float64."""
    fixed: dict[str, tuple[int, ...]]
    """Names and shapes of buffers that checkpoints have beside the parameters."""
    input: Tensor
    """float64."""
    outputs: list[Tensor]
    """float64, stored as float32."""


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    """Loads a reference case by name; skips the test where the reference outputs are absent."""

    def load(name: str) -> Golden:
        if not (GOLDEN / f"{name}.json").exists():
            pytest.skip(f"no reference outputs at {GOLDEN}")
        case = json.loads((GOLDEN / f"{name}.json").read_text())
        fixed = {name: tuple(shape) for name, shape in case["fixed_buffers"]}
        parameters = {name: tuple(shape) for name, shape in case["parameters"]}
        weights = {n: _weight(n, shape) for n, shape in parameters.items() if n not in fixed}
        with np.load(GOLDEN / f"{name}.npz") as arrays:
            outputs = [torch.from_numpy(arrays[f"output_{i}"]) for i in range(len(arrays.files))]
        return Golden(
            config=case["config"],
            parameters=parameters,
            state=weights,
            fixed=fixed,
            input=_input(**case["input"]),
            outputs=[output.double() for output in outputs],
        )

    return load


def _weight(name: str, shape: tuple[int, ...]) -> Tensor:
    z = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    fan_in = int(np.prod(shape[1:]))
    if len(shape) >= 2 and fan_in > 1:
        z = 0.7 * z / math.sqrt(fan_in)
    elif name.endswith(("bias", "beta")):
        z = 0.1 * z
    else:
        z = 1 + 0.1 * z
    return torch.from_numpy(np.asarray(z))


def _input(seed_string: str, shape: list[int]) -> Tensor:
    x = np.random.default_rng(zlib.crc32(seed_string.encode())).random(shape)
    ramp = np.linspace(0.05, 1.0, shape[-1])[None, :] * np.linspace(1.0, 0.4, shape[-2])[:, None]
    return torch.from_numpy(x * ramp)


@pytest.fixture(scope="session")
def multiply_adds() -> Callable[[nn.Module, Tensor], int]:
    """Multiply-adds of a network's convolutions for a picture, as papers count them."""

    def of(network: nn.Module, picture: Tensor) -> int:
        counts = []

        def count(layer: nn.Module, _: object, output: Tensor) -> None:
            # papers take a transposed convolution for a convolution at its output's size
            counts.append(output.numel() * layer.in_channels * layer.weight[0, 0].numel())

        for layer in network.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                layer.register_forward_hook(count)
        network(picture)
        return sum(counts)

    return of


@pytest.fixture(scope="session")
def in_threads() -> Callable[[Callable[[int], None]], None]:
    """Runs `work(0)` to `work(3)` at the same time."""

    def run(work: Callable[[int], None]) -> None:
        threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return run
