"""transformers' generic heads on this model."""

import pytest
import torch
from tiny_model import make_config, tokens
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from lightning_attention.models import LightningForSequenceClassification

HEADS = {
    "sequence": (AutoModelForSequenceClassification, {"labels": torch.tensor([0, 2])}, ["score.weight"]),
    "token": (AutoModelForTokenClassification, {"labels": tokens(2, 9) % 3}, ["score.weight", "score.bias"]),
    "question": (
        AutoModelForQuestionAnswering,
        {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([4, 8])},
        ["qa_outputs.weight", "qa_outputs.bias"],
    ),
}


def logits_of(output) -> torch.Tensor:
    return torch.stack([output.start_logits, output.end_logits]) if "start_logits" in output else output.logits


@pytest.mark.parametrize("name", HEADS)
def test_heads_train_and_load(name, tmp_path):
    auto, labels, weights = HEADS[name]
    torch.manual_seed(0)
    model = auto.from_config(make_config(num_labels=3)).train()
    ids = tokens(2, 9)
    output = model(ids, **labels)
    output.loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert set(weights) <= set(dict(model.named_parameters()))
    model.eval().save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model)
    torch.testing.assert_close(logits_of(loaded(ids)), logits_of(model(ids)))


@pytest.mark.parametrize("name", HEADS)
def test_padded_equals_unpadded(name):
    auto, _, _ = HEADS[name]
    model = auto.from_config(make_config(num_labels=3)).eval()
    ids, mask = torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9, dtype=torch.long)
    ids[0, 4:], mask[0, 4:] = tokens(5, seed=1), 1
    ids[1, :7], mask[1, :7] = tokens(7, seed=2), 1
    with torch.no_grad():
        padded = logits_of(model(ids, attention_mask=mask))
        for b in range(2):
            at = mask[b] == 1
            alone = logits_of(model(ids[b, at][None]))
            found = padded[b] if name == "sequence" else padded[b, at] if name == "token" else padded[:, b, at]
            torch.testing.assert_close(found, alone[:, 0] if name == "question" else alone[0], rtol=1e-4, atol=1e-5)


def classifier(**options) -> LightningForSequenceClassification:
    torch.manual_seed(0)
    return LightningForSequenceClassification(make_config(num_labels=3, **options)).eval()


@pytest.mark.parametrize("given", ["input_ids", "inputs_embeds"])
@pytest.mark.parametrize("pad_token_id", [None, 0, 5])
@torch.no_grad()
def test_the_mask_marks_the_last_token_of_a_text(given, pad_token_id):
    """Whatever the padding is: pad_token_id finds it only where there is no mask."""
    model = classifier(pad_token_id=pad_token_id)
    ids, mask = tokens(2, 9), torch.tensor([[1] * 6 + [0] * 3, [0] * 2 + [1] * 7])
    ids[0, 6:] = 7
    x = {"input_ids": ids} if given == "input_ids" else {"inputs_embeds": model.get_input_embeddings()(ids)}
    logits = model(**x, attention_mask=mask).logits
    for b in range(2):
        alone = model(ids[b, mask[b] == 1][None], attention_mask=torch.ones(1, int(mask[b].sum()))).logits
        torch.testing.assert_close(logits[b], alone[0], rtol=1e-4, atol=1e-5)


def test_texts_whose_ends_are_unknown_are_refused():
    with pytest.raises(ValueError, match="several texts need an attention_mask"):
        classifier(pad_token_id=None)(tokens(2, 9))
    with pytest.raises(ValueError, match="every text must have a token that is not padding"):
        classifier()(tokens(2, 9), attention_mask=torch.tensor([[1] * 9, [0] * 9]))
