"""The command line: what a person types, reads and gets, for good input and bad."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import pyvips
import torch

import fullres as fr
from fullres import cli

RUN = [sys.executable, "-m", "fullres"]


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A checkpoint of a small random network, as fullres writes them."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    hyperparameters = {"width": 4, "enc_blk_nums": [1, 1], "dec_blk_nums": [1, 1]}
    net = fr.create_network("nafnet", **hyperparameters)
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    metadata = {"network": "nafnet", "hyperparameters": json.dumps(hyperparameters)}
    metadata |= {"task": "denoise", "train_size": "32"}
    save_file(net.module.state_dict(), path, metadata)
    return str(path)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def fullres(monkeypatch, capfd, weights):
    """Runs a command; gives its exit code and what it printed to output and to errors."""

    def call(*arguments):
        if arguments[0] == "restore" and "--network" not in arguments:
            arguments = (*arguments, "--network", weights)
        monkeypatch.setattr(sys, "argv", ["fullres", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return call


def make(path, height=40, width=60):
    values = np.random.default_rng(height).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pyvips.Image.new_from_array(values).write_to_file(str(path))
    return Path(path)


def is_picture(path):
    image = pyvips.Image.new_from_file(str(path), fail_on="error")
    image.avg()
    return (image.height, image.width)


def listing(folder="."):
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file())


def test_a_photo(here, fullres):
    make("photo.jpg")
    code, out, err = fullres("restore", "photo.jpg", "--compare")
    assert (code, err) == (0, "")
    assert re.fullmatch(r"photo\.jpg → photo-restored\.jpg  0\.0 MP in [\d.]+ s\n", out)
    assert listing() == ["photo-restored-compare.png", "photo-restored.jpg", "photo.jpg"]
    assert is_picture("photo-restored.jpg") == (40, 60)


def test_a_folder(here, fullres):
    for name in ("a.jpg", "sub/b.png", "sub/deep/c.tif"):
        make(f"photos/{name}")
    Path("photos/notes.txt").write_text("no picture")
    code, out, err = fullres("restore", "photos")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("[1/3] photos/a.jpg → photos-restored/a.jpg  0.0 MP in ")
    assert lines[0].endswith(" left")
    assert lines[3].startswith("3 restored: 0.0 MP in ")
    assert listing("photos-restored") == ["a.jpg", "sub/b.png", "sub/deep/c.tif"]
    code, out, err = fullres("restore", "photos")
    assert (code, out.splitlines()) == (
        0,
        [
            "3 of 3 pictures done already (--overwrite does them again)",
            "0 restored, 3 done already",
        ],
    )


def test_one_of_many_fails_and_the_others_are_done(here, fullres):
    make("photos/a.jpg")
    make("photos/c.jpg")
    Path("photos/b.jpg").write_bytes(Path("photos/a.jpg").read_bytes()[:500])
    code, out, err = fullres("restore", "photos", "-o", "done", "--quiet")
    assert (code, out) == (1, "")
    assert re.fullmatch(r"error: photos/b\.jpg: truncated[^\n]*\n", err)
    assert listing("done") == ["a.jpg", "c.jpg"]
    code, out, err = fullres("restore", "photos", "-o", "done")
    assert code == 1
    assert out.splitlines()[-1] == "0 restored, 2 done already, 1 failed"


def test_several_paths_and_every_option(here, fullres):
    make("a.png")
    make("b.png")
    code, _, err = fullres(
        *("restore", "a.png", "b.png", "-o", "out", "--window", "20x24", "--train-size", "16"),
        *(
            "--device",
            "cpu",
            "--dtype",
            "bfloat16",
            "--suffix",
            "-x",
            "--overwrite",
            "--bits",
            "16",
        ),
        *("--quality", "80", "--tile", "32", "--compare"),
    )
    assert (code, err) == (0, "")
    names = ["a-x-compare.png", "a-x.png", "b-x-compare.png", "b-x.png"]
    assert listing("out") == names
    assert pyvips.Image.new_from_file("out/a-x.png").format == "ushort"
    code, _, err = fullres("restore", "a.png", "--global", "-o", "global.png")
    assert (code, err) == (0, "")


def text_renamed():
    Path("bad.jpg").write_text("Dear diary, this is no picture.\n")


def truncated():
    whole = make("whole.jpg", 200, 300).read_bytes()
    Path("bad.jpg").write_bytes(whole[: len(whole) // 2])
    Path("whole.jpg").unlink()


def empty_file():
    Path("bad.jpg").touch()


def unsupported():
    Path("bad.gif").write_bytes(b"GIF89a\x01\x00\x01\x00\x00\x00\x00;")


BAD = {
    "missing path": (None, "missing.jpg", r"missing\.jpg: no such file or folder"),
    "empty folder": (lambda: Path("empty").mkdir(), "empty", r"empty: no pictures found \(looked"),
    "text": (text_renamed, "bad.jpg", r"bad\.jpg: is not a picture, whatever its name says"),
    "truncated": (truncated, "bad.jpg", r"bad\.jpg: truncated JPEG, the file ends at byte \d+"),
    "0 bytes": (empty_file, "bad.jpg", r"bad\.jpg: is empty \(0 bytes\)"),
    "unsupported": (unsupported, "bad.gif", r"bad\.gif: files ending in \.gif are not supported"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_a_sentence_and_loses_nothing(here, fullres, name):
    prepare, path, sentence = BAD[name]
    if prepare:
        prepare()
    before = {p: Path(p).read_bytes() for p in listing()}
    code, out, err = fullres("restore", path)
    assert (code, out) == (1, "")
    assert re.fullmatch(rf"error: {sentence}[^\n]*\n", err)
    assert {p: Path(p).read_bytes() for p in listing()} == before


def test_one_pixel(here, fullres):
    make("dot.png", 1, 1)
    assert fullres("restore", "dot.png")[0] == 0
    assert is_picture("dot-restored.png") == (1, 1)


def test_an_output_equal_to_the_input_is_refused(here, fullres):
    photo = make("in/photo.png").read_bytes()
    Path("link.png").symlink_to("in/photo.png")
    for target in ("in/photo.png", "in/../in/photo.png", "in", "link.png"):
        code, out, err = fullres("restore", "in/photo.png", "-o", target, "--overwrite")
        assert (code, out) == (1, "")
        assert re.fullmatch(r"error: in/photo\.png: [^\n]* would replace this picture[^\n]*\n", err)
    assert Path("in/photo.png").read_bytes() == photo
    assert listing() == ["in/photo.png", "link.png"]


def test_an_existing_output_is_not_replaced(here, fullres):
    make("photo.png")
    mine = make("photo-restored.png", 7, 7).read_bytes()
    code, _, err = fullres("restore", "photo.png")
    assert code == 1
    assert err.startswith("error: photo-restored.png: exists already; ")
    assert Path("photo-restored.png").read_bytes() == mine
    assert fullres("restore", "photo.png", "--overwrite")[0] == 0
    assert is_picture("photo-restored.png") == (40, 60)


def test_an_unwritable_output(here, fullres):
    make("photo.png")
    Path("file.txt").write_text("mine")
    code, _, err = fullres("restore", "photo.png", "-o", "file.txt/out.png")
    assert code == 1
    assert re.fullmatch(r"error: file\.txt/out\.png: cannot be written [^\n]*\n", err)
    code, _, err = fullres("restore", "photo.png", "-o", "/proc/out.png")
    assert code == 1
    assert re.fullmatch(r"error: /proc/out\.png: [^\n]*\n", err)
    code, _, err = fullres("restore", "photo.png", "-o", "out.xyz")
    assert code == 1
    assert re.fullmatch(r"error: out\.xyz: [^\n]*\n", err)
    assert listing() == ["file.txt", "photo.png"]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="may write everywhere")
def test_a_folder_without_permission(here, fullres):
    make("photo.png")
    Path("closed").mkdir(mode=0o500)
    code, _, err = fullres("restore", "photo.png", "-o", "closed/out.png")
    assert code == 1
    assert re.fullmatch(r"error: closed/out\.png: [^\n]*permission[^\n]*\n", err, re.IGNORECASE)


def in_a_process(arguments, weights, first=""):
    """A command in a process of its own, which runs the Python line `first` before it."""
    environment = {**os.environ, "PYTHONPATH": str(Path(fr.__file__).parents[1])}
    code = f"{first}\nfrom fullres.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, "restore", *arguments, "--network", weights],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process")
def test_a_full_disc(here, weights):
    make("photo.png", 300, 400)

    little = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    process = in_a_process(["photo.png", "-o", "out/photo.png"], weights, little)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (1, "")
    assert re.fullmatch(r"error: out/photo\.png: the disc is full or a size limit[^\n]*\n", err)
    assert listing() == ["photo.png"]


def test_broken_checkpoints(here, fullres):
    make("photo.png")
    Path("text.pth").write_text("not weights")
    torch.save({"conv.weight": torch.zeros(3, 3)}, "strange.pth")
    for network, sentence in {
        "missing.pth": r"missing\.pth[^\n]*",
        "text.pth": r"text\.pth: [^\n]*",
        "strange.pth": r"strange\.pth: is of no known architecture[^\n]*",
        "denoise-smal": r"[^\n]*denoise-smal[^\n]*bundled[^\n]*",
    }.items():
        code, out, err = fullres("restore", "photo.png", "--network", network)
        assert (code, out) == (1, "")
        assert re.fullmatch(rf"error: {sentence}\n", err)
    assert "photo-restored.png" not in listing()


@pytest.mark.parametrize(
    "arguments",
    [
        ("restore",),
        ("restore", "a.png", "--nonsense"),
        ("restore", "a.png", "--window", "wide"),
        ("restore", "a.png", "--window", "0"),
        ("restore", "a.png", "--quality", "101"),
        ("nonsense",),
    ],
)
def test_wrong_usage(here, fullres, arguments):
    code, out, err = fullres(*arguments)
    assert (code, out) == (2, "")
    assert "Usage: fullres" in err


def test_ctrl_c(here, fullres, monkeypatch):
    from importlib import import_module

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module("fullres.restore"), "open_network", interrupted)
    make("photo.png")
    code, out, err = fullres("restore", "photo.png")
    assert (code, out, err) == (130, "", "stopped; the same command goes on from here\n")


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_killed_run_goes_on_where_it_was(here, weights, fullres):
    names = [f"{number:02}.png" for number in range(8)]
    for name in names:
        make(f"photos/{name}", 300, 400)
    process = in_a_process(["photos"], weights)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not Path("photos-restored/01.png").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    folder = Path("photos-restored")
    done = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.png")}
    assert 2 <= len(done) < len(names)
    assert all(is_picture(folder / name) == (300, 400) for name in done)

    code, out, err = fullres("restore", "photos")
    assert (code, err) == (0, "")
    assert out.startswith(f"{len(done)} of 8 pictures done already")
    assert [p.name for p in sorted(folder.glob("*.*")) if not p.name.startswith(".")] == names
    assert all(is_picture(folder / name) == (300, 400) for name in names)
    assert all((folder / name).stat().st_mtime_ns == time for name, time in done.items())
    code, out, _ = fullres("restore", folder, "-o", "again")  # what a kill left is no picture
    assert code == 0
    assert listing("again") == names


def test_inspect_networks_and_version(here, fullres, weights):
    code, out, err = fullres("inspect", weights, "--plan")
    assert (code, err) == (0, "")
    assert "NAFNet" in out
    assert "training size 32 × 32, window 48 × 48" in out
    assert fullres("networks")[1].count("nafnet") >= 1
    assert fullres("--version") == (0, f"fullres {fr.__version__}\n", "")
    code, _, err = fullres("inspect", "missing.pth")
    assert code == 1
    assert re.fullmatch(r"error: missing\.pth[^\n]*\n", err)


def test_train_says_what_is_wrong_with_a_recipe(here, fullres):
    pytest.importorskip("pydantic")
    code, _, err = fullres("train", "missing.toml")
    assert (code, err) == (1, "error: missing.toml: no such recipe\n")


def test_a_large_picture_tells_how_far_it_is_where_no_bar_can(here, fullres, monkeypatch):
    from fullres import console

    monkeypatch.setattr(console, "PATIENCE", 0.0)
    make("photo.png")
    code, out, _ = fullres("restore", "photo.png", "--tile", "16")
    assert code == 0
    lines = out.splitlines()
    assert re.fullmatch(r"photo\.png: 11%, [\d.]+ s left", lines[0])
    assert len(lines) == 3 * 4
    assert lines[-1].startswith("photo.png → photo-restored.png")


def test_the_bar_on_a_terminal(here, weights):
    pty = pytest.importorskip("pty")
    make("photos/a.png")
    make("photos/b.png")
    main, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    environment["PYTHONPATH"] = str(Path(fr.__file__).parents[1])
    process = subprocess.Popen(
        [*RUN, "restore", "photos", "--network", weights],
        stdout=follower,
        stderr=follower,
        env=environment,
    )
    os.close(follower)
    shown = b""
    while True:
        try:
            part = os.read(main, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(main)
    assert process.wait(timeout=10) == 0
    text = shown.decode()
    assert "photos/a.png → photos-restored/a.png" in text
    assert "2/2, " in text
    assert "MP/s" in text
    assert "2 restored: " in text
