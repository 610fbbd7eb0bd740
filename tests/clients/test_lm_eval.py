"""lm-eval: its log-likelihoods equal the model's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from lightning_attention.models import LightningForCausalLM
from lightning_attention.training.tokenizer import byte_tokenizer

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval: make clients")
api = pytest.importorskip("lm_eval.api.instance", reason="needs lm-eval: make clients")
harness = pytest.importorskip("lm_eval.models.huggingface", reason="needs lm-eval: make clients")
pytestmark = pytest.mark.clients

PAIRS = [("the number is", " one"), ("red is a", " color"), ("the color is not", " red green blue")]


def wrap(model: LightningForCausalLM, tokenizer: PreTrainedTokenizerFast, **options: Any) -> Any:
    return harness.HFLM(model, tokenizer=tokenizer, batch_size=2, device="cpu", **options)


def log_likelihood(model: LightningForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str, count: int) -> float:
    """Sum of the log-likelihoods of the last `count` tokens."""
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        log_probabilities = model(ids).logits.log_softmax(-1)[0, :-1]
    return log_probabilities.gather(1, ids[0, 1:, None])[-count:].sum().item()


def test_loglikelihood_equals_the_model(model: LightningForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    requests = [api.Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(PAIRS)]
    answers = [answer for answer, _ in wrap(model.eval(), tokenizer).loglikelihood(requests)]
    expected = [log_likelihood(model, tokenizer, context + rest, len(rest.split())) for context, rest in PAIRS]
    assert answers == pytest.approx(expected, rel=1e-4)


def test_long_text_is_not_truncated(model: LightningForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    context = " ".join(["the number one"] * 1000)  # 3000 tokens, more than lm-eval's 2048
    model.config.max_position_embeddings = 4096
    [(answer, _)] = wrap(model.eval(), tokenizer).loglikelihood(
        [api.Instance("loglikelihood", {}, (context, " two"), 0)]
    )
    assert answer == pytest.approx(log_likelihood(model, tokenizer, context + " two", 1), rel=1e-4)


def test_long_text_is_not_truncated_by_default(model: LightningForCausalLM) -> None:
    """Neither the tokenizer of training nor the configuration limits the context length."""
    tokenizer, context = byte_tokenizer(), "number one " * 300 + "number"
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    wrapped = wrap(model.eval(), tokenizer)
    [(answer, _)] = wrapped.loglikelihood([api.Instance("loglikelihood", {}, (context, "."), 0)])
    assert len(tokenizer(context).input_ids) > 3000
    assert answer == pytest.approx(log_likelihood(model, tokenizer, context + ".", 1), rel=1e-4)


def test_checkpoint_is_evaluated_by_its_path(
    checkpoint: str, model: LightningForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    data = tmp_path / "task.jsonl"
    data.write_text('{"text": "the number is one"}\n{"text": "red is a color"}\n')
    task = {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    }
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": checkpoint, "dtype": "float32", "trust_remote_code": True},
        tasks=[task],
        device="cpu",
        batch_size=1,
        bootstrap_iters=0,
    )
    perplexity = results["results"]["tiny"]["word_perplexity,none"]
    texts = ["the number is one", "red is a color"]
    total = sum(log_likelihood(model.eval(), tokenizer, "<bos> " + text, 4) for text in texts)
    assert perplexity == pytest.approx(torch.tensor(-total / 8).exp().item(), rel=1e-4)
