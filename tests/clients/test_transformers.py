"""transformers and accelerate: Trainer, pipeline, and loading of empty models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from tiny_model import tokens
from transformers import DataCollatorWithFlattening, PreTrainedTokenizerFast, Trainer, TrainingArguments, pipeline

from lightning_attention.models import LightningForCausalLM

pytestmark = pytest.mark.clients

SEQUENCES = [tokens(length, seed=length).tolist() for length in (3, 7, 1, 5)]
FLATTENING = {
    "position-ids": {},
    "flash-attn-kwargs": {"return_flash_attn_kwargs": True},
    "seq-idx": {"return_seq_idx": True},
    "both": {"return_flash_attn_kwargs": True, "return_seq_idx": True},
    "no-position-ids": {"return_flash_attn_kwargs": True, "return_position_ids": False},
}


@pytest.mark.parametrize("options", FLATTENING.values(), ids=FLATTENING)
def test_flattened_equals_separate(model: LightningForCausalLM, options: dict[str, bool]) -> None:
    packed = DataCollatorWithFlattening(**options)([{"input_ids": sequence} for sequence in SEQUENCES])
    with torch.no_grad():
        logits = model.eval()(**packed).logits[0]
        separate = [model(input_ids=torch.tensor([sequence])).logits[0] for sequence in SEQUENCES]
    torch.testing.assert_close(logits, torch.cat(separate))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient-checkpointing"])
def test_trainer_learns_from_flattened_sequences(
    model: LightningForCausalLM, tmp_path: Path, checkpointing: bool
) -> None:
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=20,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        gradient_checkpointing=checkpointing,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    data: Any = [{"input_ids": sequence} for sequence in SEQUENCES]
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    trainer = Trainer(model, arguments, data_collator=collator, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] / 2


def test_empty_model_loads_a_checkpoint(checkpoint: str, model: LightningForCausalLM) -> None:
    with init_empty_weights():
        empty = LightningForCausalLM(model.config)
    empty.tie_weights()
    filled = load_checkpoint_and_dispatch(empty, checkpoint, device_map={"": "cpu"})
    ids = tokens(2, 8)
    with torch.no_grad():
        torch.testing.assert_close(filled.eval()(ids).logits, model.eval()(ids).logits)


def test_layers_offloaded_to_disk_keep_logits(checkpoint: str, model: LightningForCausalLM, tmp_path: Path) -> None:
    with init_empty_weights():
        empty = LightningForCausalLM(model.config)
    empty.tie_weights()
    device_map: Any = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.layers": "disk"}
    filled = load_checkpoint_and_dispatch(empty, checkpoint, device_map=device_map, offload_folder=str(tmp_path / "d"))
    ids = tokens(2, 8)
    with torch.no_grad():
        torch.testing.assert_close(filled.eval()(ids).logits, model.eval()(ids).logits)


def test_pipeline_generates_as_the_model(model: LightningForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    generator = pipeline("text-generation", model=model.eval(), tokenizer=tokenizer, device="cpu")
    prompts = ["the number is", "red is not a"]
    texts = [
        answer[0]["generated_text"]
        for answer in generator(prompts, batch_size=2, max_new_tokens=5, do_sample=False, return_full_text=False)
    ]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    generated = model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, inputs.input_ids.shape[1] :]
    assert texts == tokenizer.batch_decode(generated, skip_special_tokens=True)
