"""The whole walk, on real files."""

from __future__ import annotations

import logging
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import pyvips
import torch
from torch import nn

import fullres as fr
from fullres.feed import Given, open_feed
from fullres.io.image import open_image
from fullres.tiles import Grid

restoring = import_module("fullres.restore")


def random_network(seed=0, **hyperparameters):
    torch.manual_seed(seed)
    levels = {"enc_blk_nums": [1, 1], "dec_blk_nums": [1, 1]}
    net = fr.create_network("nafnet", **{"width": 4, **levels, **hyperparameters})
    for name, parameter in net.module.named_parameters():
        if name.endswith(("beta", "gamma")):
            nn.init.normal_(parameter, std=0.3)
        if ".sca." in name:
            nn.init.normal_(parameter)  # so that local and global differ visibly
    return net


@pytest.fixture(scope="module")
def net():
    """A small network with random weights, trained on 32 × 32 so to speak."""
    return known(random_network())


def known(net, train_size=32):
    from dataclasses import replace

    return fr.Network(net.module, replace(net.spec, train_size=train_size))


def make(path, height=60, width=90, bands=3, dtype=np.uint8):
    random = np.random.default_rng(height * width + bands)
    ramp = np.linspace(0.2, 0.8, width)[None, :, None] * np.linspace(1, 0.5, height)[:, None, None]
    values = np.clip(ramp + random.normal(0, 0.1, (height, width, bands)), 0, 1)
    peak = 1 if dtype is np.float32 else np.iinfo(dtype).max
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pyvips.Image.new_from_array((values * peak).astype(dtype)).write_to_file(str(path))
    return path


def pixels(path):
    with open_image(path) as source:
        return source.read(0, 0, source.height, source.width)


def by_hand(net, x, window=None, local=True):
    """What the network makes of (C, H, W), quantised to 8 bits."""
    with torch.inference_mode():
        if local:
            with fr.convert(net.module, fr.Local(net.spec.train_size, window)):
                y = net.module(x[None])[0]
        else:
            y = net.module(x[None])[0]
    return (y.clamp(0, 1) * 255).round() / 255


def test_a_picture_is_what_the_local_network_makes_of_it(tmp_path, net):
    photo = make(tmp_path / "photo.png", 150, 200)
    report = fr.restore(photo, network=net)
    result = pixels(tmp_path / "photo-restored.png")
    assert (result - by_hand(net, pixels(photo))).abs().max() <= 1.01 / 255
    assert (result - by_hand(net, pixels(photo), local=False)).abs().max() > 2 / 255
    assert report.megapixels == pytest.approx(150 * 200 / 1e6)
    assert [outcome.job.target.name for outcome in report.restored] == ["photo-restored.png"]


def test_global_window_and_train_size(tmp_path, net):
    photo = make(tmp_path / "photo.png")
    x = pixels(photo)
    fr.restore(photo, tmp_path / "g.png", net, local=False)
    assert (pixels(tmp_path / "g.png") - by_hand(net, x, local=False)).abs().max() <= 1.01 / 255
    fr.restore(photo, tmp_path / "w.png", net, window=(20, 24))
    assert (pixels(tmp_path / "w.png") - by_hand(net, x, (20, 24))).abs().max() <= 1.01 / 255
    fr.restore(photo, tmp_path / "t.png", net, train_size=16, window=20)
    other = by_hand(known(net, 16), x, 20)
    assert (pixels(tmp_path / "t.png") - other).abs().max() <= 1.01 / 255
    with pytest.raises(fr.FullresError, match="no effect with --global"):
        fr.restore(photo, tmp_path / "x.png", net, local=False, window=20)


def test_the_callers_network_is_left_as_it_is(tmp_path, net):
    photo = make(tmp_path / "photo.png")
    before = {name: value.clone() for name, value in net.module.state_dict().items()}
    kinds = [type(part) for part in net.module.modules()]
    fr.restore(photo, network=net, dtype="bfloat16")
    after = net.module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [type(part) for part in net.module.modules()] == kinds
    assert all(parameter.requires_grad for parameter in net.module.parameters())


def test_an_unknown_training_size_is_asked_for(tmp_path, net):
    photo = make(tmp_path / "photo.png")
    stranger = known(net, None)
    with pytest.raises(fr.FullresError, match="give it with --train-size, or run it as it is"):
        fr.restore(photo, network=stranger)
    fr.restore(photo, tmp_path / "a.png", stranger, train_size=32)
    fr.restore(photo, tmp_path / "b.png", stranger, local=False)
    fr.restore(photo, tmp_path / "c.png", net)
    assert torch.equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "c.png"))


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (3, 2), (17, 31)])
def test_tiny_and_odd_sizes(tmp_path, net, size):
    photo = make(tmp_path / "photo.png", *size)
    fr.restore(photo, network=net, compare=True)
    result = pixels(tmp_path / "photo-restored.png")
    assert result.shape == (3, *size)
    assert (result - by_hand(net, pixels(photo))).abs().max() <= 1.01 / 255


def test_a_grey_picture_and_a_colour_network(tmp_path, net):
    photo = make(tmp_path / "photo.png", bands=1)
    fr.restore(photo, network=net)
    x = pixels(photo)
    with torch.inference_mode(), fr.convert(net.module, fr.Local(32)):
        wanted = net.module(x.expand(1, 3, -1, -1))[0].mean(0, keepdim=True).clamp(0, 1)
    result = pixels(tmp_path / "photo-restored.png")
    assert result.shape == x.shape
    assert (result - wanted).abs().max() <= 0.51 / 255 + 1e-5


def test_a_colour_picture_and_a_grey_network(tmp_path):
    grey = known(random_network(img_channel=1))
    photo = make(tmp_path / "photo.png")
    fr.restore(photo, network=grey)
    x = pixels(photo)
    with torch.inference_mode(), fr.convert(grey.module, fr.Local(32)):
        wanted = torch.cat([grey.module(x[None, None, c])[0] for c in range(3)]).clamp(0, 1)
    assert (pixels(tmp_path / "photo-restored.png") - wanted).abs().max() <= 0.51 / 255 + 1e-5


def test_a_network_of_six_channels_is_refused(tmp_path):
    photo = make(tmp_path / "photo.png")
    with pytest.raises(fr.FullresError, match=r"photo\.png: has 3 channels, .* takes 6"):
        fr.restore(photo, network=known(random_network(img_channel=6)))


def test_bit_depth_format_and_quality(tmp_path, net):
    deep = make(tmp_path / "deep.png", dtype=np.uint16)
    fr.restore(deep, network=net)
    assert pyvips.Image.new_from_file(str(tmp_path / "deep-restored.png")).format == "ushort"
    fr.restore(deep, tmp_path / "eight.png", net, bits=8)
    assert pyvips.Image.new_from_file(str(tmp_path / "eight.png")).format == "uchar"
    for quality in (30, 95):
        fr.restore(deep, tmp_path / f"q{quality}.jpg", net, bits=8, quality=quality)
    sizes = [(tmp_path / f"q{quality}.jpg").stat().st_size for quality in (30, 95)]
    assert sizes[0] < sizes[1]


def test_tiles_show_no_seams_and_cover_the_picture(tmp_path, net):
    photo = make(tmp_path / "photo.png", 230, 310)
    fr.restore(photo, tmp_path / "whole.png", net)
    told = Told()
    fr.restore(photo, tmp_path / "tiles.png", net, tile=64, progress=told)
    difference = (pixels(tmp_path / "whole.png") - pixels(tmp_path / "tiles.png")).abs()
    assert difference.max() <= 1.01 / 255
    assert len(told.tiles) == 4 * 5
    assert sum(told.tiles) == 230 * 310


class Told:
    def __init__(self):
        self.tiles = []

    def begin(self, batch, waiting): ...
    def picture(self, job, pixels): ...
    def tile(self, pixels):
        self.tiles.append(pixels)

    def end(self, outcome): ...


def test_a_network_that_keeps_what_a_pass_computed_is_made_ready():
    net = random_network()
    net.module.last = net.module(torch.rand(1, 3, 32, 32))
    with restoring.ready(net, fr.Local(32)) as restorer:
        assert restorer.module.last.is_leaf
        assert not restorer.has_global
    assert not net.module.last.is_leaf


def test_little_memory_means_tiles_and_global_statistics_say_so(tmp_path, net, monkeypatch, caplog):
    photo = make(tmp_path / "photo.png", 400, 300)
    make(tmp_path / "in" / "a.png", 400, 300)
    make(tmp_path / "in" / "b.png", 400, 300)
    with restoring.ready(net, restoring.settings_for(net)) as restorer:
        needed = restorer.peak(400, 300)
    monkeypatch.setattr("fullres.budget.free_memory", lambda device: int(needed * 1.2))
    told = Told()
    fr.restore(photo, network=net, progress=told)
    assert len(told.tiles) > 1
    caplog.set_level(logging.INFO, "fullres")
    fr.restore(tmp_path / "in", network=net, local=False)
    said = [record.message for record in caplog.records]
    assert said == ["large pictures run in tiles: global operations see one tile at a time"]
    monkeypatch.setattr("fullres.budget.free_memory", lambda device: 1000)
    with pytest.raises(fr.FullresError, match=r"photo\.png: .* free memory is too little"):
        fr.restore(photo, tmp_path / "never.png", net)
    assert not (tmp_path / "never.png").exists()


def test_out_of_memory_in_a_pass_means_smaller_tiles(tmp_path, net, caplog):
    photo = make(tmp_path / "photo.png", 400, 300)

    class Short(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            # as if every pass above so many pixels ran out, though its plan said it fits
            if x.shape[-1] * x.shape[-2] > 80_000 and type(x) is torch.Tensor:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            return self.conv(x)

    short = fr.Network(Short(), net.spec)
    fr.restore(photo, network=short)
    assert pixels(tmp_path / "photo-restored.png").shape == (3, 400, 300)
    assert [r.message for r in caplog.records if r.levelno == logging.WARNING] == [
        "out of memory at 300 × 400 pixels: smaller tiles"
    ]


def test_nothing_to_convert_runs_as_it_is(tmp_path, net, caplog):
    caplog.set_level(logging.INFO, "fullres")
    plain = fr.Network(nn.Conv2d(3, 3, 3, padding=1), net.spec)
    fr.restore(make(tmp_path / "photo.png"), network=plain)
    assert any("nothing to convert in Conv2d" in r.message for r in caplog.records)
    assert any("it runs as it is" in r.message for r in caplog.records)


class Fails(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x):
        if self.how == "nan":
            return x / 0 * 0
        return x @ torch.zeros(3, 2, 7)


def test_not_a_number_is_a_sentence_and_writes_nothing(tmp_path, net):
    photo = make(tmp_path / "photo.png")
    broken = fr.Network(Fails("nan"), net.spec)
    with pytest.raises(fr.FullresError, match=r"photo\.png: .* NaN or infinity; try --dtype flo"):
        fr.restore(photo, network=broken, dtype="bfloat16")
    with pytest.raises(fr.FullresError, match=r"photo\.png: .* NaN or infinity; try another net"):
        fr.restore(photo, network=broken)
    assert [p.name for p in tmp_path.iterdir()] == ["photo.png"]


def test_a_network_that_fails_is_a_sentence(tmp_path, net):
    photo = make(tmp_path / "photo.png")
    with pytest.raises(fr.FullresError, match=r"photo\.png: the network fails on this picture \("):
        fr.restore(photo, network=fr.Network(Fails("shape"), net.spec), local=False)


def test_devices_and_data_types(tmp_path, net):
    photo = make(tmp_path / "photo.png")
    with pytest.raises(fr.FullresError, match=r"unknown data type 'int8'; known: auto, float16"):
        fr.restore(photo, network=net, dtype="int8")
    for device in ("nonsense", "cuda:77"):
        with pytest.raises(fr.FullresError, match=f"device '{device}' cannot be used here"):
            fr.restore(photo, network=net, device=device)
    fr.restore(photo, tmp_path / "a.png", net)
    fr.restore(photo, tmp_path / "b.png", net, dtype="bfloat16", device="cpu")
    difference = (pixels(tmp_path / "a.png") - pixels(tmp_path / "b.png")).abs()
    assert difference.max() < 0.05


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_gpu_gives_the_same(tmp_path, net, dtype):
    photo = make(tmp_path / "photo.png", 230, 310)
    fr.restore(photo, tmp_path / "cpu.png", net, device="cpu")
    fr.restore(photo, tmp_path / "gpu.png", net, device="cuda", dtype=dtype, tile=128)
    difference = (pixels(tmp_path / "cpu.png") - pixels(tmp_path / "gpu.png")).abs()
    assert difference.max() < (1.01 / 255 if dtype == "float32" else 0.05)


class Doubles(nn.Module):
    def forward(self, x):
        return nn.functional.interpolate(x, scale_factor=2, mode="nearest")


def test_an_upscaler(tmp_path, net):
    from dataclasses import replace

    photo = make(tmp_path / "photo.png", 150, 170)
    double = fr.Network(Doubles(), replace(net.spec, scale=2))
    fr.restore(photo, network=double, tile=64, local=False, compare=True)
    result = pixels(tmp_path / "photo-restored.png")
    assert torch.equal(result, pixels(photo).repeat_interleave(2, 1).repeat_interleave(2, 2))
    both = pixels(tmp_path / "photo-restored-compare.png")
    assert both.shape == (3, 300, 340 + 4 + 340)
    assert torch.equal(both[..., :340], both[..., 344:])


def test_value_range(tmp_path, net):
    from dataclasses import replace

    class Brightens(nn.Module):
        def forward(self, x):
            return x + 25.5

    photo = make(tmp_path / "photo.png")
    ranged = fr.Network(Brightens(), replace(net.spec, value_range=255.0))
    fr.restore(photo, network=ranged, local=False)
    wanted = (pixels(photo) + 0.1).clamp(0, 1)
    assert (pixels(tmp_path / "photo-restored.png") - wanted).abs().max() <= 0.51 / 255


@pytest.mark.parametrize("bands", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_before_and_after(tmp_path, net, bands, dtype):
    suffix = ".tif" if dtype is np.float32 else ".png"
    photo = make(tmp_path / f"photo{suffix}", bands=bands, dtype=dtype)
    fr.restore(photo, network=net, compare=True)
    both = pyvips.Image.new_from_file(str(tmp_path / "photo-restored-compare.png"))
    assert (both.width, both.height, both.format) == (90 + 4 + 90, 60, "uchar")
    assert both.bands == (1 if bands < 3 else 3)
    if bands in (1, 3):
        before = pixels(photo)
        shown = pixels(tmp_path / "photo-restored-compare.png")
        assert (shown[..., :90] - before).abs().max() <= 1.01 / 255
        assert (shown[..., 90:94] == 1).all()


def test_before_and_after_stand_upright(tmp_path, net):
    make(tmp_path / "photo.png")
    image = pyvips.Image.new_from_file(str(tmp_path / "photo.png")).copy()
    image.set_type(pyvips.GValue.gint_type, "orientation", 6)
    image.write_to_file(str(tmp_path / "turned.jpg"))
    fr.restore(tmp_path / "turned.jpg", network=net, compare=True)
    both = pyvips.Image.new_from_file(str(tmp_path / "turned-restored-compare.png"))
    assert (both.width, both.height) == (60 + 4 + 60, 90)


def test_a_folder_goes_on_where_it_was(tmp_path, net):
    for name in ("a.png", "sub/b.png", "sub/c.png"):
        make(tmp_path / "in" / name)
    first = fr.restore(str(tmp_path / "in" / "*.png"), tmp_path / "out", net)
    assert len(first.restored) == 1
    kept = (tmp_path / "out" / "a.png").stat()
    report = fr.restore(tmp_path / "in", tmp_path / "out", net)
    assert (len(report.restored), report.already_done) == (2, 1)
    assert (tmp_path / "out" / "a.png").stat().st_mtime_ns == kept.st_mtime_ns
    again = fr.restore(tmp_path / "in", tmp_path / "out", "no such network is opened")
    assert (len(again.restored), again.already_done) == (0, 3)
    compared = fr.restore(tmp_path / "in", tmp_path / "out", net, compare=True)
    assert (len(compared.restored), compared.megapixels) == (3, 0)
    assert (tmp_path / "out" / "a.png").stat().st_mtime_ns == kept.st_mtime_ns
    assert (tmp_path / "out" / "sub" / "c-compare.png").exists()


def test_the_only_picture_that_fails_raises_and_one_of_many_is_reported(tmp_path, net):
    make(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "b.png").write_bytes(b"no picture")
    with pytest.raises(fr.ImageError, match=r"b\.png"):
        fr.restore(tmp_path / "in" / "b.png", network=net)
    report = fr.restore(tmp_path / "in", network=net)
    assert len(report.restored) == 1
    assert "b.png" in str(report.failed[0].error)


def test_the_bundled_denoiser_removes_noise(tmp_path):
    if "denoise-small" not in import_module("fullres.networks.catalog").bundled():
        pytest.skip("the weights are not bundled")
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[:96, :128]
    clean = 0.5 + 0.3 * np.sin(rows / 9)[..., None] * np.cos(columns / 13)[..., None] * [1, 0.5, -1]
    noisy = np.clip(clean + random.normal(0, 25 / 255, clean.shape), 0, 1)
    image = pyvips.Image.new_from_array((noisy * 255).round().astype(np.uint8))
    image.write_to_file(str(tmp_path / "noisy.png"))
    fr.restore(tmp_path / "noisy.png", tmp_path / "clean.png")
    wanted = torch.from_numpy(clean).permute(2, 0, 1)
    errors = [
        (pixels(tmp_path / name) - wanted).square().mean().sqrt()
        for name in ("noisy.png", "clean.png")
    ]
    assert errors[1] < errors[0] / 4


def test_the_halo_of_the_plan_follows_the_window(tmp_path, net):
    photo = make(tmp_path / "photo.png")
    with (
        restoring.ready(net, fr.Local(64, (100, 200))) as restorer,
        open_feed(photo, None, net.spec, Given()) as feed,
    ):
        grid, tiles = restoring.plan_picture(feed, restorer)
    assert grid == Grid((60, 90), (116, 164), 4)
    assert len(tiles) == 1
