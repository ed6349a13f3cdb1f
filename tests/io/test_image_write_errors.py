from __future__ import annotations

import contextlib
import functools
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import pyvips
import torch

from fullres.io import sink as sink_module
from fullres.io.image import open_image


@pytest.mark.parametrize(
    ("shape", "bits", "suffix", "words"),
    [
        ((4, 4, 3), 16, ".jpg", ["16 bits", "--bits 8", ".png or .tif"]),
        ((4, 4, 3), 16, ".webp", ["16 bits", "--bits 8"]),
        ((4, 4, 3), 16, ".avif", ["16 bits", "--bits 8"]),
        ((4, 4, 3), 32, ".png", ["float", "--bits 16", ".tif"]),
        ((4, 4, 3), 32, ".jpg", ["float", "--bits 8", ".tif"]),
        ((4, 4, 4), 8, ".jpg", ["alpha", ".png"]),
        ((4, 4, 3), 8, ".gif", [".gif", ".png"]),
        ((4, 4, 3), 8, "", ["without a suffix", ".png"]),
        ((1, 16384, 1), 8, ".webp", ["16383", ".png"]),
        ((4, 4, 3), 8, ".heic", ["libvips", ".png"]),
    ],
)
def test_what_a_format_cannot_hold_is_said_before_any_work(
    tmp_path, noise, save, pixels, copy, fails, shape, bits, suffix, words
):
    path = save(tmp_path / "in.tif", noise(*shape, bits))
    target = tmp_path / f"out{suffix}"
    if suffix == ".heic" and can_write_heic():
        pytest.skip("this build of libvips writes HEIC")
    with open_image(path) as source:
        fails(lambda: source.create(target), target, *words)
    if "--bits 8" in words:
        assert pixels(copy(path, target, bits=8)).dtype == np.uint8
    assert not list(tmp_path.glob("*.part"))


def can_write_heic():
    with contextlib.suppress(pyvips.Error):
        pyvips.Image.black(64, 64, bands=3).heifsave_buffer(compression="hevc")
        return True
    return False


def test_bits_are_8_16_or_32(tmp_path, noise, save, fails):
    path = save(tmp_path / "in.png", noise(4, 4, 3))
    with open_image(path) as source:
        fails(lambda: source.create(tmp_path / "o.png", bits=12), tmp_path / "o.png", "8, 16 or 32")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("bits", [8, 32])
def test_nan_is_never_black(tmp_path, noise, save, names, fails, value, bits):
    path = save(tmp_path / "in.tif", noise(6, 6, 3))
    tensor = torch.zeros(3, 6, 6)
    tensor[1, 2, 3] = value

    def write():
        with open_image(path) as source, source.create(tmp_path / "out.tif", bits=bits) as sink:
            sink.write(0, 0, tensor)

    fails(write, path, "NaN", "--dtype float32")
    assert names(tmp_path) == ["in.tif"]


def test_unwritten_pixels_are_an_error(tmp_path, noise, save, names, fails):
    path = save(tmp_path / "in.png", noise(6, 8, 3))

    def write():
        with open_image(path) as source, source.create(tmp_path / "out.png") as sink:
            sink.write(0, 0, torch.zeros(3, 6, 5))

    fails(write, tmp_path / "out.png", "18 of 48 pixels")
    assert names(tmp_path) == ["in.png"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
@pytest.mark.parametrize("moment", ["gathering", "encoding"])
def test_after_an_error_the_old_output_stands_and_nothing_else(
    tmp_path, monkeypatch, noise, save, names, error, moment
):
    path = save(tmp_path / "in.png", noise(6, 8, 3))
    (tmp_path / "out.png").write_bytes(b"old")

    def stop(*_):
        hidden = [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]
        assert len(hidden) == 1
        assert hidden[0].endswith(".part")
        raise error

    if moment == "encoding":
        monkeypatch.setattr(sink_module.encode, "save", stop)

    def write():
        with open_image(path) as source, source.create(tmp_path / "out.png") as sink:
            sink.write(0, 0, torch.zeros(3, 6, 8))
            if moment == "gathering":
                stop()

    with pytest.raises(error):
        write()
    assert names(tmp_path) == ["in.png", "out.png"]
    assert (tmp_path / "out.png").read_bytes() == b"old"


def test_target_folder_that_cannot_be(tmp_path, noise, save, copy, fails):
    path = save(tmp_path / "in.png", noise(6, 8, 3))
    fails(lambda: copy(path, path / "out.png"), path / "out.png", "cannot be written")
    (tmp_path / "folder.png").mkdir()
    fails(lambda: copy(path, tmp_path / "folder.png"), tmp_path / "folder.png", "folder")


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="needs a folder nobody may write to")
def test_unwritable_folder(tmp_path, noise, save, copy, fails):
    path = save(tmp_path / "in.png", noise(6, 8, 3))
    fails(lambda: copy(path, Path("/proc/out.png")), "/proc/out.png", "cannot be written")


@pytest.mark.parametrize("huge", [False, True])
@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg", ".webp", ".bmp"])
def test_file_size_limit_stands_for_a_full_disc(
    tmp_path, monkeypatch, noise, save, names, fails, suffix, huge
):
    resource = pytest.importorskip("resource")
    if huge:
        monkeypatch.setattr(sink_module, "IN_MEMORY", 0)
    path = save(tmp_path / "in.png", noise(150, 150, 3))
    target = tmp_path / f"out{suffix}"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open_image(path) as source:

        def write():
            with source.create(target) as sink:
                sink.write(0, 0, source.read(0, 0, 150, 150))

        resource.setrlimit(resource.RLIMIT_FSIZE, (16384, limits[1]))
        try:
            fails(write, target, "limit", "free some room")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["in.png"]


@pytest.mark.parametrize("huge", [False, True])
def test_full_disc(tmp_path, monkeypatch, noise, save, names, copy, fails, huge):
    if huge:
        monkeypatch.setattr(sink_module, "IN_MEMORY", 0)
    path = save(tmp_path / "in.png", noise(200, 200, 3))
    disc = tmp_path / "disc"
    disc.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disc)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("cannot mount a small file system")
    try:
        for suffix in (".png", ".tif", ".jpg", ".webp", ".avif", ".bmp"):
            target = disc / f"out{suffix}"
            write = functools.partial(copy, path, target)
            assert ".part" not in fails(write, target, "No space left", "--output")
            assert not names(disc)
    finally:
        subprocess.run(["umount", "-l", str(disc)], check=True)
