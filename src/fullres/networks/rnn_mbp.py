"""RNN-MBP: *Deep Recurrent Neural Network with Multi-scale Bi-directional Propagation for Video
Deblurring* (Zhu, Dong, Pan, Liang, Huang, Fu, Wang; AAAI 2022).

A recurrent U-Net runs through the frames forward in time and another one backward; each frame is
restored at full resolution from the sum of their features. The pooled means of the channel
attention blocks are its global operations; each spans one frame.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import islice, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fullres.networks.layers import Conv2d, pad_to_multiple
from fullres.networks.mprnet import CAB, Block, Decoder, Encoder, Features, ORSNet
from fullres.networks.spec import Architecture, Network, Spec, State

MULTIPLE = 4
"""Frames are halved twice."""


class ShallowCell(nn.Module):
    """First features of a frame: a convolution and a channel attention block."""

    def __init__(self, channels: int, block: Block) -> None:
        super().__init__()
        conv = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.shallow_feat = nn.Sequential(conv, block(channels))

    def forward(self, frame: Tensor) -> Tensor:
        x: Tensor = self.shallow_feat(frame)
        return x


class RNNMBP(nn.Module):
    """RNN-MBP (section 3): video (B, T, 3, H, W) with values in [0, 1], any H and W.

    Gives (B, T - past_frames - future_frames, 3, H, W): frames at both ends are not restored;
    `whole_video` loses none. A video with no frame left to restore is a ValueError.

    Args:
        n_features: channels at full resolution; each halving adds half as many.
        future_frames: frames dropped at the end.
        past_frames: frames dropped at the start.
    """

    def __init__(self, n_features: int = 90, future_frames: int = 2, past_frames: int = 2) -> None:
        super().__init__()
        if n_features < 4 or min(future_frames, past_frames) < 0:
            raise ValueError(
                "n_features must be at least 4, future_frames and past_frames not negative"
            )
        self.future_frames, self.past_frames = future_frames, past_frames
        width, step = n_features, n_features // 2
        self.shallow_cell = ShallowCell(width, _block())
        self.forward_encoder = Encoder(width, step, _block(), "skip", bias=False)
        self.forward_decoder = Decoder(width, step, _block())
        self.backward_encoder = Encoder(width, step, _block(), "skip", bias=False)
        self.backward_decoder = Decoder(width, step, _block())
        conv = partial(Conv2d, kernel_size=3, padding=1, bias=False)
        self.TFR = ORSNet(width, step, 0, 8, _block(), conv, bias=False)
        # used by nothing, but part of every checkpoint
        near = past_frames + 1 + future_frames
        self.fusion = nn.Conv2d(near * width, width, 3, padding=1)
        self.recons = nn.Conv2d(width, 3, 5, padding=2)

    def forward(self, video: Tensor) -> Tensor:
        count, (height, width) = video.shape[1], video.shape[-2:]
        first, end = self.past_frames, count - self.future_frames
        if first >= end:
            raise ValueError(
                f"a video of {count} frames is too short: {self.past_frames} are lost at the "
                f"start and {self.future_frames} at the end"
            )
        padded = pad_to_multiple(video.flatten(0, 1), MULTIPLE)
        frames = padded.reshape(*video.shape[:3], *padded.shape[-2:]).unbind(1)
        shallow = [self.shallow_cell(frame) for frame in frames]
        # neither sweep goes on beyond the last frame that it is needed for
        earlier = _swept(self.forward_encoder, self.forward_decoder, shallow[:end])
        later = _swept(self.backward_encoder, self.backward_decoder, reversed(shallow[first:]))
        waiting = list(islice(later, self.future_frames, None))
        restored = []
        for number, (encoded, decoded) in enumerate(islice(earlier, first, None), start=first):
            later_encoded, later_decoded = waiting.pop()
            features = _sum(encoded, later_encoded), _sum(decoded, later_decoded)
            x = self.recons(self.TFR(shallow[number], *features))
            restored.append(x + frames[number])
        return torch.stack(restored, dim=1)[..., :height, :width]


def _block() -> Block:
    """Makes blocks that share one activation, as those of each part of the network do."""
    act = nn.PReLU()
    return lambda channels: CAB(channels, kernel_size=3, reduction=4, bias=False, act=act)


def _swept(
    encoder: Encoder, decoder: Decoder, shallow: Iterable[Tensor]
) -> Iterator[tuple[Features, Features]]:
    """Features of frame after frame, to each of which those of the frame before are added."""
    before = None
    for x in shallow:
        encoded: Features = encoder(x, before)
        before = encoded, decoder(encoded)
        yield before


def _sum(a: Features, b: Features) -> list[Tensor]:
    return [x + y for x, y in zip(a, b, strict=True)]


def whole_video(network: Network, video: Tensor, length: int = 20, overlap: int = 4) -> Tensor:
    """Restore all frames of a video with a network that loses some at the ends of what it is given.

    Args:
        network: a video network, whose spec says how many frames it loses.
        video: (B, T, C, H, W), any number of frames.
        length: frames that the network is given at once.
        overlap: restored frames that neighbouring runs have in common; each gives half of them.

    Returns:
        (B, T, C, scale * H, scale * W).

    Raises:
        ValueError: the network takes no video, there is no frame, or `length` is too short.

    >>> from fullres.networks.catalog import create_network
    >>> network = create_network("rnn_mbp", n_features=4)
    >>> whole_video(network, torch.rand(1, 3, 3, 8, 8)).shape
    torch.Size([1, 3, 3, 8, 8])
    """
    if network.spec.frames_lost is None:
        raise ValueError(f"{network.spec.architecture} restores pictures, not video")
    runs = chunks(video.shape[1], network.spec.frames_lost, length, overlap)
    restored = [network.module(video[:, frames])[:, kept] for frames, kept in runs]
    return torch.cat(restored, dim=1)


def chunks(
    count: int, frames_lost: tuple[int, int], length: int = 20, overlap: int = 4
) -> list[tuple[list[int], slice]]:
    """Overlapping runs of a network through a video that together lose no frame.

    The ends are extended by reflection in time. All runs are equally long, so that those in the
    middle see as much of past and future as the others; a video short enough is one run.

    Args:
        count: frames of the video, at least 1.
        frames_lost: frames that the network drops at the start and at the end of a run.
        length: most frames of one run.
        overlap: restored frames, at least, that neighbouring runs have in common.

    Returns:
        For each run the numbers of the frames to give to the network, and which of the frames
        that it restores to keep; those of all runs, one after the other, are the video.

    Raises:
        ValueError: there is no frame, or a run is no longer than overlap and lost frames together.

    >>> chunks(4, frames_lost=(1, 2))
    [([1, 0, 1, 2, 3, 2, 1], slice(0, 4, None))]
    >>> chunks(6, frames_lost=(1, 1), length=6, overlap=2)
    [([1, 0, 1, 2, 3, 4], slice(0, 3, None)), ([1, 2, 3, 4, 5, 4], slice(1, 4, None))]
    """
    past, lost = frames_lost[0], sum(frames_lost)
    if count < 1 or overlap < 0 or length <= overlap + lost:
        raise ValueError(
            f"{count} frames in runs of {length} that overlap by {overlap}: there must be a frame, "
            f"and a run longer than the overlap and the {lost} frames lost"
        )
    given = min(length - lost, count)  # frames that each run restores
    runs = 1 + -(-(count - given) // (length - lost - overlap))
    starts = [i * (count - given) // max(runs - 1, 1) for i in range(runs)]
    cuts = [(a + given + b) // 2 for a, b in pairwise(starts)]
    found = []
    for start, begin, end in zip(starts, [0, *cuts], [*cuts, count], strict=True):
        numbers = range(start - past, start - past + given + lost)
        frames = [_reflected(number, count) for number in numbers]
        found.append((frames, slice(begin - start, end - start)))
    return found


def _reflected(number: int, count: int) -> int:
    period = max(2 * (count - 1), 1)
    return min(number % period, period - number % period)


def _hyperparameters(state: State) -> dict[str, Any] | None:
    fusion = state.get("fusion.weight")
    if fusion is None or fusion.ndim != 4 or "forward_encoder.skip_enc1.weight" not in state:
        return None
    width = fusion.shape[0]
    # only the sum of both leaves a trace; published networks drop as many at either end
    lost = fusion.shape[1] // max(width, 1) - 1
    return {"n_features": width, "future_frames": lost - lost // 2, "past_frames": lost // 2}


def _spec(hyperparameters: Mapping[str, Any]) -> Spec:
    return Spec(
        architecture="rnn_mbp",
        hyperparameters=hyperparameters,
        in_channels=3,
        out_channels=3,
        multiple=MULTIPLE,
        frames_lost=(hyperparameters["past_frames"], hyperparameters["future_frames"]),
    )


ARCHITECTURE = Architecture(
    name="rnn_mbp",
    title="RNN-MBP",
    paper="Deep Recurrent Neural Network with Multi-scale Bi-directional Propagation for Video "
    "Deblurring, AAAI 2022",
    authors="Chao Zhu, Hang Dong, Jinshan Pan, Boyang Liang, Yuhao Huang, Lean Fu, Fei Wang",
    weights="linked from the authors' page (cloud drive)",
    licence="none stated",
    tasks=("deblur",),
    train_size=256,
    build=RNNMBP,
    hyperparameters=_hyperparameters,
    spec=_spec,
)
