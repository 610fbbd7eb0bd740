"""NaN or infinity at one token reaches later tokens of its sequence, and back to the start of the chunk."""

import math

import pytest
import torch
from oracle import Case, attention, device_of, make_inputs, run

from lightning_attention import lightning_attention
from lightning_attention.ops.chunked import CHUNK_SIZE
from lightning_attention.ops.gpu import product_precision
from lightning_attention.ops.triton import config

C = CHUNK_SIZE
H, COLUMN = 1, 3  # head and column of the NaN or infinity
CASES = {
    "inside a chunk": (Case(T=2 * C), (1, C + 20), slice(C, None)),
    "in a ragged end": (Case(T=2 * C + 25), (1, 2 * C + 10), slice(2 * C, None)),
    "without a state": (Case(T=2 * C, state=False), (1, 9), slice(0, None)),
    "packed": (Case(lengths=(C + 7, 2 * C + 15, 5)), (0, (C + 7) + C + 20), slice(2 * C + 7, 3 * C + 7)),
    "packed, ragged": (Case(lengths=(C + 7, 2 * C + 15, 5)), (0, C + 3), slice(C, C + 7)),
    "packed, short": (Case(lengths=(7, 0, 20, 1, 9, C)), (0, 18), slice(7, 27)),
    "packed, without states": (Case(lengths=(3, C - 10, 2, 20), state=False), (0, C - 6), slice(C - 7, C - 5)),
}
values = pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
backends = pytest.mark.parametrize("backend", ["chunked", "reference"])


def results(backend: str, inputs, name: str | None = None, at=(), value: float = 0.0) -> dict[str, torch.Tensor]:
    """Return outputs and gradients; with a name, after setting one element of that input."""
    if name is not None:
        tensor = getattr(inputs, name)
        before = tensor[at].item()
        tensor[at] = value
        try:
            return run(attention(backend), inputs)
        finally:
            tensor[at] = before
    return run(attention(backend), inputs)


def changed(poisoned: dict, clean: dict, name: str) -> torch.Tensor:
    """Return where a result is not finite; assert that the rest is bit-identical."""
    bad = ~poisoned[name].isfinite()
    assert torch.equal(poisoned[name][~bad], clean[name][~bad]), name
    return bad


def reached(clean: torch.Tensor, *at) -> torch.Tensor:
    mask = torch.zeros_like(clean, dtype=torch.bool)
    mask[at] = True
    return mask


@backends
@cases
@values
def test_a_query_reaches_only_its_own_output(backend, case, value):
    case, (b, t), _ = case
    inputs = make_inputs(case)
    clean, poisoned = results(backend, inputs), results(backend, inputs, "q", (b, t, H, COLUMN), value)
    assert torch.equal(changed(poisoned, clean, "o"), reached(clean["o"], b, t, H))
    assert not changed(poisoned, clean, "final_state").any()


def last(case: Case, t: int) -> int:
    """Return the end of the sequence that holds token t."""
    if case.lengths is None:
        return case.T
    return next(end for end in torch.tensor(case.lengths).cumsum(0).tolist() if t < end)


@backends
@cases
@values
@pytest.mark.parametrize("name", ["k", "v"])
def test_keys_and_values_reach_no_farther_back_than_their_chunk(backend, name, case, value):
    """A key reaches all columns of its head, a value one; other heads, sequences and earlier chunks do not change."""
    case, (b, t), chunk = case
    inputs = make_inputs(case)
    clean, poisoned = results(backend, inputs), results(backend, inputs, name, (b, t, H, COLUMN), value)
    column = slice(None) if name == "k" else COLUMN
    bad, end = changed(poisoned, clean, "o"), last(case, t)
    assert not (bad & ~reached(bad, b, slice(chunk.start if backend == "chunked" else t, end), H, column)).any()
    assert bad[b, t, H, column].all()
    if backend == "chunked":
        assert bad[b, chunk.start : t, H, column].all()  # as documented
    sequence = b if case.lengths is None else len([n for n in torch.tensor(case.lengths).cumsum(0) if n <= t])
    bad = changed(poisoned, clean, "final_state")
    entries = (slice(None), COLUMN) if name == "v" else (COLUMN, slice(None))
    assert not (bad & ~reached(bad, sequence, H, *entries)).any()
    assert bad[sequence, H][entries].all()


@backends
@values
def test_an_initial_state_reaches_one_column_of_its_sequence(backend, value):
    inputs = make_inputs(Case(lengths=(C + 7, 2 * C, 5)))
    clean, poisoned = results(backend, inputs), results(backend, inputs, "initial_state", (1, H, 2, COLUMN), value)
    bad = changed(poisoned, clean, "o")
    assert not (bad & ~reached(bad, 0, slice(C + 7, 3 * C + 7), H, COLUMN)).any()
    assert bad[0, C + 7, H, COLUMN]


@backends
@cases
@values
@pytest.mark.parametrize("name", ["q", "k", "v", "do"])
def test_gradients_stay_in_their_sequence_and_head(backend, name, case, value):
    case, (b, t), chunk = case
    inputs = make_inputs(case)
    clean, poisoned = results(backend, inputs), results(backend, inputs, name, (b, t, H, COLUMN), value)
    end = last(case, t)
    start = 0 if case.lengths is None else max(n for n in (0, *torch.tensor(case.lengths).cumsum(0)) if n <= t)
    chunk_start, chunk_end = (chunk.start, min(chunk.start + C, end)) if backend == "chunked" else (t, t + 1)
    # Queries and output gradients reach back, keys and values forward; in the other direction, to the end of the chunk.
    later, earlier = slice(chunk_start, end), slice(start, chunk_end)
    at = slice(t, t + 1)
    reach = {
        "q": {"dq": None, "dk": earlier, "dv": earlier},
        "k": {"dq": later, "dk": None, "dv": at},
        "v": {"dq": later, "dk": at, "dv": None},
        "do": {"dq": at, "dk": earlier, "dv": earlier},
    }[name]
    for gradient, tokens in reach.items():
        bad = changed(poisoned, clean, gradient)
        allowed = reached(bad, b, tokens, H) if tokens else torch.zeros_like(bad)
        assert not (bad & ~allowed).any(), gradient
        assert tokens is None or bad[b, t, H].any(), gradient


@pytest.mark.triton
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@values
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_values_in_portable_kernels_reach_as_far_as_documented(dtype, name, value):
    t, length, device = 100, 150, device_of("triton")
    chunk = config.scan_tiles(64, 64, dtype, product_precision(dtype)).C
    q, k, v = (torch.randn(2, length, 2, 64, dtype=dtype, device=device) for _ in range(3))
    log_decay = -torch.tensor([0.5, 0.1], device=device)
    clean = lightning_attention(q, k, v, log_decay, backend="triton").output
    {"q": q, "k": k, "v": v}[name][0, t, 1, 5] = value
    o = lightning_attention(q, k, v, log_decay, backend="triton").output
    reached = torch.zeros_like(o, dtype=torch.bool)
    first, last = (t, t + 1) if name == "q" else (t // chunk * chunk, length)
    reached[0, first:last, 1, slice(5, 6) if name == "v" else slice(None)] = True
    assert torch.equal(o[~reached], clean[~reached])
    assert not o[0, t, 1, 5].isfinite()
    assert chunk < t
