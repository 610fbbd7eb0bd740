"""Hopper's kernels, in every configuration of sizes, direction and cut, compiled without a GPU."""

from typing import Any

import pytest

triton = pytest.importorskip("triton", "3.6")

from ops.machine_code import loops, machine_code, signature_of  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402

from lightning_attention.ops.hopper import config, gradients, kernels, states  # noqa: E402

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter does not compile")

# Of a multiprocessor; a program has 1024 bytes beside its own.
SHARED_MEMORY = 233_472
# Loads and stores of local memory in the loop over chunks, of some 600 instructions; Triton 3.8 and 3.9 have the most.
SPILLS_IN_LOOP = {
    "scan_kernel": {"nothing": 40, "packed": 80, "everything": 120},
    "gradient_kernel": {"nothing": 80, "packed": 100, "everything": 120},
    "interval_state_kernel": {"nothing": 0, "packed": 0},
}
# Products wait for each other where the compiler finds too few registers for those that are to be under way.
WAITS_IN_LOOP = 14
OPTIONAL = {
    "log_decay",
    "initial_state",
    "interval_states",
    "final_state",
    "d_final_state",
    "d_initial_state",
    "cu_seqlens",
}
# Optional tensors that are given.
GIVEN = {"nothing": {"log_decay"}, "packed": {"log_decay", "cu_seqlens"}, "everything": OPTIONAL}


def check(kernel: Any, V: int, given: str, constants: dict[str, Any], num_stores: int, *, waits: bool) -> None:
    """Compile with states of intervals or a prefix, never both.

    A kernel launched before the last one has ended, and no other, `waits` for it.
    """
    prefix = constants.get("PREFIX")
    makes_states = kernel is states.interval_state_kernel
    present = GIVEN[given] - ({"interval_states"} if prefix else set()) | (
        {"interval_states"} if makes_states else set()
    )
    absent = OPTIONAL.intersection(kernel.arg_names) - present
    constants = dict.fromkeys(absent) | constants
    signature, aligned = signature_of(kernel, "bf16", constants)
    source = GluonASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": 4, "maxnreg": config.MAX_REGISTERS[V]}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert (compiled.metadata.shared + 1024) * config.programs_per_multiprocessor(V) <= SHARED_MEMORY
    _, code = machine_code(compiled)
    assert "UTMALDG.4D" in code
    assert ("ACQBULK" in code) == waits
    assert ("PREEXIT" in code) == (kernel is not gradients.gradient_kernel)  # which nothing runs beside
    hot = [body for body in loops(code) if count(body, "UTMASTG") == num_stores and count(body, "HGMMA")]
    num_groups = V // 64
    hot = sorted(hot, key=len)[:num_groups]
    assert len(hot) == num_groups
    for body in hot:
        assert count(body, "LDL") + count(body, "STL") <= SPILLS_IN_LOOP[kernel.fn.__name__][given]
        assert count(body, "WARPGROUP") <= WAITS_IN_LOOP


def count(body: list[str], instruction: str) -> int:
    return sum(instruction in text for text in body)


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize(("K", "V"), config.SCAN_STAGES, ids=str)
def test_scan(K, V, given, reverse, prefix):
    transposed = given == "everything" and prefix == reverse
    constants = {
        "K": K,
        "V": V,
        "REVERSE": reverse,
        "TRANSPOSED_STATES": transposed,
        "PREFIX": prefix,
        "BESIDE": reverse,
    }
    waits = reverse or (given == "everything" and not prefix)
    constants["STAGES"] = config.SCAN_STAGES[K, V]
    check(kernels.scan_kernel, V, given, constants, num_stores=1, waits=waits)


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("D", config.GRADIENT_STAGES)
def test_gradient(D, given, prefix):
    constants = {"D": D, "PREFIX": prefix, "STAGES": config.GRADIENT_STAGES[D]}
    check(gradients.gradient_kernel, D, given, constants, num_stores=2, waits=True)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("given", ["nothing", "packed"])
@pytest.mark.parametrize(("K", "V"), config.STATE_STAGES, ids=str)
def test_states(K, V, given, reverse):
    constants = {"K": K, "V": V, "REVERSE": reverse, "STAGES": config.STATE_STAGES[K, V]}
    check(states.interval_state_kernel, V, given, constants, num_stores=0, waits=reverse)
