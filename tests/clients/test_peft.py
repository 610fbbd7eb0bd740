"""PEFT: adapters train, merge, save and load."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import tokens
from torch import Tensor

from lightning_attention.models import LightningForCausalLM

peft = pytest.importorskip("peft", reason="needs PEFT: make clients")
pytestmark = pytest.mark.clients

PROJECTIONS = ["qkvu_proj", "out_proj", "vu_proj"]  # out_proj is in the attention and in the GLU


def train_step(model: torch.nn.Module) -> None:
    ids = tokens(2, 8)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    model.eval()


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens(2, 8, seed=1)).logits


CONFIGS = {
    "lora": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=PROJECTIONS),
    "lora-all-linear": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"),
    "lora-trained-head": lambda: peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=PROJECTIONS, modules_to_save=["lm_head"]
    ),
    "ia3": lambda: peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["qkvu_proj", "mlp.out_proj"], feedforward_modules=["mlp.out_proj"]
    ),
}


def test_named_projections_are_all_linear_layers(model: LightningForCausalLM) -> None:
    linear = {name for name, module in model.model.named_modules() if isinstance(module, torch.nn.Linear)}
    for name in ("lora", "lora-all-linear"):
        adapted = peft.get_peft_model(model, CONFIGS[name]())
        assert {target.removeprefix("model.") for target in adapted.targeted_module_names} == linear
        model = adapted.unload()


@pytest.fixture(params=CONFIGS)
def adapted(request: pytest.FixtureRequest, model: LightningForCausalLM) -> Any:
    return peft.get_peft_model(model, CONFIGS[request.param]())


def test_step_trains_only_the_adapter(adapted: Any) -> None:
    before = {name: parameter.clone() for name, parameter in adapted.named_parameters()}
    untrained = logits(adapted)
    train_step(adapted)
    changed = {name for name, parameter in adapted.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed
    assert changed <= {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert not torch.equal(logits(adapted), untrained)


def test_adapter_loads_onto_the_base_model(checkpoint: str, adapted: Any, tmp_path: Path) -> None:
    train_step(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    reloaded = peft.PeftModel.from_pretrained(LightningForCausalLM.from_pretrained(checkpoint), tmp_path / "adapter")
    torch.testing.assert_close(logits(reloaded), logits(adapted))


def test_merged_model_loads_with_equal_logits(adapted: Any, tmp_path: Path) -> None:
    train_step(adapted)
    expected = logits(adapted)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(LightningForCausalLM.from_pretrained(tmp_path)), logits(merged))


def test_trained_head_keeps_the_embedding(model: LightningForCausalLM) -> None:
    embedding = model.get_parameter("model.embed_tokens.weight").clone()
    adapted: Any = peft.get_peft_model(model, CONFIGS["lora-trained-head"]())
    train_step(adapted)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged.get_input_embeddings().weight, embedding)
    assert not torch.equal(merged.lm_head.weight, embedding)


def test_adapted_generates_as_merged(adapted: Any) -> None:
    train_step(adapted)
    prompt = tokens(2, 6)
    options = {"input_ids": prompt, "max_new_tokens": 5, "do_sample": False}
    generated = adapted.generate(**options)
    assert torch.equal(generated, adapted.merge_and_unload().generate(**options))


def test_prefix_tuning_is_refused_naming_the_cache(model: LightningForCausalLM) -> None:
    """Prefix tuning prepends keys and values, which a recurrent state does not have."""
    ids = tokens(2, 8)
    with pytest.raises(TypeError, match="LightningCache"):
        peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))(input_ids=ids)


def test_prompt_tuning_trains(model: LightningForCausalLM) -> None:
    adapted = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    untrained = logits(adapted)
    train_step(adapted)
    assert not torch.equal(logits(adapted), untrained)


@pytest.mark.filterwarnings("ignore:Position ids are not supported")  # PEFT's, of every generate()
@pytest.mark.parametrize("config", [peft.PromptTuningConfig, peft.PromptEncoderConfig], ids=["prompts", "p-tuning"])
def test_virtual_tokens_are_read_once_by_generate(model: LightningForCausalLM, config: Any) -> None:
    adapted = peft.get_peft_model(model, config(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    ids = tokens(2, 6)
    expected = ids
    for _ in range(5):
        expected = torch.cat([expected, logits_of(adapted, expected)[:, -1:].argmax(dim=-1)], dim=1)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert torch.equal(adapted.generate(input_ids=ids, **options), expected)
    left = torch.cat([torch.zeros(2, 2, dtype=torch.int64), ids], dim=1)
    found = adapted.generate(input_ids=left, attention_mask=(left != 0).long(), **options)
    assert torch.equal(found[:, 2:], expected)


def logits_of(adapted: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return adapted(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("config", [peft.PromptTuningConfig, peft.PromptEncoderConfig], ids=["prompts", "p-tuning"])
def test_virtual_tokens_go_with_padding(model: LightningForCausalLM, config: Any) -> None:
    """PEFT prepends ones of float32 to the mask, as a data collator gives it."""
    adapted = peft.get_peft_model(model, config(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    ids, mask = tokens(2, 8), torch.ones(2, 8, dtype=torch.int64)
    mask[1, 5:] = 0
    padded = adapted(input_ids=ids, attention_mask=mask, labels=ids)
    alone = adapted(input_ids=ids[1:, :5], attention_mask=mask[1:, :5])
    assert padded.loss.isfinite()
    torch.testing.assert_close(padded.logits[1, :9], alone.logits[0], rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_keeps_gradients(model: LightningForCausalLM) -> None:
    adapted = peft.get_peft_model(model, CONFIGS["lora"]()).train()
    ids = tokens(2, 8)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            adapted.gradient_checkpointing_enable()
            adapted.enable_input_require_grads()
        adapted.zero_grad()
        adapted(input_ids=ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in adapted.parameters() if p.grad is not None])
    torch.testing.assert_close(gradients[0], gradients[1])
