"""RNN-MBP, plain: Zhu et al., AAAI 2022, section 3, on the blocks of MPRNet.

Neither sweep goes on beyond the last frame that it is needed for, as in our form.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fullres.networks.layers import pad_to_multiple
from fullres.networks.mprnet import Features
from fullres.networks.rnn_mbp import MULTIPLE, RNNMBP, ShallowCell
from plain import mprnet


def shallow_cell(self: ShallowCell, frame: Tensor) -> Tensor:
    return self.shallow_feat(frame)


def swept(
    encoder: nn.Module, decoder: nn.Module, shallow: Sequence[Tensor]
) -> list[tuple[Features, Features]]:
    states: list[tuple[Features, Features]] = []
    for x in shallow:
        encoded = encoder(x, states[-1] if states else None)
        states.append((encoded, decoder(encoded)))
    return states


def network(self: RNNMBP, video: Tensor) -> Tensor:
    height, width = video.shape[-2:]
    first, end = self.past_frames, video.shape[1] - self.future_frames
    frames = [pad_to_multiple(frame, MULTIPLE) for frame in video.unbind(1)]
    shallow = [self.shallow_cell(frame) for frame in frames]
    earlier = swept(self.forward_encoder, self.forward_decoder, shallow[:end])
    later = swept(self.backward_encoder, self.backward_decoder, shallow[first:][::-1])[::-1]
    restored = []
    for number in range(first, end):
        encoded, decoded = (
            tuple(a + b for a, b in zip(forward, backward, strict=True))
            for forward, backward in zip(earlier[number], later[number - first], strict=True)
        )
        x = self.recons(self.TFR(shallow[number], encoded, decoded))
        restored.append(x + frames[number])
    return torch.stack(restored, dim=1)[..., :height, :width]


FORMS = {**mprnet.PARTS, ShallowCell: shallow_cell, RNNMBP: network}
