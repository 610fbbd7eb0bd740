"""Where the Triton kernels run: on a GPU (`pytest -m gpu`), or interpreted (`TRITON_INTERPRET=1 pytest -m triton`)."""

import os
from importlib.util import find_spec

import hypothesis
import pytest
import torch

# Each process of pytest-xdist sees one GPU, or GPUS_PER_PROCESS. This has to come before CUDA is initialized, which
# `oracle` does.
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and (count := torch.cuda.device_count()) > 1:
    names = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))).split(",")
    gpus = int(os.environ.get("GPUS_PER_PROCESS", "1"))
    first = int(worker.removeprefix("gw")) * gpus % (count - count % gpus or 1)
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names[first : first + gpus])

from oracle import HAS_GPU, INTERPRETED


class TorchRandom:
    """The generator of torch for hypothesis, which seeds it before every example: one that fails fails again."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


TORCH_RANDOM = TorchRandom()  # hypothesis keeps a weak reference
hypothesis.register_random(TORCH_RANDOM)

# Where the tests of kernels run there may be no server: it needs the extra "serve", and its tests the extra "dev".
NEEDED_BY_SERVER = "fastapi", "uvicorn", "openai", "httpx", "prometheus_client"
collect_ignore = [] if all(map(find_spec, NEEDED_BY_SERVER)) else ["serving", "cli/test_serve.py", "test_docs.py"]

HAS_TRITON = find_spec("triton") is not None
CAN_INTERPRET = INTERPRETED and HAS_TRITON


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("triton"):
            if HAS_GPU:
                item.add_marker(pytest.mark.gpu)
            elif not CAN_INTERPRET:
                item.add_marker(pytest.mark.skip(reason="needs a GPU, or TRITON_INTERPRET=1"))
        elif item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Keep bytes out of test names: compressed bytes hold the time, and workers of pytest-xdist must agree on names."""
    return argname if isinstance(val, bytes) else None


def pytest_runtest_setup() -> None:
    torch.manual_seed(0)  # a test draws the same numbers alone and among others
    if HAS_TRITON:
        from lightning_attention.ops.gpu import plan

        plan.clear()  # tests patch how sequences are cut, which is not part of a plan's key
