"""Layers can be built and called under FakeTensorMode."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from lightning_attention import decay
from lightning_attention.nn import (
    CosFormerFeatures,
    EluFeatures,
    GatedLightningAttention,
    LearnedPositions,
    NormalizedLinearAttention,
    PositiveRandomFeatures,
    QuadraticLightningAttention,
    RandomFourierFeatures,
)

REAL_LOG_DECAY = decay.log_decay(2, preset="alibi")
LAYERS = {
    "lightning": lambda: GatedLightningAttention(16, 2, decay.log_decay(2, preset="alibi"), lrpe=True),
    "lightning, real decay": lambda: GatedLightningAttention(16, 2, REAL_LOG_DECAY),
    "lightning-1": lambda: QuadraticLightningAttention(16, 2, decay.log_decay(2, preset="alibi")),
    "elu": lambda: NormalizedLinearAttention(16, 2, EluFeatures(8)),
    "cosformer": lambda: NormalizedLinearAttention(16, 2, CosFormerFeatures(8, 64)),
    "rfa": lambda: NormalizedLinearAttention(16, 2, RandomFourierFeatures(2, 8)),
    "performer": lambda: NormalizedLinearAttention(16, 2, PositiveRandomFeatures(8)),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_fake_layer_has_the_right_metadata(make):
    with FakeTensorMode():
        layer, positions = make(), torch.arange(5)[None]
        y, state = layer(torch.randn(1, 5, 16), positions, state=torch.zeros(1, *layer.state_shape))
        encoded = LearnedPositions(10, 16)(positions)
    fake, real = ({**dict(x.named_parameters()), **dict(x.named_buffers())} for x in (layer, make()))
    assert fake.keys() == real.keys()
    for name, tensor in fake.items():
        assert isinstance(tensor, FakeTensor)
        assert (tensor.shape, tensor.dtype) == (real[name].shape, real[name].dtype)
    assert y.shape == encoded.shape == (1, 5, 16)
    assert state.shape == (1, *layer.state_shape)
