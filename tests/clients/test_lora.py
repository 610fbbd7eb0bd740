"""LoRA adapters: runs train, save and resume adapters alone, which are merged when they are loaded."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import make_config, save_checkpoint
from torch import Tensor
from training.runs import losses, options, quiet, torchrun, write_inputs

from lightning_attention.cli import main
from lightning_attention.inference import Engine, SamplingOptions, load
from lightning_attention.models import LightningForCausalLM
from lightning_attention.models.adapters import (
    add_adapters,
    load_adapted,
    lora_config,
    merge_checkpoint,
    trained_weights,
)
from lightning_attention.models.checkpoint import checkpoints
from lightning_attention.models.mixers import ATTENTIONS, attention_options
from lightning_attention.training import TrainingOptions, train
from lightning_attention.training.metrics import read_metrics

peft = pytest.importorskip("peft", reason="needs PEFT: make clients")
pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore::FutureWarning")]
ADAPTERS = "adapter_model.safetensors"
PROMPT = torch.tensor([[256, *b"3 times 4"]])


@pytest.fixture
def files(tmp_path: Path) -> Path:
    write_inputs(tmp_path)
    return tmp_path


@pytest.fixture
def base(files: Path) -> Path:
    return save_checkpoint(files / "base" / "checkpoint-3")


def tuned(files: Path, name: str = "tuned", **changes: Any) -> TrainingOptions:
    defaults = {"config": None, "init_from": files / "base", "lora_rank": 2, "learning_rate": 1e-2}
    return options(files, name, **defaults | changes)


def logits(model: LightningForCausalLM) -> Tensor:
    with torch.no_grad():
        return model.eval()(PROMPT.to(model.device)).logits.float()


def test_only_adapters_are_trained_and_saved(files: Path, base: Path) -> None:
    checkpoint = train(tuned(files, steps=60), console=quiet())
    found = losses(files / "tuned")
    assert found[60] < found[5] - 0.3
    weights = load_file(checkpoint / ADAPTERS)
    assert all(".lora_A." in name or ".lora_B." in name for name in weights)
    assert len(weights) == 3 * 4 * 2  # layers, projections, factors
    assert not (checkpoint / "model.safetensors").exists()
    config = json.loads((checkpoint / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == (str(base), 2, 4)
    adapted, expected = load_adapted(checkpoint), load_file(base / "model.safetensors")
    for name, x in adapted.state_dict().items():
        if (plain := name.replace(".base_layer", "")) in expected:
            assert torch.equal(x, expected[plain]), name
    assert sum(x.numel() for x in trained_weights(adapted).values()) == sum(x.numel() for x in weights.values())


def test_the_best_adapters_on_own_text_are_kept_and_load(files: Path, base: Path) -> None:
    """Also after a run that goes on for longer, with another schedule."""
    validation = files / "valid"
    validation.mkdir()
    (validation / "a.txt").write_text("".join(f"{i} times {i} is {i * i}. " for i in range(80)))
    run = tuned(files, validation=(validation,), keep_best=True, eval_every=5, save_every=10, steps=20)
    train(run, console=quiet())
    train(replace(run, steps=40, schedule="constant"), resume=True, console=quiet())
    found = {x["step"]: x["eval_loss"] for x in read_metrics(files / "tuned" / "metrics.jsonl") if "eval_loss" in x}
    best = files / "tuned" / "best"
    assert best.resolve().name == f"checkpoint-{min(found, key=lambda step: found[step])}"
    assert torch.equal(logits(load(best)[0]), logits(load(best.resolve())[0]))


def test_a_resumed_run_has_the_weights_of_an_undisturbed_one(files: Path, base: Path) -> None:
    train(tuned(files, lora_dropout=0.1), console=quiet())
    expected = (files / "tuned" / "checkpoint-20" / ADAPTERS).read_bytes()
    found = losses(files / "tuned")
    shutil.rmtree(files / "tuned" / "checkpoint-20")
    checkpoint = train(TrainingOptions.load(files / "tuned"), resume=True, console=quiet())
    assert (checkpoint / ADAPTERS).read_bytes() == expected
    assert losses(files / "tuned") == found


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # Dynamo hides it, unless warnings are errors
@pytest.mark.parametrize(
    "changes",
    [
        {"segment_length": 17},
        {"gradient_checkpointing": True},
        {"accumulate": 2, "batch_size": 1},
        pytest.param({"compile": True}, marks=pytest.mark.slow),
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_losses_do_not_depend_on_how_a_step_is_computed(files: Path, base: Path, changes: dict) -> None:
    plain = train(tuned(files, "plain"), console=quiet())
    other = train(tuned(files, "other", **changes), console=quiet())
    assert losses(files / "other") == pytest.approx(losses(files / "plain"), rel=1e-4)
    found, expected = load_file(other / ADAPTERS), load_file(plain / ADAPTERS)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-2, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"fsdp": True}, {"sequence_parallel": 2, "batch_size": 2}], ids=str)
def test_two_processes_train_the_adapters_of_one(files: Path, base: Path, changes: dict) -> None:
    expected = load_file(train(tuned(files, "one"), console=quiet()) / ADAPTERS)
    two = {"batch_size": 1} | changes
    finish(torchrun(2, *arguments_of(tuned(files, "two", **two))))
    shutil.rmtree(files / "two" / "checkpoint-20")
    finish(torchrun(2, "train", "--resume", f"--output={files / 'two'}"))
    found = load_file(files / "two" / "checkpoint-20" / ADAPTERS)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-2, atol=1e-3)


def finish(process: Popen[str]) -> None:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output


def arguments_of(chosen: TrainingOptions) -> list[str]:
    values = {name: x for name, x in vars(chosen).items() if x not in (None, ()) and name not in ("size", "tokenizer")}
    values["data"] = chosen.data[0]
    flags = [f"--{name.replace('_', '-')}={x}" for name, x in values.items() if not isinstance(x, bool)]
    return ["train", *flags, "--no-compile", *(["--fsdp"] if chosen.fsdp else [])]


def test_adapters_learn_conversations_and_keep_their_template(files: Path, base: Path) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "three times four is twelve"}]
    (files / "chat.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 200)
    template = "{% for message in messages %}<{{ message.role }}>{{ message.content }}</s>{% endfor %}"
    template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    (files / "template.jinja").write_text(template)
    train(tuned(files, data=files / "chat.jsonl", chat_template=files / "template.jinja", steps=60), console=quiet())
    found = losses(files / "tuned")
    assert found[60] < found[5] - 0.3
    assert load(files / "tuned")[1].chat_template == template


def test_bfloat16_changes_the_losses_a_little(files: Path, base: Path) -> None:
    train(tuned(files, "plain"), console=quiet())
    train(tuned(files, "other", dtype="bfloat16"), console=quiet())
    assert losses(files / "other") == pytest.approx(losses(files / "plain"), rel=0.05)


@pytest.mark.parametrize("attention", [*ATTENTIONS, "2:1"])
def test_every_attention_takes_adapters(attention: str) -> None:
    model = LightningForCausalLM(make_config(max_position_embeddings=64, **attention_options(attention)))
    add_adapters(model, lora_config(Path("base"), 2, 4, 0))
    assert len(trained_weights(model)) == 3 * 4 * 2
    model(PROMPT % 50, labels=PROMPT % 50).loss.backward()
    assert all(parameter.grad is not None for parameter in trained_weights(model).values())


def test_a_layer_without_a_projection_is_refused() -> None:
    model = LightningForCausalLM(make_config())
    model.model.layers[1].mlp = torch.nn.Identity()
    with pytest.raises(ValueError, match="needs the linear layers vu_proj, which layer 1 does not have"):
        add_adapters(model, lora_config(Path("base"), 2, 4, 0))


def test_a_run_without_its_base_model_keeps_its_checkpoints(files: Path, base: Path) -> None:
    train(tuned(files), console=quiet())
    base.rename(files / "moved")
    with pytest.raises(ValueError, match=r"the base model of .* is missing"):
        train(TrainingOptions.load(files / "tuned"), resume=True, console=quiet())
    assert [path.name for path in checkpoints(files / "tuned")] == ["checkpoint-10", "checkpoint-20"]
    base.symlink_to(files / "moved")
    train(TrainingOptions.load(files / "tuned"), resume=True, console=quiet())


@pytest.fixture
def checkpoint(files: Path, base: Path) -> Path:
    return train(tuned(files, steps=5), console=quiet())


def test_a_loaded_model_is_merged(files: Path, checkpoint: Path, base: Path) -> None:
    expected = logits(load_adapted(checkpoint))
    model, tokenizer = load(files / "tuned")
    torch.testing.assert_close(logits(model), expected.to(model.device), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, logits(load(base)[0]).cpu(), atol=1e-2)
    assert not any("lora" in name for name, _ in model.named_modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not hasattr(model, "peft_config")
    (completion,) = Engine(model, max_requests=2).run([PROMPT[0].tolist()], SamplingOptions(3, 0.0))
    generated = model.generate(PROMPT.to(model.device), max_new_tokens=3, do_sample=False)
    assert completion.tokens == generated[0, PROMPT.shape[1] :].tolist()
    assert tokenizer.eos_token_id == 257


def test_adapters_are_merged_before_they_are_rounded(checkpoint: Path) -> None:
    model, _ = load(checkpoint, bf16=True)
    expected = load(checkpoint)[0].to(torch.bfloat16)
    assert model.dtype == model.config.dtype == torch.bfloat16
    for (name, x), (_, y) in zip(model.state_dict().items(), expected.state_dict().items(), strict=True):
        assert x.dtype == y.dtype, name
        assert torch.equal(x, y), name


def test_peft_loads_the_adapters(checkpoint: Path, base: Path) -> None:
    model = peft.PeftModel.from_pretrained(LightningForCausalLM.from_pretrained(base), checkpoint)
    assert torch.equal(logits(model), logits(load_adapted(checkpoint)))


def test_a_merged_checkpoint_is_plain(files: Path, checkpoint: Path, monkeypatch, capsys) -> None:
    expected = logits(load_adapted(checkpoint))
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", words("merge", checkpoint=files / "tuned", output=files / "merged"))
    with pytest.raises(SystemExit) as stopped:
        main()
    assert (stopped.value.code or 0, *capsys.readouterr()) == (0, f"checkpoint  {files / 'merged'}\n", "")
    names = {path.name for path in (files / "merged").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not any("adapter" in name for name in names)
    model = LightningForCausalLM.from_pretrained(files / "merged")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="exists: choose another output"):
        merge_checkpoint(checkpoint, files / "merged")
    with pytest.raises(ValueError, match="has no adapters to merge"):
        merge_checkpoint(files / "merged", files / "again")
    train(tuned(files, "next", init_from=files / "merged", steps=2), console=quiet())


def words(name: str, **options: object) -> list[str]:
    return ["lightning-attention", name, *(f"--{key}={value}" for key, value in options.items())]


def test_generate_takes_the_run(files: Path, checkpoint: Path, monkeypatch, capsys) -> None:
    merge_checkpoint(checkpoint, files / "merged")
    printed = []
    for folder in ("tuned", "merged"):
        options = {"prompt": "3 times", "max-new-tokens": 8, "temperature": 0}
        monkeypatch.setattr("sys.argv", words("generate", checkpoint=files / folder, **options))
        with pytest.raises(SystemExit) as stopped:
            main()
        assert not stopped.value.code
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]


def test_vllm_is_told_to_merge(files: Path, checkpoint: Path, monkeypatch, capsys) -> None:
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", words("serve", checkpoint=files / "tuned", engine="vllm"))
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        f"lightning-attention: --engine vllm needs a plain checkpoint: run lightning-attention merge on {checkpoint}\n"
    )


def test_a_run_starts_from_merged_adapters(files: Path, checkpoint: Path) -> None:
    changes = {"init_from": checkpoint, "lora_rank": None, "steps": 1, "learning_rate": 1e-12, "weight_decay": 0.0}
    after = load(train(tuned(files, "full", **changes), console=quiet()))[0]
    torch.testing.assert_close(logits(after), logits(load(checkpoint)[0]))
    with pytest.raises(ValueError, match="consists of LoRA adapters: merge them"):
        train(tuned(files, "twice", init_from=checkpoint), console=quiet())


def without_base(checkpoint: Path, base: Path) -> None:
    shutil.rmtree(base)


def without_a_factor(checkpoint: Path, base: Path) -> None:
    weights = load_file(checkpoint / ADAPTERS)
    weights.popitem()
    save_file(weights, checkpoint / ADAPTERS)


def of_another_width(checkpoint: Path, base: Path) -> None:
    weights = {name: x[:, :-1].contiguous() for name, x in load_file(checkpoint / ADAPTERS).items()}
    save_file(weights, checkpoint / ADAPTERS)


def without_adapters(checkpoint: Path, base: Path) -> None:
    (checkpoint / ADAPTERS).unlink()


def of_another_kind(checkpoint: Path, base: Path) -> None:
    (checkpoint / "adapter_config.json").write_text('{"peft_type": "IA3"}')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_base, "the base model of .* is missing: there is no folder"),
        (without_a_factor, "do not fit their base model"),
        (of_another_width, "do not fit their base model"),
        (without_adapters, "is not a checkpoint"),
        (of_another_kind, "peft_type is 'IA3'"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_unusable_adapters_are_refused(checkpoint: Path, base: Path, damage: Any, message: str) -> None:
    damage(checkpoint, base)
    with pytest.raises(ValueError, match=message):
        load(checkpoint)
    with pytest.raises(ValueError, match=message):
        merge_checkpoint(checkpoint, checkpoint.parent / "merged")
    assert not (checkpoint.parent / "merged").exists()
