"""Pictures for tests of `fullres.io`: each fixture is a function that makes, reads or copies."""

from __future__ import annotations

import numpy as np
import pytest
import pyvips

from fullres.errors import ImageError
from fullres.io import vips
from fullres.io.image import open_image

NAMES = {8: ("b-w", "srgb"), 16: ("grey16", "rgb16"), 32: ("b-w", "srgb")}
DTYPES = {8: np.uint8, 16: np.uint16, 32: np.float32}


@pytest.fixture(scope="session")
def noise():
    """Random samples of shape (height, width, channels)."""

    def make(height, width, channels, bits=8, seed=0):
        values = np.random.default_rng(seed).random((height, width, channels), dtype=np.float32)
        return values if bits == 32 else np.rint(values * (2**bits - 1)).astype(DTYPES[bits])

    return make


@pytest.fixture(scope="session")
def save():
    """Writes with libvips itself; `metadata` is a list of (name, value)."""

    def write(path, array, metadata=(), **options):
        bits = 8 * array.dtype.itemsize
        image = vips.from_array(array, NAMES[bits][array.shape[2] > 2]).copy()
        for name, value in metadata:
            kind = {bytes: pyvips.GValue.blob_type, int: pyvips.GValue.gint_type}.get(type(value))
            image.set_type(kind or pyvips.GValue.gstr_type, name, value)
        image.write_to_file(str(path), **options)
        return path

    return write


@pytest.fixture(scope="session")
def load():
    """The libvips image at a path."""
    return lambda path: pyvips.Image.new_from_file(str(path))


@pytest.fixture(scope="session")
def pixels(load):
    """The stored samples at a path, shape (height, width, bands)."""

    def read(path):
        image = load(path)
        return vips.fetch(image, 0, 0, image.height, image.width)

    return read


@pytest.fixture(scope="session")
def names():
    """The sorted names of what is in a folder."""
    return lambda folder: sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="session")
def copy():
    """Reads and writes the same values; nearest-neighbour where `scale` is above 1."""

    def pass_through(path, target, scale=1, **options):
        with open_image(path) as source, source.create(target, scale=scale, **options) as sink:
            tensor = source.read(0, 0, source.height, source.width)
            sink.write(0, 0, tensor.repeat_interleave(scale, 1).repeat_interleave(scale, 2))
        return target

    return pass_through


@pytest.fixture(scope="session")
def fails():
    """The sentence of the ImageError that `action` raises, checked for form and `words`."""

    def check(action, path, *words):
        with pytest.raises(ImageError) as caught:
            action()
        message = str(caught.value)
        assert message.startswith(f"{path}: ")
        assert "\n" not in message
        assert ";" in message, "no remedy"
        for word in words:
            assert word in message
        return message

    return check
