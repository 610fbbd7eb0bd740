"""What is documented as float32 does not depend on `torch.set_default_dtype`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from lightning_attention import decay
from lightning_attention.nn import LRPE, GatedLightningAttention, PositiveRandomFeatures, RandomFourierFeatures

# Modules, and the names of their float32 parameters and buffers.
MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "rfa": (lambda: RandomFourierFeatures(3, 8), ("directions", "sigma")),
    "performer": (lambda: PositiveRandomFeatures(8), ("directions",)),
    "lrpe": (lambda: LRPE(3, 8), ("theta",)),
    "decay": (lambda: GatedLightningAttention(24, 3, decay.log_decay(3, preset="alibi")), ("decay.log_decay",)),
}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(("make", "names"), MODULES.values(), ids=MODULES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_default_dtype_changes_no_float32_part(make, names, dtype):
    expected = make()
    with default_dtype(dtype):
        module = make()
        with torch.device("meta"):
            on_meta = make()
    for name in names:
        path, _, attribute = name.rpartition(".")
        found, exact, empty = (getattr(x.get_submodule(path), attribute) for x in (module, expected, on_meta))
        assert found.dtype == empty.dtype == torch.float32
        assert torch.equal(found, exact)
        assert empty.is_meta
