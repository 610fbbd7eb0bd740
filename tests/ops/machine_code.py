"""Kernels compiled without a GPU, and what the compiler made of them."""

import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import triton

TENSORS = {"q", "k", "v", "o", "do", "dk", "dv"}
STATES = {"initial_state", "interval_states", "final_state", "states", "factors", "log_decay", "state"}
STATES |= {"d_initial_state", "d_final_state"}
INTEGERS = {"cu_seqlens", "state_indices", "state_positions", "parents", "last"}


def signature_of(kernel: Any, dtype: str, constants: dict[str, Any]) -> tuple[dict[str, str], dict]:
    """With every optional tensor given that is no constant, which takes most registers; and what is aligned to 16."""
    signature: dict[str, str] = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in TENSORS:
            signature[name] = f"*{dtype}"
        elif name in STATES:
            signature[name] = "*fp32"
        elif name in INTEGERS:
            signature[name] = "*i32"
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
    aligned = [
        i for i, name in enumerate(signature) if signature[name].startswith("*") or re.match(r"stride_\w+[bth]", name)
    ]
    return signature, {(i,): [["tt.divisibility", 16]] for i in aligned}


@cache
def cuobjdump(*arguments: str) -> str:
    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout


def machine_code(compiled: Any) -> tuple[int, str]:
    """Bytes of local memory of a thread, and the instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = cuobjdump("-res-usage", file.name), cuobjdump("-sass", file.name)
    found = re.search(r"STACK:(\d+)", usage)
    assert found is not None
    return int(found[1]), code


def loops(code: str) -> list[list[str]]:
    """The instructions between a branch backwards and its target, of every such branch."""
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
