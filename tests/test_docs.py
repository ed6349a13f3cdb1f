"""The code in the README and the documentation runs and prints what it says; links lead on."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest
import skimage.data
import torch
from skimage import io as skio
from torch import nn

import fullres as fr

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

BLOCK = re.compile(
    r"^```python\n(?P<code>.*?)^```$(?:\s*^```text\n(?P<output>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)
FILE = re.compile(r"# (\w+\.py)\n")
CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
LINKED = sorted(
    page
    for folder in (ROOT, ROOT / "docs", ROOT / "benchmarks", ROOT / "src/fullres/weights")
    for page in folder.glob("*.md")
)


class MyNetwork(nn.Sequential):
    """What the README calls so."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3, padding=1), nn.InstanceNorm2d(4), nn.Conv2d(4, 3, 1))


def blocks(page: Path) -> list[re.Match[str]]:
    return list(BLOCK.finditer(page.read_text(encoding="utf-8")))


def given(folder: Path) -> dict:
    """Names and files that a page takes for granted."""
    options = {"width": 4, "enc_blk_nums": [1, 1], "dec_blk_nums": [1, 1]}
    weights = fr.create_network("nafnet", **options).module.state_dict()
    torch.save({"params": weights}, folder / "NAFNet-SIDD-width64.pth")
    (folder / "photos").mkdir()
    skio.imsave(folder / "photos" / "cat.png", skimage.data.chelsea()[:96, :96])
    return {"MyNetwork": MyNetwork, "x": torch.rand(1, 3, 40, 48), "__name__": "page"}


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda page: page.name)
def test_the_code_of_a_page_runs_and_prints_what_it_says(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace = given(tmp_path)
    for block in blocks(page):
        code = block["code"]
        named = FILE.match(code)
        line = page.read_text(encoding="utf-8").count("\n", 0, block.start("code"))
        place = named[1] if named else f"{page.name}, from line {line + 1}"
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, place, "exec"), namespace)
        if block["output"] is not None:
            assert printed.getvalue() == block["output"], place


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    pages = {page.name for page in PAGES[1:]} - {"index.md"}
    assert pages <= set(re.findall(r"\]\(([\w-]+\.md)\)", index))


def prose(page: Path) -> str:
    return CODE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """What links to headings of a page end in."""
    found = HEADING.findall(page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in found}


def dead_links(page: Path) -> list[str]:
    """Links of a page to files or headings that are not there."""
    dead = []
    for link in LINK.findall(prose(page)):
        path, _, anchor = link.partition("#")
        there = page.parent / path if path else page
        if "://" in link or link.startswith("mailto:"):
            continue
        if not there.exists() or (anchor and anchor not in anchors(there)):
            dead.append(link)
    return dead


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    assert dead_links(page) == []


def test_the_test_of_links_sees_dead_ones(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A b\n[1](page.md) [2](#a-b) [3](no.md) [4](page.md#c) `[5](x)` [6](https://x)"
    )
    assert dead_links(page) == ["no.md", "page.md#c"]
