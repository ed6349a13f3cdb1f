from __future__ import annotations

import pytest
from safetensors.torch import save_file

from fullres.networks.catalog import create_network, networks, open_network
from fullres.networks.inspect import describe, networks_table

OPTIONS = {"width": 4, "middle_blk_num": 1, "enc_blk_nums": [1, 2], "dec_blk_nums": [1, 1]}


@pytest.fixture
def shelf(tmp_path):
    """A folder of named weights, as the package's own."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    weights = create_network("nafnet", **OPTIONS).module.state_dict()
    metadata = {"task": "denoise", "train_size": "96"}
    save_file(weights, folder / "denoise-tiny.safetensors", metadata)
    return folder


def test_describe(shelf):
    report = describe(open_network("denoise-tiny", folder=shelf))
    for fact in (
        "NAFNet (nafnet)",
        "enc_blk_nums=[1, 2]",
        "denoise",
        "96 by 96 pixels",
        "4 pixels",
        "3 in, 3 out",
        "Simple Baselines for Image Restoration",
        "Liangyu Chen",
        "licence MIT",
    ):
        assert fact in report
    parameters = sum(p.numel() for p in create_network("nafnet", **OPTIONS).module.parameters())
    assert f"{parameters:,}" in report


def test_describe_says_what_is_unknown():
    report = describe(create_network("nafnet", **OPTIONS))
    assert "unknown (published for deblur, denoise)" in report


def test_networks_table(shelf, tmp_path):
    table = networks_table(shelf)
    assert all(networks()[name].weights in table for name in networks())
    assert table.splitlines()[-1].split() == ["denoise-tiny", "nafnet", "denoise", "96"]
    assert networks_table(tmp_path).endswith("bundled weights: none")
