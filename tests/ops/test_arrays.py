"""What operators of the library answer where torch does not tell them apart from plain tensors."""

import pytest
import torch
from torch.autograd import forward_ad

from fullres.ops.pyramid import pyramid_attention
from fullres.ops.stripes import anchored_attention, window_attention
from fullres.ops.windows import projected_attention, transposed_attention

ONE, BIAS = torch.ones(2), torch.zeros(2, 7, 9)
ATTENTION = {
    "channels": lambda x: transposed_attention(*x.chunk(3, 1), ONE, (5, 6)),
    "channels, projected": lambda x: projected_attention(
        lambda part: part.chunk(3, 1),
        x,
        ONE,
        torch.ones(24, 8, 1, 1),
        window=(16, 24),
        channels=24,
        halo=0,
    ),
    "pyramid": lambda x: pyramid_attention(x, [x], [x], scales=[1.0], window=(5, 6)),
    "windows": lambda x: window_attention(x, (4, 5), (2, 2), ONE, BIAS),
    "anchors": lambda x: anchored_attention(
        x, x[:, :8, ::2, ::2], 2, (4, 6), (2, 2), (ONE, ONE), (BIAS[:, :5, :8], BIAS[:, :5, :8])
    ),
}


@pytest.mark.filterwarnings("ignore:`torch.jit")  # which torch itself calls
@pytest.mark.parametrize("attention", ATTENTION.values(), ids=ATTENTION)
def test_forward_derivatives_are_refused_rather_than_zero(attention):
    x, towards = torch.rand(2, 1, 24, 24, 30)
    assert attention(x).isfinite().all()
    for recorded in (True, False):
        with torch.set_grad_enabled(recorded):
            with pytest.raises(NotImplementedError, match="reverse mode"):
                torch.func.jvp(attention, (x,), (towards,))
            with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="reverse mode"):
                attention(forward_ad.make_dual(x, towards))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # map by map
@pytest.mark.parametrize("attention", ATTENTION.values(), ids=ATTENTION)
@pytest.mark.parametrize("last", [False, True])
def test_torch_func_maps_attention(attention, last):
    x = torch.rand(2, 1, 24, 24, 30)
    x = x.movedim(2, -1).contiguous().movedim(-1, 2) if last else x
    with torch.no_grad():
        mapped = torch.vmap(attention)(x)
        torch.testing.assert_close(mapped, torch.stack([attention(y) for y in x]))
