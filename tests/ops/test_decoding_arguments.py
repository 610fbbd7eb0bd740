"""Decoding states as arguments: what fits together, what is refused, and how PyTorch sees the operators."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_attention import (
    DecodingState,
    lightning_attention,
    lightning_attention_commit,
    lightning_attention_prefill_,
    lightning_attention_step,
    lightning_attention_verify,
)

B, T, H, D = 2, 5, 3, 16
LOG_DECAY = -torch.tensor([0.5, 0.1, 0.0])


def tokens(*shape: int) -> Any:
    """q, k and v."""
    return torch.randn(3, *shape, H, D).unbind()


def new_state(num_states: int = B, **options: Any) -> DecodingState:
    return DecodingState.zeros(num_states, H, D, D, **options)


def begun(num_states: int = B) -> DecodingState:
    """States after 40 tokens: a chunk, and 8 in the ring."""
    state = new_state(num_states)
    lightning_attention_prefill_(*tokens(num_states, 40), log_decay=LOG_DECAY, state=state, invariant=True)
    return state


@pytest.mark.parametrize("tokens_after", [0, 1, 40])
def test_prefill_for_speed_leaves_a_plain_state(tokens_after):
    """It starts from the ring, and empties it; steps go on from there."""
    state = begun()
    plain = state.select(torch.arange(B))
    plain.fold_(LOG_DECAY)
    qkv, then = tokens(B, 20), tokens(B, tokens_after)
    o = lightning_attention_prefill_(*qkv, log_decay=LOG_DECAY, state=state)
    expected = lightning_attention(*qkv, log_decay=LOG_DECAY, initial_state=plain.state, output_final_state=True)
    torch.testing.assert_close(o, expected.output)
    assert not state.count.any()
    torch.testing.assert_close(state.state, expected.final_state)
    if tokens_after:
        o = lightning_attention_step(*then, log_decay=LOG_DECAY, state=state)
        expected = lightning_attention(
            *then, log_decay=LOG_DECAY, initial_state=expected.final_state, output_final_state=True
        )
        torch.testing.assert_close(o, expected.output)
        torch.testing.assert_close(state.fold_(LOG_DECAY), expected.final_state)


def test_prefill_for_speed_keeps_states_at_positions_in_slots_with_empty_rings():
    pool, qkv = begun(4), tokens(1, 30)
    slots = torch.tensor([2])
    initial = pool.select(slots).fold_(LOG_DECAY)
    o = lightning_attention_prefill_(
        *qkv,
        log_decay=LOG_DECAY,
        state=pool,
        state_indices=slots,
        state_positions=[10],
        saved_indices=torch.tensor([[0]]),
    )
    expected = lightning_attention(*qkv, log_decay=LOG_DECAY, initial_state=initial, output_final_state=True)
    torch.testing.assert_close(o, expected.output)
    part: Any = [x[:, :10] for x in qkv]
    between = lightning_attention(
        *part, log_decay=LOG_DECAY, initial_state=initial, output_final_state=True
    ).final_state
    assert between is not None
    torch.testing.assert_close(pool.state[0], between[0])
    assert pool.count[:, 0].tolist() == [0, 8, 0, 8]


def test_memory_and_selection():
    state = begun(3)
    assert state.chunk_size == 32
    assert state.nbytes == 3 * H * (D * D * 4 + 2 * 32 * D * 4 + 4)
    chosen = state.select(torch.tensor([2, 2, 0]))
    for part, found in zip(state, chosen, strict=True):
        assert torch.equal(found, part[[2, 2, 0]])
        assert found.data_ptr() != part.data_ptr()
    assert not any(part.any() for part in state.zero_())
    half = new_state(dtype=torch.bfloat16, storage_dtype=torch.bfloat16)
    assert (half.state.dtype, half.keys.dtype, half.count.dtype) == (torch.bfloat16, torch.bfloat16, torch.int32)


def test_indices_of_minus_one_change_nothing():
    state = begun()
    before = [part.clone() for part in state]
    o = lightning_attention_step(*tokens(B), log_decay=LOG_DECAY, state=state, state_indices=torch.tensor([-1, -1]))
    assert not o.any()
    state.fold_(LOG_DECAY, torch.tensor([-1]))
    assert all(torch.equal(part, kept) for part, kept in zip(state, before, strict=True))


def with_part(**parts: Tensor) -> DecodingState:
    return new_state()._replace(**parts)


def step(state: Any, *qkv: Tensor, **options: Any) -> None:
    q, k, v = qkv or tokens(B)
    lightning_attention_step(q, k, v, LOG_DECAY, state=state, **options)


def prefill(state: Any, **options: Any) -> None:
    lightning_attention_prefill_(*tokens(B, T), log_decay=LOG_DECAY, state=state, **options)


FAULTS = {
    "a part that is no tensor": (
        lambda: step(DecodingState(torch.zeros(B, H, D, D), [1], [1], 3)),  # pyright: ignore[reportArgumentType]
        TypeError,
        "keys must be a dense tensor, got list",
    ),
    "keys of other heads": (
        lambda: step(with_part(keys=torch.zeros(B, H, 32, D + 1))),
        ValueError,
        r"keys of the decoding state must be \[2, 3, 32, 16\], got shape \(2, 3, 32, 17\)",
    ),
    "values of another length": (
        lambda: step(with_part(values=torch.zeros(B, H, 31, D))),
        ValueError,
        "values of the decoding state must be",
    ),
    "keys of another dtype": (
        lambda: step(with_part(keys=torch.zeros(B, H, 32, D).half())),
        TypeError,
        "keys of the decoding state must be torch.float32, got torch.float16",
    ),
    "a count by sequence": (
        lambda: step(with_part(count=torch.zeros(B, dtype=torch.int32))),
        ValueError,
        "count of the decoding state must be",
    ),
    "a count of 64 bits": (
        lambda: step(with_part(count=torch.zeros(B, H, dtype=torch.int64))),
        TypeError,
        "count of the decoding state must be torch.int32",
    ),
    "a count beyond the ring": (
        lambda: step(with_part(count=torch.full((B, H), 32, dtype=torch.int32))),
        ValueError,
        r"count must be in \[0, 32\), got 32 to 32",
    ),
    "rings in another order": (
        lambda: step(with_part(keys=torch.zeros(B, 32, H, D).transpose(1, 2))),
        ValueError,
        "keys of the decoding state must be contiguous in each slot",
    ),
    "expanded states": (
        lambda: step(with_part(state=torch.zeros(1, H, D, D).expand(B, -1, -1, -1))),
        ValueError,
        "state of the decoding state must be contiguous in each slot",
    ),
    "chunks of another backend": (
        lambda: step(with_part(keys=torch.zeros(B, H, 64, D), values=torch.zeros(B, H, 64, D))),
        ValueError,
        "the decoding state has chunks of 64 tokens.*they have 32 in 'chunked'",
    ),
    "too few states": (lambda: step(new_state(1)), ValueError, r"state must be \[N, H, K, V\] = \[2, 3, 16, 16\]"),
    "a slot twice": (
        lambda: step(new_state(3), state_indices=torch.tensor([1, 1])),
        ValueError,
        "state_indices must differ",
    ),
    "a slot outside": (
        lambda: step(new_state(3), state_indices=torch.tensor([1, 3])),
        ValueError,
        r"state_indices must be -1 or in \[0, 3\)",
    ),
    "saved indices": (
        lambda: step(new_state(3), saved_indices=torch.tensor([1, 2])),
        ValueError,
        "saved_indices go with plain states",
    ),
    "a gradient": (
        lambda: step(new_state(), *(x.requires_grad_() for x in tokens(B))),
        ValueError,
        "keeps no gradient",
    ),
    "bfloat16 inputs": (
        lambda: step(new_state(), *(x.bfloat16() for x in tokens(B))),
        TypeError,
        "keys of the decoding state must be torch.bfloat16",
    ),
    "invariant prefill of a plain state": (
        lambda: prefill(torch.zeros(B, H, D, D), invariant=True),
        ValueError,
        "invariant prefill needs a DecodingState",
    ),
    "invariant prefill with positions": (
        lambda: prefill(new_state(3), invariant=True, state_positions=[2], saved_indices=torch.tensor([[0], [1]])),
        ValueError,
        "invariant prefill keeps no states at positions",
    ),
    "invariant of another kind": (lambda: prefill(new_state(), invariant=1), TypeError, "invariant must be True or"),
    "an unknown backend": (lambda: new_state(backend="cuda"), ValueError, "backend must be 'auto' or one of"),
    "an unknown dtype": (lambda: new_state(dtype=torch.int8), TypeError, "dtype must be one of"),
    "parents of another shape": (
        lambda: lightning_attention_verify(*tokens(B, T), state=new_state(), parents=torch.zeros(B, 2).long()),
        ValueError,
        r"parents must be \[B, T\]",
    ),
    "a last draft outside": (
        lambda: lightning_attention_commit(*tokens(B, T)[1:], state=new_state(), last=torch.tensor([5, 0])),
        ValueError,
        "last must be -1 or in",
    ),
    "vmap": (
        lambda: torch.vmap(lambda q: lightning_attention_step(q, q, q, state=new_state()))(torch.randn(4, B, H, D)),
        NotImplementedError,
        "torch.vmap does not map over decoding states",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), FAULTS.values(), ids=FAULTS)
def test_faults_raise_and_change_nothing(call, error, message):
    with pytest.raises(error, match=message):
        call()


PREFILL_FAULTS: dict[str, dict[str, Any]] = {
    "bounds beyond the tokens": {"cu_seqlens": torch.tensor([0, T + 1])},
    "a slot outside": {"state_indices": torch.tensor([2])},
    "a position outside": {"state_positions": [T + 1], "saved_indices": torch.tensor([[1]])},
    "a slot for two states": {"state_positions": [2], "saved_indices": torch.tensor([[0]])},
    "a backend of GPUs": {"backend": "hopper"},
    "a mask of another length": {"has_initial_state": torch.tensor([True, False])},
}


@pytest.mark.parametrize("fault", PREFILL_FAULTS.values(), ids=PREFILL_FAULTS)
@pytest.mark.parametrize("invariant", [False, True])
def test_a_prefill_that_is_refused_leaves_the_ring(fault, invariant):
    state, qkv = begun(), tokens(1, T)
    before = state.select(torch.arange(B))
    options = {"state_indices": torch.tensor([0]), "invariant": invariant} | fault
    known = r"cu_seqlens|state_indices|state_positions|has_initial_state|positions|backend 'hopper' cannot run this"
    with pytest.raises((ValueError, NotImplementedError), match=known):
        lightning_attention_prefill_(*qkv, log_decay=LOG_DECAY, state=state, **options)
    assert all(torch.equal(part, kept) for part, kept in zip(state, before, strict=True))


@pytest.mark.parametrize("is_packed", [False, True], ids=["batch rows", "packed"])
def test_operators_are_registered_as_pytorch_expects(is_packed):
    state, (q, k, v) = begun(), tokens(B, T)
    inputs: Any = [q, k, v, LOG_DECAY, *state, torch.tensor([1, 0]), torch.tensor([True, False]), None, None]
    if is_packed:
        inputs[:3] = [x.flatten(0, 1)[None] for x in (q, k, v)]
        inputs[10] = torch.tensor([0, 3, B * T])
    else:
        inputs[11] = torch.tensor([2, 5])
    operators = torch.ops.lightning_attention
    torch.library.opcheck(operators.append.default, (*inputs, 0.5, "auto"))
    torch.library.opcheck(operators.attend.default, (*inputs, 0.5, "auto"))
    torch.library.opcheck(operators.fold.default, (LOG_DECAY, *state, None, "auto"))


def test_compiled_steps_and_drafts_equal_eager():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def decode(q: Tensor, k: Tensor, v: Tensor, state: DecodingState, parents: Tensor) -> list[Tensor]:
        o = lightning_attention_step(q[:, 0], k[:, 0], v[:, 0], LOG_DECAY, state=state)
        drafts = lightning_attention_verify(q, k, v, LOG_DECAY, state=state, parents=parents)
        last = torch.full((B,), 3)
        lightning_attention_commit(k, v, LOG_DECAY, state=state, last=last, parents=parents)
        return [o, drafts, *(part.clone() for part in state)]

    (q, k, v), state, parents = tokens(B, T), begun(), torch.tensor([[-1, 0, 0, 1, -1]] * B)
    same = DecodingState(*(part.clone() for part in state))
    eager = decode._torchdynamo_orig_callable  # pyright: ignore[reportFunctionMemberAccess]
    for found, expected in zip(decode(q, k, v, state, parents), eager(q, k, v, same, parents), strict=True):
        assert torch.equal(found, expected)


def test_autocast_casts_the_inputs():
    state = new_state(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        o = lightning_attention_step(*tokens(B), log_decay=LOG_DECAY, state=state)
        drafts = lightning_attention_verify(*tokens(B, T), log_decay=LOG_DECAY, state=state)
    assert o.dtype == drafts.dtype == torch.bfloat16
    assert (state.count == 1).all()
