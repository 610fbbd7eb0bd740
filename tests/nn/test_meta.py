"""A layer on the device "meta" gets the right decay, however its memory is allocated later."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch

from lightning_attention import decay
from lightning_attention.nn import GatedLightningAttention

LOG_DECAY = decay.log_decay(3, preset="alibi")


def layer() -> GatedLightningAttention:
    return GatedLightningAttention(24, 3, LOG_DECAY, lrpe=True)


def on_meta() -> GatedLightningAttention:
    with torch.device("meta"):
        return layer()


def emptied(module: GatedLightningAttention) -> GatedLightningAttention:
    """`to_empty`, with memory full of NaN."""
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        return module.to_empty(device="cpu")
    finally:
        torch.use_deterministic_algorithms(False)


def under_accelerate(include_buffers: bool) -> GatedLightningAttention:
    accelerate = pytest.importorskip("accelerate")
    with accelerate.init_empty_weights(include_buffers=include_buffers):
        return layer()


def pickled(module: GatedLightningAttention) -> GatedLightningAttention:
    return pickle.loads(pickle.dumps(module))


def saved(module: GatedLightningAttention) -> GatedLightningAttention:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


ALLOCATIONS: dict[str, Callable[[], GatedLightningAttention]] = {
    "to_empty": lambda: emptied(on_meta()),
    "copy, to_empty": lambda: emptied(copy.deepcopy(on_meta())),
    "to_empty, copy": lambda: copy.deepcopy(emptied(on_meta())),
    "pickle, to_empty": lambda: emptied(pickled(on_meta())),
    "save, to_empty": lambda: emptied(saved(on_meta())),
    "to meta and back": lambda: emptied(layer().to("meta")),
    "bfloat16, to_empty": lambda: emptied(on_meta().bfloat16()).float(),
    "to_empty, half": lambda: emptied(on_meta()).half().float(),
    "to_empty, double": lambda: emptied(on_meta()).double().float(),
    "accelerate": lambda: emptied(under_accelerate(False)),
    "accelerate, buffers too": lambda: emptied(under_accelerate(True)),
    "to_empty in inference mode": lambda: torch.inference_mode()(lambda: emptied(on_meta()))().cpu(),
    "shared": lambda: emptied(on_meta()).share_memory(),
}


@pytest.mark.parametrize("allocate", ALLOCATIONS.values(), ids=ALLOCATIONS)
def test_allocated_layer_has_its_decay(allocate):
    log_decay = allocate().decay.log_decay
    assert torch.equal(log_decay, LOG_DECAY)
    assert log_decay.dtype == torch.float32


def test_loaded_layer_equals_saved():
    source, target = layer(), emptied(on_meta())
    assert not any("decay" in name for name in source.state_dict())
    target.load_state_dict(source.state_dict())
    x, positions = torch.randn(2, 7, 24), torch.arange(7)[None]
    torch.testing.assert_close(target(x, positions), source(x, positions), rtol=0, atol=0)


def test_layer_loaded_by_accelerate_equals_saved(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    source = layer()
    torch.save(source.state_dict(), tmp_path / "layer.bin")
    target = accelerate.load_checkpoint_and_dispatch(
        under_accelerate(False), str(tmp_path / "layer.bin"), device_map={"": "cpu"}
    )
    x, positions = torch.randn(2, 7, 24), torch.arange(7)[None]
    torch.testing.assert_close(target(x, positions), source(x, positions), rtol=0, atol=0)


def test_layer_filled_by_accelerate_has_its_decay():
    utils = pytest.importorskip("accelerate.utils")
    source, target = layer(), under_accelerate(False)
    for name, value in source.state_dict().items():
        utils.set_module_tensor_to_device(target, name, "cpu", value=value)
    assert torch.equal(target.decay.log_decay, LOG_DECAY)


def test_casts_keep_the_address_of_the_decay():
    """A CUDA graph reads from its address."""
    module = layer()
    address = module.decay.log_decay.data_ptr()
    assert module.to("cpu").half().decay.log_decay.data_ptr() == address


CHANGES: dict[str, Callable[[GatedLightningAttention], object]] = {
    "in place": lambda module: module.log_decay.copy_(2 * LOG_DECAY),
    "assigned": lambda module: setattr(module.decay, "log_decay", 2 * LOG_DECAY),
}
MOVES: dict[str, Callable[[GatedLightningAttention], GatedLightningAttention]] = {
    "cpu": lambda module: module.to("cpu"),
    "casts": lambda module: module.bfloat16().float(),
    "double": lambda module: module.double(),
    "to meta and back": lambda module: emptied(module.to("meta")),
    "to_empty": emptied,
    "copy": copy.deepcopy,
    "pickle, cast": lambda module: pickled(module).half(),
    "twice": lambda module: emptied(module.to("meta")).half().to("cpu"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_changed_decay_is_kept_by_casts_and_moves(change, move):
    module = layer()
    change(module)
    log_decay = move(module).decay.log_decay
    assert torch.equal(log_decay, 2 * LOG_DECAY)
    assert log_decay.dtype == torch.float32


def test_decay_on_meta_is_refused_by_the_forward_pass():
    x, positions = torch.randn(2, 7, 24), torch.arange(7)[None]
    module = layer()
    module.decay.to("meta")
    with pytest.raises(ValueError, match="log_decay must be on the device of q, cpu, got meta"):
        module(x, positions)


def test_decay_on_meta_is_refused_by_the_constructor():
    with pytest.raises(ValueError, match="log_decay must have values, got a tensor on meta"):
        GatedLightningAttention(24, 3, torch.empty(3, device="meta"))
