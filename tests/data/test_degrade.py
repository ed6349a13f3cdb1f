"""Degradations by name, and folders of pairs."""

from __future__ import annotations

import pytest
import skimage.data
import torch
from skimage import io as skio

from fullres.data.blur import Motion, Shake
from fullres.data.datasets import open_dataset
from fullres.data.degradations import Noise
from fullres.data.degrade import (
    DEGRADATIONS,
    create_degradation,
    degrade_folder,
    parse_degradation,
    picture_random,
)
from fullres.data.reading import read_picture
from fullres.errors import FullresError


@pytest.fixture
def clean(tmp_path):
    folder = tmp_path / "clean"
    (folder / "more").mkdir(parents=True)
    cat = skimage.data.chelsea()
    for name, left in (("a.png", 0), ("b.jpg", 100), ("more/a.png", 200)):
        skio.imsave(folder / name, cat[:64, left : left + 80], check_contrast=False)
    return [("a", folder / "a.png"), ("b", folder / "b.jpg"), ("more/a", folder / "more/a.png")]


@pytest.mark.parametrize("name", sorted(DEGRADATIONS.keys() - {"one_of", "chain"}))
def test_every_degradation_has_a_name_and_defaults(name):
    made = create_degradation(name)
    degraded = made(torch.rand(3, 24, 36), picture_random(0, "x"))
    assert degraded.shape[1:] == (24 // made.scale, 36 // made.scale)
    assert isinstance(made.needs_whole, bool)


def test_written_as_on_the_command_line():
    assert parse_degradation("noise sigma=[5,25] varying=true") == Noise((5, 25), varying=True)
    nested = parse_degradation('motion shake={"shift":[0,2]} objects=[2,3]')
    assert nested == Motion(Shake(shift=(0, 2)), objects=(2, 3))
    for text, words in [
        ("fog", "unknown degradation 'fog'; known: noise, jpeg"),
        ("", "unknown degradation ''"),
        ("noise sigma", "write parameters without spaces"),
        ("noise level=3", "noise: unknown parameter 'level'; known: sigma"),
        ("noise sigma=3", "sigma=3: is a range"),
        ("noise sigma=[a,b]", "sigma="),
    ]:
        with pytest.raises(FullresError, match=words):
            parse_degradation(text)


def test_mixtures_and_chains():
    text = 'one_of of=[{"name":"noise","sigma":[0,0]},{"name":"haze"}]'
    mixture = parse_degradation(text)
    clean = torch.rand(3, 20, 20)
    made = [mixture(clean, picture_random(seed, "x")) for seed in range(20)]
    same = sum(torch.equal(x, clean) for x in made)
    assert 0 < same < 20
    assert mixture.needs_whole
    chain = create_degradation(
        "chain", of=[{"name": "bicubic", "scale": 2}, {"name": "noise", "sigma": [10, 10]}]
    )
    assert (chain.scale, chain.needs_whole) == (2, False)
    small = create_degradation("bicubic", scale=2)(clean, picture_random(0, "x"))
    noisy = Noise((10, 10))(small, picture_random(0, "x"))
    assert torch.equal(chain(clean, picture_random(0, "x")), noisy)
    with pytest.raises(FullresError, match="different scales"):
        create_degradation("one_of", of=[{"name": "noise"}, {"name": "bicubic"}])
    with pytest.raises(FullresError, match="needs a list"):
        create_degradation("one_of", of=[])


def test_folders_hold_pairs(clean, tmp_path):
    degrade_folder(clean, tmp_path / "pairs", Noise((20, 20)), seed=3)
    pairs = open_dataset(tmp_path / "pairs", "pairs").pairs
    assert sorted(pair.name for pair in pairs) == ["a", "b", "more/a"]
    for (name, path), pair in zip(clean, sorted(pairs, key=lambda p: p.name), strict=True):
        target, degraded = read_picture(pair.target), read_picture(pair.degraded)
        assert torch.equal(target, read_picture(path))
        again = Noise((20, 20))(target, picture_random(3, name)).clamp(0, 1)
        assert float((degraded - again).abs().max()) < 0.5001 / 255


def test_versions_differ_and_a_stopped_run_goes_on(clean, tmp_path):
    made = degrade_folder(clean, tmp_path / "pairs", Noise((20, 20)), versions=2)
    files = sorted(p for p in made.rglob("*.png"))
    assert len(files) == 12
    first, second = (read_picture(made / "input" / f"a_v{version}.png") for version in (0, 1))
    assert not torch.equal(first, second)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
    lost = made / "input" / "b_v1.png"
    lost.unlink()
    degrade_folder(clean, tmp_path / "pairs", Noise((20, 20)), versions=2)
    for path, (written, content) in before.items():
        assert path.read_bytes() == content
        assert path == lost or path.stat().st_mtime_ns == written


def test_other_sizes_and_channels(clean, tmp_path):
    made = degrade_folder(clean, tmp_path / "small", create_degradation("bicubic", scale=2))
    assert read_picture(made / "input" / "a.png").shape == (3, 32, 40)
    made = degrade_folder(clean, tmp_path / "mosaic", create_degradation("mosaic"), bits=16)
    assert read_picture(made / "input" / "a.png").shape == (1, 64, 80)


def test_names_must_differ(clean, tmp_path):
    with pytest.raises(FullresError, match="two pictures are named a"):
        degrade_folder([*clean, clean[0]], tmp_path / "pairs", Noise())
