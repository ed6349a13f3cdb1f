"""Other authors' networks, opened by way of spandrel and made local."""

from __future__ import annotations

import copy
import logging
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from skimage import data
from skimage import io as skio
from skimage.metrics import peak_signal_noise_ratio
from torch import nn

import fullres as fr
from fullres.io.image import open_image
from fullres.networks import foreign
from fullres.networks.catalog import open_network
from fullres.networks.foreign import Foreign, network_of
from fullres.networks.inspect import describe
from fullres.restore import ready, restore_tensor, settings_for

pytestmark = [
    pytest.mark.skipif(find_spec("spandrel") is None, reason="spandrel is not installed"),
    # of theirs, when they are imported, built and run
    pytest.mark.filterwarnings("ignore:torch.meshgrid", "ignore:`torch.jit"),
]

SHARED = Path(__file__).parents[3] / "shared" / "data"
DNCNN = SHARED / "checkpoints" / "dncnn_25.pth"

SWIN = {"embed_dim": 12, "depths": (2,), "num_heads": (2,), "window_size": 8}
SMALL = {
    "SwinIR": SWIN,
    "Compact": {"num_feat": 4, "num_conv": 1, "upscale": 2},
    "HAT": {**SWIN, "upscale": 2, "num_feat": 16, "squeeze_factor": 6},
    "RCAN": {"n_resgroups": 1, "n_resblocks": 2, "n_feats": 16, "scale": 2},
    "OmniSR": {"num_feat": 16, "up_scale": 2},
    "DRUNet": {"in_nc": 4, "out_nc": 3, "nc": [8, 8, 16, 16], "nb": 2},
    "DITN": {"dim": 12, "ITL_blocks": 1, "SAL_blocks": 1, "upscale": 2},
    "KBNet": {"width": 8, "middle_blk_num": 1, "enc_blk_nums": [1, 1], "dec_blk_nums": [1, 1]},
    "NAFNet": {"width": 8, "enc_blk_nums": [1], "dec_blk_nums": [1]},
    "PLKSR": {"dim": 16, "n_blocks": 1, "upscaling_factor": 2},
    "MixDehazeNet": {"embed_dims": [8, 16, 32, 16, 8], "depths": [1] * 5},
    "RestoreFormer": {
        "ch": 32,
        "ch_mult": (1, 1, 2),
        "num_res_blocks": 1,
        "embed_dim": 32,
        "n_embed": 16,
        "z_channels": 32,
        "head_size": 2,
    },
}
CLASSES = {"KBNet": "KBNet_s", "PLKSR": "RealPLKSR"}


def built(name: str) -> nn.Module:
    """A small network of an architecture, with random weights."""
    architectures = import_module(f"spandrel.architectures.{name}")
    torch.manual_seed(0)
    return getattr(architectures, CLASSES.get(name, name))(**SMALL[name]).eval()


def saved(name: str, folder: Path, nest: str = "params_ema") -> Path:
    path = folder / f"{name}.pth"
    torch.save({nest: built(name).state_dict(), "iter": 5}, path)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(fr.NetworkError) as caught:
        open_network(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


# Opening --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("SwinIR", {"in_channels": 3, "out_channels": 3, "scale": 1, "task": "restoration"}),
        ("HAT", {"scale": 2, "task": "super-resolution", "multiple": 1}),
        ("DITN", {"scale": 2, "multiple": 8}),
        ("DRUNet", {"in_channels": 4, "out_channels": 3, "condition": "noise level"}),
    ],
)
def test_a_checkpoint_that_ours_do_not_claim_is_opened(tmp_path, name, spec):
    network = open_network(saved(name, tmp_path))
    assert network.spec.architecture == name
    assert {key: getattr(network.spec, key) for key in spec} == spec
    assert network.spec.train_size is None
    assert not any(part.training for part in network.module.modules())
    wanted = built(name)
    assert {k: v.tolist() for k, v in wanted.state_dict().items()} == {
        k.removeprefix("model."): v.tolist() for k, v in network.module.state_dict().items()
    }
    x = torch.rand(2, network.spec.in_channels, 32, 24)
    with torch.no_grad():
        assert torch.allclose(network.module(x), wanted(x), atol=1e-6)


def test_what_was_saved_from_a_network_of_theirs_opens_again(tmp_path):
    network = open_network(saved("Compact", tmp_path))
    path = tmp_path / "again.safetensors"
    half = {name: weight.half() for name, weight in network.module.state_dict().items()}
    save_file(half, path, {"train_size": "128", "task": "deblur"})
    again = open_network(path)
    assert (again.spec.train_size, again.spec.task) == (128, "deblur")
    x = torch.rand(1, 3, 9, 9)
    with torch.no_grad():
        assert torch.allclose(again.module(x), network.module(x), atol=1e-2)


def test_ours_come_first(tmp_path):
    assert open_network(saved("NAFNet", tmp_path)).spec.architecture == "nafnet"


def test_what_looks_like_ours_but_is_not_is_left_to_them(tmp_path):
    assert open_network(saved("KBNet", tmp_path)).spec.architecture == "KBNet"


def test_what_is_described(tmp_path):
    report = describe(open_network(saved("HAT", tmp_path)))
    for fact in ("HAT, by way of spandrel", "embed_dim=12", "depths=[2]", "unknown", "scale"):
        assert fact in report
    parameters = sum(p.numel() for p in built("HAT").parameters())
    assert f"{parameters:,}" in report


def test_networks_that_make_no_picture_of_a_picture_are_refused(tmp_path):
    message = refusal(saved("RestoreFormer", tmp_path))
    assert "RestoreFormer, which restores aligned pictures of one face" in message


def test_networks_that_need_a_mask_are_refused():
    from spandrel import MAIN_REGISTRY, MaskedImageModelDescriptor

    model = nn.Conv2d(4, 3, 1)
    descriptor = MaskedImageModelDescriptor(
        model,
        model.state_dict(),
        architecture=MAIN_REGISTRY["LaMa"].architecture,
        purpose="Inpainting",
        tags=[],
        supports_half=True,
        supports_bfloat16=True,
        input_channels=3,
        output_channels=3,
    )
    with pytest.raises(fr.NetworkError, match="is LaMa, which fills in what a mask marks"):
        network_of(descriptor)


def test_broken_weights_are_refused(tmp_path):
    state = built("SwinIR").state_dict()
    state["conv_first.weight"][0] = torch.nan
    torch.save(state, tmp_path / "w.pth")
    assert "SwinIR with NaN or infinity in 1 of its tensors" in refusal(tmp_path / "w.pth")


def test_incomplete_weights_are_refused(tmp_path):
    state = built("SwinIR").state_dict()
    del state["norm.bias"]
    torch.save(state, tmp_path / "w.pth")
    assert "looks to spandrel like SwinIR (" in refusal(tmp_path / "w.pth")


@pytest.mark.parametrize("there", [True, False])
def test_an_unknown_architecture(tmp_path, monkeypatch, there):
    monkeypatch.setattr(foreign, "installed", lambda: there)
    torch.save({"a": torch.ones(3), "b.c": torch.ones(2)}, tmp_path / "w.pth")
    message = refusal(tmp_path / "w.pth")
    assert "is of no known architecture" in message
    assert message.endswith("those of spandrel") == there
    assert ("pip install 'fullres[spandrel]'" in message) != there


def test_without_spandrel_ours_still_open(tmp_path, monkeypatch):
    path = saved("NAFNet", tmp_path)
    monkeypatch.setattr(foreign, "installed", lambda: False)
    assert open_network(path).spec.architecture == "nafnet"


def test_files_are_read_by_our_own_reader_alone(tmp_path, monkeypatch):
    path, load, modes = saved("Compact", tmp_path), torch.load, []

    def watched(*arguments, **options):
        modes.append(options.get("weights_only"))
        return load(*arguments, **options)

    monkeypatch.setattr(torch, "load", watched)
    assert open_network(path).spec.architecture == "RealESRGAN Compact"
    assert modes == [True]


# Any size -------------------------------------------------------------------------------------


class Picky(nn.Module):
    """Enlarges by repetition, takes few sizes, and scribbles on its input."""

    def __init__(self, multiple: int, minimum: int, square: bool) -> None:
        super().__init__()
        self.multiple, self.minimum, self.square = multiple, minimum, square

    def forward(self, x):
        height, width = x.shape[-2:]
        assert height % self.multiple == width % self.multiple == 0
        assert min(height, width) >= self.minimum
        assert height == width or not self.square
        return F.interpolate(x.mul_(2), scale_factor=2)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.integers(0, 3), st.booleans())
def test_any_size(height, width, multiple, times, square):
    minimum = max(multiple * times, 1)
    picky = Picky(multiple, minimum, square)
    module = Foreign(picky, nn.Module.__call__, 2, multiple, minimum, square)
    x = torch.rand(2, 3, height, width)
    before = x.clone()
    assert module(x).equal(F.interpolate(2 * before, scale_factor=2))
    assert x.equal(before)


def test_a_minimum_that_is_no_multiple():
    module = Foreign(Picky(1, 5, False), nn.Module.__call__, 2, minimum=5)
    assert module(torch.ones(1, 1, 3, 11)).shape == (1, 1, 6, 22)


def test_pictures_one_by_one():
    seen = []

    def call(model, x):
        seen.append(len(x))
        return model(x)

    module = Foreign(nn.Identity(), call, singly=True)
    x = torch.rand(3, 1, 4, 4)
    assert module(x).equal(x)
    assert seen == [1, 1, 1]


# Conversion -----------------------------------------------------------------------------------

LOCAL = {
    "HAT": {"average pool"},
    "RCAN": {"average pool"},
    "OmniSR": {"mean"},
    "PLKSR": {"group norm"},
    "MixDehazeNet": {"average pool"},
    "SwinIR": set(),
}


@pytest.mark.parametrize("name", LOCAL)
def test_conversion(tmp_path, name):
    network = open_network(saved(name, tmp_path))
    module, size = network.module.double().requires_grad_(False), 40
    local = fr.Local(size)
    plan = fr.plan(module, local)
    assert {op.kind for op in plan.converted} == LOCAL[name]
    if not LOCAL[name]:
        assert not plan.operations
        return
    small, large = (
        torch.rand(shape, dtype=torch.double) for shape in ((1, 3, size, size), (2, 3, 53, 83))
    )
    before = module(small), module(large)
    with fr.convert(module, local):
        assert torch.allclose(module(small), before[0], rtol=0, atol=1e-10)
        y = module(large)
        one_by_one = torch.cat([module(picture[None]) for picture in large])
    assert y.shape == before[1].shape
    assert y.isfinite().all()
    assert not torch.allclose(y, before[1], rtol=0, atol=1e-9)
    assert torch.allclose(y, one_by_one, rtol=0, atol=1e-10)
    assert module(large).equal(before[1])
    with fr.convert(module, fr.Local(size, 4 * size)):
        assert torch.allclose(module(large), before[1], rtol=0, atol=1e-10)


def test_a_network_of_the_extra_package(tmp_path):
    extra = pytest.importorskip("spandrel_extra_arches.architectures.MIRNet2")
    torch.manual_seed(0)
    state = extra.MIRNet2(n_feat=16, n_MRB=1).state_dict()
    torch.save({"params": state}, tmp_path / "w.pth")
    network = open_network(tmp_path / "w.pth")
    assert network.spec.architecture == "MIRNet2"
    plan = fr.plan(network.module, fr.Local(32))
    assert plan.operations


# DnCNN ----------------------------------------------------------------------------------------

needs_dncnn = pytest.mark.skipif(not DNCNN.exists(), reason=f"no {DNCNN}")


def noisy(clean: np.ndarray) -> np.ndarray:
    """Noise of standard deviation 25/255, as in the published figures."""
    return clean + np.random.default_rng(0).normal(0, 25 / 255, clean.shape)


@needs_dncnn
def test_dncnn_on_set12():
    files = sorted((SHARED / "set12").glob("*.png"))
    assert len(files) == 12
    network, figures = open_network(DNCNN), []
    with torch.inference_mode(), ready(network, settings=None) as restorer:
        for file in files:
            with open_image(file) as source:
                clean = source.read(0, 0, source.height, source.width).double()
            picture = torch.from_numpy(noisy(clean.numpy())).float()[None]
            restored = restore_tensor(picture, restorer, file)[0].clamp(0, 1)
            figures.append(peak_signal_noise_ratio(clean.numpy(), restored.numpy(), data_range=1))
    assert np.mean(figures) == pytest.approx(30.44, abs=0.05)


@needs_dncnn
@pytest.mark.parametrize("picture", [data.camera()[:96, :128], data.astronaut()[:96, 96:224]])
def test_a_grey_network_restores_grey_and_colour_pictures(tmp_path, picture, caplog):
    from PIL import Image

    clean = picture / 255
    pixels = np.rint(noisy(clean).clip(0, 1) * 255).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    with caplog.at_level(logging.INFO):
        fr.restore(tmp_path / "photo.png", tmp_path / "out.png", DNCNN)
    assert "nothing to convert" in caplog.text
    restored = np.asarray(Image.open(tmp_path / "out.png"))
    assert restored.shape == picture.shape
    gain = peak_signal_noise_ratio(picture, restored) - peak_signal_noise_ratio(picture, pixels)
    assert gain > 7


@needs_dncnn
def test_a_network_of_unknown_training_size():
    network = open_network(DNCNN)
    assert settings_for(copy.copy(network)) is not None


def test_fbcnn_is_told_the_jpeg_quality_or_estimates_it(tmp_path):
    torch.manual_seed(0)
    arch = import_module("spandrel.architectures.FBCNN")
    model = arch.FBCNN(nc=[8, 8, 16, 512], nb=2).eval()
    torch.save(model.state_dict(), tmp_path / "fbcnn.pth")
    network = open_network(tmp_path / "fbcnn.pth")
    assert (network.spec.condition, network.spec.blind, network.spec.in_channels) == (
        "JPEG quality",
        True,
        3,
    )
    assert "JPEG quality (--jpeg-quality), if it is known" in describe(network)
    x = torch.rand(1, 3, 16, 24)
    with torch.no_grad():
        assert torch.equal(network.module(x), model(x)[0])
        told = torch.cat([x, torch.full((1, 1, 16, 24), 0.3)], 1)
        assert torch.equal(network.module(told), model(x, torch.tensor([[0.7]]))[0])
    skio.imsave(tmp_path / "in.png", data.chelsea()[:40, :50])
    for quality in (None, 20):
        target = tmp_path / f"out-{quality}.png"
        fr.restore(tmp_path / "in.png", target, network, jpeg_quality=quality, train_size=32)
    estimated, at_20 = (skio.imread(tmp_path / f"out-{q}.png") for q in (None, 20))
    assert (estimated != at_20).any()
