from __future__ import annotations

import numpy as np

from fullres.io import vips


def test_rgb_with_a_profile_is_untouched_and_keeps_it(tmp_path, noise, save, load, pixels, copy):
    profile = vips.builtin_profile("p3")
    array = noise(6, 8, 3)
    path = save(tmp_path / "in.png", array, [("icc-profile-data", profile)])
    for suffix in (".png", ".tif", ".webp", ".jpg", ".avif"):
        written = load(copy(path, tmp_path / f"out{suffix}"))
        assert written.get("icc-profile-data") == profile
        if suffix in (".png", ".tif", ".webp"):
            assert np.array_equal(pixels(tmp_path / f"out{suffix}"), array)


def test_lab_is_converted_to_srgb(tmp_path, noise, load, pixels, copy):
    rgb = noise(6, 8, 3)
    lab = vips.from_array(rgb, "srgb").colourspace("lab")
    lab.tiffsave(str(tmp_path / "in.tif"))
    written = load(copy(tmp_path / "in.tif", tmp_path / "out.png", bits=8))
    assert written.get("icc-profile-data") == vips.builtin_profile("srgb")
    assert np.abs(pixels(tmp_path / "out.png").astype(int) - rgb).max() <= 1


def test_grey_with_a_profile_in_a_colour_only_format(tmp_path, save, load, pixels, copy):
    """A grey profile would be wrong for RGB pixels, so they are converted."""
    grey = vips.from_array(np.full((4, 4, 1), 100, np.uint8), "b-w")
    linear = grey_profile()
    path = save(
        tmp_path / "in.png", np.full((4, 4, 1), 100, np.uint8), [("icc-profile-data", linear)]
    )
    assert load(copy(path, tmp_path / "o.png")).get("icc-profile-data") == linear
    assert pixels(tmp_path / "o.png").tolist() == vips.fetch(grey, 0, 0, 4, 4).tolist()
    written = load(copy(path, tmp_path / "o.webp"))
    assert written.get("icc-profile-data") == vips.builtin_profile("srgb")
    expected = 255 * (1.055 * (100 / 255) ** (1 / 2.4) - 0.055)  # linear light to sRGB
    assert np.abs(pixels(tmp_path / "o.webp") - expected).max() < 2


def grey_profile():
    """A minimal ICC v2 profile for grey proportional to light."""

    def tag(body):
        return body + bytes(-len(body) % 4)

    white = b"XYZ \0\0\0\0" + b"".join(
        round(v * 65536).to_bytes(4, "big") for v in (0.9642, 1, 0.8249)
    )
    bodies = {
        b"wtpt": tag(white),
        b"kTRC": tag(b"curv\0\0\0\0\0\0\0\0"),
        b"desc": tag(b"desc\0\0\0\0\0\0\0\x05grey\0" + bytes(78)),
        b"cprt": tag(b"text\0\0\0\0none\0"),
    }
    at, table, data = 128 + 4 + 12 * len(bodies), len(bodies).to_bytes(4, "big"), b""
    for name, body in bodies.items():
        table += name + (at + len(data)).to_bytes(4, "big") + len(body).to_bytes(4, "big")
        data += body
    head = bytearray(128)
    head[0:4] = (at + len(data)).to_bytes(4, "big")
    head[8:12], head[12:24], head[36:40] = b"\x02\x10\0\0", b"mntrGRAYXYZ ", b"acsp"
    head[68:80] = white[8:]
    return bytes(head) + table + data
