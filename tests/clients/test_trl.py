"""TRL: supervised fine-tuning, with packing, DPO and GRPO."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from lightning_attention.models import LightningForCausalLM

trl = pytest.importorskip("trl", reason="needs TRL: make clients")
datasets = pytest.importorskip("datasets", reason="needs datasets: make clients")
pytestmark = pytest.mark.clients

TEXTS = ["the number is one", "red is a color", "two is not a color", "the color is blue", "three is a number"]
OPTIONS: dict[str, Any] = {
    "max_steps": 2,
    "learning_rate": 1e-2,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def sft(model: LightningForCausalLM | str, tokenizer: PreTrainedTokenizerFast, folder: Path, **options: Any) -> Any:
    return trl.SFTTrainer(
        model,
        args=trl.SFTConfig(output_dir=str(folder), **OPTIONS | {"max_length": 64} | options),
        train_dataset=datasets.Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer,
    )


PACKING = {
    "packed": {"packing": True, "per_device_train_batch_size": 1},
    "padding-free": {"padding_free": True, "max_length": None, "per_device_train_batch_size": 5},
}


@pytest.mark.parametrize("options", PACKING.values(), ids=PACKING)
def test_sft_packed_equals_separate(
    model: LightningForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, options: dict[str, Any]
) -> None:
    total, count = 0.0, 0
    for text in TEXTS:
        ids = tokenizer(text + "<eos>", return_tensors="pt").input_ids
        with torch.no_grad():
            total += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert losses(sft(model, tokenizer, tmp_path, **options))[0] == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient-checkpointing"])
def test_sft_learns(
    model: LightningForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, checkpointing: bool
) -> None:
    options = {"max_steps": 20, "gradient_checkpointing": checkpointing, "per_device_train_batch_size": 5}
    result = losses(sft(model, tokenizer, tmp_path, **options))
    assert result[-1] < result[0] / 2


def test_sft_loads_a_checkpoint_by_its_path(
    checkpoint: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    trainer = sft(checkpoint, tokenizer, tmp_path, model_init_kwargs={"trust_remote_code": True})
    assert type(trainer.model).__name__ == "LightningForCausalLM"
    assert len(losses(trainer)) == 2


PAIRS = {"prompt": ["one is a", "red is a"] * 4, "chosen": [" number", " color"] * 4, "rejected": [" the", " not"] * 4}


@pytest.mark.parametrize("loaded_by", ["class", "path"])
def test_dpo_prefers_chosen_answers(
    checkpoint: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, loaded_by: str
) -> None:
    options = OPTIONS | {"max_steps": 20, "per_device_train_batch_size": 8, "trust_remote_code": True}
    trainer = trl.DPOTrainer(
        LightningForCausalLM.from_pretrained(checkpoint) if loaded_by == "class" else checkpoint,
        args=trl.DPOConfig(output_dir=str(tmp_path), **options),
        train_dataset=datasets.Dataset.from_dict(PAIRS),
        processing_class=tokenizer,
    )
    trainer.train()
    margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert margins[-1] > margins[0] + 0.1


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient-checkpointing"])
def test_grpo_raises_the_reward(
    model: LightningForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, checkpointing: bool
) -> None:
    def reward(completions: list[str], **_: Any) -> list[float]:
        return [completion.split().count("red") / 4 for completion in completions]

    options = OPTIONS | {
        "max_steps": 15,
        "gradient_checkpointing": checkpointing,
        "per_device_train_batch_size": 16,
        "num_generations": 8,
        "max_completion_length": 4,
    }
    trainer = trl.GRPOTrainer(
        model,
        reward_funcs=reward,
        args=trl.GRPOConfig(output_dir=str(tmp_path), **options),
        train_dataset=datasets.Dataset.from_dict({"prompt": ["the color is", "a color is", "one is"] * 4}),
        processing_class=tokenizer,
    )
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert sum(rewards[-3:]) > sum(rewards[:3])
