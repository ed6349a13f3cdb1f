from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from fullres.local import Local, plan
from fullres.networks.catalog import create_network
from fullres.networks.rnn_mbp import ARCHITECTURE, RNNMBP, chunks, whole_video
from fullres.networks.spec import Network, Spec

SMALL = {"n_features": 8, "future_frames": 1, "past_frames": 1}


@pytest.fixture
def small() -> RNNMBP:
    torch.manual_seed(0)
    return RNNMBP(**SMALL).eval()


@settings(deadline=None, max_examples=8)
@given(width=st.integers(4, 100), lost=st.integers(0, 4))
def test_hyperparameters_are_read_back_from_names_and_shapes(width, lost):
    hyperparameters = {"n_features": width, "future_frames": lost, "past_frames": lost}
    with torch.device("meta"):
        state = RNNMBP(**hyperparameters).state_dict()
    assert ARCHITECTURE.hyperparameters(state) == hyperparameters


def test_each_part_has_one_activation(small):
    for name, part in small.named_children():
        expected = 0 if name in ("fusion", "recons") else 1
        assert sum(isinstance(module, nn.PReLU) for module in part.modules()) == expected
    assert sum(isinstance(module, nn.PReLU) for module in small.modules()) == 6


@settings(deadline=None, max_examples=6)
@given(
    st.integers(1, 13), st.integers(1, 13), st.integers(1, 3), st.integers(0, 2), st.integers(0, 2)
)
def test_any_size_and_number_of_frames(height, width, kept, past, future):
    network = RNNMBP(n_features=4, past_frames=past, future_frames=future)
    with torch.no_grad():
        output = network(torch.rand(2, past + kept + future, 3, height, width))
    assert output.shape == (2, kept, 3, height, width)


def test_frames_dropped_are_those_at_the_ends(small):
    network = RNNMBP(n_features=8, future_frames=2, past_frames=0).eval()
    weights = {n: w for n, w in small.state_dict().items() if not n.startswith("fusion")}
    network.load_state_dict(weights, strict=False)
    every = RNNMBP(n_features=8, future_frames=0, past_frames=0).eval()
    every.load_state_dict(
        {**weights, "fusion.weight": every.fusion.weight, "fusion.bias": every.fusion.bias}
    )
    video = torch.rand(1, 5, 3, 8, 8)
    with torch.no_grad():
        restored = every(video)
        torch.testing.assert_close(small(video), restored[:, 1:4])
        torch.testing.assert_close(network(video), restored[:, :3])


def test_every_frame_depends_on_all_frames(small):
    video = torch.rand(1, 5, 3, 16, 16)
    with torch.no_grad():
        before = small(video)
        for number in range(5):
            changed = video.clone()
            changed[:, number].uniform_()
            differs = (small(changed) != before).flatten(2).any(2)
            assert differs.all()


def test_frames_are_padded_by_reflection(small):
    video = torch.rand(1, 3, 3, 13, 18)
    rows = torch.tensor([*range(13), 11, 10, 9])
    columns = torch.tensor([*range(18), 16, 15])
    padded = video[..., rows, :][..., columns]
    with torch.no_grad():
        torch.testing.assert_close(small(video), small(padded)[..., :13, :18])


@pytest.mark.parametrize("frames", [1, 2])
def test_too_few_frames(small, frames):
    with pytest.raises(ValueError, match=f"{frames} frames is too short: 1 are lost at the start"):
        small(torch.rand(1, frames, 3, 8, 8))


def test_every_pooling_becomes_local():
    network = RNNMBP(n_features=4, future_frames=0, past_frames=0).eval()
    pools = sum(isinstance(part, nn.AdaptiveAvgPool2d) for part in network.modules())
    planned = plan(network, Local(16), torch.rand(1, 1, 3, 16, 16))
    assert (len(planned.converted), len(planned.kept)) == (pools, 0)


def test_spec():
    spec = create_network("rnn_mbp", n_features=4, past_frames=1).spec
    assert (spec.multiple, spec.scale, spec.train_size, spec.task) == (4, 1, 256, "deblur")
    assert spec.frames_lost == (1, 2)


@pytest.mark.parametrize(
    "hyperparameters", [{"n_features": 3}, {"future_frames": -1}, {"past_frames": -1}]
)
def test_impossible_hyperparameters(hyperparameters):
    with pytest.raises(ValueError, match="n_features must be at least 4"):
        RNNMBP(**hyperparameters)


# Whole videos ---------------------------------------------------------------------------------

LOST = st.tuples(st.integers(0, 3), st.integers(0, 3))


@given(st.integers(1, 90), LOST, st.integers(1, 30), st.integers(0, 6))
def test_runs_together_are_the_video(count, lost, length, overlap):
    assume(length > overlap + sum(lost))
    runs = chunks(count, lost, length, overlap)
    restored = [frames[lost[0] : len(frames) - lost[1]] for frames, _ in runs]
    kept = [frames[part] for frames, (_, part) in zip(restored, runs, strict=True)]
    assert [number for numbers in kept for number in numbers] == list(range(count))
    assert {len(frames) for frames, _ in runs} == {min(length, count + sum(lost))}
    assert all(kept)
    for one, other in pairwise(restored):
        assert len(set(one) & set(other)) >= overlap
    assert len(runs) == 1 or count + sum(lost) > length


@given(st.integers(1, 9), LOST)
def test_ends_are_extended_by_reflection(count, lost):
    [(frames, _)] = chunks(count, lost, length=20)
    assert (
        frames == np.pad(np.arange(count), lost, mode="reflect" if count > 1 else "edge").tolist()
    )


@pytest.mark.parametrize(("count", "length", "overlap"), [(0, 20, 4), (9, 8, 4), (9, 20, -1)])
def test_runs_that_cannot_be(count, length, overlap):
    with pytest.raises(ValueError, match="runs of"):
        chunks(count, (2, 2), length, overlap)


class Drops(nn.Module):
    """Gives the frames it gets, twice as large, but for two at the start and one at the end."""

    def forward(self, video):
        return video[:, 2:-1].repeat_interleave(2, -1).repeat_interleave(2, -2)


@pytest.mark.parametrize("count", [1, 2, 5, 23])
def test_whole_video_gives_each_frame_in_its_place(count):
    video = torch.rand(2, count, 3, 4, 5)
    network = Network(Drops(), Spec("drops", {}, 3, 3, scale=2, frames_lost=(2, 1)))
    restored = whole_video(network, video, length=9, overlap=2)
    assert restored[..., ::2, ::2].equal(video)


def test_whole_video_of_a_network_without_memory_does_not_depend_on_its_runs(small):
    with torch.no_grad():
        for name, weight in small.named_parameters():
            if ".skip_enc" in name or ".skip_dec" in name:
                weight.zero_()
        network = Network(small, ARCHITECTURE.spec(SMALL))
        video = torch.rand(1, 12, 3, 8, 8)
        expected = whole_video(network, video, length=14)
        restored = whole_video(network, video, length=5, overlap=1)
        torch.testing.assert_close(restored, expected)
        torch.testing.assert_close(small(video), expected[:, 1:-1])


def test_whole_video_is_for_video():
    with pytest.raises(ValueError, match="nafnet restores pictures, not video"):
        whole_video(create_network("nafnet", width=4), torch.rand(1, 3, 3, 8, 8))
