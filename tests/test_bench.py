"""What is measured is right; how fast things are is for the benchmarks to say."""

from __future__ import annotations

import json
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch

from fullres import Local, convert, create_network, networks
from fullres.bench import Cost, Left, as_picture_network, bench, picture, row
from fullres.cli import main
from fullres.errors import FullresError
from fullres.measure import interleaved, machine, median_ratio, peak_memory_of, table

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

SMALL = {
    "nafnet": {"width": 8, "enc_blk_nums": [1, 1], "dec_blk_nums": [1, 1]},
    "restormer": {"dim": 8, "num_blocks": [1] * 4, "heads": [1, 2, 2, 4]},
    "restormer-biasfree": {
        "dim": 8,
        "num_blocks": [1] * 4,
        "heads": [1, 2, 2, 4],
        "LayerNorm_type": "BiasFree",
    },
    "hinet": {"wf": 8, "depth": 3, "hin_position_right": 2},
    "mprnet": {"n_feat": 8, "scale_unetfeats": 4, "scale_orsnetfeats": 4, "num_cab": 2},
    "ffanet": {"gps": 2, "blocks": 2, "dim": 16},
    "rnn_mbp": {"n_features": 8},
    "spdnet": {"n_feats": 32, "n_resblocks": 1},
    "unet-se": {"depth": 3, "attention": "se"},
    "unet-ge": {"depth": 3, "attention": "ge"},
    "unet-cbam": {"depth": 3, "attention": "cbam"},
    "unet-in": {"depth": 3, "norm": "in"},
    "unet-gn": {"depth": 3, "norm": "gn"},
    "grl": {
        "embed_dim": 36,
        "depths": [4],
        "num_heads_window": [3],
        "num_heads_stripe": [3],
        "window_size": 8,
        "stripe_size": [8, 16],
    },
    "panet": {"n_resblocks": 2, "n_feats": 8},
    "pa_edsr": {"n_resblocks": 2, "n_feats": 8, "pyramid_channel": 8, "pyramid_reduction": 2},
}
NO_LOCAL_FORM = {"panet", "pa_edsr"}
"""Networks to which the paper does not apply its conversion."""

PARTS_ONLY = {"rnn_mbp", "spdnet"}
"""Networks whose parts alone have plain forms."""

LOCAL = Local(train_size=32, window=12)


@pytest.fixture
def benchmarks(monkeypatch):
    """Makes what lies in benchmarks/ importable."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def small(benchmarks):
    """Makes a small network of a case, in which every weight counts."""
    from cases import draw_weights

    def make(name):
        network = as_picture_network(create_network(name.split("-")[0], **SMALL[name]))
        draw_weights(network)
        return network

    return make


def size_of(name):
    """Height and width that windows and stripes of GRL tile; others take any."""
    return (48, 64) if name == "grl" else (46, 58)


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_plain_forms_compute_what_the_networks_compute(small, name):
    from plain import plain

    network = small(name)
    x = picture(network.spec, size_of(name)) * network.spec.value_range
    expected = network.module(x)
    module = plain(network)
    assert all(p.is_contiguous() for p in module.parameters())
    assert type(network.module) is not type(module) or name in PARTS_ONLY
    assert (module(x) - expected).abs().max() < 1e-5 * network.spec.value_range
    # and the weights matter: a last convolution of nothing would hide any mistake before it
    assert (expected - x).square().mean() > 0.05**2 if expected.shape == x.shape else True


@pytest.mark.parametrize("name", sorted(SMALL.keys() - NO_LOCAL_FORM))
@torch.no_grad()
def test_plain_local_forms_compute_what_conversion_computes(small, name):
    from plain import plain_local

    network = small(name)
    # darker to the left, so that windows differ
    x = picture(network.spec, size_of(name)) * torch.linspace(0.05, 1, size_of(name)[1])
    as_it_is = network.module(x)
    module = plain_local(network, LOCAL)
    with convert(network.module, LOCAL):
        expected = network.module(x)
    assert (expected - as_it_is).abs().max() > 1e-4
    assert (module(x) - expected).abs().max() < 5e-6


@pytest.mark.parametrize("name", sorted(NO_LOCAL_FORM))
def test_what_the_paper_has_no_local_form_of_is_refused(small, name):
    from plain import NoLocalForm, plain_local

    with pytest.raises(NoLocalForm, match="no local form"):
        plain_local(small(name), LOCAL)


def test_every_case_is_a_network_of_ours(benchmarks):
    from cases import CASES, cases

    known = set(networks())
    assert {architecture for architecture, _ in CASES.values()} >= known
    assert {name.split("-")[0] for name in SMALL} == {CASES[case][0] for case in cases()}
    assert set(cases()) == {case for case, (name, _) in CASES.items() if name in known}


def test_weights_of_benchmarks_change_a_picture_a_little(small):
    network = small("hinet")
    x = picture(network.spec, (64, 64))
    with torch.no_grad():
        change = network.module(x) - x
    assert change.square().mean().sqrt() == pytest.approx(0.1, rel=1e-3)


def test_a_video_network_restores_a_picture_as_a_still_video():
    network = create_network("rnn_mbp", n_features=4)
    as_pictures = as_picture_network(network)
    assert as_pictures.spec.frames_lost is None
    x = picture(as_pictures.spec, (9, 14))
    with torch.no_grad():
        expected = network.module(x[:, None].repeat(1, 5, 1, 1, 1))[:, 0]
        assert torch.equal(as_pictures.module(x), expected)
    still = create_network("nafnet", width=4, enc_blk_nums=[1], dec_blk_nums=[1])
    assert as_picture_network(still) is still


def test_turns_change_their_order_and_count_no_first_call():
    made = []
    times = interleaved(
        {name: lambda name=name: made.append(name) for name in ("a", "b")}, repeats=3
    )
    assert "".join(made) == "ab" + "ab" + "ba" + "ab"
    assert {name: len(taken) for name, taken in times.items()} == {"a": 3, "b": 3}


def test_ratios_are_taken_within_turns():
    times = interleaved({"long": lambda: time.sleep(0.05), "short": lambda: time.sleep(0.01)}, 3)
    assert 1.5 < median_ratio(times, "long", "short") < 6
    # a slow turn slows both
    assert median_ratio({"a": [2.0, 40.0, 2.0], "b": [1.0, 20.0, 1.0]}, "a", "b") == 2


@pytest.fixture
def makes(tmp_path, monkeypatch):
    """A module of passes that can be imported from other processes."""
    (tmp_path / "passes_for_memory.py").write_text(
        """
from contextlib import contextmanager
import os
import torch
from fullres.errors import ImageError

@contextmanager
def floats(number):
    def run(size):
        x = torch.ones(number, *size)  # filled, so that the pages are taken
        return x.sum()
    yield run

@contextmanager
def error():
    def run(size):
        raise ImageError("photo.jpg: no such picture")
    yield run

@contextmanager
def killed():
    yield lambda size: os._exit(9)
"""
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import passes_for_memory

    yield passes_for_memory
    sys.modules.pop("passes_for_memory")


def test_peak_memory_is_what_a_pass_takes(makes):
    size = (1000, 1000)
    assert peak_memory_of(makes.floats, 50, size=size) == pytest.approx(200e6, rel=0.1)


def test_a_pass_that_fails_says_why(makes):
    with pytest.raises(FullresError, match=r"photo\.jpg: no such picture"):
        peak_memory_of(makes.error, size=(8, 8))
    with pytest.raises(FullresError, match="smaller --size"):
        peak_memory_of(makes.killed, size=(8, 8))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Saves a small random network as fullres does; gives the checkpoint's path."""
    from safetensors.torch import save_file

    def save(name, **hyperparameters):
        net = create_network(name, **hyperparameters)
        path = tmp_path_factory.mktemp("weights") / f"{name}.safetensors"
        metadata = {"network": name, "hyperparameters": json.dumps(hyperparameters)}
        save_file(net.module.state_dict(), path, metadata | {"train_size": "32"})
        return str(path)

    return save


@pytest.fixture(scope="module")
def weights(saved):
    return saved("nafnet", width=4, enc_blk_nums=[1, 1], dec_blk_nums=[1, 1])


@pytest.fixture
def peak_known(monkeypatch):
    """Spares the process that measures memory."""
    monkeypatch.setattr("fullres.bench.peak_memory_of", lambda *_, size: 2 * 10**9)


def test_networks_are_measured_and_faults_reported(weights):
    cost, fault = bench([weights, "nosuch"], 160, repeats=1)
    assert isinstance(cost, Cost)
    assert cost.name == weights
    assert cost.size == (160, 160)
    assert cost.seconds > 0
    assert cost.overhead is not None
    assert 0.1 < cost.overhead < 10
    assert cost.megapixels_a_second == pytest.approx(0.0256 / cost.seconds)
    assert 160 * 160 * 4 * 3 < cost.peak < 500e6
    assert fault == Left("nosuch", fault.reason)
    assert "bundled" in fault.reason


def test_a_picture_too_large_for_memory_is_not_tried(monkeypatch, weights):
    monkeypatch.setattr("fullres.bench.free_memory", lambda device: 1000)
    (left,) = bench([weights], 64, repeats=1)
    assert isinstance(left, Left)
    assert "smaller --size" in left.reason


@pytest.mark.usefixtures("peak_known")
def test_networks_that_nobody_named_are_left_out_where_slow(monkeypatch, weights):
    monkeypatch.setattr("fullres.bench.bundled", lambda: (weights,))
    monkeypatch.setattr("fullres.bench.networks", dict)
    (cost,) = bench(size=64, repeats=1)
    assert isinstance(cost, Cost)
    monkeypatch.setattr("fullres.bench.PATIENCE", 0.0)
    (left,) = bench(size=64, repeats=1)
    assert isinstance(left, Left)
    assert "name it" in left.reason
    (cost,) = bench([weights], size=64, repeats=1)
    assert isinstance(cost, Cost)


@pytest.mark.usefixtures("peak_known")
def test_a_network_without_global_operations_has_no_overhead(saved):
    (cost,) = bench([saved("unet", width=4, depth=2)], (20, 30), repeats=1)
    assert isinstance(cost, Cost)
    assert cost.overhead is None
    assert row(cost)[4:] == ("—", "2.00 GB")


@pytest.mark.usefixtures("peak_known")
@pytest.mark.parametrize("style", [[], ["--markdown"]])
def test_the_command_prints_machine_and_table(monkeypatch, capfd, weights, style):
    arguments = ["fullres", "bench", weights, "--size", "64x96", "--repeats", "1", *style]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    printed = capfd.readouterr().out
    assert machine("cpu") in printed
    assert "64 × 96" in printed
    assert ("| network | picture |" in printed) == bool(style)


def test_the_command_says_what_it_could_not_measure(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["fullres", "bench", "nosuch"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    assert "nosuch: " in capfd.readouterr().err


def test_the_machine_is_described():
    assert f"torch {torch.__version__}" in machine("cpu")
    assert f"{torch.get_num_threads()} thread" in machine("cpu")


def test_a_table_appears_line_by_line():
    lines = table(["a", "b"], (pytest.fail("read ahead") for _ in range(1)))
    assert [next(lines), next(lines)] == ["| a | b |", "|---|---|"]


@pytest.mark.parametrize("script", ["networks", "overhead"])
def test_benchmarks_print_a_row_for_each_case(monkeypatch, capsys, small, script):
    import cases

    monkeypatch.setattr(cases, "network", small)
    module = import_module(script)
    if script == "networks":
        monkeypatch.setattr(module, "peak_rate", lambda: 1e9)
    arguments = [script, "unet-se", "--size", "32x48", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--threads", str(torch.get_num_threads())])
    module.main()
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("| unet-se | 32 × 48 |")
    assert len(last.split("|")) == len(module.HEADER) + 2
