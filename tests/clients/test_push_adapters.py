"""LoRA adapters on the Hub: their card, and that they load with their base model from there."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import fake_hub
from huggingface_hub import ModelCard
from tiny_model import save_checkpoint
from training.runs import command, options, quiet, write_inputs

from lightning_attention.models.adapters import merge_checkpoint
from lightning_attention.models.card import metadata
from lightning_attention.training import train

pytest.importorskip("peft", reason="needs PEFT: make clients")
pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore::FutureWarning")]
LOADED = """
import lightning_attention.models, torch
from transformers import AutoModelForCausalLM
from lightning_attention.inference import load
model = AutoModelForCausalLM.from_pretrained("team/adapters").eval()
ids = torch.tensor([[256, *b"3 times"]])
torch.testing.assert_close(model(ids).logits, load({checkpoint!r})[0](ids).logits, rtol=1e-4, atol=1e-5)
"""


@pytest.fixture
def files(tmp_path: Path) -> Path:
    write_inputs(tmp_path)
    save_checkpoint(tmp_path / "base" / "checkpoint-3")
    return tmp_path


def tuned(files: Path) -> Path:
    return train(options(files, "tuned", config=None, init_from=files / "base", lora_rank=2), console=quiet())


def test_cards_of_adapters_and_of_the_merged_model(files: Path) -> None:
    checkpoint = tuned(files)
    card, merged = (
        ModelCard.load(folder / "README.md") for folder in (checkpoint, merge_checkpoint(checkpoint, files / "merged"))
    )
    assert (metadata(card).library_name, metadata(merged).library_name) == ("peft", "transformers")
    assert {"lora", "transformers"} <= set(metadata(card).tags or ())
    assert "LoRA adapters of rank 2 for `base/checkpoint-3`" in card.text
    assert "`base/checkpoint-3` with LoRA adapters of rank 2, merged into its weights" in merged.text
    losses = [re.findall(r"^\| held-out text.*$", x.text, re.M) for x in (card, merged)]
    assert losses[0] == losses[1] != []
    assert not any(str(files) in str(x) for x in (card, merged))


def test_pushed_adapters_load_with_their_base_model(files: Path) -> None:
    with fake_hub() as hub:
        env = hub.environment(files)
        assert command("push", files / "base", "team/base", env=env).returncode == 0
        run = ["train", "--init-from", files / "base", "--data", files / "data.txt", "--output", files / "tuned"]
        run += ["--lora-rank", 2, "--steps", 5, "--sequence-length", 64, "--batch-size", 2, "--no-compile"]
        result = command(*run, "--push-to-hub", "team/adapters", "--hub-base-model", "team/base", env=env)
        assert result.returncode == 0, result.stderr
        pushed = hub.repositories["team/adapters"].files
        assert json.loads(pushed["adapter_config.json"])["base_model_name_or_path"] == "team/base"
        card = ModelCard(pushed["README.md"].decode())
        assert (metadata(card).base_model, "base_model:adapter:team/base" in (metadata(card).tags or ())) == (
            "team/base",
            True,
        )
        assert not any(str(files).encode() in content for content in pushed.values())
        snippet = re.findall(r"^```python\n(.*?)^```$", card.text, re.M | re.S)[0]
        for code in (snippet, LOADED.format(checkpoint=str(files / "tuned" / "checkpoint-5"))):
            result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
            assert result.returncode == 0, result.stderr
