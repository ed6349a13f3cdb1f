from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fullres import Local, convert
from fullres.memory import peak_memory
from fullres.networks.catalog import create_network
from fullres.networks.nafnet import ARCHITECTURE, NAFBlock, NAFNet
from fullres.ops import parts

SMALL = {"width": 4, "middle_blk_num": 1, "enc_blk_nums": (1, 1), "dec_blk_nums": (1, 1)}
SIDD = {"enc_blk_nums": (2, 2, 4, 8), "middle_blk_num": 12, "dec_blk_nums": (2, 2, 2, 2)}


@pytest.fixture
def small() -> NAFNet:
    """A small network whose blocks act: beta and gamma, zero at the start, are drawn."""
    torch.manual_seed(0)
    network = NAFNet(**SMALL).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith(("beta", "gamma")):
                parameter.normal_()
    return network


@pytest.mark.parametrize(
    ("hyperparameters", "millions"),
    [
        pytest.param({"width": 32}, 17.1, id="GoPro width 32"),
        pytest.param({"width": 64}, 67.9, id="GoPro width 64"),
        pytest.param({"width": 32, **SIDD}, 29.2, id="SIDD width 32"),
        pytest.param({"width": 64, **SIDD}, 116.0, id="SIDD width 64"),
    ],
)
def test_parameter_counts_of_published_configurations(hyperparameters, millions):
    with torch.device("meta"):
        network = NAFNet(**hyperparameters)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == millions


@settings(deadline=None, max_examples=15)
@given(data=st.data(), levels=st.integers(1, 4))
def test_hyperparameters_are_read_back_from_names_and_shapes(data, levels):
    blocks = st.lists(st.integers(0, 12), min_size=levels, max_size=levels).map(tuple)
    hyperparameters = {
        "img_channel": data.draw(st.integers(1, 6)),
        "width": data.draw(st.integers(1, 70)),
        "middle_blk_num": data.draw(st.integers(1, 12)),
        "enc_blk_nums": data.draw(blocks),
        "dec_blk_nums": data.draw(blocks),
    }
    with torch.device("meta"):
        state = NAFNet(**hyperparameters).state_dict()
    assert ARCHITECTURE.hyperparameters(state) == hyperparameters


def test_padding_is_reflection_at_the_bottom_and_right(small):
    picture = torch.rand(1, 3, 13, 18)
    rows = torch.tensor([*range(13), 11, 10, 9])
    columns = torch.tensor([*range(18), 16, 15])
    padded = picture[:, :, rows][:, :, :, columns]
    with torch.no_grad():
        torch.testing.assert_close(small(picture), small(padded)[..., :13, :18])


def test_blocks_in_parts_leave_their_input_as_it_is(monkeypatch):
    monkeypatch.setitem(parts.BUDGET, "cpu", 2**13)
    torch.manual_seed(0)
    block, x = NAFBlock(4), torch.randn(2, 4, 40, 50)
    torch.nn.init.normal_(block.beta)
    torch.nn.init.normal_(block.gamma)
    before, expected = x.clone(), block(x)
    with torch.no_grad():
        torch.testing.assert_close(block(x), expected)
    assert torch.equal(x, before)


@pytest.mark.parametrize("local", [False, True])
def test_a_pass_takes_four_of_the_largest_maps(monkeypatch, small, local):
    """And a few rows, beside the picture and the result."""
    monkeypatch.setitem(parts.BUDGET, "cpu", 2**15)
    if local:
        convert(small, Local(train_size=64, window=96))
    height, width = 512, 640
    largest, picture = (4 * channels * height * width for channels in (4, 3))
    need = peak_memory(small, (1, 3, height, width), torch.float32, "cpu")
    assert 3 * largest < need < 4.25 * largest + 2 * picture


def test_spec():
    spec = create_network("nafnet", width=8).spec
    assert (spec.multiple, spec.scale, spec.train_size) == (16, 1, 256)
    assert spec.task is None
    assert spec.hyperparameters["enc_blk_nums"] == (1, 1, 1, 28)


@pytest.mark.parametrize(
    "hyperparameters",
    [
        {"width": 0},
        {"img_channel": 0},
        {"middle_blk_num": -1},
        {"enc_blk_nums": [], "dec_blk_nums": []},
        {"enc_blk_nums": [1, 1]},
        {"enc_blk_nums": [1, -1], "dec_blk_nums": [1, 1]},
    ],
)
def test_impossible_hyperparameters(hyperparameters):
    with pytest.raises(ValueError, match=r"img_channel|levels"):
        NAFNet(**hyperparameters)
