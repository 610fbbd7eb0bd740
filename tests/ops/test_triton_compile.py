"""Compilation of every kernel, in every configuration, for every architecture; this needs no GPU."""

from typing import Any

import pytest
import torch

from lightning_attention.ops.triton import config

triton = pytest.importorskip("triton")

from ops.machine_code import machine_code, signature_of  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from lightning_attention.ops.gpu import accumulate  # noqa: E402
from lightning_attention.ops.hopper import config as hopper  # noqa: E402
from lightning_attention.ops.triton import decoding, gates, kernels, quadratic, ring, softmax_gradient  # noqa: E402

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter does not compile"),
]

# Bytes of shared memory that one program may take (CUDA C++ Programming Guide, technical specifications).
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
TENSOR_CORES = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
# A head size for each configuration in `config`, and one that is not a power of two.
HEAD_DIMS = (16, 64, 96, 128, 256)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Arguments of a scan without `state_positions`.
NO_SLOTS = {"final_indices": None, "saved_indices": None, "stride_slot": None}
NO_STATES = {"states": None, "state_positions": None} | NO_SLOTS
# Bytes of local memory a thread may use: 255 registers are 1020, and spilling a few loop-invariant values costs little.
SPILLS = {128: 224, 256: 600}


def compile_kernel(
    kernel: Any,
    arch: int | str,
    dtype: str,
    tiles: config.Tiles | None,
    num_warps: int = 4,
    num_stages: int = 3,
    *,
    pool: str = "fp32",
    **constants: Any,
) -> Any:
    if tiles is not None:
        num_warps = tiles.num_warps
        constants |= {"C": tiles.C, "BK": tiles.BK, "BV": tiles.BV, "NUM_STAGES": tiles.num_stages}
    signature, aligned = signature_of(kernel, dtype, constants, pool)
    source = ASTSource(kernel, signature, constants, aligned)
    target = GPUTarget("cuda", arch, 32) if isinstance(arch, int) else GPUTarget("hip", arch, 64)
    return triton.compile(source, target=target, options={"num_warps": num_warps, "num_stages": num_stages})


def check(compiled: Any, arch: int, head_dim: int, *, products: bool) -> None:
    assert compiled.metadata.shared <= SHARED_MEMORY[arch]
    stack, code = machine_code(compiled)
    assert stack <= SPILLS[256 if head_dim > 128 else 128]
    if products:
        assert TENSOR_CORES[arch] in code or "HMMA" in code


@pytest.mark.parametrize("arch", SHARED_MEMORY, ids="sm_{}".format)
@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(head_dim, dtype) for dtype in ("bf16", "fp16") for head_dim in HEAD_DIMS], ids=str
)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_scan_compiles_and_fits(arch, head_dim, dtype, reverse):
    tiles = config.scan_tiles(head_dim, head_dim, DTYPES[dtype], "ieee")
    constants: dict[str, Any] = {
        "K": head_dim,
        "V": head_dim,
        "REVERSE": reverse,
        "TRANSPOSED_STATES": reverse,
        "PRECISION": "ieee",
    }
    compiled = compile_kernel(kernels.scan_kernel, arch, dtype, tiles, **NO_STATES, **constants)
    check(compiled, arch, head_dim, products=True)
    if head_dim in (64, 128):
        assert TENSOR_CORES[arch] in machine_code(compiled)[1]


@pytest.mark.parametrize("arch", SHARED_MEMORY, ids="sm_{}".format)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(
    ("slots", "pool"), [(NO_SLOTS, "fp32"), ({}, "fp32"), ({}, "bf16")], ids=["states", "slots", "bf16 slots"]
)
def test_prefill_compiles_and_fits(arch, dtype, slots, pool):
    for head_dim in (128, 256):
        tiles = config.scan_tiles(head_dim, head_dim, DTYPES[dtype], "ieee")
        constants: dict[str, Any] = {
            "K": head_dim,
            "V": head_dim,
            "REVERSE": False,
            "TRANSPOSED_STATES": False,
            "PRECISION": "ieee",
        }
        compiled = compile_kernel(kernels.scan_kernel, arch, dtype, tiles, pool=pool, **slots, **constants)
        check(compiled, arch, head_dim, products=True)


@pytest.mark.parametrize("arch", SHARED_MEMORY, ids="sm_{}".format)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_interval_states_compile_and_fit(arch, head_dim):
    tiles = config.interval_tiles(head_dim, head_dim, torch.bfloat16, "ieee")
    constants: dict[str, Any] = {"K": head_dim, "V": head_dim, "REVERSE": True, "PRECISION": "ieee"}
    compiled = compile_kernel(kernels.interval_state_kernel, arch, "bf16", tiles, **constants)
    check(compiled, arch, head_dim, products=True)


@pytest.mark.parametrize("arch", SHARED_MEMORY, ids="sm_{}".format)
def test_accumulation_compiles_and_loads_ahead(arch):
    constants: dict[str, Any] = {"SIZE": 128 * 128, "BLOCK": accumulate.BLOCK, "NUM_STAGES": accumulate.NUM_STAGES}
    constants |= {"IN_FLOAT32": False, "TRIGGER_DEPENDENTS": False, "OVERLAP_PREVIOUS": False}
    compiled = compile_kernel(accumulate.accumulate_kernel, arch, "bf16", None, accumulate.NUM_WARPS, **constants)
    check(compiled, arch, 128, products=False)
    assert "LDGSTS" in machine_code(compiled)[1]  # loads are asynchronous


@pytest.mark.parametrize("arch", SHARED_MEMORY, ids="sm_{}".format)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_reading_a_state_compiles_and_fits(arch, dtype):
    for head_dim in (128, 256):
        tiles = config.interval_tiles(head_dim, head_dim, DTYPES[dtype], "ieee")
        constants: dict[str, Any] = {"K": head_dim, "V": head_dim, "REVERSE": False, "ADD": True, "PRECISION": "ieee"}
        compiled = compile_kernel(kernels.read_kernel, arch, dtype, tiles, **constants)
        check(compiled, arch, head_dim, products=True)


@pytest.mark.parametrize("arch", SHARED_MEMORY, ids="sm_{}".format)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_quadratic_attention_compiles_and_fits(arch, dtype):
    for K, V in ((64, 64), (128, 128), (256, 128), (96, 256), (256, 256)):
        constants = quadratic.tiles(DTYPES[dtype].itemsize, K, V) | {"K": K, "V": V, "REVERSE": True}
        constants |= {"BK": triton.next_power_of_2(K), "BV": triton.next_power_of_2(V)}
        compiled = compile_kernel(quadratic.left_product_kernel, arch, dtype, None, **constants)
        check(compiled, arch, max(K, V), products=dtype == "bf16")


@pytest.mark.parametrize("arch", [86, 90], ids="sm_{}".format)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_float32_scan_compiles_and_fits(arch, head_dim, precision):
    tiles = config.scan_tiles(head_dim, head_dim, torch.float32, precision)
    constants: dict[str, Any] = {
        "K": head_dim,
        "V": head_dim,
        "REVERSE": True,
        "TRANSPOSED_STATES": True,
        "PRECISION": precision,
    }
    compiled = compile_kernel(kernels.scan_kernel, arch, "fp32", tiles, **NO_STATES, **constants)
    check(compiled, arch, head_dim, products=precision == "tf32")


DECODING = {
    "step": {"last": None, "parents": None, "saved_indices": None},
    "step to slots": {"last": None, "parents": None},
    "commit": {"o": None, "saved_indices": None},
}


@pytest.mark.parametrize("arch", SHARED_MEMORY, ids="sm_{}".format)
@pytest.mark.parametrize("constants", DECODING.values(), ids=DECODING.keys())
def test_decoding_compiles_and_fits(arch, constants):
    for head_dim in (16, 128, 256):
        BK, BV = config.step_tiles(head_dim, head_dim)
        sizes: dict[str, Any] = {"K": head_dim, "V": head_dim, "BK": BK, "BV": BV, "stride_sv": 1}
        compiled = compile_kernel(decoding.step_kernel, arch, "bf16", None, **constants, **sizes)
        check(compiled, arch, head_dim, products=False)


def chunk_sizes(arch: int, head_dim: int, dtype: str) -> set[int]:
    """Chunk sizes of the portable kernels, and of the Hopper kernels for a GPU that has them."""
    has_own = arch == 90 and dtype == "bf16" and head_dim in hopper.HEAD_DIMS
    return {config.scan_tiles(head_dim, head_dim, DTYPES[dtype], "ieee").C, *([hopper.C] if has_own else [])}


# Head sizes for each configuration of the kernels of decoding states.
RING_SPILLS = 1000  # around a loop of two sources of tokens
ring_archs = pytest.mark.parametrize(
    "arch",
    [arch if arch in (80, 90) else pytest.param(arch, marks=pytest.mark.slow) for arch in SHARED_MEMORY],
    ids="sm_{}".format,
)
RING_HEAD_DIMS = {"bf16": (64, 128, 256), "fp16": (256,), "fp32": (128,)}


@ring_archs
@pytest.mark.parametrize("dtype", RING_HEAD_DIMS)
def test_steps_from_decoding_states_compile_and_fit(arch, dtype):
    for head_dim in RING_HEAD_DIMS[dtype]:
        for C in chunk_sizes(arch, head_dim, dtype):
            for programs in (1, 4096):
                tiles = config.ring_step_tiles(head_dim, head_dim, C, DTYPES[dtype], programs, is_interpreted=False)
                constants: dict[str, Any] = {"K": head_dim, "V": head_dim, "C": C, **tiles.constants()}
                constants |= {"SCALE_KEYS": C == hopper.C, "PRECISION": "ieee"}
                compiled = compile_kernel(ring.ring_step_kernel, arch, dtype, None, tiles.num_warps, **constants)
                if dtype == "fp32":  # products without tensor cores take many registers
                    assert compiled.metadata.shared <= SHARED_MEMORY[arch]
                else:
                    check(compiled, arch, head_dim, products=True)


@ring_archs
@pytest.mark.parametrize(("dtype", "pool"), [("bf16", "fp32"), ("bf16", "bf16"), ("fp16", "fp32"), ("fp32", "fp32")])
def test_attention_from_decoding_states_compiles_and_fits(arch, dtype, pool):
    for head_dim in RING_HEAD_DIMS[dtype]:
        for C in chunk_sizes(arch, head_dim, dtype):
            tiles = config.ring_tiles(head_dim, head_dim, C, DTYPES[dtype], "ieee")
            constants: Any = {"K": head_dim, "V": head_dim, "C": C, "BK": tiles.BK, "BV": tiles.BV}
            constants |= {"PRECISION": "ieee"}
            options: dict[str, Any] = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages, "pool": pool}
            kernels_and_constants = (
                (ring.fold_kernel, constants),
                (ring.ring_kernel, constants | {"SCALE_KEYS": C == hopper.C, "UPDATE": True}),
            )
            for kernel, given in kernels_and_constants:
                compiled = compile_kernel(kernel, arch, dtype, None, **options, **given)
                assert compiled.metadata.shared <= SHARED_MEMORY[arch]
                assert dtype == "fp32" or machine_code(compiled)[0] <= RING_SPILLS


@pytest.mark.parametrize("arch", [80, 86, 90], ids="sm_{}".format)
@pytest.mark.parametrize(("head_dim", "num_drafts"), [(128, 16), (128, 64), (256, 64)])
def test_verification_compiles_and_fits(arch, head_dim, num_drafts):
    C, BK, BV, num_warps = config.verify_tiles(head_dim, head_dim, num_drafts)
    sizes = {"K": head_dim, "V": head_dim, "C": C, "BK": BK, "BV": BV, "stride_sv": 1}
    compiled = compile_kernel(decoding.verify_kernel, arch, "bf16", None, num_warps=num_warps, **sizes)
    check(compiled, arch, head_dim, products=False)


@pytest.mark.parametrize("arch", SHARED_MEMORY, ids="sm_{}".format)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_softmax_gradient_compiles_and_loads_16_bytes_a_thread(arch, dtype):
    sizes = {"V": 50_304, "BLOCK": softmax_gradient.MAX_BLOCK, "NEEDS_GRADIENT": True}
    kernel, num_warps = softmax_gradient.softmax_gradient_kernel, softmax_gradient.NUM_WARPS
    compiled = compile_kernel(kernel, arch, dtype, None, num_warps=num_warps, **sizes)
    check(compiled, arch, 128, products=False)
    assert "LDG.E.128" in machine_code(compiled)[1]


@pytest.mark.parametrize("arch", SHARED_MEMORY, ids="sm_{}".format)
@pytest.mark.parametrize(
    "kernel",
    [gates.activated_parts_gradient_kernel, gates.product_gradient_kernel, gates.gated_norm_gradient_kernel],
    ids=lambda kernel: kernel.__name__,
)
def test_gradients_of_gates_compile_and_load_16_bytes_a_thread(arch, kernel):
    compiled = compile_kernel(kernel, arch, "bf16", None, W=1024, BLOCK=1024)
    check(compiled, arch, 128, products=False)
    assert "LDG.E.128" in machine_code(compiled)[1]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_scan_compiles_for_amd(head_dim):
    """Triton brings a compiler for an MI300; kernels were never run there."""
    tiles = config.scan_tiles(head_dim, head_dim, torch.bfloat16, "ieee")
    constants: dict[str, Any] = {
        "K": head_dim,
        "V": head_dim,
        "REVERSE": True,
        "TRANSPOSED_STATES": True,
        "PRECISION": "ieee",
    }
    compiled = compile_kernel(kernels.scan_kernel, "gfx942", "bf16", tiles, **NO_STATES, **constants)
    assert compiled.metadata.shared <= 65_536
    assert "v_mfma" in compiled.asm["amdgcn"]
