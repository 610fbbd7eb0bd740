"""Compiled and exported models equal the eager model, with one graph for inputs of any values."""

import warnings

import pytest
import torch
from tiny_model import make_config, tokens
from torch.export import Dim, export

from lightning_attention.models import LightningCache, LightningForCausalLM


@pytest.fixture
def model() -> LightningForCausalLM:
    torch.manual_seed(0)
    return LightningForCausalLM(make_config(positions="lrpe-d", num_hidden_layers=1)).eval()


@pytest.fixture(autouse=True)
def reset_compiler():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # from imports of some PyTorch versions
        torch.compiler.reset()


def padded(T: int) -> torch.Tensor:
    """`[2, T]` mask with padding on the left, inside and on the right."""
    mask = torch.ones(2, T, dtype=torch.long)
    mask[0, : T // 4], mask[1, T // 2 : T // 2 + 3], mask[1, -2:] = 0, 0, 0
    return mask


def restarting(T: int) -> torch.Tensor:
    return (torch.arange(T) % 11).expand(2, -1).contiguous()


INPUTS = {
    "nothing": lambda T: {},
    "mask": lambda T: {"attention_mask": padded(T)},
    "bool mask": lambda T: {"attention_mask": padded(T).bool()},
    "mask without padding": lambda T: {"attention_mask": torch.ones(2, T, dtype=torch.long)},
    "position_ids": lambda T: {"position_ids": torch.arange(T).expand(2, -1).contiguous()},
    "packed": lambda T: {"position_ids": restarting(T)},
    "packed and a mask": lambda T: {"position_ids": restarting(T), "attention_mask": padded(T)},
    "seq_idx": lambda T: {"seq_idx": torch.arange(T).expand(2, -1) // 7},
    "mask of numbers": lambda T: {"attention_mask": padded(T) * (1 + torch.arange(T) // 7), "use_cache": False},
}


OTHER_SEQUENCES = {
    "positions that restart": {"position_ids": torch.arange(3)[None]},
    "another document": {"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 2, 2, 2]])},
    "a negative mask": {"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1, 1, -1]])},
    "other padding": {"attention_mask": torch.tensor([[1, 0, 1, 1, 1, 1, 1, 1]])},
    "seq_idx": {"seq_idx": torch.tensor([[1, 1, 1]])},
}


@pytest.mark.parametrize("case", OTHER_SEQUENCES)
@torch.no_grad()
def test_a_compiled_model_does_not_go_on_from_another_sequence(model, case):
    """The error comes when the graph runs, or while it is traced."""
    ids = tokens(1, 8)
    cache = model(ids[:, :5], use_cache=True).cache
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with pytest.raises((RuntimeError, ValueError), match=r"sequence|padding|seq_idx|Unsupported|Observed exception"):
        compiled(ids[:, 5:], cache=cache, **OTHER_SEQUENCES[case])


@torch.no_grad()
def test_a_compiled_model_goes_on_from_the_cache(model):
    ids, mask = tokens(1, 8), torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1]])
    expected = model(ids, attention_mask=mask).logits[:, 5:]
    cache = model(ids[:, :5], attention_mask=mask[:, :5], use_cache=True).cache
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    given = {"attention_mask": mask, "position_ids": torch.tensor([[4, 5, 6]])}
    torch.testing.assert_close(compiled(ids[:, 5:], cache=cache, **given).logits, expected)


@torch.no_grad()
def test_a_model_of_softmax_attention_is_one_graph():
    model, ids = LightningForCausalLM(make_config(layer_pattern="1:1")).eval(), tokens(2, 12)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids).logits, model(ids).logits)


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("case", INPUTS)
def test_compiled_equals_eager_without_graph_breaks(model, case, train):
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for T in (30,) if train else (30, 37):
        ids, inputs = tokens(2, T), INPUTS[case](T)
        at = inputs.get("attention_mask", torch.ones(2, T)) != 0
        if train:
            labels = torch.where(at, ids, -100)
            losses = [m(ids, labels=labels, **inputs | {"use_cache": False}).loss for m in (model, compiled)]
            gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
            torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
        else:
            with torch.no_grad():
                torch.testing.assert_close(compiled(ids, **inputs).logits[at], model(ids, **inputs).logits[at])


@pytest.mark.slow
@pytest.mark.parametrize("is_padded", [False, True], ids=["no mask", "mask"])
def test_compiled_decoding_equals_one_call(model, is_padded):
    ids, mask = tokens(2, 30), padded(30) if is_padded else torch.ones(2, 30)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = model(ids, attention_mask=mask if is_padded else None).logits
        cache, logits = LightningCache(1), []
        for start, stop in ((0, 6), *((t, t + 1) for t in range(6, 24)), (24, 30)):
            past = mask[:, :stop] if is_padded else None
            logits.append(compiled(ids[:, start:stop], attention_mask=past, cache=cache).logits)
    at = mask == 1
    torch.testing.assert_close(torch.cat(logits, dim=1)[at], expected[at], rtol=1e-4, atol=1e-4)


def test_compiled_cache_refuses_packed_sequences(model):
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), pytest.raises(RuntimeError, match="which a cache cannot hold"):
        compiled(tokens(2, 30), position_ids=restarting(30), use_cache=True)


class Logits(torch.nn.Module):
    def __init__(self, model: LightningForCausalLM, names: list[str]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.model(**dict(zip(self.names, inputs, strict=True)), use_cache=False).logits


@pytest.mark.parametrize("is_dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", INPUTS)
def test_exported_equals_eager(model, case, is_dynamic):
    def inputs_of(T):
        return {"input_ids": tokens(2, T)} | {name: x for name, x in INPUTS[case](T).items() if name != "use_cache"}

    inputs = inputs_of(30)
    module = Logits(model, list(inputs))
    dims = ({1: Dim("T", min=2, max=8192)},) * len(inputs) if is_dynamic else None
    with torch.no_grad():
        exported = export(module, tuple(inputs.values()), dynamic_shapes=(dims,) if dims else None).module()
        for T in (57, 5000) if is_dynamic else (30,):
            inputs = inputs_of(T)
            at = inputs.get("attention_mask", torch.ones(2, T)) != 0
            found, expected = exported(*inputs.values())[at], module(*inputs.values())[at]
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
