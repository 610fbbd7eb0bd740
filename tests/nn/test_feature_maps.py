"""Linear attention with feature maps equals its quadratic form, and its features estimate what they should."""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_attention.nn import (
    LRPE,
    CosFormerFeatures,
    EluFeatures,
    FeatureMap,
    LearnedPositions,
    NormalizedLinearAttention,
    PositiveRandomFeatures,
    RandomFourierFeatures,
)
from lightning_attention.nn.feature_maps import RandomFeatures, default_positive_features

H, D = 3, 8
MAPS = {
    "elu": lambda: EluFeatures(D),
    "cosformer": lambda: CosFormerFeatures(D, max_positions=200),
    "rfa": lambda: RandomFourierFeatures(H, D),
    "performer": lambda: PositiveRandomFeatures(D),
}
BY_NAME = pytest.mark.parametrize("name", MAPS)


def make_layer(name: str, dtype: torch.dtype = torch.float64) -> NormalizedLinearAttention:
    torch.manual_seed(0)
    layer = NormalizedLinearAttention(H * D, H, MAPS[name]()).to(dtype)
    for parameter in layer.parameters():  # also those that `to` leaves in float32
        parameter.data = (parameter + 0.3 * torch.randn_like(parameter)).to(dtype)
    return layer


def quadratic(layer: NormalizedLinearAttention, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Output of one sequence `[1, T, W]` by all pairs of tokens, and the denominators `[1, H, T]`."""
    q, k, v, u = layer.qkvu_proj(x).chunk(4, dim=-1)
    q, k, v = (y.unflatten(-1, (H, D)) for y in (q, k, v))
    q, k = layer.feature_map(q, positions, is_query=True), layer.feature_map(k, positions, is_query=False)
    scores = torch.einsum("bihf,bjhf->bhij", q, k).tril()
    sums = scores.sum(dim=-1)
    o = torch.einsum("bhij,bjhd->bihd", scores / sums.clamp_min(layer.feature_map.eps)[..., None], v)
    return layer.out_proj(layer.norm(o.flatten(-2)) * u), sums


@BY_NAME
@pytest.mark.parametrize("lengths", [[150], [40, 0, 1, 70]], ids=str)
def test_output_and_gradients_equal_the_quadratic_form(name, lengths):
    """Packed sequences, of which one is empty, equal separate ones."""
    layer, bounds = make_layer(name), torch.tensor([0, *lengths]).cumsum(0)
    x = torch.randn(1, sum(lengths), H * D, dtype=torch.float64)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    y, _ = layer(x, positions, cu_seqlens=bounds if len(lengths) > 1 else None)
    parts = [quadratic(layer, x[:, a:b], positions[:, a:b])[0] for a, b in pairwise(bounds.tolist())]
    expected = torch.cat(parts, dim=1)
    weight, parameters = torch.randn_like(y), list(layer.parameters())
    gradients = [torch.autograd.grad((z * weight).sum(), parameters) for z in (y, expected)]
    for found, exact in zip((y, *gradients[0]), (expected, *gradients[1]), strict=True):
        assert (found - exact).norm() < 1e-11 * exact.norm()


@BY_NAME
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("lengths", [[100, 20], [90, *[1] * 30]], ids=["calls", "steps"])
def test_calls_with_a_state_equal_one(name, lengths, grad):
    layer, x, positions = make_layer(name), torch.randn(2, 120, H * D, dtype=torch.float64), torch.arange(120)[None]
    state, parts = torch.zeros(2, H, layer.feature_map.num_features, D + 1, dtype=torch.float64), []
    with torch.set_grad_enabled(grad):
        for at in torch.arange(120).split(lengths):
            y, state = layer(x[:, at], positions[:, at], state=state)
            parts.append(y)
        expected, no_state = layer(x, positions)
    assert no_state is None
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "some_are_small"), [("elu", False), ("performer", False), ("rfa", True)])
def test_denominators_below_eps_are_raised_to_it(name, some_are_small):
    """Positive features have none; those of RFA, which may be negative, are raised to eps."""
    layer, T = make_layer(name), 400
    x, positions = torch.randn(1, T, H * D, dtype=torch.float64), torch.arange(T)[None]
    expected, sums = quadratic(layer, x, positions)
    assert (sums <= layer.feature_map.eps).any() == some_are_small
    torch.testing.assert_close(layer(x, positions)[0], expected, rtol=1e-9, atol=1e-9)


@BY_NAME
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("is_cast", [True, False], ids=["cast", "autocast"])
def test_16_bits_are_accurate_over_thousands_of_tokens(name, dtype, is_cast):
    """Denominators exceed the range of float16."""
    layer, T = make_layer(name, torch.float32), 3000
    if name == "cosformer":
        layer.feature_map = CosFormerFeatures(D, max_positions=T)
    x, positions = 30 * torch.randn(1, T, H * D), torch.arange(T)[None]
    expected, sums = quadratic(layer.double(), x.double(), positions)
    assert sums.max() > 65504 or name not in ("elu", "cosformer")
    layer = layer.to(dtype) if is_cast else layer.float()
    with torch.autocast("cpu", dtype, enabled=not is_cast):
        y, _ = layer(x.to(dtype) if is_cast else x, positions)
    assert y.dtype == dtype
    assert (y - expected).norm() < (0.1 if name in ("rfa", "performer") else 0.04) * expected.norm()


def scores(feature_map: FeatureMap, q: Tensor, k: Tensor) -> Tensor:
    """`φ(q)ᵀ φ(k)` `[B, H, T, T]`, over its sum for each query."""
    positions = torch.arange(q.shape[1])[None]
    products = torch.einsum(
        "bihf,bjhf->bhij", feature_map(q, positions, is_query=True), feature_map(k, positions, is_query=False)
    )
    return products / products.sum(dim=-1, keepdim=True)


def test_positive_features_estimate_softmax():
    q, k = 0.5 * torch.randn(2, 1, 20, 2, D, dtype=torch.float64)
    exact = (torch.einsum("bihd,bjhd->bhij", q, k) / D**0.5).softmax(dim=-1)
    errors = [(scores(PositiveRandomFeatures(D, count), q, k) - exact).norm() / exact.norm() for count in (64, 16384)]
    assert errors[1] < 0.1 < errors[0]


def test_fourier_features_estimate_softmax_of_normalised_vectors():
    q, k = torch.randn(2, 1, 20, 2, D, dtype=torch.float64)
    directions = [x / x.norm(dim=-1, keepdim=True) for x in (q, k)]
    exact = torch.einsum("bihd,bjhd->bhij", *directions).softmax(dim=-1)
    errors = [(scores(RandomFourierFeatures(2, D, count), q, k) - exact).norm() / exact.norm() for count in (64, 32768)]
    assert errors[1] < 0.03 < errors[0]


def test_cosformer_weighs_products_by_distance():
    M, T = 64, 60
    q, k = torch.randn(2, 1, T, 2, D, dtype=torch.float64)
    positions = torch.arange(T)[None]
    f = CosFormerFeatures(D, M)
    found = torch.einsum("bihf,bjhf->bhij", f(q, positions, is_query=True), f(k, positions, is_query=False))
    distance = (positions.T - positions).double()
    expected = torch.einsum("bihd,bjhd->bhij", q.relu(), k.relu()) * torch.cos(math.pi / 2 * distance / M)
    torch.testing.assert_close(found, expected)
    assert (torch.cos(math.pi / 2 * distance / M) > 0).all()


def test_directions_are_orthogonal_within_blocks():
    directions = PositiveRandomFeatures(D, 3 * D - 2).directions
    for block in directions.split(D):
        products = block @ block.T
        torch.testing.assert_close(products, products.diagonal().diag(), rtol=0, atol=1e-4)
    lengths = PositiveRandomFeatures(D, 4096).directions.norm(dim=-1)
    assert lengths.square().mean().item() == pytest.approx(D, rel=0.05)
    assert lengths.std() > 0.5


@pytest.mark.parametrize(
    "make", [lambda s: RandomFourierFeatures(H, D, seed=s), lambda s: PositiveRandomFeatures(D, seed=s)]
)
def test_directions_depend_on_the_seed_alone(make):
    first: RandomFeatures = make(3)
    torch.manual_seed(123)
    assert torch.equal(first.directions, make(3).directions)
    assert not torch.equal(first.directions, make(4).directions)
    assert torch.equal(first.directions, first.draw())
    with torch.device("meta"):
        assert make(3).directions.is_meta
    assert first.bfloat16().directions.dtype == torch.float32
    assert "directions" in first.state_dict()


@pytest.mark.parametrize("head_dim", [1, 2, 64, 128, 1000])
def test_default_features_fit_the_kernels(head_dim):
    assert default_positive_features(head_dim) in range(16, 257, 16)


def apply_to(module: Any, positions: Tensor) -> Tensor:
    if isinstance(module, LearnedPositions):
        return module(positions)
    return module(torch.ones(1, positions.shape[1], 2, D), positions, is_query=True)


@pytest.mark.parametrize("module", [LearnedPositions(10, 4), CosFormerFeatures(D, 10)], ids=["learned", "cosformer"])
@pytest.mark.parametrize("wrong", [-1, 10, 10**9])
def test_positions_out_of_range(module, wrong):
    """They raise where values are at hand, and are NaN in a graph."""
    positions = torch.tensor([[0, wrong, 9]])
    with pytest.raises(ValueError, match=rf"positions must be in \[0, 10\), got {wrong}"):
        apply_to(module, positions)
    found = torch.compile(apply_to, backend="aot_eager")(module, positions)
    assert found.flatten(2).isnan().all(dim=2).tolist() == [[False, True, False]]
    assert not found[:, [0, 2]].isnan().any()


POSITIONED: dict[str, Callable[[Tensor], Tensor]] = {
    "learned": partial(apply_to, LearnedPositions(1024, 4)),
    "cosformer": partial(apply_to, CosFormerFeatures(D, 1024)),
    "lrpe": lambda positions: LRPE(2, D)(torch.ones(1, positions.shape[1], 2, D), positions),
}
BY_POSITIONED = pytest.mark.parametrize("apply", POSITIONED.values(), ids=POSITIONED)


@BY_POSITIONED
@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.uint64], ids=str
)
def test_positions_may_be_any_integers(apply, dtype):
    positions = torch.tensor([[0, 1, 127]])
    assert torch.equal(apply(positions.to(dtype)), apply(positions))


@BY_POSITIONED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool], ids=str)
def test_positions_that_are_not_integers_are_refused(apply, dtype):
    with pytest.raises(TypeError, match=f"positions must be integers, got {dtype}"):
        apply(torch.zeros(1, 3, dtype=dtype))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: EluFeatures(0), ValueError, "head_dim must be at least 1"),
        (lambda: CosFormerFeatures(8, 1.5), TypeError, "max_positions must be an integer"),  # pyright: ignore[reportArgumentType]
        (lambda: RandomFourierFeatures(2, 8, 7), ValueError, "num_features must be even"),
        (lambda: PositiveRandomFeatures(8, 0), ValueError, "num_features must be at least 1"),
        (lambda: LearnedPositions(0, 8), ValueError, "max_positions must be at least 1"),
        (lambda: NormalizedLinearAttention(10, 3, EluFeatures(3)), ValueError, "hidden_size must be a multiple"),
    ],
)
def test_bad_sizes_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
