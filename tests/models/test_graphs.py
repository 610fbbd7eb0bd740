"""Compiled and exported models: one graph, for inputs whose values it has not seen."""

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
def compile_anew():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # what some versions of PyTorch import here
        torch.compiler.reset()


def padded(T: int) -> torch.Tensor:
    """Rows of T columns with padding on either side, and inside."""
    mask = torch.ones(2, T, dtype=torch.long)
    mask[0, : T // 4], mask[1, T // 2 : T // 2 + 3], mask[1, -2:] = 0, 0, 0
    return mask


def restarting(T: int) -> torch.Tensor:
    return (torch.arange(T) % 11).expand(2, -1).contiguous()


INPUTS = {
    "mask": lambda T: {"attention_mask": padded(T)},
    "bool mask": lambda T: {"attention_mask": padded(T).bool()},
    "mask without padding": lambda T: {"attention_mask": torch.ones(2, T, dtype=torch.long)},
    "position_ids": lambda T: {"position_ids": torch.arange(T).expand(2, -1).contiguous()},
    "documents": lambda T: {"position_ids": restarting(T)},
    "documents and a mask": lambda T: {"position_ids": restarting(T), "attention_mask": padded(T)},
    "seq_idx": lambda T: {"seq_idx": torch.arange(T).expand(2, -1) // 7},
    "mask of numbers": lambda T: {"attention_mask": padded(T) * (1 + torch.arange(T) // 7), "use_cache": False},
}


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("case", INPUTS)
def test_compiled_without_a_graph_break(model, case, train):
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


def test_compiled_decoding_with_a_mask(model):
    ids, mask = tokens(2, 30), padded(30)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected, cache, logits = model(ids, attention_mask=mask).logits, LightningCache(1), []
        for start, stop in ((0, 6), *((t, t + 1) for t in range(6, 24)), (24, 30)):
            logits.append(compiled(ids[:, start:stop], attention_mask=mask[:, :stop], cache=cache).logits)
    at = mask == 1
    torch.testing.assert_close(torch.cat(logits, dim=1)[at], expected[at], rtol=1e-4, atol=1e-4)


def test_a_compiled_cache_holds_no_documents(model):
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
@pytest.mark.parametrize("case", ["nothing", *INPUTS])
def test_exported(model, case, is_dynamic):
    def inputs_of(T):
        inputs = INPUTS[case](T) if case in INPUTS else {}
        return {"input_ids": tokens(2, T)} | {name: x for name, x in inputs.items() if name != "use_cache"}

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
