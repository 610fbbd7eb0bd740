"""Where the Triton kernels run: on a GPU (`pytest -m gpu`), or interpreted (`TRITON_INTERPRET=1 pytest -m triton`)."""

import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("triton"):
            if HAS_GPU:
                item.add_marker(pytest.mark.gpu)
            elif not INTERPRETED:
                item.add_marker(pytest.mark.skip(reason="needs a GPU, or TRITON_INTERPRET=1"))
        elif item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
