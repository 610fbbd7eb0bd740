"""Layers compiled in place equal eager layers, with one graph for inputs of any size."""

import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tiny_model import make_config, tokens
from torch._dynamo.utils import counters

from lightning_attention.models import LightningForCausalLM, compile_layers
from lightning_attention.training import segmented_loss

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:The .grad attribute:UserWarning"
    ),
]


@pytest.fixture(autouse=True)
def reset_compiler():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # from imports of some PyTorch versions
        torch.compiler.reset()
    counters.clear()


def num_graphs() -> int:
    return counters["stats"]["unique_graphs"]


def models() -> tuple[LightningForCausalLM, LightningForCausalLM]:
    """An eager model and its compiled copy: a layer with LRPE-d, and layers without."""
    eager, compiled = (LightningForCausalLM(make_config(positions="mix")) for _ in range(2))
    compiled.load_state_dict(eager.state_dict())
    compile_layers(compiled, "aot_eager")
    return eager, compiled


def restarting(*shape: int, every: int) -> torch.Tensor:
    return (torch.arange(shape[-1]) % every).expand(shape).contiguous()


def whole(batch_size: int, length: int, every: int | None) -> dict[str, Any]:
    """Packed inputs with `cu_seqlens`, or batch rows."""
    ids = tokens(batch_size, length)
    if every is None:
        return {"input_ids": ids, "labels": ids, "position_ids": restarting(batch_size, length, every=length)}
    total = batch_size * length
    bounds = torch.tensor([*range(0, total, every), total])
    return {"input_ids": ids.view(1, -1), "labels": ids.view(1, -1), "cu_seqlens": bounds}


def loss_of(model: LightningForCausalLM, inputs: dict[str, Any], segment_length: int | None) -> torch.Tensor:
    if segment_length is None:
        return model(**inputs, use_cache=False).loss
    return segmented_loss(model, **inputs, segment_length=segment_length)


SIZES = [(2, 32, None), (3, 45, None), (2, 9, None)]
PACKED = [(2, 32, 7), (1, 45, 20), (3, 12, 3)]
# Cases: inputs, tokens per training segment. The last segments are shorter.
INPUTS = {
    "batch rows": (SIZES, None),
    "packed": (PACKED, None),
    "segments of batch rows": (SIZES, 7),
}


@pytest.mark.parametrize(("sizes", "segment_length"), INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize(
    "is_checkpointed",
    [False, True],
    ids=["", "gradient checkpointing"],
)
def test_loss_and_gradients_equal_eager_with_a_graph_for_all_sizes(sizes, segment_length, is_checkpointed):
    """Two graphs, for the first layer and the others; the forward pass of segments needs two without gradients."""
    eager, compiled = models()
    if is_checkpointed:
        eager.gradient_checkpointing_enable()
        compiled.gradient_checkpointing_enable()
    for size in sizes:
        for model in (eager, compiled):
            model.zero_grad()
            loss_of(model.train(), whole(*size), segment_length).backward()
        for (name, expected), actual in zip(eager.named_parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-4, atol=1e-5, msg=name)
    assert num_graphs() == (2 if segment_length is None else 4)


@pytest.mark.parametrize(("sizes", "segment_length"), INPUTS.values(), ids=INPUTS)
def test_evaluation_equals_eager_with_a_graph_for_all_sizes(sizes, segment_length):
    eager, compiled = (model.eval() for model in models())
    with torch.no_grad():
        for size in sizes:
            losses = [loss_of(model, whole(*size), segment_length) for model in (compiled, eager)]
            torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    assert num_graphs() == 2


def test_training_and_evaluation_in_turn_compile_once():
    _, model = models()
    for size in PACKED:
        loss_of(model.train(), whole(*size), None).backward()
        with torch.no_grad():
            loss_of(model.eval(), whole(*size), None)
    assert num_graphs() == 4


@pytest.mark.parametrize("segment_length", [None, 7], ids=["at once", "segments"])
def test_autocast_reaches_compiled_layers(segment_length):
    eager, compiled = models()
    inputs = whole(2, 32, None)
    with torch.autocast("cpu", torch.bfloat16):
        losses = [loss_of(model, inputs, segment_length) for model in (compiled, eager)]
    torch.testing.assert_close(*losses, rtol=1e-2, atol=0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16) if segment_length is None else nullcontext():
        exact = loss_of(eager, inputs, segment_length)
    assert losses[0] != exact or segment_length is None


def test_a_compiled_model_saves_generates_and_has_the_weights_of_an_eager_one(tmp_path):
    eager, compiled = models()
    assert list(compiled.state_dict()) == list(eager.state_dict())
    compiled.save_pretrained(tmp_path)
    loaded = LightningForCausalLM.from_pretrained(tmp_path)
    for name, weight in eager.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight)
    ids = tokens(1, 9)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert torch.equal(compiled.eval().generate(ids, **options), eager.eval().generate(ids, **options))


def test_models_without_layers_are_refused():
    with pytest.raises(TypeError, match="takes a model with lightning attention layers, got Linear"):
        compile_layers(torch.nn.Linear(2, 2))
