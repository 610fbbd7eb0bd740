"""A layer made without memory: its decay is a constant, and right however memory comes to it."""

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
    """`to_empty`, with memory that was used before."""
    torch.use_deterministic_algorithms(True)  # which fills new memory with NaN
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


WAYS: dict[str, Callable[[], GatedLightningAttention]] = {
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


@pytest.mark.parametrize("way", WAYS)
def test_a_decay_is_right(way):
    module = WAYS[way]()
    assert torch.equal(module.decay.log_decay, LOG_DECAY)
    assert module.decay.log_decay.dtype == torch.float32


def test_a_loaded_layer_is_the_one_saved():
    source, target = layer(), emptied(on_meta())
    assert not any("decay" in name for name in source.state_dict())
    target.load_state_dict(source.state_dict())
    x, positions = torch.randn(2, 7, 24), torch.arange(7)[None]
    torch.testing.assert_close(target(x, positions), source(x, positions), rtol=0, atol=0)


def test_loading_by_accelerate(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    source = layer()
    torch.save(source.state_dict(), tmp_path / "layer.bin")
    target = accelerate.load_checkpoint_and_dispatch(
        under_accelerate(False), str(tmp_path / "layer.bin"), device_map={"": "cpu"}
    )
    x, positions = torch.randn(2, 7, 24), torch.arange(7)[None]
    torch.testing.assert_close(target(x, positions), source(x, positions), rtol=0, atol=0)


def test_setting_tensors_by_accelerate():
    utils = pytest.importorskip("accelerate.utils")
    source, target = layer(), under_accelerate(False)
    for name, value in source.state_dict().items():
        utils.set_module_tensor_to_device(target, name, "cpu", value=value)
    assert torch.equal(target.decay.log_decay, LOG_DECAY)


def test_memory_stays_where_nothing_moves():
    """A CUDA graph holds on to its address."""
    module = layer()
    address = module.decay.log_decay.data_ptr()
    assert module.to("cpu").half().decay.log_decay.data_ptr() == address


def test_a_layer_on_meta_does_not_run():
    x, positions = torch.randn(2, 7, 24), torch.arange(7)[None]
    module = layer()
    module.decay.to("meta")
    with pytest.raises(ValueError, match="log_decay must be on the device of q, cpu, got meta"):
        module(x, positions)


def test_a_decay_without_values_is_refused():
    with pytest.raises(ValueError, match="log_decay must have values, got a tensor on meta"):
        GatedLightningAttention(24, 3, torch.empty(3, device="meta"))
