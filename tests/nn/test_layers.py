"""Layers equal their formulas."""

import pytest
import torch
import torch.nn.functional as F

from lightning_attention import decay, lightning_attention
from lightning_attention.nn import LRPE, GatedLightningAttention, SimpleGLU, SimpleRMSNorm


def test_rms_norm_equals_its_formula():
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    expected = x / (x.norm(dim=-1, keepdim=True) / 4)
    torch.testing.assert_close(SimpleRMSNorm(eps=0.0)(x), expected)
    assert list(SimpleRMSNorm().parameters()) == []
    assert SimpleRMSNorm()(torch.zeros(2, 4)).isfinite().all()


def test_glu_equals_its_formula():
    glu, x = SimpleGLU(6, 10).double(), torch.randn(2, 3, 6, dtype=torch.float64)
    W_v, W_u = glu.vu_proj.weight.split(10)
    torch.testing.assert_close(glu(x), ((x @ W_v.T) * (x @ W_u.T)) @ glu.out_proj.weight.T)


def test_lrpe_products_depend_on_distance_only():
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
def test_lrpe_is_precise_at_every_position(t):
    """For angles and for the gradient of theta, after millions of tokens."""
    lrpe, x = LRPE(num_heads=2, head_dim=8), torch.ones(1, 1, 2, 8)
    rotated = lrpe(x, torch.tensor([[t]]))
    theta = lrpe.theta.detach().double().requires_grad_()
    exact = torch.cat([torch.cos(theta * t), torch.sin(theta * t)], dim=-1)
    torch.testing.assert_close(rotated[0, 0].double(), exact, rtol=0, atol=2e-3)
    weight = torch.randn(2, 16)
    (gradient,) = torch.autograd.grad((rotated[0, 0] * weight).sum(), lrpe.theta)
    (expected,) = torch.autograd.grad((exact * weight).sum(), theta)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-2, atol=2e-3 * t)


def test_lrpe_is_initialised_as_published():
    theta = LRPE(num_heads=3, head_dim=4).theta
    expected = [10000 ** (-2 * i / 12) for i in range(12)]
    torch.testing.assert_close(theta.flatten(), torch.tensor(expected))


@pytest.mark.parametrize(
    ("cast", "dtype"), [("bfloat16", torch.bfloat16), ("half", torch.float16), ("double", torch.float64)]
)
def test_casts_keep_decay_and_theta_in_float32(cast, dtype):
    layer = GatedLightningAttention(24, 3, decay.log_decay(3, preset="alibi"), lrpe=True)
    names = ["lrpe.theta", "decay.log_decay"]
    before = {name: x.clone() for name, x in [*layer.named_parameters(), *layer.named_buffers()] if name in names}
    getattr(layer, cast)()
    after = dict([*layer.named_parameters(), *layer.named_buffers()])
    assert layer.qkvu_proj.weight.dtype == dtype
    assert all(torch.equal(after[name], before[name]) for name in names)
    layer.to("meta")
    assert {x.device.type for x in [*layer.parameters(), *layer.buffers()]} == {"meta"}


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("length", [1, 7])
def test_two_calls_with_a_state_equal_one(grad, length):
    torch.manual_seed(0)
    layer = GatedLightningAttention(24, 3, decay.log_decay(3, preset="alibi"))
    x, positions = torch.randn(2, 5 + length, 24), torch.arange(5 + length)[None]
    with torch.set_grad_enabled(grad):
        expected, no_state = layer(x, positions)
        assert no_state is None
        first, state = layer(x[:, :5], positions[:, :5], state=torch.zeros(2, 3, 8, 8))
        second, state = layer(x[:, 5:], positions[:, 5:], state=state)
        q, k, v, _ = layer.qkvu_proj(x).unflatten(-1, (4, 3, 8)).unbind(-3)
        _, expected_state = lightning_attention(F.silu(q), F.silu(k), v, layer.decay.log_decay, output_final_state=True)
    assert state is not None
    assert expected_state is not None
    torch.testing.assert_close(torch.cat([first, second], dim=1), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, expected_state, rtol=1e-4, atol=1e-5)
    if grad:
        sums = second.sum() + state.square().sum(), expected[:, 5:].sum() + expected_state.square().sum()
        gradients = [torch.autograd.grad(x, layer.qkvu_proj.weight, retain_graph=True)[0] for x in sums]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_angles_of_a_rounded_theta_are_float32(dtype):
    """load_state_dict(assign=True) and accelerate put a rounded theta in place of the parameter."""
    layer, exact = LRPE(2, 8), LRPE(2, 8)
    layer.theta = torch.nn.Parameter(layer.theta.to(dtype))
    exact.theta.data = layer.theta.float()
    x, positions = torch.randn(1, 3, 2, 8), torch.tensor([[5, 3001, 1_000_000]])
    assert torch.equal(layer(x, positions), exact(x, positions))
