"""Gradients of a chunk: with heads of 128, dv in one warpgroup and dk in another; with heads of 64, both in one.

Each of two warpgroups keeps half the columns of R, and publishes a copy for both.
"""

from triton.language import constexpr

from .parts import (
    ACC,
    BV,
    LEFT,
    C,
    Shared,
    aggregate,
    clear_tokens,
    fence_async_shared,
    gl,
    jit,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@aggregate
class Copies:
    """Copies of R in shared memory: one for a single warpgroup; for two, which read each other's half, two in turn.

    A warpgroup overwrites the copy that nobody reads: whoever has seen copy r - 1 has read copy r - 2.
    The barriers `published` are those of two warpgroups, None for one.
    """

    R_s: Shared
    published: Shared | constexpr
    D: constexpr

    @jit
    def publish(self, b_R, r, g: constexpr):
        self.R_s.index(r % 2 * 2 + g if self.D == 128 else 0).store(b_R.to(self.R_s.dtype))
        fence_async_shared()
        if self.D == 128:
            mbarrier.arrive(self.published.index(r % 2))  # pyright: ignore[reportAttributeAccessIssue]

    @jit
    def wait(self, r):
        if self.D == 128:
            mbarrier.wait(self.published.index(r % 2), r // 2 & 1)  # pyright: ignore[reportAttributeAccessIssue]


@jit
def chunk_128(b_R, copies, args, kv, output_0, output_1, reads, writes, c, r, t, m, g: constexpr):
    """Compute dv in warpgroup 0, dk in warpgroup 1, of m tokens. Returns R before them, and publishes a copy."""
    dtype: constexpr = args.R_s.dtype
    s = kv.pipeline.wait(c)
    t_q, t_k = args.q_s.index(s).reshape([C, args.D]), args.k_s.index(s).reshape([C, args.D])
    t_v0, t_v1 = args.v_s.index(2 * s).reshape([C, BV]), args.v_s.index(2 * s + 1).reshape([C, BV])
    t_do0, t_do1 = args.do_s.index(2 * s).reshape([C, BV]), args.do_s.index(2 * s + 1).reshape([C, BV])
    if kv.PACKED and m < C:  # both warpgroups write the same
        clear_tokens(t_q, m, True)
        clear_tokens(t_do0, m, True)
        clear_tokens(t_do1, m, True)
        fence_async_shared()

    zeros = gl.zeros([C, C], gl.float32, layout=ACC)
    if g == 0:
        b_A = warpgroup_mma(t_k, t_q.permute((1, 0)), zeros, use_acc=False, is_async=True)
    else:
        b_A = warpgroup_mma(t_v0, t_do0.permute((1, 0)), zeros, use_acc=False, is_async=True)
        b_A = warpgroup_mma(t_v1, t_do1.permute((1, 0)), b_A, is_async=True)
    copies.wait(r)
    t_R0, t_R1 = args.R_s.index(r % 2 * 2), args.R_s.index(r % 2 * 2 + 1)
    zeros = gl.zeros([C, BV], gl.float32, layout=ACC)
    if g == 0:
        b_0 = warpgroup_mma(t_k, t_R0, zeros, use_acc=False, is_async=True)
        b_1 = warpgroup_mma(t_k, t_R1, zeros, use_acc=False, is_async=True)
    else:
        b_0 = warpgroup_mma(t_v0, t_R0.slice(0, BV).permute((1, 0)), zeros, use_acc=False, is_async=True)
        b_1 = warpgroup_mma(t_v0, t_R0.slice(BV, BV).permute((1, 0)), zeros, use_acc=False, is_async=True)
        b_0 = warpgroup_mma(t_v1, t_R1.slice(0, BV).permute((1, 0)), b_0, is_async=True)
        b_1 = warpgroup_mma(t_v1, t_R1.slice(BV, BV).permute((1, 0)), b_1, is_async=True)
    b_A = warpgroup_mma_wait(2 if g == 0 else 4, deps=[b_A])
    b_A = gl.convert_layout((b_A * reads.inside).to(dtype), LEFT)
    b_0, b_1 = warpgroup_mma_wait(0, deps=[b_0, b_1])
    b_0 = b_0 * reads.state[:, None]
    b_1 = b_1 * reads.state[:, None]
    if g == 0:
        t_x0, t_x1 = t_do0, t_do1
    else:
        t_x0, t_x1 = t_q.slice(0, BV, dim=1), t_q.slice(BV, BV, dim=1)
    b_0 = warpgroup_mma(b_A, t_x0, b_0, is_async=True)
    b_1 = warpgroup_mma(b_A, t_x1, b_1, is_async=True)
    b_qT = t_q.permute((1, 0)).load(LEFT)
    b_qT = (b_qT.to(gl.float32) * writes.key[None, :]).to(dtype)
    b_R = b_R * writes.state
    b_R = warpgroup_mma(b_qT, t_do0 if g == 0 else t_do1, b_R, is_async=True)

    b_0, b_1 = warpgroup_mma_wait(1, deps=[b_0, b_1])
    tma.store_wait(0)
    t_0, t_1 = output_0.tile(), output_1.tile()
    t_0.store(b_0.to(dtype))
    t_1.store(b_1.to(dtype))
    fence_async_shared()
    if m == C:
        output_0.store(t)
        output_1.store(t)
    b_R = warpgroup_mma_wait(0, deps=[b_R])
    kv.pipeline.release(s)
    copies.publish(b_R, r + 1, g)
    if m < C:
        output_0.store_tokens(t, m, True)
        output_1.store_tokens(t, m, True)
    return b_R


@jit
def chunk_64(b_R, copies, args, kv, dv, dk, reads, writes, c, r, t, m, g: constexpr):
    """Compute dv and dk of m tokens. Returns R before them, and publishes a copy."""
    dtype: constexpr = args.R_s.dtype
    t_R = args.R_s.index(0)
    s = kv.pipeline.wait(c)
    t_q, t_do = kv.tiles(s)
    t_k, t_v = args.k_s.index(s).reshape([C, args.D]), args.v_s.index(s).reshape([C, args.D])
    if kv.PACKED and m < C:
        clear_tokens(t_q, m, True)
        clear_tokens(t_do, m, True)
        fence_async_shared()

    zeros = gl.zeros([C, C], gl.float32, layout=ACC)
    b_A = warpgroup_mma(t_k, t_q.permute((1, 0)), zeros, use_acc=False, is_async=True)
    b_B = warpgroup_mma(t_v, t_do.permute((1, 0)), zeros, use_acc=False, is_async=True)
    zeros = gl.zeros([C, args.D], gl.float32, layout=ACC)
    b_dv = warpgroup_mma(t_k, t_R, zeros, use_acc=False, is_async=True)
    b_dk = warpgroup_mma(t_v, t_R.permute((1, 0)), zeros, use_acc=False, is_async=True)
    b_A, b_B = warpgroup_mma_wait(2, deps=[b_A, b_B])
    b_A = gl.convert_layout((b_A * reads.inside).to(dtype), LEFT)
    b_B = gl.convert_layout((b_B * reads.inside).to(dtype), LEFT)
    b_dv, b_dk = warpgroup_mma_wait(0, deps=[b_dv, b_dk])
    b_dv = b_dv * reads.state[:, None]
    b_dk = b_dk * reads.state[:, None]
    b_dv = warpgroup_mma(b_A, t_do, b_dv, is_async=True)
    b_dk = warpgroup_mma(b_B, t_q, b_dk, is_async=True)
    b_qT = t_q.permute((1, 0)).load(LEFT)
    b_qT = (b_qT.to(gl.float32) * writes.key[None, :]).to(dtype)
    b_R = b_R * writes.state
    b_R = warpgroup_mma(b_qT, t_do, b_R, is_async=True)

    b_dv, b_dk = warpgroup_mma_wait(1, deps=[b_dv, b_dk])
    tma.store_wait(0)
    t_dv, t_dk = dv.tile(), dk.tile()
    t_dv.store(b_dv.to(dtype))
    t_dk.store(b_dk.to(dtype))
    fence_async_shared()
    if m == C:
        dv.store(t)
        dk.store(t)
    b_R = warpgroup_mma_wait(0, deps=[b_R])
    kv.pipeline.release(s)
    copies.publish(b_R, r + 1, g)
    if m < C:
        dv.store_tokens(t, m, True)
        dk.store_tokens(t, m, True)
    return b_R
