"""What networks compute with given weights is what reference outputs say, local forms included.

A network with a reference case needs an entry in `CASES`.
"""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from fullres.local import Local, convert
from fullres.networks.catalog import create_network

CASES = {
    "ffanet": "ffanet",
    "ffanet_local": "ffanet",
    "grl_sr_x4": "grl",
    "hinet": "hinet",
    "hinet_local": "hinet",
    "mprnet": "mprnet",
    "mprnet_local": "mprnet",
    "nafnet": "nafnet",
    "pa_edsr_x2": "pa_edsr",
    "panet_car": "panet",
    "panet_denoise": "panet",
    "restormer": "restormer",
    "restormer_biasfree": "restormer",
    "restormer_local": "restormer",
    "rnn_mbp": "rnn_mbp",
}
"""Architectures of the cases; SPDNet's, of which shapes alone are told, is in its own file."""

UP_TO_255 = {"pa_edsr_x2"}
"""Cases whose values are too large for the rounding of float32 to pass unseen."""

OTHER_ORDER = {"nafnet"}
"""Cases whose parameters we define in another order than the published code."""

TOLERANCES = {"grl_sr_x4": {torch.float64: 1e-5, torch.float32: 1e-4}}
"""Of cases that others than the usual ones are for."""


@contextmanager
def weights_defined_in(dtype):
    """Weights that a network defines itself are defined in this type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def loaded(name, case, dtype):
    """The network of a case, local if the case is."""
    options = dict(case.config)
    window, calibration = options.pop("window", None), options.pop("calibration", None)
    with weights_defined_in(dtype if name in UP_TO_255 else torch.float32):
        network = create_network(CASES[name], **options).module.to(dtype)
    missing, unexpected = network.load_state_dict(case.state, strict=False)
    assert sorted(missing) == sorted(case.fixed)
    assert not unexpected
    if window is not None:
        assert not convert(network, Local(tuple(calibration), tuple(window))).kept
    return network


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_outputs(golden, name, dtype):
    case = golden(name)
    network, x = loaded(name, case, dtype), case.input.to(dtype)
    outputs = [network(x)]
    if len(case.outputs) > 1:
        result, outputs = outputs[0], network.outputs(x)
        assert result.equal(outputs[-1])
    for output, expected in zip(outputs, case.outputs, strict=True):
        error = (output - expected).abs()
        if name in UP_TO_255:
            error -= expected.abs() * 2**-24
        usual = 1e-6 if dtype == torch.float64 else 1e-4 * expected.abs().max()
        assert error.max() < TOLERANCES.get(name, {}).get(dtype, usual)


@pytest.mark.parametrize("name", [name for name in CASES if not name.endswith("_local")])
def test_names_and_shapes_are_those_of_published_checkpoints(golden, name):
    case = golden(name)
    state = create_network(CASES[name], **case.config).module.state_dict()
    shapes = {n: tuple(value.shape) for n, value in state.items()}
    fixed = {n: shapes.pop(n) for n in case.fixed}
    assert fixed == case.fixed
    assert shapes == case.parameters
    if name not in OTHER_ORDER:
        assert list(shapes) == list(case.parameters)
