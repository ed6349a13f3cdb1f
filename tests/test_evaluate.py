"""Evaluations of small networks on small pictures, and the folders that they leave."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import pyvips
import torch
from torch import nn

import fullres as fr
from fullres.cli import main
from fullres.data.datasets import Dataset, Pair, open_dataset
from fullres.data.degradations import Bicubic, Mosaic, Noise
from fullres.data.degrade import picture_random
from fullres.io.image import open_image
from fullres.metrics import protocol
from fullres.patches import restore_patches

DATA = Path(__file__).parents[2] / "shared" / "data"
evaluating = import_module("fullres.evaluate")
NOISE = Noise((25, 25))


def network(train_size=24, **hyperparameters):
    """A small network whose global operations matter."""
    torch.manual_seed(0)
    levels = {"enc_blk_nums": [1], "dec_blk_nums": [1]}
    made = fr.create_network("nafnet", **{"width": 4, **levels, **hyperparameters})
    for name, parameter in made.module.named_parameters():
        if name.endswith(("beta", "gamma")):
            nn.init.normal_(parameter, std=0.1)
        if ".sca." in name:
            nn.init.normal_(parameter, std=3)
    return fr.Network(made.module, replace(made.spec, train_size=train_size))


@pytest.fixture(scope="module")
def net():
    return network()


def make(path, height, width, bands=3, seed=0):
    random = np.random.default_rng(seed)
    ramp = np.linspace(0.1, 0.9, width)[None, :, None] * np.linspace(1, 0.3, height)[:, None, None]
    values = np.clip(ramp + random.normal(0, 0.05, (height, width, bands)), 0, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    pyvips.Image.new_from_array((values * 255).astype(np.uint8)).write_to_file(str(path))


def make_pairs(root, names=("a", "b", "c"), bands=3):
    for number, name in enumerate(names):
        for folder in ("input", "target"):
            seed = 2 * number + (folder == "target")
            make(root / folder / f"{name}.png", 50 + number, 70, bands, seed)
    return root


@pytest.fixture
def pairs(tmp_path):
    return make_pairs(tmp_path / "set")


@pytest.fixture
def clean(tmp_path):
    for number, name in enumerate("xy"):
        make(tmp_path / "clean" / f"{name}.png", 48, 60, seed=number)
    return tmp_path / "clean"


def read(path):
    with open_image(path) as source:
        return source.read(0, 0, source.height, source.width)


@torch.inference_mode()
def by_hand(net, x, mode):
    size = net.spec.train_size
    if mode == "input":
        return x
    if mode == "global":
        return net.module(x[None])[0]
    if mode == "local":
        with fr.convert(net.module, fr.Local(size)):
            return net.module(x[None])[0]
    return restore_patches(net.module, x[None], size, int(mode[8:] or 0), batch=1)[0]


ALL = ("global", "local", "patches", "patches-8")


def test_every_mode_is_what_the_network_gives_by_hand(pairs, net):
    found = fr.evaluate(net, pairs, modes=ALL, protocol="rgb")
    assert [(row.name, row.mode) for row in found.rows] == [
        (name, mode) for name in "abc" for mode in ("input", *ALL)
    ]
    for row in found.rows:
        x, target = (read(pairs / f / f"{row.name}.png") for f in ("input", "target"))
        expected = protocol("rgb").measure(by_hand(net, x, row.mode), target)
        assert row.metrics == pytest.approx(expected, abs=2e-4), row
        assert (row.height, row.width) == x.shape[1:]
        assert (row.seconds > 0) == (row.memory > 0) == (row.tiles > 0) == (row.mode != "input")
    scores = [found.of(mode)["a"].metrics["psnr"] for mode in ALL]
    assert len({round(score, 3) for score in scores}) == 4  # or else nothing was told apart


def test_the_table_has_means_and_gains(pairs, net):
    found = fr.evaluate(net, pairs, protocol="rgb")
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in found.table().splitlines()]
    assert lines[0] == ["mode", "PSNR", "SSIM", "gain", "least … most", "s/MP", "memory"]
    assert [line[0] for line in lines[2:]] == ["input", "global", "local", "patches"]
    gains = [
        found.of("local")[n].metrics["psnr"] - found.of("global")[n].metrics["psnr"] for n in "abc"
    ]
    local = next(each for each in found.summary() if each.mode == "local")
    assert local.gains == pytest.approx(gains)
    assert local.metrics["psnr"] == pytest.approx(
        np.mean([found.of("local")[n].metrics["psnr"] for n in "abc"])
    )
    assert float(lines[4][3]) == pytest.approx(np.mean(gains), abs=0.006)
    least, most = lines[4][4].split(" … ")
    assert float(least) == pytest.approx(min(gains), abs=0.006)
    assert float(most) == pytest.approx(max(gains), abs=0.006)
    pictures = found.per_picture("ssim").splitlines()
    assert len(pictures) == 5
    assert "SSIM local" in pictures[0]
    assert pictures[2].split("|")[1:3] == [" a       ", " 70 × 50 "]
    with pytest.raises(fr.FullresError, match="take one of psnr, ssim"):
        found.per_picture("lpips")


def test_csv_and_json_have_all_rows(pairs, net):
    found = fr.evaluate(net, pairs, modes=["local"], protocol="rgb")
    lines = list(csv.DictReader(io.StringIO(found.csv())))
    assert [float(line["psnr"]) for line in lines] == [row.metrics["psnr"] for row in found.rows]
    content = json.loads(found.json())
    assert [row["ssim"] for row in content["rows"]] == [row.metrics["ssim"] for row in found.rows]
    assert [mode["mode"] for mode in content["modes"]] == ["input", "local"]
    assert content["modes"][1]["gain"] is None
    assert content["settings"]["window"] == [36, 36]


def test_tiles_are_counted_and_give_the_same(tmp_path, net):
    make(tmp_path / "input" / "a.png", 300, 340, seed=1)
    make(tmp_path / "target" / "a.png", 300, 340, seed=2)
    whole = fr.evaluate(net, tmp_path, modes=["local"], protocol="rgb").of("local")["a"]
    tiled = fr.evaluate(net, tmp_path, modes=["local"], protocol="rgb", tile=128).of("local")["a"]
    assert (whole.tiles, tiled.tiles) == (1, 9)
    assert tiled.metrics == pytest.approx(whole.metrics, abs=1e-3)
    assert tiled.memory < whole.memory


def test_window_and_train_size_are_those_given(pairs, net):
    found = fr.evaluate(net, pairs, modes=["local", "patches"], window=30, train_size=20)
    x, target = (read(pairs / f / "a.png") for f in ("input", "target"))
    with torch.inference_mode(), fr.convert(net.module, fr.Local(20, 30)):
        local = net.module(x[None])[0]
    with torch.inference_mode():
        patches = restore_patches(net.module, x[None], 20)[0]
    usual = protocol(found.protocol)
    for mode, picture in (("local", local), ("patches", patches)):
        expected = usual.measure(picture, target)["psnr"]
        assert found.of(mode)["a"].metrics["psnr"] == pytest.approx(expected, abs=2e-3)


class Counted:
    """Counts passes over pictures larger than a patch."""

    def __init__(self, monkeypatch):
        self.names = []
        run = evaluating._Work.restore

        def restore(work, example, mode, progress):
            self.names.append((example.name, mode))
            return run(work, example, mode, progress)

        monkeypatch.setattr(evaluating._Work, "restore", restore)


def test_a_stopped_run_goes_on(pairs, net, tmp_path, monkeypatch):
    folder = tmp_path / "results"
    first = fr.evaluate(net, pairs, output=folder, protocol="rgb")
    file = folder / "results.csv"
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 3 * 4
    file.write_text("".join(lines[:6]) + lines[6][:-3])  # b's global row lacks its end
    counted = Counted(monkeypatch)
    again = fr.evaluate(net, pairs, output=folder, protocol="rgb")
    wanted = [("b", m) for m in ("global", "local", "patches")]
    wanted += [("c", m) for m in ("global", "local", "patches")]
    assert counted.names[: len(wanted)] == wanted
    assert {name for name, _ in counted.names[len(wanted) :]} <= {"a"}  # for the contact sheet
    assert again.rows[:5] == first.rows[:5]
    metrics = [row.metrics for row in again.rows]
    assert metrics == [row.metrics for row in first.rows]
    assert len(file.read_text().splitlines()) == 1 + 3 * 4
    counted.names.clear()
    assert fr.evaluate(net, pairs, output=folder, protocol="rgb").rows == again.rows
    assert not counted.names
    more = fr.evaluate(net, pairs, output=folder, protocol="rgb", modes=["local", "patches-4"])
    assert counted.names == [(name, "patches-4") for name in "abc"]
    assert more.of("local") == again.of("local")


def test_a_run_that_fails_leaves_what_it_has(pairs, net, tmp_path):
    folder = tmp_path / "results"
    (pairs / "input" / "b.png").write_bytes((pairs / "input" / "b.png").read_bytes()[:500])
    with pytest.raises(fr.ImageError, match=r"b\.png"):
        fr.evaluate(net, pairs, output=folder, protocol="rgb")
    assert [line.split(",")[0] for line in (folder / "results.csv").read_text().splitlines()] == [
        "name",
        *4 * "a",
    ]


def test_results_of_other_settings_are_not_mixed(pairs, net, tmp_path):
    folder = tmp_path / "results"
    usual = {"output": folder, "protocol": "rgb", "modes": ["local"]}
    fr.evaluate(net, pairs, **usual)
    before = (folder / "results.csv").read_text()
    for changed, named in (
        ({"protocol": "gopro"}, "protocol was"),
        ({"window": 30}, r"window was \[36, 36\] and is \[30, 30\] now"),
        ({"train_size": 30}, "training size was"),
        ({"dtype": "float64"}, "data type was auto and is float64"),
        ({"tile": 64}, "tile was None and is 64"),
    ):
        with pytest.raises(fr.FullresError, match=named):
            fr.evaluate(net, pairs, **{**usual, **changed})
        assert (folder / "results.csv").read_text() == before
    # what the local mode is run with is nothing to the global one
    fr.evaluate(net, pairs, **{**usual, "modes": ["global"]}, window=30)
    content = json.loads((folder / "results.json").read_text())
    assert [mode["mode"] for mode in content["modes"]] == ["input", "local", "global"]
    assert content["settings"]["window"] == [36, 36]
    fr.evaluate(net, pairs, **usual, window=30, overwrite=True)
    with pytest.raises(fr.FullresError, match="window was"):
        fr.evaluate(net, pairs, **usual)


def test_results_of_other_weights_are_not_mixed(pairs, net, tmp_path):
    fr.evaluate(net, pairs, output=tmp_path / "r", protocol="rgb", modes=["global"])
    other = network()
    with torch.no_grad():
        other.module.ending.bias += 1e-3
    with pytest.raises(fr.FullresError, match="weights was nafnet"):
        fr.evaluate(other, pairs, output=tmp_path / "r", protocol="rgb", modes=["global"])
    (tmp_path / "r" / "results.json").unlink()
    with pytest.raises(fr.FullresError, match="unknown settings"):
        fr.evaluate(net, pairs, output=tmp_path / "r", protocol="rgb", modes=["global"])


def test_the_folder_of_results(pairs, net, tmp_path):
    folder = tmp_path / "new" / "results"
    found = fr.evaluate(net, pairs, output=folder, protocol="rgb")
    names = {path.name for path in folder.iterdir()}
    assert names == {"results.csv", "results.json", "results.md", "contact-sheet.png"}
    assert (folder / "results.csv").read_text() == found.csv()
    assert (folder / "results.json").read_text() == found.json()
    report = (folder / "results.md").read_text()
    assert found.table() in report
    assert found.per_picture() in report
    sheet = pyvips.Image.new_from_file(str(folder / "contact-sheet.png"))
    assert (sheet.bands, sheet.format) == (3, "uchar")
    assert sheet.height > 3 * 50
    assert sheet.min() == 0  # the captions are black


def test_clean_pictures_are_degraded_by_their_names(clean, net):
    found = fr.evaluate(net, clean, modes=["global"], degradation=NOISE, seed=3, protocol="rgb")
    target = read(clean / "y.png")
    noisy = NOISE(target, picture_random(3, "y"))
    rows = {row.mode: row.metrics["psnr"] for row in found.rows if row.name == "y"}
    assert rows["input"] == protocol("rgb").measure(noisy, target)["psnr"]
    expected = protocol("rgb").measure(by_hand(net, noisy, "global"), target)["psnr"]
    assert rows["global"] == pytest.approx(expected, abs=1e-3)
    dataset = open_dataset(clean)
    alone = replace(dataset, pairs=dataset.pairs[1:])
    again = fr.evaluate(net, alone, modes=["global"], degradation=NOISE, seed=3, protocol="rgb")
    assert again.rows[0].metrics == found.rows[2].metrics


def test_what_does_not_fit_is_said(pairs, clean, net):
    with pytest.raises(fr.FullresError, match="say how to degrade them with --degrade"):
        fr.evaluate(net, clean)
    with pytest.raises(fr.FullresError, match="leave out --degrade"):
        fr.evaluate(net, pairs, degradation=NOISE)
    with pytest.raises(fr.FullresError, match="unknown mode 'tiles'; known are global, local"):
        fr.evaluate(net, pairs, modes=["tiles"])
    with pytest.raises(fr.FullresError, match="cannot overlap by 24; give a larger --patch-size"):
        fr.evaluate(net, pairs, modes=["patches-24"])
    with pytest.raises(fr.FullresError, match="no protocol 'psnr'"):
        fr.evaluate(net, pairs, protocol="psnr")
    with pytest.raises(fr.FullresError, match="does not ask for the noise level"):
        fr.evaluate(net, pairs, noise_level=25)
    enlarged = Bicubic(2)
    with pytest.raises(fr.FullresError, match="24 pixels and its target 60 × 48, but the network"):
        fr.evaluate(net, clean, degradation=enlarged)


def test_an_unknown_training_size_is_asked_for(pairs):
    stranger = network(train_size=None)
    with pytest.raises(fr.FullresError, match="give --train-size or --patch-size"):
        fr.evaluate(stranger, pairs)
    with pytest.raises(fr.FullresError, match="--train-size, or evaluate --mode global alone"):
        fr.evaluate(stranger, pairs, modes=["local"])
    assert len(fr.evaluate(stranger, pairs, modes=["global"], protocol="rgb").rows) == 6
    assert len(fr.evaluate(stranger, pairs, modes=["patches"], patch_size=20).rows) == 6


class Plain(nn.Module):
    """Nothing in it is global."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        return x + 0.1 * self.body(x)


def spec(**changes):
    return fr.Spec(**{"architecture": "plain", "hyperparameters": {}} | changes)


def test_with_nothing_to_convert_local_is_global(pairs, tmp_path, monkeypatch, caplog):
    torch.manual_seed(0)
    plain = fr.Network(Plain().eval(), spec(in_channels=3, out_channels=3))
    counted = Counted(monkeypatch)
    with caplog.at_level("INFO", "fullres"):
        found = fr.evaluate(
            plain, pairs, modes=["global", "local"], protocol="rgb", output=tmp_path / "r"
        )
    assert "it runs as it is" in caplog.text
    assert counted.names == [(name, "global") for name in "abc"]
    for name, row in found.of("local").items():
        assert row == replace(found.of("global")[name], mode="local")
    assert not (tmp_path / "r" / "contact-sheet.png").exists()


class Doubling(nn.Module):
    def forward(self, x):
        return nn.functional.interpolate(x, scale_factor=2, mode="nearest")


def test_networks_that_enlarge_get_bicubic_downscaling(tmp_path):
    make(tmp_path / "clean" / "odd.png", 61, 47)
    double = fr.Network(Doubling(), spec(in_channels=3, out_channels=3, scale=2, train_size=16))
    found = fr.evaluate(
        double, tmp_path / "clean", modes=["global", "patches-4"], protocol="sr", layout="clean"
    )
    target = read(tmp_path / "clean" / "odd.png")[:, :60, :46]
    small = Bicubic(2)(target, picture_random(0, "odd"))
    expected = protocol("sr").measure(Doubling()(small[None])[0], target, 2)
    for mode in ("global", "patches-4"):
        assert found.of(mode)["odd"].metrics == pytest.approx(expected, abs=1e-3)
    assert found.of("input")["odd"].metrics["psnr"] > expected["psnr"]  # bicubic beats nearest
    assert (found.rows[0].height, found.rows[0].width) == (30, 23)


def test_grey_pictures_of_colour_networks_and_the_other_way_round(tmp_path, net):
    grey = make_pairs(tmp_path / "grey", "a", bands=1)
    x, target = (read(grey / f / "a.png") for f in ("input", "target"))
    with torch.inference_mode():
        y = net.module(x.expand(1, 3, -1, -1))[0].mean(0, keepdim=True)
    found = fr.evaluate(net, grey, modes=["global"], protocol="rgb")
    assert found.rows[1].metrics == pytest.approx(protocol("rgb").measure(y, target), abs=1e-3)
    colour = make_pairs(tmp_path / "colour", "a")
    x, target = (read(colour / f / "a.png") for f in ("input", "target"))
    single = network(img_channel=1)
    with torch.inference_mode():
        y = single.module(x[:, None])[:, 0]
    found = fr.evaluate(single, colour, modes=["global"], protocol="rgb")
    assert found.rows[1].metrics == pytest.approx(protocol("rgb").measure(y, target), abs=1e-3)


class Views(nn.Module):
    def forward(self, x):
        return 0.75 * x[:, :3] + 0.25 * x[:, 3:]


def test_both_views_of_a_dual_pixel_pair(tmp_path):
    files = [tmp_path / f"{name}.png" for name in ("left", "target", "right")]
    for seed, file in enumerate(files):
        make(file, 40, 50, seed=seed)
    dataset = Dataset("dual", "dpdd-dual", (Pair("1", *files),), (), "deblur", "rgb", 1)
    both = fr.Network(Views(), spec(in_channels=6, out_channels=3, views=2))
    left, target, right = map(read, files)
    found = fr.evaluate(both, dataset, modes=["global"])
    expected = protocol("rgb").measure(0.75 * left + 0.25 * right, target)
    assert found.of("global")["1"].metrics == pytest.approx(expected)
    one = replace(dataset, pairs=(Pair("1", *files[:2]),))
    with pytest.raises(fr.FullresError, match="dual has no right views"):
        fr.evaluate(both, one, modes=["global"])
    with pytest.raises(fr.FullresError, match="dual has pairs of views"):
        fr.evaluate(network(), dataset, modes=["global"])


class AddsLevel(nn.Module):
    def forward(self, x):
        return x[:, :3] + x[:, 3:]


def test_the_noise_level_of_the_degradation_is_told(clean):
    told = fr.Network(
        AddsLevel(), spec(in_channels=4, out_channels=3, condition="noise level", train_size=16)
    )
    found = fr.evaluate(told, clean, modes=["patches"], degradation=NOISE, protocol="rgb")
    target = read(clean / "x.png")
    noisy = NOISE(target, picture_random(0, "x"))
    expected = protocol("rgb").measure(noisy + 25 / 255, target)
    assert found.of("patches")["x"].metrics == pytest.approx(expected)
    with pytest.raises(fr.FullresError, match="needs the noise level"):
        fr.evaluate(told, clean, modes=["global"], degradation=Noise((0, 50)))


class Keeps(nn.Module):
    def forward(self, x):
        return x


def test_mosaics_are_made_as_the_network_takes_them(clean):
    keeps = fr.Network(Keeps(), spec(in_channels=3, out_channels=3, task="demosaic"))
    found = fr.evaluate(keeps, clean, modes=["global"], degradation=Mosaic(), protocol="rgb")
    target = read(clean / "x.png")
    samples = Mosaic(form="samples")(target, picture_random(0, "x"))
    expected = protocol("rgb").measure(samples, target)
    assert found.of("global")["x"].metrics == pytest.approx(expected)
    with pytest.raises(fr.FullresError, match="--degrade mosaic"):
        fr.evaluate(keeps, clean, modes=["global"], degradation=NOISE)


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["fullres", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code


@pytest.fixture
def stored(net, tmp_path):
    path = tmp_path / "net.pth"
    torch.save({"params": net.module.state_dict()}, path)
    return path


def test_the_command(stored, pairs, tmp_path, monkeypatch, capsys):
    usual = ("evaluate", stored, pairs, "--train-size", 24, "--protocol", "rgb")
    assert run(monkeypatch, *usual, "--output", tmp_path / "r", "--per-picture") == 0
    shown = capsys.readouterr().out
    assert "[1/3] a  PSNR input " in shown
    assert "| local " in shown
    assert "| picture " in shown
    assert run(monkeypatch, *usual, "-o", tmp_path / "r", "-m", "local", "--csv") == 0
    again = capsys.readouterr().out
    assert len(again.splitlines()) == 7
    assert set((tmp_path / "r" / "results.csv").read_text().splitlines()) > set(again.splitlines())
    assert run(monkeypatch, *usual, "-m", "global", "--json") == 0
    assert json.loads(capsys.readouterr().out)["protocol"] == "rgb"


def test_the_command_degrades(stored, clean, monkeypatch, capsys):
    usual = ("evaluate", stored, clean, "--mode", "global", "--protocol", "rgb", "--csv")
    assert run(monkeypatch, *usual, "--degrade", "noise sigma=[25,25]", "--seed", 3) == 0
    first = next(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    noisy = NOISE(read(clean / "x.png"), picture_random(3, "x"))
    expected = protocol("rgb").measure(noisy, read(clean / "x.png"))
    assert float(first["psnr"]) == expected["psnr"]
    assert run(monkeypatch, *usual) == 1
    assert capsys.readouterr().err.startswith("error: clean: has clean pictures")


def test_dncnn_denoises_set12_as_published():
    checkpoint, folder = DATA / "checkpoints" / "dncnn_25.pth", DATA / "set12"
    if not checkpoint.exists() or not folder.exists():
        pytest.skip("no checkpoint of DnCNN, or no Set12")
    pytest.importorskip("spandrel")
    dataset = open_dataset(folder)
    two = replace(dataset, pairs=dataset.pairs[:2])
    found = fr.evaluate(checkpoint, two, modes=["global"], degradation=NOISE, protocol="rgb")
    # Zhang et al., 2017, table III: 30.18 for cameraman and 33.06 for house, sigma 25
    scores = [row.metrics["psnr"] for row in found.rows if row.mode == "global"]
    assert scores == pytest.approx([30.18, 33.06], abs=0.15)
