"""The layers by their formulas."""

import pytest
import torch

from lightning_attention import decay, lightning_attention
from lightning_attention.nn import LRPE, GatedLightningAttention, SimpleGLU, SimpleRMSNorm


def test_simple_rms_norm():
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    expected = x / (x.norm(dim=-1, keepdim=True) / 4)
    torch.testing.assert_close(SimpleRMSNorm(eps=0.0)(x), expected)
    assert list(SimpleRMSNorm().parameters()) == []
    assert SimpleRMSNorm()(torch.zeros(2, 4)).isfinite().all()


def test_simple_glu():
    glu, x = SimpleGLU(6, 10).double(), torch.randn(2, 3, 6, dtype=torch.float64)
    W_v, W_u = glu.vu_proj.weight.split(10)
    torch.testing.assert_close(glu(x), ((x @ W_v.T) * (x @ W_u.T)) @ glu.out_proj.weight.T)


def test_lrpe_products_depend_on_distance_alone():
    lrpe = LRPE(num_heads=2, head_dim=8)
    q, k = torch.randn(2, 1, 1, 2, 8).expand(2, 1, 40, 2, 8)
    t = torch.arange(40)[None]
    products = torch.einsum("bihd,bjhd->hij", lrpe(q, t + 1000), lrpe(k, t + 1000))
    torch.testing.assert_close(products[:, 1:, 1:], products[:, :-1, :-1], rtol=1e-3, atol=1e-3)
    distance = (t.T - t).double()
    expected = torch.einsum(
        "hd,hdij->hij", (q * k)[0, 0].double(), torch.cos(lrpe.theta.double()[..., None, None] * distance)
    )
    torch.testing.assert_close(products.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("t", [0, 4095, 4096, 100_000, (1 << 24) - 1])
def test_lrpe_far_away(t):
    """Angles are as precise after millions of tokens as after thousands, and so is the gradient of theta."""
    lrpe, x = LRPE(num_heads=2, head_dim=8), torch.ones(1, 1, 2, 8)
    rotated = lrpe(x, torch.tensor([[t]]))
    theta = lrpe.theta.detach().double().requires_grad_()
    exact = torch.cat([torch.cos(theta * t), torch.sin(theta * t)], dim=-1)
    torch.testing.assert_close(rotated[0, 0].double(), exact, rtol=0, atol=2e-3)
    weight = torch.randn(2, 16)
    (gradient,) = torch.autograd.grad((rotated[0, 0] * weight).sum(), lrpe.theta)
    (expected,) = torch.autograd.grad((exact * weight).sum(), theta)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-2, atol=2e-3 * t)


def test_lrpe_starts_as_published():
    theta = LRPE(num_heads=3, head_dim=4).theta
    expected = [10000 ** (-2 * i / 12) for i in range(12)]
    torch.testing.assert_close(theta.flatten(), torch.tensor(expected))


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
def test_rates_are_not_rounded(cast):
    layer = GatedLightningAttention(24, 3, decay.log_decay(3, preset="alibi"), lrpe=True)
    theta, rates = layer.lrpe.theta.detach().clone(), layer.decay.log_decay.clone()
    getattr(layer, cast)()
    assert layer.qkvu_proj.weight.dtype == getattr(torch, {"half": "float16", "double": "float64"}.get(cast, cast))
    assert torch.equal(layer.lrpe.theta, theta)
    assert torch.equal(layer.decay.log_decay, rates)
    layer.to("meta")
    assert layer.decay.log_decay.device.type == layer.lrpe.theta.device.type == "meta"


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("length", [1, 7])
def test_the_state_goes_on(grad, length):
    torch.manual_seed(0)
    layer = GatedLightningAttention(24, 3, decay.log_decay(3, preset="alibi"))
    x, positions = torch.randn(2, 5 + length, 24), torch.arange(5 + length)[None]
    with torch.set_grad_enabled(grad):
        whole, no_state = layer(x, positions)
        assert no_state is None
        first, state = layer(x[:, :5], positions[:, :5], state=torch.zeros(2, 3, 8, 8))
        second, state = layer(x[:, 5:], positions[:, 5:], state=state)
        q, k, v, _ = layer.qkvu_proj(x).unflatten(-1, (4, 3, 8)).unbind(-3)
        silu = torch.nn.functional.silu
        _, expected = lightning_attention(silu(q), silu(k), v, layer.decay.log_decay, output_final_state=True)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-5)
    if grad:
        weight = layer.qkvu_proj.weight
        pieces = torch.autograd.grad(second.sum() + state.square().sum(), weight, retain_graph=True)
        torch.testing.assert_close(
            pieces, torch.autograd.grad(whole[:, 5:].sum() + expected.square().sum(), weight), rtol=1e-4, atol=1e-4
        )


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="hidden_size must be a multiple of num_heads = 3, got 16"):
        GatedLightningAttention(16, 3, torch.zeros(3))
