import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fullres.ops.box import local_mean, local_mean_reference
from fullres.ops.frames import Frame
from fullres.ops.gate import LARGE, Layer, attended, gated

ACTIVATIONS = (None, "relu", "sigmoid")


def wide(layer):
    weight, bias = (t if t is None else t.double() for t in (layer.weight, layer.bias))
    return Layer(weight, bias, layer.activation)


def expected(x, inner, layers, frame, plus=None):
    """In float64, every position by itself."""
    gate = inner.double()
    for layer in map(wide, layers):
        gate = layer(gate)
    product = x.double() * frame.extended(gate)
    return product if plus is None else product + plus.double()


@st.composite
def heads(draw):
    channels = draw(st.sampled_from([16, 32, 48, 20, 3]))
    pooled = draw(st.integers(1, 40))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    layers, last = [], pooled
    for after in [*draw(st.lists(st.integers(1, 40), max_size=2)), channels]:
        bias = torch.randn(after) if draw(st.booleans()) else None
        layers.append(Layer(torch.randn(after, last) / last**0.5, bias))
        activation = draw(st.sampled_from(ACTIVATIONS))
        if activation:
            layers.append(Layer(activation=activation))
        last = after
    return channels, pooled, layers


@given(
    heads(),
    st.tuples(st.integers(1, 40), st.integers(1, 90)),
    st.tuples(st.integers(1, 50), st.integers(1, 90)),
    st.integers(1, 2),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, torch.channels_last, torch.contiguous_format]),
)
@settings(max_examples=100, deadline=None)
def test_it_is_the_product_with_the_layers_at_every_position(
    head, size, window, batch, in_place, pixels, added
):
    channels, pooled, layers = head
    kind = torch.channels_last if pixels else torch.contiguous_format
    frame = Frame.of(size, window)
    x = torch.randn(batch, channels, *size).contiguous(memory_format=kind)
    inner = torch.randn(batch, pooled, *frame.windows).contiguous(memory_format=kind)
    plus = None if added is None else torch.randn_like(x).contiguous(memory_format=added)
    wanted = expected(x, inner, layers, frame, plus)
    with torch.no_grad():
        found = gated(x, inner, layers, frame, plus=plus, in_place=in_place)
    assert (found is x) == in_place
    assert found.stride() == x.stride()
    assert (found - wanted).abs().max() <= 1e-5 * (1 + wanted.abs().max())


@pytest.mark.parametrize("added", [False, True])
def test_bfloat16_is_rounded_once(added):
    frame = Frame.of((30, 50), (9, 11))
    x = torch.randn(1, 32, 30, 50).bfloat16().contiguous(memory_format=torch.channels_last)
    inner = torch.randn(1, 8, *frame.windows).bfloat16()
    inner = inner.contiguous(memory_format=torch.channels_last)
    layers = [Layer(torch.randn(32, 8).bfloat16()), Layer(activation="sigmoid")]
    plus = torch.randn_like(x) if added else None
    with torch.no_grad():
        found = gated(x, inner, layers, frame, plus=plus)
    wanted = expected(x, inner, layers, frame, plus)
    assert found.dtype == torch.bfloat16
    # where product and sum cancel, float32's own roundings of both are left
    terms = x.abs() + (0 if plus is None else plus.abs())
    assert ((found - wanted).abs() <= 2**-8 * wanted.abs() + 2**-22 * terms).all()


def test_types_meet_as_in_any_product():
    frame = Frame.of((9, 20), (4, 5))
    x = torch.randn(1, 16, 9, 20).bfloat16().contiguous(memory_format=torch.channels_last)
    inner = torch.randn(1, 16, *frame.windows).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        found = gated(x, inner, [Layer(activation="sigmoid")], frame)
    assert found.dtype == torch.float32
    assert torch.equal(found, x * frame.extended(inner.sigmoid()))


@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
def test_activations_of_any_value(activation):
    values = torch.tensor([0.0, -0.0, 1e-30, 1, -1, 20, -20, 80, -80, 87.5, -89, 1e4, -1e4, 3e38])
    special = torch.tensor([torch.inf, -torch.inf, torch.nan])
    values = torch.cat([values, -values, special, torch.linspace(-90, 90, 33)])
    inner = values.view(1, -1, 1, 1).contiguous(memory_format=torch.channels_last)
    assert values.numel() == 64
    frame = Frame.of((1, 1), (1, 1))
    x = torch.ones_like(inner)
    with torch.no_grad():
        found = gated(x, inner, [Layer(activation=activation)], frame).flatten().double()
    wanted = getattr(torch, activation)(values.double())
    assert torch.equal(found.isnan(), wanted.isnan())
    found, wanted = found.nan_to_num(-1), wanted.nan_to_num(-1)
    assert torch.equal(found.isinf(), wanted.isinf())
    finite = wanted.isfinite()
    assert ((found - wanted).abs()[finite] <= 3e-7 * wanted.abs()[finite] + 2e-38).all()


def test_large_layers_are_computed_by_themselves():
    frame = Frame.of((9, 20), (4, 5))
    channels = 16 * (int(LARGE**0.5) // 16 + 1)
    x = torch.randn(1, channels, 9, 20).contiguous(memory_format=torch.channels_last)
    inner = torch.randn(1, channels, *frame.windows).contiguous(memory_format=torch.channels_last)
    layers = [Layer(torch.randn(channels, channels) / 14), Layer(activation="sigmoid")]
    with torch.no_grad():
        found = gated(x, inner, layers, frame)
    assert (found - expected(x, inner, layers, frame)).abs().max() < 1e-5


@pytest.mark.parametrize("in_place", [False, True])
def test_derivatives_flow(in_place):
    frame = Frame.of((6, 7), (3, 3))
    x = torch.randn(1, 16, 6, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(16, 16, dtype=torch.float64, requires_grad=True)

    plus = torch.randn(1, 16, 6, 7, dtype=torch.float64, requires_grad=True)

    def head(x, weight, plus=None):
        inner = local_mean(x, (3, 3), replicate=False)
        layers = [Layer(weight), Layer(activation="sigmoid")]
        x = x.clone() if in_place else x
        return gated(x, inner, layers, frame, plus=plus, in_place=in_place)

    assert torch.autograd.gradcheck(head, (x, weight))
    assert torch.autograd.gradcheck(head, (x, weight, plus))


@given(
    st.sampled_from([16, 32, 48, 20]),
    st.integers(1, 24),
    st.tuples(st.integers(1, 70), st.integers(30, 130)),
    st.tuples(st.integers(1, 80), st.integers(1, 140)),
    st.integers(1, 3),
    st.integers(1, 5),
    st.booleans(),
    st.booleans(),
    st.sampled_from(ACTIVATIONS),
)
@settings(max_examples=100, deadline=None)
def test_attention_is_the_product_with_the_layers_of_the_means(
    channels, pooled, size, window, batch, threads, in_place, added, last
):
    squeeze = Layer(torch.randn(pooled, channels) / channels**0.5, torch.randn(pooled))
    layers = [Layer(activation="relu"), Layer(torch.randn(channels, pooled), None)]
    layers += [Layer(activation=last)] if last else []
    x = torch.randn(batch, channels, *size).contiguous(memory_format=torch.channels_last)
    plus = torch.randn_like(x) if added else None
    inner = wide(squeeze)(local_mean_reference(x.double(), window, replicate=False))
    wanted = expected(x, inner, layers, Frame.of(size, window), plus)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            found = attended(x, window, squeeze, layers, plus=plus, in_place=in_place)
    finally:
        torch.set_num_threads(before)
    assert (found is x) == in_place
    assert found.stride() == x.stride()
    assert (found - wanted).abs().max() <= 1e-5 * (1 + wanted.abs().max())
