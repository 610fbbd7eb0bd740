"""Machine code and resources of every variant of the Hopper kernels, compiled without a GPU."""

import re

import pytest

triton = pytest.importorskip("triton", "3.6")

from ops.machine_code import hash_of, hopper_variants, loops, machine_code, recorded_hashes  # noqa: E402

from lightning_attention.ops.hopper import config, gradients, kernels, states  # noqa: E402

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter does not compile"),
]

# Bytes of a multiprocessor; a program takes 1024 besides its own.
SHARED_MEMORY = 233_472
# Loads and stores of local memory in the loop over chunks, of some 600 instructions; Triton 3.8 and 3.9 have the most.
SPILLS_IN_LOOP = {
    "scan_kernel": {"no_decay": 40, "decay": 40, "states": 120, "packed": 80, "everything": 120, "slots": 120},
    "gradient_kernel": {"no_decay": 80, "decay": 80, "states": 120, "packed": 100, "everything": 120},
    "interval_state_kernel": {"decay": 0, "packed": 0},
}
# Products wait for each other where the compiler finds too few registers for those that are to be in flight.
WAITS_IN_LOOP = 14
VARIANTS = hopper_variants()
HASHES = recorded_hashes()


def is_slow(name: str) -> bool:
    output, _, given, _ = name.split("-")
    return output == "dq" or given in ("no_decay", "states")


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=[pytest.mark.slow] * is_slow(name)) for name in VARIANTS]
)
def compiled(request):
    """Name of a variant, its bytes of shared memory, its instructions, and the code that LLVM gets."""
    found = VARIANTS[request.param].compile()
    return request.param, found.metadata.shared, machine_code(found)[1], found.asm["llir"]


@pytest.mark.skipif(triton.__version__ not in HASHES, reason=f"hashes are of Triton {', '.join(HASHES)} only")
def test_machine_code_is_unchanged(compiled):
    """See machine_code.py for how to change hashes on purpose."""
    name, shared_memory, code, _ = compiled
    assert hash_of(shared_memory, code) == HASHES[triton.__version__][name]


def test_kernels_fit_a_multiprocessor(compiled):
    name, shared_memory, *_ = compiled
    assert (shared_memory + 1024) * config.programs_per_multiprocessor(VARIANTS[name].value_dim) <= SHARED_MEMORY


def test_descriptors_and_barriers_share_no_memory(compiled):
    """Though a barrier may have been used for the last time: descriptors that lay on one were corrupted."""
    *_, code = compiled
    barriers = offsets(code, "mbarrier.init")
    descriptors = offsets(code, "tensormap.replace.tile.global_address")
    assert barriers
    assert descriptors
    assert not [(x, y) for x in descriptors for y in barriers if x - 8 < y < x + 128]


def offsets(code: str, instruction: str) -> set[int]:
    """Offsets in shared memory of what an instruction writes."""
    lines = [line for line in code.splitlines() if instruction in line]
    return {int(x[1] or 0) for line in lines for x in re.finditer(r"@global_smem(?:, i(?:32|64) (\d+)\))?", line)}


def test_overlap_of_kernels(compiled):
    """Kernels wait for the kernel launched before only if they use its results or overlap it."""
    name, _, code, _ = compiled
    variant = VARIANTS[name]
    is_scan = variant.kernel is kernels.scan_kernel
    is_gradient = variant.kernel is gradients.gradient_kernel
    overlaps = variant.constants["OVERLAP_PREVIOUS"] if is_scan else is_gradient or variant.constants["REVERSE"]
    sums_states = is_scan and variant.cut == "segments"
    assert ("ACQBULK" in code) == (overlaps or sums_states)
    assert ("PREEXIT" in code) != is_gradient  # no kernel overlaps the gradients


def test_the_loop_over_chunks_loads_by_tma_and_spills_and_waits_little(compiled):
    """TMA loads tiles; products rarely wait, and few registers are spilled."""
    name, _, code, _ = compiled
    variant = VARIANTS[name]
    assert "UTMALDG.4D" in code
    num_stores = {kernels.scan_kernel: 1, gradients.gradient_kernel: 2, states.interval_state_kernel: 0}[variant.kernel]
    num_groups = variant.value_dim // 64
    hot = [body for body in loops(code) if count(body, "UTMASTG") == num_stores and count(body, "HGMMA")]
    hot = sorted(hot, key=len)[:num_groups]
    assert len(hot) == num_groups
    for body in hot:
        assert count(body, "LDL") + count(body, "STL") <= SPILLS_IN_LOOP[variant.kernel.fn.__name__][variant.given]
        assert count(body, "WARPGROUP") <= WAITS_IN_LOOP


def count(body: list[str], instruction: str) -> int:
    return sum(instruction in text for text in body)
