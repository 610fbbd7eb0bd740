"""Prefill in a pool of states, for both families of kernels.

All programs of a sequence read the state before it, and one of them writes the state after it. So the first is copied
from its slot before they start; the second is written to the slot directly.
"""

import triton.language as tl

from ..inputs import Metadata, SlotPrefillInputs
from ..problem import state_dtype
from .plan import Operand, Planner
from .primitives import jit, load_slot, program_ids
from .scans import Scans, WrittenSlots
from .segments import ceil_div

# Elements of a state that a program copies, and its warps.
BLOCK, NUM_WARPS = 1024, 4


def has_contiguous_states(pool: Metadata) -> bool:
    """True if the kernels can write to its slots."""
    _, _, K, V = pool.shape
    return pool.strides[1:] == (K * V, V, 1)


def plan_prefill_(planner: Planner, x: SlotPrefillInputs[Operand], scans: type[Scans], scale: float) -> tuple[Operand]:
    indices, positions, saved = (planner.contiguous(y) for y in (x.state_indices, x.state_positions, x.saved_indices))
    num_sequences = x.q.shape[0] if x.cu_seqlens is None else x.cu_seqlens.shape[0] - 1
    _, H, K, V = x.state.shape
    stride = x.state.strides[0]
    initial = planner.empty(num_sequences, H, K, V, dtype=state_dtype(x.q.dtype))
    planner.launch(
        copy_kernel,
        num_sequences * H * ceil_div(K * V, BLOCK),
        {"num_warps": NUM_WARPS},
        pool=x.state,
        states=initial,
        state_indices=indices,
        has_initial_state=planner.contiguous(x.has_initial_state),
        H=H,
        stride_slot=stride,
        SIZE=K * V,
        BLOCK=BLOCK,
    )
    call = scans(planner, x.from_states(initial), scale)
    return (call.output(x.state, x.state, positions, WrittenSlots(stride, indices, saved)),)


@jit(do_not_specialize=["H"])
def copy_kernel(
    pool, states, state_indices, has_initial_state, H, stride_slot, SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    """Copy the states of sequences out of their slots: zero for slot -1, and where there is no initial state."""
    i_x, i_h, _, i_n = program_ids(H, 1, SIZE, BLOCK)
    i_slot = load_slot(state_indices, i_n)
    exists = i_slot >= 0
    if has_initial_state is not None:
        exists = exists & (tl.load(has_initial_state + i_n) != 0)
    o_x = i_x * BLOCK + tl.arange(0, BLOCK)
    p_S = pool + i_slot * stride_slot + i_h * SIZE + o_x
    b_S = tl.load(p_S, mask=(o_x < SIZE) & exists, other=0.0).to(tl.float32)
    tl.store(states + (i_n * H + i_h) * SIZE + o_x, b_S, mask=o_x < SIZE)
