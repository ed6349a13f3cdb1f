from __future__ import annotations

import copy
import importlib
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fullres import Local, convert, plan
from fullres.errors import ConversionError, NetworkError
from fullres.networks import grl_attention
from fullres.networks.catalog import create_network, open_network
from fullres.networks.grl import ARCHITECTURE, GRL
from fullres.networks.grl_attention import AnchorProjection, relative_positions
from fullres.networks.grl_checkpoint import TASKS, published, published_as

SMALL = {
    "embed_dim": 24,
    "depths": (4,),
    "num_heads_window": (2,),
    "num_heads_stripe": (2,),
    "window_size": 8,
    "stripe_size": (8, 16),
    "anchor_window_down_factor": 4,
    "local_connection": False,
    "img_size": 32,
}
FRACTIONS = {"stripe_size": (8, None), "stripe_groups": (None, 4)}
FOUR_STAGES = {
    "depths": (4, 4, 4, 4),
    "num_heads_window": (2, 2, 2, 2),
    "num_heads_stripe": (2, 2, 2, 2),
    "local_connection": False,
}
SIZES = {
    "tiny": {"embed_dim": 64, **FOUR_STAGES},
    "small": {"embed_dim": 128, **FOUR_STAGES},
    "base": {},
}


def randomised(network: nn.Module, seed: int = 0) -> nn.Module:
    """Weights of a size at which attention is neither flat nor one-hot."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
            if parameter.dim() > 1 and parameter[0].numel() > 1:
                parameter.mul_(0.7 / parameter[0].numel() ** 0.5)
    return network.eval()


@pytest.fixture
def small() -> GRL:
    return randomised(GRL(**SMALL))


@pytest.fixture
def fractions() -> GRL:
    """Stripes that are a fraction of the picture, and channel attention."""
    return randomised(GRL(**{**SMALL, **FRACTIONS, "local_connection": True}))


# As published -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "task", "upscale", "upsampler", "millions"),
    [
        ("base", "super-resolution", 4, "pixelshuffle", 20.20),
        ("small", "super-resolution", 4, "pixelshuffle", 3.49),
        ("tiny", "super-resolution", 4, "pixelshuffledirect", 0.91),
        ("base", "deblur", 1, "", 19.81),
    ],
)
def test_parameter_counts_of_the_paper(size, task, upscale, upsampler, millions):
    sizes = {**SIZES[size], **published(task, base=size == "base")}
    with torch.device("meta"):
        network = GRL(upscale=upscale, upsampler=upsampler, **sizes)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 2) == millions


def spandrels(size: int, **hyperparameters) -> nn.Module:
    """The same network of an independent package."""
    package = pytest.importorskip("spandrel.architectures.GRL")
    lists = {n: list(v) if isinstance(v, tuple) else v for n, v in hyperparameters.items()}
    out = hyperparameters.get("out_channels", hyperparameters.get("in_channels", 3))
    defaults = {"stripe_shift": True, "mlp_ratio": 2.0, "out_channels": out}
    return package.GRL(**{**defaults, **lists, "img_size": size}).eval()


@pytest.mark.filterwarnings("ignore")  # of the packages that spandrel imports
@pytest.mark.parametrize(
    ("size", "hyperparameters"),
    [
        (32, {}),
        (64, FRACTIONS),
        (48, FRACTIONS),  # anchors are not shifted as far as positions
        (32, {"stripe_size": (None, None), "stripe_groups": (1, 2)}),
        (32, {"stripe_size": (None, None), "stripe_groups": (1, 2), "stripe_shift": False}),
        (36, {"window_size": 12, "stripe_size": (12, 36)}),
        (32, {"anchor_window_down_factor": 2}),
        (32, {"anchor_window_down_factor": 1}),
        (32, {"window_size": 32, "stripe_size": (32, 32)}),
        (32, {"anchor_proj_type": "maxpool"}),
        (32, {"anchor_proj_type": "conv2d"}),
        (32, {"anchor_proj_type": "separable_conv"}),
        (32, {"anchor_proj_type": "patchmerging", "anchor_window_down_factor": 2}),
        (32, {"anchor_proj_type": "conv2d", "anchor_one_stage": False}),
        (32, {"anchor_proj_type": "separable_conv", "anchor_one_stage": False}),
        (32, {"anchor_proj_type": "patchmerging", "anchor_one_stage": False}),
        (16, {"qkv_proj_type": "separable_conv", "qkv_bias": False}),
        (16, {"qkv_bias": False}),
        (16, {"conv_type": "3conv"}),
        (16, {"conv_type": "1conv1x1"}),
        (16, {"conv_type": "linear"}),
        (16, {"mlp_ratio": 2.5}),
        (16, {"local_connection": True, "num_heads_stripe": (3,)}),
        (16, {"upsampler": "pixelshuffle", "upscale": 2}),
        (16, {"upsampler": "pixelshuffle", "upscale": 3}),
        (16, {"upsampler": "pixelshuffle", "upscale": 4}),
        (16, {"upsampler": "pixelshuffledirect", "upscale": 3}),
        (16, {"upsampler": "nearest+conv", "upscale": 4}),
        (16, {"in_channels": 6, "out_channels": 3}),
        (16, {"in_channels": 1}),
        (16, {"img_range": 255.0}),
    ],
)
def test_an_independent_implementation_computes_the_same(size, hyperparameters):
    options = {**SMALL, **hyperparameters}
    theirs = randomised(spandrels(size, **options)).double()
    ours = GRL(**options).eval().double()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    picture = torch.rand(1, options.get("in_channels", 3), size, size, dtype=torch.float64)
    with torch.no_grad():
        expected = theirs(picture)
        output = ours(picture)
    assert (output - expected).abs().max() < 1e-7 * expected.abs().max()


@pytest.mark.filterwarnings("ignore")
def test_an_independent_implementation_agrees_on_wide_pictures():
    theirs = randomised(spandrels((32, 48), **SMALL)).double()
    ours = GRL(**SMALL).eval().double()
    ours.load_state_dict(theirs.state_dict())
    picture = torch.rand(2, 3, 32, 48, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours(picture), theirs(picture), rtol=1e-7, atol=1e-7)


# Hyperparameters --------------------------------------------------------------------------------


@st.composite
def hyperparameters(draw):
    stages = draw(st.integers(1, 3))
    heads = st.lists(st.sampled_from([1, 2, 3]), min_size=stages, max_size=stages).map(tuple)
    upsampler, upscale = draw(
        st.sampled_from(
            [("", 1), ("nearest+conv", 4)]
            + [(u, n) for u in ("pixelshuffle", "pixelshuffledirect") for n in (2, 3, 4)]
        )
    )
    channels = draw(st.sampled_from([1, 3, 6]))
    out = None if upsampler == "pixelshuffledirect" else draw(st.sampled_from([None, 2]))
    kind = draw(st.sampled_from(["avgpool", "conv2d", "separable_conv", "patchmerging"]))
    one_stage = kind == "avgpool" or draw(st.booleans())
    return {
        "upscale": upscale,
        "in_channels": channels,
        "out_channels": out,
        "embed_dim": 12 * draw(st.integers(2, 5)),
        "upsampler": upsampler,
        "depths": tuple(draw(st.integers(1, 5)) for _ in range(stages)),
        "num_heads_window": draw(heads),
        "num_heads_stripe": draw(heads),
        "mlp_ratio": draw(st.integers(4, 16)) / 4,
        "qkv_bias": draw(st.booleans()),
        "qkv_proj_type": draw(st.sampled_from(["linear", "separable_conv"])),
        "anchor_proj_type": kind,
        "anchor_one_stage": one_stage,
        "anchor_window_down_factor": 4 if kind == "conv2d" or not one_stage else 2,
        "conv_type": draw(st.sampled_from(["1conv", "3conv", "1conv1x1", "linear"])),
        "local_connection": draw(st.booleans()),
    }


@settings(deadline=None, max_examples=15)
@given(hyperparameters())
def test_hyperparameters_are_read_back_from_names_and_shapes(wanted):
    with torch.device("meta"):
        state = GRL(**wanted).state_dict()
    found = ARCHITECTURE.hyperparameters(state)
    if wanted["anchor_proj_type"] == "avgpool":  # leaves no trace of how much it pools
        wanted = {n: v for n, v in wanted.items() if n != "anchor_window_down_factor"}
    assert wanted.items() <= found.items()
    with torch.device("meta"):
        again = GRL(**found).state_dict()
    assert {n: v.shape for n, v in again.items()} == {n: v.shape for n, v in state.items()}


@pytest.mark.parametrize(
    ("size", "options", "task"),
    [
        ("tiny", {}, "denoise"),
        ("base", {"in_channels": 1}, "denoise"),
        ("base", {"in_channels": 6, "out_channels": 3}, "defocus"),
        ("small", {"upsampler": "pixelshuffle", "upscale": 3}, "super-resolution"),
        ("base", {"upsampler": "pixelshuffle", "upscale": 2}, "super-resolution"),
        ("base", {"upsampler": "nearest+conv", "upscale": 4}, "real-world super-resolution"),
    ],
)
def test_windows_that_weights_of_that_kind_were_published_with(size, options, task):
    with torch.device("meta"):
        state = GRL(**SIZES[size], **options).state_dict()
    found = ARCHITECTURE.hyperparameters(state)
    assert published(task, base=size == "base").items() <= found.items()
    spec = create_network("grl", **{**found, "depths": (1,) * len(found["depths"])}).spec
    assert (spec.task, spec.train_size) == (task, found["img_size"])


@pytest.mark.parametrize(
    ("file", "window", "stripe", "cell", "size"),
    [
        ("dn_grl_small_c3s25", 16, (64, 128), 4, 256),
        ("dn_grl_tiny_c1", 16, (64, 128), 4, 256),
        ("dn_grl_base_c1s50", 32, (64, 128), 2, 256),
        ("jpeg_grl_small_c3q10", 36, (72, 144), 4, 288),
        ("dm_grl_small", 8, (32, 32), 4, 64),
        ("db_motion_grl_base_realblur_j", 12, (48, 96), 4, 480),
        ("db_defocus_single_pixel_grl_base", 16, (48, 96), 4, 480),
        ("db_defocus_dual_pixel_grl_base", 16, (48, 96), 4, 480),
        ("sr_grl_tiny_c3x2", 32, (64, 64), 4, 256),
        ("sr_grl_base_c3x4", 32, (64, 64), 2, 256),
        ("bsr_grl_base", 16, (32, 64), 4, 128),
    ],
)
def test_names_of_published_files_tell_their_windows(file, window, stripe, cell, size):
    assert published_as(file, {}) == {
        "window_size": window,
        "stripe_size": stripe,
        "anchor_window_down_factor": cell,
        "img_size": size,
    }


@pytest.mark.parametrize("file", ["grl", "my_grl_base", "dn_swin_base", "sr_grl"])
def test_other_names_tell_nothing(file):
    assert published_as(file, {}) == {}


@pytest.mark.parametrize("task", TASKS)
def test_tasks_are_told_by_their_windows(task):
    options = {"local_connection": True, "embed_dim": 24, "depths": (1,)}
    heads = {f"num_heads_{n}": (2,) for n in ("window", "stripe")}
    if "super-resolution" in task:
        options |= {"upscale": 4, "upsampler": "pixelshuffle"}
    if task.startswith("real"):
        options["upsampler"] = "nearest+conv"
    spec = create_network("grl", **options, **heads, **published(task, base=True)).spec
    assert spec.task == task
    assert spec.task in ARCHITECTURE.tasks


@pytest.mark.parametrize(
    "hyperparameters",
    [
        {"in_channels": 0},
        {"embed_dim": 2, "mlp_ratio": 2.0},
        {"embed_dim": 25},
        {"embed_dim": 12, "local_connection": True},
        {"mlp_ratio": 0.01},
        {"img_range": 0.0},
        {"upscale": 2},
        {"upscale": 0},
        {"upscale": 6, "upsampler": "pixelshuffle"},
        {"upscale": 1, "upsampler": "pixelshuffledirect"},
        {"upscale": 2, "upsampler": "nearest+conv"},
        {"depths": (1, 1)},
        {"depths": (0,)},
        {"num_heads_window": (5,)},
        {"window_size": 0},
        {"stripe_size": (8,)},
        {"stripe_size": (8, 10)},
        {"stripe_size": (8, None)},
        {"stripe_groups": (0, 1)},
        {"anchor_window_down_factor": 0},
        {"anchor_window_down_factor": 1, "anchor_proj_type": "conv2d"},
        {"anchor_window_down_factor": 4, "anchor_proj_type": "patchmerging"},
        {
            "anchor_window_down_factor": 6,
            "anchor_proj_type": "conv2d",
            "anchor_one_stage": False,
            "stripe_size": (6, 6),
        },
        {"anchor_one_stage": False},
    ],
)
def test_impossible_hyperparameters(hyperparameters):
    with pytest.raises(NetworkError, match=next(iter(hyperparameters))):
        create_network("grl", **{**SMALL, **hyperparameters})


def test_spec():
    spec = create_network("grl", **SMALL).spec
    assert (spec.multiple, spec.scale, spec.train_size, spec.value_range) == (1, 1, 32, 1.0)
    assert (spec.in_channels, spec.out_channels, spec.task) == (3, 3, None)
    spec = create_network("grl", **SMALL, in_channels=6, out_channels=3).spec
    assert (spec.in_channels, spec.out_channels, spec.views) == (6, 3, 2)
    spec = create_network("grl", **SMALL, in_channels=1).spec
    assert (spec.in_channels, spec.out_channels, spec.views) == (1, 1, 1)


# Checkpoints ------------------------------------------------------------------------------------


def tables(window, stripe, down, size):
    """Buffers of the published code that tell sizes, and one of each other kind."""
    few = [n // down for n in stripe]
    table = [n + m - 1 for n, m in zip(stripe, few, strict=True)]
    pixels, anchors = stripe[0] * stripe[1], few[0] * few[1]
    return {
        "table_w": torch.zeros(1, 2 * window - 1, 2 * window - 1, 2),
        "table_sh": torch.zeros(1, *table, 2),
        "table_sv": torch.zeros(1, *table[::-1], 2),
        "index_w": torch.zeros(window**2, window**2, dtype=torch.long),
        "index_sh_a2w": torch.zeros(anchors, pixels, dtype=torch.long),
        "index_sv_w2a": torch.zeros(pixels, anchors, dtype=torch.long),
        "mask_w": torch.zeros((size // window) ** 2, window**2, window**2),
        "mask_sv_a2w": torch.zeros(1, anchors, pixels),
    }


def test_sizes_are_read_from_tables(tmp_path, small):
    state = {**small.state_dict(), **tables(6, (8, 12), 2, 36)}
    torch.save({"params": state}, tmp_path / "grl.pth")
    network = open_network(tmp_path / "grl.pth")
    found = network.spec.hyperparameters
    assert (found["window_size"], found["stripe_size"], found["img_size"]) == (6, (8, 12), 36)
    assert found["anchor_window_down_factor"] == 2
    assert network.spec.train_size == 36


@pytest.mark.parametrize(
    ("prefix", "others"),
    [("", {}), ("model.", {}), ("model_g.", {"model_d.conv0.weight": torch.ones(4, 3, 3, 3)})],
)
@pytest.mark.parametrize("nested", [True, False])
def test_published_nestings_open(tmp_path, small, nested, prefix, others):
    weights = {**small.state_dict(), **tables(8, (8, 16), 4, 32)}
    state = {f"{prefix}{name}": value for name, value in weights.items()} | others
    if prefix:
        state |= {"current_val_metric": torch.zeros(2), "best_iter": torch.zeros(2).long()}
    content = {"state_dict": state, "epoch": 3, "hyper_parameters": {}} if nested else state
    torch.save(content, tmp_path / "last.ckpt")
    network = open_network(tmp_path / "last.ckpt")
    assert isinstance(network.module, GRL)
    picture = torch.rand(1, 3, 16, 24)
    with torch.no_grad():
        assert torch.equal(network.module(picture), small(picture))


# What it computes -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (5, 3), (37, 53), (16, 50)])
@pytest.mark.parametrize("options", [{}, FRACTIONS, {"upscale": 3, "upsampler": "pixelshuffle"}])
def test_any_size_is_restored(size, options):
    network = randomised(GRL(**{**SMALL, **options}))
    scale = options.get("upscale", 1)
    with torch.no_grad():
        output = network(torch.rand(2, 3, *size))
    assert output.shape == (2, 3, *(scale * n for n in size))
    assert output.isfinite().all()


@settings(deadline=None, max_examples=8)
@given(height=st.integers(1, 20), width=st.integers(1, 20))
def test_pictures_of_a_batch_do_not_meet(height, width):
    network = randomised(GRL(**SMALL))
    pictures = torch.rand(3, 3, height, width)
    with torch.no_grad():
        apart = torch.cat([network(picture) for picture in pictures.split(1)])
        torch.testing.assert_close(network(pictures), apart, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["avgpool", "maxpool"])
def test_anchors_pool_what_is_there(kind):
    torch.manual_seed(0)
    projection = AnchorProjection(6, kind, True, 4)
    x = torch.rand(1, 6, 9, 5)
    pool = torch.Tensor.mean if kind == "avgpool" else torch.Tensor.amax
    cells = [[pool(x[..., a : a + 4, b : b + 4], (2, 3)) for b in (0, 4)] for a in (0, 4, 8)]
    pooled = torch.stack([torch.stack(row, -1) for row in cells], -2)
    reduction = projection.body[0].reduction
    expected = F.linear(pooled.permute(0, 2, 3, 1), reduction.weight, reduction.bias)
    torch.testing.assert_close(projection(x), expected.permute(0, 3, 1, 2))


@pytest.mark.parametrize("one_stage", [True, False])
@pytest.mark.parametrize("kind", ["conv2d", "separable_conv", "patchmerging"])
def test_anchors_of_other_kinds_see_zeros_beyond_the_border(kind, one_stage):
    torch.manual_seed(0)
    down = 2 if kind == "patchmerging" and one_stage else 4
    projection = AnchorProjection(6, kind, one_stage, down)
    for part in projection.modules():  # a bias would be seen by the stages that follow
        if getattr(part, "bias", None) is not None:
            nn.init.zeros_(part.bias)
    x = torch.rand(1, 6, 9, 5)
    whole = F.pad(x, (0, -5 % down + down, 0, -9 % down + down))
    anchors = projection(x)
    assert anchors.shape == (1, 3, -(-9 // down), -(-5 // down))
    torch.testing.assert_close(
        projection(whole)[..., : anchors.shape[2], : anchors.shape[3]], anchors
    )


def test_channels_last_equals_contiguous(fractions):
    picture = torch.rand(2, 3, 33, 20)
    with torch.no_grad():
        expected = fractions(picture)
        fractions.to(memory_format=torch.channels_last)
        output = fractions(picture.contiguous(memory_format=torch.channels_last))
    assert output.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_lower_precision_is_as_good_as_its_rounding(fractions, dtype, tolerance):
    picture = torch.rand(1, 3, 24, 40, dtype=torch.float64)
    with torch.no_grad():
        exact = fractions.double()(picture)
        output = fractions.to(dtype)(picture.to(dtype))
    assert output.dtype == dtype
    assert (output.double() - exact).abs().max() < tolerance * exact.abs().max()


@pytest.mark.parametrize("local", [False, True])
def test_exports(local):
    network = randomised(GRL(**{**SMALL, **FRACTIONS, "depths": (1,), "local_connection": True}))
    picture = torch.rand(1, 3, 29, 18)
    if local:
        convert(network, Local(train_size=16, window=16))
    program = torch.export.export(network, (picture,))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(picture), network(picture))


def test_gradients_reach_every_parameter(fractions):
    fractions(torch.rand(1, 3, 20, 24)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in fractions.parameters())


# Positions --------------------------------------------------------------------------------------


def test_relative_positions_are_those_of_the_published_tables():
    positions = relative_positions((8, 12), (2, 3), torch.empty(0, dtype=torch.float64))
    assert positions.shape == (8 + 2 - 1, 12 + 3 - 1, 2)
    # queries 8 and keys 2, centred: from -1 - 3 to 7 - 3
    rows = torch.arange(-4, 5, dtype=torch.float64) * 8 / 4
    expected = rows.sign() * (rows.abs() + 1).log2() / 3
    torch.testing.assert_close(positions[:, 0, 0], expected)
    torch.testing.assert_close(positions[:, 5, 0], expected)
    assert positions[..., 1].diff(dim=1).min() > 0


def test_tables_are_kept_up_to_a_bound():
    kept = grl_attention._kept_relative_positions
    like = torch.empty(0)
    assert relative_positions((3, 4), (3, 4), like) is relative_positions((3, 4), (3, 4), like)
    other = relative_positions((3, 4), (3, 4), like.half())
    assert other.dtype == torch.float16
    for n in range(1, 2 * grl_attention.TABLES):
        relative_positions((n, 1), (1, 1), like)
    assert kept.cache_info().currsize <= grl_attention.TABLES


def test_tables_of_an_inference_pass_serve_training(small):
    grl_attention._kept_relative_positions.cache_clear()
    with torch.inference_mode():
        small(torch.rand(1, 3, 9, 10))
    small(torch.rand(1, 3, 9, 10)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in small.parameters())


def test_tables_of_a_fake_pass_do_not_last(small, monkeypatch):
    # which tries local forms on numbers, and those tables may last
    planning = importlib.import_module("fullres.local.plan")
    monkeypatch.setattr(planning, "disagreement", lambda *_: None)
    grl_attention._kept_relative_positions.cache_clear()
    network = randomised(GRL(**{**SMALL, **FRACTIONS, "depths": (1,)}))
    plan(network, Local(16))
    torch.export.export(network, (torch.rand(1, 3, 9, 10),))
    assert grl_attention._kept_relative_positions.cache_info().currsize == 0
    assert torch.isfinite(small(torch.rand(1, 3, 9, 10))).all()


def test_copies_and_pickles_compute_the_same(small):
    picture = torch.rand(1, 3, 13, 18)
    file = io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    copies = [
        copy.deepcopy(small),
        pickle.loads(pickle.dumps(small)),
        torch.load(file, weights_only=False),
    ]
    with torch.no_grad():
        for other in copies:
            assert torch.equal(other(picture), small(picture))


def test_threads_share_a_network(fractions):
    pictures = [torch.rand(1, 3, 8 + n, 30 - n) for n in range(12)]
    with torch.no_grad():
        expected = [fractions(picture) for picture in pictures]
        grl_attention._kept_relative_positions.cache_clear()
        with ThreadPoolExecutor(4) as pool:
            outputs = list(pool.map(torch.no_grad()(fractions), pictures))
    for output, wanted in zip(outputs, expected, strict=True):
        assert torch.equal(output, wanted)


# Local ------------------------------------------------------------------------------------------


def test_what_becomes_local(small, fractions):
    planned = plan(fractions, Local(train_size=32))
    assert [op.name for op in planned.converted] == [
        f"layers.0.blocks.{n}.{part}"
        for n in range(4)
        for part in ("attn.stripe_attn", "conv.cab.3.attention.0")
    ]
    assert not planned.kept
    assert not plan(small, Local(train_size=32)).operations


@torch.no_grad()
def test_local_stripes_keep_their_length_at_the_training_size(fractions):
    fractions.double()
    picture = torch.rand(2, 3, 32, 64, dtype=torch.float64)
    square = picture[..., :32]
    expected, globally = fractions(square), fractions(picture)
    with convert(fractions, Local(train_size=32)):
        assert "stripe=8×8" in repr(fractions.layers[0].blocks[0].attn.stripe_attn)
        torch.testing.assert_close(fractions(square), expected)
        assert not torch.allclose(fractions(picture), globally)
        assert fractions(torch.rand(1, 3, 41, 7).double()).shape == (1, 3, 41, 7)
        with pytest.raises(ConversionError, match="local already"):
            convert(fractions, Local(train_size=32))
    assert "stripe=8×1/4" in repr(fractions)
    assert torch.equal(fractions(picture), globally)


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 40), (31, 18)])
def test_local_agrees_with_global_at_any_training_size(height, width):
    network = randomised(GRL(**{**SMALL, **FRACTIONS, "depths": (3,)})).double()
    picture = torch.rand(1, 3, height, width, dtype=torch.float64)
    expected = network(picture)
    with convert(network, Local((height, width))):
        torch.testing.assert_close(network(picture), expected)


@torch.no_grad()
def test_local_stripes_are_those_of_a_network_with_fixed_stripes():
    options = {**SMALL, "stripe_size": (None, None), "stripe_groups": (2, 4)}
    network = randomised(GRL(**options)).double()
    fixed = GRL(**{**SMALL, "stripe_size": (16, 8)}).double()
    fixed.load_state_dict(network.state_dict())
    picture = torch.rand(1, 3, 50, 37, dtype=torch.float64)
    with convert(network, Local(train_size=32)):
        torch.testing.assert_close(network(picture), fixed(picture))


def test_the_local_form_shares_parameters(fractions):
    attention = fractions.layers[0].blocks[1].attn.stripe_attn
    local = attention.to_local((48, 48), feature_size=(32, 30))
    assert [axis.length for axis in local.axes] == [8, 8]
    assert attention.axes[0].length is None
    assert list(local.state_dict()) == list(attention.state_dict())
    assert all(a is b for a, b in zip(local.parameters(), attention.parameters(), strict=True))


def test_a_published_name_settles_what_shapes_do_not(tmp_path):
    options = {"depths": [1], "num_heads_window": [2], "num_heads_stripe": [2], "embed_dim": 24}
    state = create_network("grl", **options).module.state_dict()
    for name, window in (("jpeg_grl_small_c3q40", 36), ("mine", 32)):
        torch.save({"state_dict": {f"model_g.{n}": x for n, x in state.items()}}, tmp_path / name)
        opened = open_network(tmp_path / name)
        assert opened.spec.hyperparameters["window_size"] == window, name
