"""Contact sheets: crops are where the captions say, pixel by pixel."""

from __future__ import annotations

import pytest
import pyvips
import torch

from fullres.errors import ImageError
from fullres.io.contact_sheet import GAP, LINE, SIDE, Strip, write_contact_sheet


def test_crops_lie_side_by_side_under_their_captions(tmp_path):
    torch.manual_seed(0)
    crops = [(torch.rand(3, 60, 80) * 255).round() / 255 for _ in range(3)]
    grey = (torch.rand(1, SIDE, SIDE) * 255).round() / 255
    strips = [
        Strip("one <&> + 0.3 dB", [(f"crop {n}", crop) for n, crop in enumerate(crops)]),
        Strip("two", [("grey", grey)]),
    ]
    write_contact_sheet(strips, tmp_path / "sheet.png")
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]
    sheet = torch.from_numpy(pyvips.Image.new_from_file(str(tmp_path / "sheet.png")).numpy())
    height = 2 * LINE + 2 * GAP
    assert sheet.shape == (2 * height + 60 + SIDE, 3 * (SIDE + GAP) + GAP, 3)
    top = GAP + 2 * LINE
    for n, crop in enumerate(crops):
        left = GAP + n * (SIDE + GAP)
        shown = sheet[top : top + 60, left : left + 80].permute(2, 0, 1)
        assert torch.equal(shown, (crop * 255).round().byte())
        caption = sheet[GAP + LINE : top, left : left + 80]
        assert caption.min() < 60  # black on white
    top += height + 60
    shown = sheet[top : top + SIDE, GAP : GAP + SIDE].permute(2, 0, 1)
    assert torch.equal(shown, (grey * 255).round().byte().expand(3, -1, -1))


def test_a_folder_that_is_missing(tmp_path):
    strip = Strip("one", [("crop", torch.rand(1, 8, 8))])
    with pytest.raises(ImageError, match=r"sheet\.png: cannot be written"):
        write_contact_sheet([strip], tmp_path / "no" / "sheet.png")
