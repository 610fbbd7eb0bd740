"""Kernels compiled without a GPU, and the machine code that the compiler made.

`python tests/ops/machine_code.py` compiles every variant of the Hopper kernels, and prints those whose machine code is
not as recorded in `hopper_machine_code.json`; with `--write` it records them. It compiles with the Triton that Python
finds: run it once for each version in that file (`PYTHONPATH=.venv/triton-3.9.0 python ...`). Record machine code only
when a change of it is intended, and the kernels have been timed on a GPU.
"""

import argparse
import hashlib
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from lightning_attention.ops.hopper import config, gradients, kernels, states

TENSORS = {"q", "k", "v", "o", "do", "dk", "dv", "logits"}
TENSORS |= {"keys", "values"}
TENSORS |= {"qkvu", "dq", "du", "dqkvu", "vu", "dvu", "x", "u", "y", "dx", "dy"}
STATES = {"initial_state", "interval_states", "final_state", "states", "factors", "log_decay", "state"}
STATES |= {"d_initial_state", "d_final_state", "losses"}
POOL = {"final_state", "states", "state"}
INTEGERS = {"starts", "cu_seqlens", "state_positions", "parents", "last"}
INTEGERS |= {"count", "lengths"}
INTEGERS |= {"state_indices", "saved_indices", "final_indices"}
LONG_INTEGERS = {"labels"}
BOOLS = {"has_initial_state"}
FLOATS = {"scale", "eps"}

HASHES = Path(__file__).with_name("hopper_machine_code.json")

# Optional tensors of the Hopper kernels, and those that a launch gives them.
INITIAL_AND_FINAL = {"initial_state", "final_state", "d_initial_state", "d_final_state"}
SLOTS = {"final_indices", "stride_slot"}
OPTIONAL = {"log_decay", "cu_seqlens", "interval_states", *INITIAL_AND_FINAL, *SLOTS}
GIVEN = {
    "no_decay": set(),
    "decay": {"log_decay"},
    "states": {"log_decay", *INITIAL_AND_FINAL},
    "packed": {"log_decay", "cu_seqlens"},
    "everything": {"log_decay", "cu_seqlens", *INITIAL_AND_FINAL},
    "slots": {"log_decay", "cu_seqlens", *INITIAL_AND_FINAL, *SLOTS},
}
# Where the state before a segment comes from: there is one segment, chunks before it are read, or states are summed.
CUTS = {
    "no_decay": ["uncut"],
    "decay": ["uncut", "prefix"],
    "states": ["segments"],
    "packed": ["uncut", "prefix"],
    "everything": ["prefix", "segments"],
    "slots": ["prefix", "segments"],
}
# Arguments of the scan for each output that it computes.
SCANS = {
    "o": {"REVERSE": False, "TRANSPOSED_STATES": False, "OVERLAP_PREVIOUS": False},
    "dq": {"REVERSE": False, "TRANSPOSED_STATES": True, "OVERLAP_PREVIOUS": False},
    "dk": {"REVERSE": True, "TRANSPOSED_STATES": True, "OVERLAP_PREVIOUS": True},
    "dv": {"REVERSE": True, "TRANSPOSED_STATES": False, "OVERLAP_PREVIOUS": True},
}


class Variant(NamedTuple):
    """A Hopper kernel with the constants of a launch, where tensors that are not given are None."""

    kernel: Any
    value_dim: int
    given: str
    cut: str
    constants: dict[str, Any]

    def compile(self) -> Any:
        signature, aligned = signature_of(self.kernel, "bf16", self.constants)
        source = GluonASTSource(self.kernel, signature, self.constants, aligned)
        options = {"num_warps": 4, "maxnreg": config.MAX_REGISTERS[self.value_dim]}
        with knobs.compilation.scope():
            knobs.compilation.disable_line_info = True  # line numbers change the order of instructions
            return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def hopper_variants() -> dict[str, Variant]:
    """Variants that launches ask for, by name: what is computed, K and V, tensors that are given, and the cut."""
    return {"-".join([*names, variant.given, variant.cut]): variant for names, variant in _variants()}


def _variants() -> Iterator[tuple[list[str], Variant]]:
    for given, cuts in CUTS.items():
        for cut in cuts:
            for (K, V), stages in config.SCAN_STAGES.items():
                for output, options in SCANS.items():
                    if options["REVERSE"] and K == V:  # gradient_kernel computes both
                        continue
                    if given == "slots" and output != "o":
                        continue
                    constants = {"K": K, "V": V} | options | {"PREFIX": cut == "prefix", "STAGES": stages}
                    constants |= {} if output in ("o", "dv") else {"final_state": None}
                    yield [output, f"{K}x{V}"], _variant(kernels.scan_kernel, V, given, cut, constants)
            for D, stages in config.GRADIENT_STAGES.items() if given != "slots" else ():
                constants = {"D": D, "PREFIX": cut == "prefix", "STAGES": stages}
                yield ["dkdv", f"{D}x{D}"], _variant(gradients.gradient_kernel, D, given, cut, constants)
    for given in ("decay", "packed"):
        for (K, V), stages in config.STATE_STAGES.items():
            for reverse in (False, True):
                constants = {"K": K, "V": V, "REVERSE": reverse, "STAGES": stages}
                variant = _variant(states.interval_state_kernel, V, given, "segments", constants)
                yield ["d_states" if reverse else "states", f"{K}x{V}"], variant


def _variant(kernel: Any, V: int, given: str, cut: str, constants: dict[str, Any]) -> Variant:
    present = GIVEN[given] | ({"interval_states"} if cut == "segments" else set())
    absent = (OPTIONAL - present).intersection(kernel.arg_names)
    return Variant(kernel, V, given, cut, dict.fromkeys(sorted(absent)) | constants)


def hash_of(shared_memory: int, code: str) -> str:
    """Hash of instructions and of the bytes of shared memory."""
    return hashlib.sha256(f"{shared_memory} {code}".encode()).hexdigest()[:12]


def recorded_hashes() -> dict[str, dict[str, str]]:
    """Hashes of every variant, by version of Triton."""
    return json.loads(HASHES.read_text()) if HASHES.exists() else {}


def signature_of(kernel: Any, dtype: str, constants: dict[str, Any], pool: str = "fp32") -> tuple[dict[str, str], dict]:
    """Types of arguments, and attributes of those aligned to 16 bytes. Tensors are given unless they are constants.

    States that a scan writes have the dtype of a pool.
    """
    signature: dict[str, str] = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in TENSORS:
            signature[name] = f"*{dtype}"
        elif name in STATES:
            signature[name] = f"*{pool}" if name in POOL else "*fp32"
        elif name in INTEGERS:
            signature[name] = "*i32"
        elif name in LONG_INTEGERS:
            signature[name] = "*i64"
        elif name in BOOLS:
            signature[name] = "*i1"
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
    aligned = [
        i
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or (kind != "constexpr" and re.match(r"stride_(\w+[bth]|slot|state|keys|values)", name))
    ]
    return signature, {(i,): [["tt.divisibility", 16]] for i in aligned}


@cache
def cuobjdump(*arguments: str) -> str:
    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout


def machine_code(compiled: Any) -> tuple[int, str]:
    """Bytes of local memory per thread, and the instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = cuobjdump("-res-usage", file.name), cuobjdump("-sass", file.name)
    found = re.search(r"STACK:(\d+)", usage)
    assert found is not None
    return int(found[1]), code


def loops(code: str) -> list[list[str]]:
    """Instructions of every loop: from the target of a backward branch to the branch."""
    found = [
        (int(m[1], 16), m[2])
        for line in code.splitlines()
        if (m := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", line))
    ]
    place = {address: i for i, (address, _) in enumerate(found)}
    bodies = []
    for i, (address, instruction) in enumerate(found):
        branch = re.search(r"BRA\S* (?:\S+, )?0x([0-9a-f]+)", instruction)
        if branch and (target := int(branch[1], 16)) < address:
            bodies.append([text for _, text in found[place[target] : i + 1]])
    return bodies


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare or record the machine code of the Hopper kernels.")
    parser.add_argument("--write", action="store_true", help="record the machine code")
    arguments = parser.parse_args()
    found = {}
    for name, variant in hopper_variants().items():
        compiled = variant.compile()
        found[name] = hash_of(compiled.metadata.shared, machine_code(compiled)[1])
    recorded = recorded_hashes()
    before = recorded.get(triton.__version__, {})
    changed = [name for name in before | found if before.get(name) != found.get(name)]
    print(f"Triton {triton.__version__}: {len(changed)} of {len(found)} variants differ", *changed, sep="\n  ")
    if arguments.write:
        HASHES.write_text(json.dumps(recorded | {triton.__version__: found}, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
