"""Results do not depend on `torch.set_default_device`."""

from collections.abc import Callable, Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_model import VOCAB, make_config, make_model, save_checkpoint, tokens
from torch import Tensor

from lightning_attention.inference import Engine, SamplingOptions, StatePool, load, stream
from lightning_attention.training import PackedDataset, evaluate, segmented_loss
from lightning_attention.training.batches import join_sequences

EOS = 2
GREEDY = SamplingOptions(max_new_tokens=6, temperature=0)
SAMPLED = SamplingOptions(max_new_tokens=6, seed=3, top_k=5, top_p=0.9, repetition_penalty=1.2)
LENGTHS = 5, 9, 4, 12, 7
STREAM = np.concatenate([np.append(tokens(n, seed=n).numpy(), EOS) for n in LENGTHS]).astype(np.uint16)
STARTS = np.cumsum((0, *LENGTHS))[:-1] + np.arange(5)
MODEL = make_model(eos_token_id=None).eval()
PROMPTS, BATCH = [tokens(n, seed=1).tolist() for n in (3, 9, 6)], tokens(2, 5, seed=4)
UNIGRAM = torch.full((VOCAB,), 1 / VOCAB).log()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("run") / "checkpoint-1")


@pytest.fixture
def on_meta() -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """Call a function with the default device "meta"."""

    def call(function: Callable[[], Any]) -> Any:
        torch.set_default_device("meta")
        try:
            return function()
        finally:
            torch.set_default_device(None)

    yield call
    torch.set_default_device(None)


def sequences() -> list[dict[str, Tensor]]:
    dataset = PackedDataset(STREAM, 10, STARTS)
    return [dataset[i] for i in range(len(dataset))]


def served(options: SamplingOptions, **sizes: Any) -> list[list[int]]:
    engine = Engine(MODEL, prefix_slots=3, prefix_block=2, **sizes)
    return [completion.tokens for completion in engine.run(PROMPTS, options)]


def pooled() -> list[Tensor]:
    pool = StatePool(make_config(), 2)
    slots = [pool.allocate(), pool.allocate()]
    pool.zero(slots)
    pool.copy(*slots)
    pool.restore(slots[0], pool.snapshot(slots[1]) + 1)
    return [state.clone() for state in pool.states]


def gradients() -> list[Tensor]:
    batch: dict[str, Any] = join_sequences(sequences())
    MODEL.zero_grad()
    loss = segmented_loss(MODEL, **batch, segment_length=7)
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in MODEL.parameters() if parameter.grad is not None)]


CALLS: dict[str, Callable[[], Any]] = {
    "PackedDataset": sequences,
    "join_sequences": lambda: join_sequences(sequences()),
    "loss_of": lambda: PackedDataset(STREAM, 10, STARTS).loss_of(UNIGRAM),
    "Engine, greedy": lambda: served(GREEDY),
    "Engine, sampled": lambda: served(SAMPLED, prefill_tokens=4, max_requests=2),
    "StatePool": pooled,
    "evaluate": lambda: astuple(evaluate(MODEL, PackedDataset(STREAM, 10, STARTS), UNIGRAM, VOCAB)),
    "segmented_loss": gradients,
    "generate": lambda: MODEL.generate(BATCH, max_new_tokens=5, do_sample=False),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_default_device_keeps_results(on_meta, call):
    torch.testing.assert_close(on_meta(call), call(), rtol=0, atol=0)


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_default_device_keeps_text_of_a_checkpoint(on_meta, checkpoint, options):
    def text() -> str:
        model, tokenizer = load(checkpoint)
        return "".join(stream(model, tokenizer, "some text", options))

    assert on_meta(text) == text()
