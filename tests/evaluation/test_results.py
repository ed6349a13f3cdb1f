"""Names of modes, tables of results, and what a contact sheet shows."""

from __future__ import annotations

import json

import pytest
import torch

import fullres as fr
from fullres.evaluation.modes import overlap_of
from fullres.evaluation.results import Evaluation, Row
from fullres.evaluation.sheet import extremes
from fullres.io.contact_sheet import where_they_differ


def test_names_of_modes():
    assert [overlap_of(mode) for mode in ("global", "local", "patches", "patches-128")] == [
        None,
        None,
        0,
        128,
    ]
    for wrong in ("patches-", "patches-x", "patches--1", "input", ""):
        with pytest.raises(fr.FullresError, match="unknown mode"):
            overlap_of(wrong)


def test_equal_pictures_gain_nothing_and_json_has_no_infinity():
    rows = [Row("a", mode, 8, 8, 1, 0.1, 9, {"psnr": float("inf")}) for mode in ("global", "local")]
    found = Evaluation("n", "d", "rgb", ("input", "global", "local"), tuple(rows))
    assert found.gains("local") == {"a": 0.0}
    assert json.loads(found.json())["rows"][0]["psnr"] is None
    assert "inf" in found.table()


def test_the_contact_sheet_shows_the_extremes():
    gains = {name: gain for gain, name in enumerate("abcdefgh", start=-5)}
    assert extremes(gains) == ["h", "g", "c", "b", "a"]
    first, second = torch.zeros(3, 100, 200), torch.zeros(3, 100, 200)
    second[:, 70:90, 150:170] = 1
    rows, columns = where_they_differ(first, second, 40)
    assert rows.start <= 70 < 90 <= rows.stop == rows.start + 40
    assert columns.start <= 150 < 170 <= columns.stop == columns.start + 40
    assert where_they_differ(first, second, 500) == (slice(0, 100), slice(0, 200))
