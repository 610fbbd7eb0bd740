"""Softmax attention: every path equals a quadratic form in float64 that is written here."""

import math

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lightning_attention.nn import KeyValues, RoPE, Slots, SoftmaxAttention

W, H, D = 32, 4, 8
CASES = {
    "full": {},
    "grouped": {"num_key_value_heads": 2},
    "window": {"window": 5},
    "window of one": {"window": 1, "num_key_value_heads": 1},
    "no positions, no gate": {"rope": None, "gate": False},
    "interpolated": {"rope": RoPE(D, base=500.0, factor=4.0)},
}
ALL = pytest.mark.parametrize("case", CASES)


def make(case: str = "full", dtype: torch.dtype = torch.float64) -> SoftmaxAttention:
    torch.manual_seed(0)
    layer = SoftmaxAttention(W, H, **{"rope": RoPE(D)} | CASES[case]).to(dtype)
    with torch.no_grad():
        layer.qkvu_proj.weight.mul_(6)  # scores far from zero
    return layer


def inputs(length: int = 23, batch_size: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x = torch.randn(batch_size, length, W, dtype=dtype, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(length).expand(batch_size, -1)


def rotated(x: Tensor, positions: Tensor, rope: RoPE | None) -> Tensor:
    """x `[T, D]` by multiplication of complex numbers, positions `[T]`."""
    if rope is None:
        return x
    theta = rope.base ** (-torch.arange(0, D, 2, dtype=torch.float64) / D) / rope.factor
    turns = torch.polar(torch.ones((), dtype=torch.float64), positions[:, None] * theta)
    turned = torch.complex(x[:, : D // 2], x[:, D // 2 :]) * turns
    return torch.cat([turned.real, turned.imag], dim=-1)


def definition(layer: SoftmaxAttention, x: Tensor, sinks: int = 0, window: int | None = None) -> Tensor:
    """The layer for one sequence `[T, W]` by loops over heads and queries, with a band and sinks."""
    q, k, v, u = layer.split_parts(layer.qkvu_proj(x))
    q, k, v = layer.split_heads(q, k, v)
    window = layer.window if window is None else window
    o = torch.empty_like(q)
    j = torch.arange(len(x))
    for h in range(H):
        keys, values = (y[:, h // (H // layer.num_key_value_heads)] for y in (k, v))
        for i in range(len(x)):
            seen = (j <= i) & ((j > i - window) | (j < sinks) if window else True)
            nearest = min(i, sinks + (window or 0) - 1) if sinks else i
            at = torch.where(j < sinks, nearest, i)
            queries = rotated(q[i, h].expand(len(x), -1), at, layer.rope)
            scores = (queries * rotated(keys, j, layer.rope)).sum(-1) / math.sqrt(D)
            o[i, h] = scores.masked_fill(~seen, -math.inf).softmax(0) @ values
    y = layer.norm(o.flatten(-2))
    return layer.out_proj(y if u is None else y * u)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)


@ALL
def test_equals_the_definition_with_gradients(case):
    layer = make(case)
    x, positions = inputs()
    expected = torch.stack([definition(layer, row) for row in x])
    actual, state = layer(x, positions)
    assert state is None
    close(actual, expected)
    g = torch.randn_like(expected)
    found, exact = (torch.autograd.grad(y, list(layer.parameters()), g) for y in (actual, expected))
    for gradient, correct in zip(found, exact, strict=True):
        close(gradient, correct)


@ALL
def test_packed_sequences_equal_separate_ones_with_gradients(case):
    """Among them empty ones, one token, and more than a window."""
    layer, lengths = make(case), [0, 4, 1, 0, 17, 3, 16, 0]
    x, _ = inputs(sum(lengths), 1)
    parts = x[0].split(lengths)
    expected = torch.cat([definition(layer, part) for part in parts])
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    actual, _ = layer(x, positions, torch.tensor([0, *lengths]).cumsum(0))
    close(actual[0], expected)
    g = torch.randn_like(expected)
    found = torch.autograd.grad(actual[0], list(layer.parameters()), g)
    for gradient, correct in zip(found, torch.autograd.grad(expected, list(layer.parameters()), g), strict=True):
        close(gradient, correct)


def test_no_tokens():
    layer = make()
    x = torch.randn(1, 0, W, dtype=torch.float64)
    for bounds in ([0], [0, 0, 0]):
        assert layer(x, torch.zeros(1, 0, dtype=torch.int64), torch.tensor(bounds))[0].shape == (1, 0, W)
    past = layer.make_key_values(2, torch.float64, "cpu")
    assert layer(x, torch.zeros(1, 0, dtype=torch.int64), torch.tensor([0, 0, 0]), past)[0].shape == (1, 0, W)
    assert past.lengths.tolist() == [0, 0]


@ALL
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "gradients"])
def test_calls_from_keys_and_values_equal_one_call(case, grad):
    layer = make(case)
    x, positions = inputs(40)
    expected = torch.stack([definition(layer, row) for row in x])
    past = layer.make_key_values(2, torch.float64, "cpu")
    with torch.set_grad_enabled(grad):
        parts = zip(*(y.split([1, 6, 1, 1, 12, *[1] * 19], dim=1) for y in (x, positions)), strict=True)
        close(torch.cat([layer(*part, None, past)[0] for part in parts], dim=1), expected)
    assert past.lengths.tolist() == [40, 40]
    assert (past.keys.shape[1] == layer.window) if layer.window else past.keys.shape[1] >= 40


@ALL
@torch.no_grad()
def test_sequences_of_several_lengths_go_on_from_keys_and_values(case):
    """Packed, and single tokens of some of the sequences."""
    layer, x = make(case), inputs(40, 3)[0]
    past, read = layer.make_key_values(3, torch.float64, "cpu"), [0, 0, 0]
    expected = [definition(layer, row) for row in x]
    for counts in [(3, 0, 7), (0, 2, 1), (1, 1, 1), (0, 1, 0), (0, 0, 0), (1, 0, 1), (9, 6, 2), (1, 1, 0), (2, 11, 5)]:
        spans = [(n, n + count) for n, count in zip(read, counts, strict=True)]
        if max(counts) <= 1:
            at = torch.tensor([[n] for n in read])
            slots = torch.tensor([b if count else -1 for b, count in enumerate(counts)])
            y, _ = layer(x.gather(1, at[..., None].expand(-1, -1, W)), at, None, past, Slots(slots))
            found = [y[b, : counts[b]] for b in range(3)]
        else:
            packed = torch.cat([x[b, start:end] for b, (start, end) in enumerate(spans)])[None]
            positions = torch.cat([torch.arange(*span) for span in spans])[None]
            y, _ = layer(packed, positions, torch.tensor([0, *counts]).cumsum(0), past)
            found = y[0].split(list(counts))
        for b, (start, end) in enumerate(spans):
            close(found[b], expected[b][start:end])
        read = [end for _, end in spans]
        assert past.lengths.tolist() == read


@pytest.mark.parametrize("case", ["full", "grouped", "no positions, no gate", "interpolated"])
@pytest.mark.parametrize(("sinks", "window"), [(4, 12), (1, 7), (0, 10), (4, 100), (3, 1)])
@pytest.mark.parametrize("parts", [[1] * 50, [30, *[1] * 20], [5, 20, 25]], ids=["tokens", "a text", "texts"])
@torch.no_grad()
def test_streaming_equals_a_banded_pass_in_constant_memory(case, sinks, window, parts):
    layer = make(case)
    x, positions = inputs(50)
    expected = torch.stack([definition(layer, row, sinks, window) for row in x])
    past = layer.make_key_values(2, torch.float64, "cpu", window=window, sinks=sinks)
    nbytes = past.nbytes
    calls = zip(x.split(parts, dim=1), positions.split(parts, dim=1), strict=True)
    close(torch.cat([layer(*call, None, past)[0] for call in calls], dim=1), expected)
    assert past.nbytes == nbytes == 2 * 2 * (sinks + window) * layer.num_key_value_heads * D * 8


@torch.no_grad()
def test_sequences_may_be_selected():
    layer = make("window")
    x, positions = inputs(30, 3)
    past = layer.make_key_values(3, torch.float64, "cpu")
    layer(x[:, :20], positions[:, :20], None, past)
    past.select(torch.tensor([2, 2, 0]))
    y, _ = layer(x[[2, 2, 0], 20:], positions[:, 20:], None, past)
    close(y, torch.stack([definition(layer, x[b])[20:] for b in (2, 2, 0)]))
    past.reset()
    close(layer(x, positions, None, past)[0], torch.stack([definition(layer, row) for row in x]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["full", "window"])
@torch.no_grad()
def test_accuracy_of_lower_precisions(case, dtype):
    layer, x = make(case, dtype), inputs(60)[0]
    expected = torch.stack([definition(make(case), row) for row in x.to(dtype).double()])
    past = layer.make_key_values(2, dtype, "cpu")
    positions = torch.arange(60)[None]
    calls = [layer(x.to(dtype), positions)[0], layer(x.to(dtype), positions, None, past)[0]]
    for y in calls:
        assert y.dtype == dtype
        error = (y.double() - expected).norm() / expected.norm()
        assert error < {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}[dtype]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS")  # the first product in the thread of backward passes
@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_accuracy_on_a_gpu_with_gradients(case, dtype):
    """Batch rows, packed sequences, and calls from keys and values; sums of gradients of all weights."""
    exact, layer = make(case), make(case, dtype).cuda()
    lengths = [0, 4, 1, 70, 17, 200, 0, 64]
    bound = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}[dtype]

    def error(actual: Tensor, expected: Tensor) -> float:
        return ((actual.double().cpu() - expected).norm() / expected.norm()).item()

    rows, row_positions = inputs(60)
    packed, _ = inputs(sum(lengths), 1)
    packed_positions = torch.cat([torch.arange(n) for n in lengths])[None]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    for x, positions, cu_seqlens in ((rows, row_positions, None), (packed, packed_positions, bounds)):
        x = x.to(dtype).double()
        expected, _ = exact(x, positions, cu_seqlens)
        on_gpu = None if cu_seqlens is None else cu_seqlens.cuda()
        actual, _ = layer(x.to(dtype).cuda(), positions.cuda(), on_gpu)
        assert actual.dtype == dtype
        assert error(actual, expected) < bound
        g = torch.randn(x.shape, dtype=torch.float64)
        found = torch.autograd.grad(actual, list(layer.parameters()), g.to(dtype).cuda())
        for gradient, correct in zip(found, torch.autograd.grad(expected, list(exact.parameters()), g), strict=True):
            assert error(gradient, correct) < 2 * bound
    past = layer.make_key_values(2, dtype, "cuda")
    with torch.no_grad():
        parts = zip(*(y.split([20, 1, 30, *[1] * 9], dim=1) for y in (rows.to(dtype), row_positions)), strict=True)
        found = torch.cat([layer(x.cuda(), at.cuda(), None, past)[0] for x, at in parts], dim=1)
    assert error(found, exact(rows.to(dtype).double(), row_positions)[0]) < bound


def test_rotary_positions_are_those_of_transformers():
    q, k = torch.randn(2, 10, H, D), torch.randn(2, 10, H, D)
    positions = torch.randint(2000, (2, 10))
    angles = positions[..., None] * 10000.0 ** (-torch.arange(0, D, 2) / D)
    cos, sin = (torch.cat([f(angles)] * 2, dim=-1) for f in (torch.cos, torch.sin))
    expected = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    for x, y in zip((q, k), expected, strict=True):
        torch.testing.assert_close(RoPE(D)(x, positions), y.transpose(1, 2), rtol=1e-3, atol=1e-3)


def test_positions_are_interpolated():
    """A factor f at position f t is no factor at t."""
    x, positions = torch.randn(1, 10, H, D, dtype=torch.float64), torch.arange(10)[None]
    close(RoPE(D, factor=4.0)(x, 4 * positions), RoPE(D)(x, positions))


def test_rotary_positions_have_the_precision_of_float32_at_long_contexts():
    x, positions = torch.randn(1, 8, 1, D), torch.arange(8)[None]
    exact = [RoPE(D)(x.double(), positions + offset) for offset in (0, 1 << 22)]
    found = [RoPE(D)(x, positions + offset).double() for offset in (0, 1 << 22)]
    products = [(y[0, :, 0] @ y[0, :, 0].T) for y in (*exact, *found)]
    close(products[0], products[1])
    assert (products[3] - products[2]).abs().max() < 0.2  # θ itself is rounded: 4e6 × 6e-8


REFUSED = {
    "heads that do not divide": (lambda: SoftmaxAttention(W, H, num_key_value_heads=3), ValueError, "must divide"),
    "no heads": (lambda: SoftmaxAttention(W, H, num_key_value_heads=0), ValueError, "num_key_value_heads must be at"),
    "half a head": (lambda: SoftmaxAttention(W, H, num_key_value_heads=0.5), TypeError, "must be an integer"),  # pyright: ignore[reportArgumentType]
    "no window": (lambda: SoftmaxAttention(W, H, window=0), ValueError, "window must be at least 1"),
    "rope of other heads": (lambda: SoftmaxAttention(W, H, rope=RoPE(16)), ValueError, "heads of 8 channels, got 16"),
    "rope by name": (lambda: SoftmaxAttention(W, H, rope="rope"), TypeError, "rope must be a RoPE or None"),  # pyright: ignore[reportArgumentType]
    "odd heads": (lambda: RoPE(7), ValueError, "head_dim must be even, got 7"),
    "base": (lambda: RoPE(8, base=1.0), ValueError, "base must be above 1 and finite"),
    "NaN base": (lambda: RoPE(8, base=math.nan), ValueError, "base must be above 1 and finite"),
    "factor": (lambda: RoPE(8, factor=0.5), ValueError, "factor must be at least 1"),
}


@pytest.mark.parametrize(("call", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_a_state_or_slots_of_a_pool_are_refused():
    layer = make()
    x, positions = inputs()
    with pytest.raises(TypeError, match="must be KeyValues, got Tensor"):
        layer(x, positions, None, torch.zeros(2, H, D, D))
    with pytest.raises(ValueError, match="no pool of states"):
        layer(x[:, :1], positions[:, :1], None, torch.zeros(2, H, D, D), Slots(torch.tensor([0, 1])))
    with pytest.raises(ValueError, match="no state of constant size"):
        _ = layer.state_shape


def test_keys_of_other_sequences_are_refused():
    layer = make()
    x, positions = inputs()
    past = KeyValues(3, H, D, window=None, dtype=torch.float64, device="cpu")
    message = r"state has keys of shape \[N, H, D\] = \[3, 4, 8\], these inputs need \[2, 4, 8\]"
    with pytest.raises(ValueError, match=message):
        layer(x, positions, None, past)
    with pytest.raises(ValueError, match=message):
        layer(x[:1], positions[:1], torch.tensor([0, 3, 23]), past)
    with pytest.raises(ValueError, match=r"\[2, 4, 8\], these inputs need \[2, 2, 8\]"):
        make("grouped")(x, positions, None, key_values())


def key_values(window: int | None = None, sinks: int = 0) -> KeyValues:
    return KeyValues(2, H, D, window=window, sinks=sinks, dtype=torch.float64, device="cpu")


@pytest.mark.parametrize("kept", [{}, {"window": 3}, {"window": 50}, {"window": 5, "sinks": 1}], ids=str)
def test_keys_of_another_window_are_refused(kept):
    layer = make("window")
    x, positions = inputs()
    with pytest.raises(ValueError, match="state must have the layer's window of 5 and no sinks"):
        layer(x, positions, None, key_values(**kept))


@pytest.mark.parametrize(
    ("window", "sinks", "error", "message"),
    [
        (None, 2, ValueError, "sinks go with a window"),
        (0, 0, ValueError, "window must be at least 1, got 0"),
        (3, -1, ValueError, "sinks must be at least 0, got -1"),
        (2.0, 0, TypeError, "window must be an integer, got 2.0"),
    ],
)
def test_bad_windows_are_refused(window, sinks, error, message):
    with pytest.raises(error, match=message):
        key_values(window, sinks)


@ALL
@pytest.mark.parametrize("shape", [(0, 7), (2, 0)])
def test_no_token_is_no_output(case, shape):
    layer = make(case)
    x, positions = inputs()
    past = layer.make_key_values(shape[0], torch.float64, "cpu")
    for state in (None, past):
        y, _ = layer(x[: shape[0], : shape[1]], positions[: shape[0], : shape[1]], None, state)
        assert y.shape == (*shape, x.shape[-1])
    assert past.longest == 0


@pytest.mark.parametrize("bounds", [[0, 3, 22], [1, 23], [0, 9, 5, 23]])
def test_bounds_that_do_not_fit_are_refused(bounds):
    layer = make()
    x, positions = inputs(23, 1)
    past = layer.make_key_values(len(bounds) - 1, torch.float64, "cpu")
    for state in (None, past):
        with pytest.raises(ValueError, match="cu_seqlens must"):
            layer(x, positions, torch.tensor(bounds), state)
    assert past.longest == 0
