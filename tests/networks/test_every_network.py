"""Laws that every network holds: those of a new file are tested without a word here.

A network whose published size is too large for quick tests needs an entry in `SMALL`.
"""

from __future__ import annotations

import copy
import logging
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from skimage import data
from torch import Tensor, nn

import fullres as fr
from fullres.errors import ConversionError
from fullres.io.image import open_image
from fullres.networks.catalog import create_network, networks, open_network
from fullres.networks.spec import Network, Spec
from fullres.ops import parts

RESTORMER = {
    "dim": 4,
    "num_blocks": (1, 1, 1, 1),
    "num_refinement_blocks": 1,
    "heads": (1, 2, 2, 4),
}
GRL = {"embed_dim": 20, "depths": (2,), "num_heads_window": (1,), "num_heads_stripe": (1,)}

SMALL: dict[str, list[dict]] = {
    "ffanet": [{"blocks": 1, "dim": 16}],
    "grl": [
        GRL,
        {
            **GRL,
            "local_connection": False,
            "upsampler": "pixelshuffledirect",
            "upscale": 2,
            "stripe_size": (64, 64),
            "anchor_window_down_factor": 4,
        },
    ],
    "hinet": [{"wf": 4, "depth": 3, "hin_position_right": 2}],
    "mprnet": [{"n_feat": 8, "scale_unetfeats": 4, "scale_orsnetfeats": 4, "num_cab": 1}],
    "nafnet": [
        {"width": 4, "middle_blk_num": 1, "enc_blk_nums": (1, 1), "dec_blk_nums": (1, 1)},
    ],
    "pa_edsr": [{"n_resblocks": 2, "n_feats": 8, "pyramid_channel": 8, "scale": 3}],
    "panet": [{"n_resblocks": 2, "n_feats": 8}],
    "restormer": [
        RESTORMER,
        {
            **RESTORMER,
            "inp_channels": 6,
            "dual_pixel_task": True,
            "bias": True,
            "LayerNorm_type": "BiasFree",
        },
    ],
    "rnn_mbp": [{"n_features": 4, "future_frames": 1, "past_frames": 0}],
    "spdnet": [{"n_feats": 32, "n_resblocks": 1}],
    "unet": [
        {"width": 4, "depth": 2, "attention": "se"},
        {"width": 4, "depth": 2, "attention": "ge", "norm": "gn"},
        {"width": 4, "depth": 2, "attention": "cbam", "norm": "in"},
    ],
}
"""Hyperparameters of quick networks by name, none of which a checkpoint would not tell."""

GREY: dict[str, dict] = {
    "ffanet": {"img_channel": 1},
    "grl": {"in_channels": 1},
    "hinet": {"in_chn": 1},
    "mprnet": {"in_c": 1, "out_c": 1},
    "nafnet": {"img_channel": 1},
    "panet": {"n_colors": 1},
    "restormer": {"inp_channels": 1, "out_channels": 1},
    "unet": {"in_chn": 1},
}
"""What makes a network one for grey pictures, where it can be."""

LARGEST = 1_000_000
"""Parameters that a network without an entry may have."""

TRAIN, WINDOW = 16, 24

Case = tuple[str, int]
"""A network's name and which of its hyperparameters."""


def options_of(name: str) -> list[dict]:
    return SMALL.get(name, [{}])


def cases(first_only: bool = False) -> pytest.MarkDecorator:
    found = [
        pytest.param((name, number), id=f"{name}-{number}")
        for name in sorted(networks())
        for number in range(1 if first_only else len(options_of(name)))
    ]
    return pytest.mark.parametrize("case", found)


both = pytest.mark.parametrize("local", [False, True], ids=["global", "local"])


@cache
def drawn(case: Case) -> Network:
    """A network with random weights; those that are zero at the start are drawn, too."""
    name, number = case
    if name not in SMALL:
        with torch.device("meta"):
            published = create_network(name).module
        count = sum(p.numel() for p in published.parameters())
        if count > LARGEST:
            pytest.fail(
                f"{name} has {count:,} parameters as published, too many for quick tests: give "
                f"it small hyperparameters in SMALL of {Path(__file__).name}"
            )
    torch.manual_seed(0)
    network = create_network(name, **options_of(name)[number])
    for parameter in network.module.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return network


@cache
def planned(case: Case) -> fr.Plan:
    """What becomes local in the network that is drawn."""
    network = drawn(case)
    video = network.spec.frames_lost is not None
    example = picture(network.spec, TRAIN, TRAIN) if video else None
    return fr.plan(network.module, fr.Local(TRAIN, WINDOW), example)


def localised(case: Case) -> fr.Conversion:
    """The network that is drawn made local; one without a global operation is skipped."""
    if not planned(case).converted:
        pytest.skip("has no global operation")
    return fr.Conversion(drawn(case).module, planned(case))


def made(case: Case, local: bool = False) -> Network:
    """A copy of the network that is drawn."""
    network = drawn(case)
    with localised(case) if local else nullcontext():
        return replace(network, module=copy.deepcopy(network.module))


def picture(spec: Spec, height: int, width: int, batch: int = 1) -> Tensor:
    """Random input, darker at the top and left; of video, one frame more than get lost."""
    frames = () if spec.frames_lost is None else (sum(spec.frames_lost) + 1,)
    ramp = torch.linspace(0.1, 1, height)[:, None] * torch.linspace(0.3, 1, width)
    return spec.value_range * ramp * torch.rand(batch, *frames, spec.in_channels, height, width)


def shape_of_result(spec: Spec, x: Tensor) -> tuple[int, ...]:
    batch, *frames = x.shape[:-3]
    size = (spec.scale * side for side in x.shape[-2:])
    return batch, *(n - sum(spec.frames_lost) for n in frames), spec.out_channels, *size


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


# What it computes -----------------------------------------------------------------------------


@both
@cases()
def test_any_size_is_restored_at_its_own_size(case, local):
    network = made(case, local)

    @settings(deadline=None, max_examples=3)
    @given(st.integers(1, 33), st.integers(1, 33))
    @example(1, 1)
    @example(1, 30)
    @torch.no_grad()
    def law(height, width):
        x = picture(network.spec, height, width)
        output = network.module(x)
        assert output.shape == shape_of_result(network.spec, x)
        assert output.isfinite().all()

    law()


@pytest.mark.parametrize("name", sorted(GREY.keys() & networks()))
@torch.no_grad()
def test_grey_pictures(name):
    options = options_of(name)[0] | GREY[name]
    network = create_network(name, **options)
    spec, module = network.spec, network.module
    assert (spec.in_channels, spec.out_channels) == (1, 1)
    assert module(torch.rand(1, 1, 9, 8)).shape == (1, 1, 9 * spec.scale, 8 * spec.scale)
    detected = networks()[name].hyperparameters(module.state_dict())
    assert detected.items() <= spec.hyperparameters.items()


@both
@cases()
@torch.no_grad()
def test_a_batch_is_restored_picture_by_picture(case, local):
    network = made(case, local)
    pictures = picture(network.spec, 26, 27, batch=2)
    alone = torch.cat([network.module(one) for one in pictures.split(1)])
    assert_close(network.module(pictures), alone)


@both
@cases()
@torch.no_grad()
def test_channels_last_is_kept_and_changes_nothing(case, local):
    network = made(case, local)
    height, width = (side + -side % network.spec.multiple for side in (26, 27))
    x = picture(network.spec, height, width, batch=2)
    expected = network.module(x)
    network.module.to(memory_format=torch.channels_last)
    if network.spec.frames_lost is not None:  # the format is one of four dimensions
        assert_close(network.module(x), expected)
        return
    output = network.module(x.contiguous(memory_format=torch.channels_last))
    assert_close(output, expected)
    torch.testing.assert_close(output, expected)
    if network.spec.out_channels > 1:
        assert output.is_contiguous(memory_format=torch.channels_last)


@both
@cases()
@torch.no_grad()
def test_lower_precision_is_as_good_as_its_rounding(case, local):
    network = made(case, local)
    x = picture(network.spec, 26, 25).double()
    exact = network.module.double()(x)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 0.01), (torch.bfloat16, 0.05)):
        output = network.module.to(dtype)(x.to(dtype))
        assert output.dtype == dtype
        assert_close(output.double(), exact, tolerance)


@cases()
def test_trains_in_mixed_precision(case):
    """Gradients in bfloat16 point where those of float32 do."""
    network = made(case)
    torch.manual_seed(0)
    x = picture(network.spec, 24, 32)
    found = []
    for mixed in (False, True):
        network.module.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            outputs = getattr(network.module, "outputs", network.module)(x)
        outputs = outputs if isinstance(outputs, tuple | list) else [outputs]
        torch.stack([y.float().square().mean() for y in outputs]).sum().backward()
        gradients = [p.grad for p in network.module.parameters() if p.grad is not None]
        found.append(torch.cat([g.flatten() for g in gradients]))
    assert found[1].isfinite().all()
    assert torch.cosine_similarity(*found, dim=0) > 0.99


@cases(first_only=True)
@torch.no_grad()
def test_exports(case):
    # once local, where it can be: the rest of the network is the same
    network = made(case, local=bool(planned(case).converted))
    x = picture(network.spec, 26, 25)
    exported = torch.export.export(network.module, (x,)).module()
    assert_close(exported(x), network.module(x))


@both
@cases(first_only=True)
@torch.no_grad()
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit")
def test_traces(case, local):
    network = made(case, local)
    x, other = picture(network.spec, 26, 25, batch=2).split(1)
    if network.spec.frames_lost is None:
        network.module.to(memory_format=torch.channels_last)
        x, other = (y.contiguous(memory_format=torch.channels_last) for y in (x, other))
    if local and network.spec.architecture == "ffanet":  # layers of vectors, reshaped
        with pytest.raises(ConversionError, match=r"torch\.export"):
            torch.jit.trace(network.module, x)
        return
    traced = torch.jit.trace(network.module, x, check_trace=False)
    assert_close(traced(other), network.module(other))


@both
@cases()
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # picture by picture
def test_torch_func_maps_it(monkeypatch, case, local, gradients):
    monkeypatch.setitem(parts.BUDGET, "cpu", 2**12)
    network = made(case, local)
    network.module.to(memory_format=torch.channels_last)
    pictures = picture(network.spec, 26, 27, batch=2).unsqueeze(1)
    with torch.set_grad_enabled(gradients):
        mapped = torch.func.vmap(network.module)(pictures)
        assert_close(mapped, torch.stack([network.module(one) for one in pictures]))


@both
@cases()
@pytest.mark.filterwarnings("ignore:`torch.jit")  # which torch itself calls
def test_forward_derivatives_are_those_of_reverse_mode_or_refused(case, local):
    network = made(case, local)
    network.module.double()
    x, towards = picture(network.spec, 26, 27, batch=2).double().split(1)
    try:
        _, forward = torch.func.jvp(network.module, (x,), (towards,))
    except NotImplementedError as refusal:
        if "reverse mode" not in str(refusal):
            raise
        return
    weights = torch.rand_like(forward)
    _, pulled = torch.func.vjp(network.module, x)
    torch.testing.assert_close((forward * weights).sum(), (pulled(weights)[0] * towards).sum())


# Local ----------------------------------------------------------------------------------------


@cases()
@torch.no_grad()
def test_conversion_changes_nothing_up_to_the_window_and_something_beyond(case):
    before, after = made(case), made(case, local=True)
    for size in ((TRAIN, TRAIN), (WINDOW, 21)):
        x = picture(before.spec, *size)
        assert_close(after.module(x), before.module(x), 1e-6)
    x = picture(before.spec, 2 * WINDOW, 2 * WINDOW + 6)
    expected, output = before.module(x), after.module(x)
    assert output.shape == expected.shape
    assert (output - expected).abs().max() > 1e-5 * expected.abs().max()


@cases()
@torch.no_grad()
def test_reverting_is_exact(case):
    module = drawn(case).module
    x = picture(drawn(case).spec, 26, 27)
    expected = module(x)

    def form() -> list:
        return [(id(part), type(part), sorted(vars(part))) for part in module.modules()]

    def tensors() -> list:
        return [(name, id(t)) for name, t in module.state_dict(keep_vars=True).items()]

    forms, weights = form(), tensors()
    conversion = localised(case)
    assert tensors() == weights
    assert form() != forms
    conversion.revert()
    assert (form(), tensors()) == (forms, weights)
    assert module(x).equal(expected)


# Checkpoints ----------------------------------------------------------------------------------


def _prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in state.items()}


NESTINGS = [
    lambda state: {"params": state},
    lambda state: {"epoch": 7, "state_dict": _prefixed(state, "module.")},
    lambda state: {"step": 1, "psnrs": [1.0], "model": _prefixed(state, "module.")},
]


@cases()
def test_checkpoints_of_all_nestings_open(tmp_path, case):
    network = made(case)
    state = network.module.state_dict()
    for number, nest in enumerate(NESTINGS[: 1 if case[1] else None]):
        path = tmp_path / f"{number}.pth"
        torch.save(nest(state), path)
        opened = open_network(path)
        assert opened.spec == network.spec
        assert not opened.module.training
        weights = opened.module.state_dict()
        assert list(weights) == list(state)
        assert all(weights[name].equal(value) for name, value in state.items())


@pytest.mark.parametrize("name", sorted(networks()))
def test_checkpoints_are_told_apart(name):
    with torch.device("meta"):
        for options in ({}, *options_of(name)):
            state = create_network(name, **options).module.state_dict()
            for read in (lambda a, s: a.adapt(s), lambda _, s: s):  # as opened, and as it is
                claims = [
                    architecture.name
                    for architecture in networks().values()
                    if architecture.hyperparameters(read(architecture, state)) is not None
                ]
                assert claims == [name]


# Whole pictures -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    """A part of a real photograph, neither square nor a multiple of much."""
    import pyvips

    path = tmp_path_factory.mktemp("photo") / "astronaut.png"
    crop = np.ascontiguousarray(data.astronaut()[40:138, 160:291])
    pyvips.Image.new_from_array(crop).write_to_file(str(path))
    return path


def _pixels(path: Path) -> Tensor:
    with open_image(path) as source:
        return source.read(0, 0, source.height, source.width)


@cases()
@torch.no_grad()
def test_a_real_picture_is_restored_by_a_checkpoint(tmp_path, caplog, photo, case):
    network = made(case)
    spec = network.spec
    if spec.frames_lost is not None:
        pytest.skip("restores video")
    beside = {
        "right": photo if spec.views == 2 else None,
        "noise_level": 25 if spec.condition == "noise level" else None,
        "jpeg_quality": 50 if spec.condition == "JPEG quality" else None,
    }
    torch.save({"params": network.module.state_dict()}, tmp_path / "net.pth")
    x, results = _pixels(photo), {}
    for local in (True, False):
        with caplog.at_level(logging.INFO, "fullres"):
            report = fr.restore(
                photo,
                tmp_path / f"{local}.tif",
                network=tmp_path / "net.pth" if local else network,
                train_size=TRAIN if local else None,
                local=local,
                tile=None if local else 256,
                bits=32,
                **beside,
            )
        assert not report.failed
        results[local] = _pixels(tmp_path / f"{local}.tif")
        assert results[local].shape == (3, *(spec.scale * side for side in x.shape[1:]))
        assert results[local].isfinite().all()
    changed = (results[True] - results[False]).abs().max()
    runs_as_it_is = "it runs as it is" in caplog.text
    assert changed == 0 if runs_as_it_is else changed > 5e-7, changed
