"""Training runs of a tiny model: results, resuming, several processes."""

import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import needs_two_gpus
from safetensors.torch import load_file
from tiny_model import make_config
from training.runs import (
    COMMAND,
    MODEL,
    ON_CPU,
    arguments,
    linux_only,
    losses,
    options,
    quiet,
    torchrun,
    wait_for,
    wait_for_end,
    workers_after,
)
from transformers import TrainingArguments

from lightning_attention.inference import load
from lightning_attention.models import LightningConfig, LightningForCausalLM
from lightning_attention.models.checkpoint import checkpoints, last_checkpoint
from lightning_attention.training import PackedDataset, TrainingOptions, byte_tokenizer, evaluate, train
from lightning_attention.training.arguments import training_arguments
from lightning_attention.training.checkpoint import CheckpointingTrainer
from lightning_attention.training.execution import Execution
from lightning_attention.training.metrics import drop_after, read_metrics
from lightning_attention.training.model_config import model_config
from lightning_attention.training.plots import plot_loss

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def test_a_run_writes_checkpoints_metrics_and_plot(files):
    checkpoint = train(options(files, steps=60, learning_rate=1e-2), console=quiet())
    assert checkpoint == files / "run" / "checkpoint-60"
    found = losses(files / "run")
    assert list(found) == list(range(5, 61, 5))
    assert found[60] < found[5] - 1
    records = read_metrics(files / "run" / "metrics.jsonl")
    assert all(record["tokens"] == record["step"] * 128 for record in records)
    assert all(record["tokens_per_second"] > 0 for record in records if "loss" in record)
    assert [record["step"] for record in records if "eval_loss" in record] == list(range(10, 61, 10))
    assert (files / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    model, tokenizer = load(files / "run")
    assert model.config.decay_preset == "transnormer"
    ids = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    for config in (model.config, model.generation_config):
        eos = config.eos_token_id
        eos = eos[0] if isinstance(eos, list) and len(eos) == 1 else eos  # a list in transformers 5.17
        assert (config.bos_token_id, eos, config.pad_token_id) == ids == (256, 257, 258)
    assert tokenizer("ab").input_ids == [256, *b"ab"]
    train(TrainingOptions.load(files / "run"), resume=True, console=quiet())
    assert losses(files / "run") == found
    # The last two checkpoints are kept.
    assert [path.name for path in checkpoints(files / "run")] == ["checkpoint-50", "checkpoint-60"]
    assert not (files / "run" / "unfinished").exists()
    with pytest.raises(ValueError, match="holds a run already"):
        train(options(files), console=quiet())


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "bfloat16"},
        {"gradient_checkpointing": True},
        {"accumulate": 2, "batch_size": 1},
        {"decay_preset": "retnet"},
        {"segment_length": 17},
        {"segment_length": 64, "accumulate": 2, "batch_size": 1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_losses_do_not_depend_on_how_a_step_is_computed(files, changes):
    """bfloat16 and other decays change the losses a little."""
    train(options(files, "plain"), console=quiet())
    checkpoint = train(options(files, "other", **changes), console=quiet())
    plain, other = losses(files / "plain"), losses(files / "other")
    tolerance = 0.05 if changes in ({"dtype": "bfloat16"}, {"decay_preset": "retnet"}) else 1e-4
    assert other == pytest.approx(plain, rel=tolerance)
    model, _ = load(checkpoint)
    assert model.config.decay_preset == changes.get("decay_preset", "transnormer")


@pytest.mark.slow
def test_a_killed_run_resumes_as_if_undisturbed(files):
    changes: dict[str, Any] = {"steps": 200, "save_every": 20, "eval_every": 50, "log_every": 10}
    quietly: dict[str, Any] = {"stdout": subprocess.DEVNULL, "env": ON_CPU}  # on a CPU equal runs have equal losses
    subprocess.run([*COMMAND, *arguments(files, "undisturbed", **changes)], check=True, **quietly)
    process = subprocess.Popen([*COMMAND, *arguments(files, "killed", **changes)], **quietly)
    wait_for(files / "killed" / "checkpoint-40", process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (files / "data.txt").write_text("other text, which must not matter")
    (files / "model.json").unlink()
    assert max(losses(files / "killed"), default=0) < 200
    output = subprocess.run(
        [*COMMAND, "train", "--resume", "--output", str(files / "killed")],
        env=ON_CPU,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "resuming from" in output.stdout
    assert "missing" not in output.stderr
    assert losses(files / "killed") == pytest.approx(losses(files / "undisturbed"), rel=1e-4)
    undisturbed, killed = (load(files / name)[0].state_dict() for name in ("undisturbed", "killed"))
    for name, weight in undisturbed.items():
        torch.testing.assert_close(killed[name], weight, rtol=1e-3, atol=1e-4)


def test_a_save_that_fails_leaves_the_last_checkpoint(files, monkeypatch):
    def full(self, output_dir):
        if self.state.global_step == 20:
            (Path(output_dir) / "rng_state.pth").write_bytes(b"half of it")
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(CheckpointingTrainer, "_save_rng_state", full)
    with pytest.raises(OSError, match=r"could not save .*checkpoint-20: .*No space left on device"):
        train(options(files, steps=30), console=quiet())
    assert last_checkpoint(files / "run").name == "checkpoint-10"
    assert not (files / "run" / "unfinished").exists()
    load(files / "run")


def test_an_unfinished_checkpoint_of_a_killed_save_is_ignored_and_removed(files):
    train(options(files), console=quiet())
    leftover = files / "run" / "unfinished" / "checkpoint-30"
    leftover.mkdir(parents=True)
    (leftover / "config.json").write_text("{")
    assert last_checkpoint(files / "run").name == "checkpoint-20"
    saved = json.loads((files / "run" / "run.json").read_text())
    (files / "run" / "run.json").write_text(json.dumps(saved | {"steps": 30}))
    train(TrainingOptions.load(files / "run"), resume=True, console=quiet())
    assert last_checkpoint(files / "run").name == "checkpoint-30"
    assert not leftover.parent.exists()
    load(files / "run")


def test_a_full_disk_is_one_error_line(files):
    """Files are limited to 100 KB, less than the weights."""
    (files / "model.json").write_text(json.dumps(MODEL | {"hidden_size": 96}))

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    process = subprocess.run(
        [*COMMAND, *arguments(files, steps=1, save_every=1)], capture_output=True, text=True, preexec_fn=limit
    )
    assert process.returncode == 2
    error = [line for line in process.stderr.splitlines() if line.startswith("lightning-attention:")]
    assert len(error) == 1
    assert "could not save" in error[0]
    assert "Traceback" not in process.stderr
    assert checkpoints(files / "run") == []


@pytest.mark.parametrize(
    ("processes", "changes"),
    [
        pytest.param(2, {"batch_size": 1, "segment_length": 17}, marks=pytest.mark.slow),
        pytest.param(2, {"sequence_parallel": 2, "segment_length": 17}, marks=pytest.mark.slow),
        pytest.param(
            4,
            {"sequence_parallel": 2, "batch_size": 1, "sequence_parallel_strategy": "ring"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            4, {"sequence_parallel": 2, "batch_size": 1, "fsdp": True, "segment_length": 17}, marks=pytest.mark.slow
        ),
    ],
    ids=["sequences, by segments", "tokens, by segments", "sequences and tokens", "sequences, tokens and the model"],
)
def test_several_processes_make_the_steps_of_one(files, processes, changes):
    train(options(files, "one", steps=10), console=quiet())
    process = torchrun(processes, *arguments(files, "several", steps=10, **changes))
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert losses(files / "several") == pytest.approx(losses(files / "one"), rel=1e-3)
    records = [read_metrics(files / name / "metrics.jsonl")[-1] for name in ("several", "one")]
    assert records[0]["eval_loss"] == pytest.approx(records[1]["eval_loss"], rel=1e-3)
    assert records[0]["tokens"] == records[1]["tokens"]
    load(files / "several")


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["softmax", "1:1", "performer"])
def test_processes_that_shard_other_attentions_make_the_steps_of_one(files, attention):
    train(options(files, "one", steps=10, attention=attention), console=quiet())
    process = torchrun(2, *arguments(files, "two", steps=10, attention=attention, batch_size=1, fsdp=True))
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert losses(files / "two") == pytest.approx(losses(files / "one"), rel=1e-3)
    load(files / "two")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes", [{"segment_length": 17}, {"fsdp": True, "compile": True}], ids=["by segments", "sharded"]
)
def test_a_process_of_torchrun_on_a_gpu_has_the_losses_of_one_without(files, changes):
    """One process over NCCL."""
    train(options(files, "alone", steps=10, dtype="bfloat16"), console=quiet())
    process = torchrun(1, *arguments(files, "one", steps=10, dtype="bfloat16", **changes), where=os.environ)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert losses(files / "one") == pytest.approx(losses(files / "alone"), rel=1e-2)
    load(files / "one")


@pytest.mark.gpu
@pytest.mark.nccl
@needs_two_gpus
@pytest.mark.parametrize(
    "changes",
    [
        {"sequence_parallel": 2, "segment_length": 17},
        {"sequence_parallel": 2, "sequence_parallel_strategy": "ring", "fsdp": True},
        {"batch_size": 1, "fsdp": True, "segment_length": 17},
    ],
    ids=["tokens, by segments", "tokens and the model", "sequences and the model, by segments"],
)
def test_two_processes_on_two_gpus_make_the_steps_of_one(files, changes):
    assert_two_gpus_make_the_steps_of_one(files, {}, changes, 1e-3)


@pytest.mark.gpu
@pytest.mark.nccl
@needs_two_gpus
def test_two_gpus_that_shard_a_compiled_hybrid_make_the_steps_of_one(files):
    (files / "model.json").write_text(json.dumps(MODEL | {"hidden_size": 32}))  # heads that FlashAttention takes
    hybrid = {"attention": "1:1", "dtype": "bfloat16"}
    assert_two_gpus_make_the_steps_of_one(files, hybrid, {"batch_size": 1, "fsdp": True, "compile": True}, 1e-2)


def assert_two_gpus_make_the_steps_of_one(files, model, changes, tolerance):
    train(options(files, "one", steps=10, **model), console=quiet())
    process = torchrun(2, *arguments(files, "two", steps=10, **model, **changes), where=os.environ)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert losses(files / "two") == pytest.approx(losses(files / "one"), rel=tolerance)
    load(files / "two")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "sharing", "later"),
    [
        (2, {"sequence_parallel": 2, "fsdp": True}, (1, "--sequence-parallel=1", "--no-fsdp")),
        (1, {}, (2, "--sequence-parallel=2", "--fsdp", "--sequence-parallel-strategy=ring")),
    ],
    ids=["two, then one", "one, then two"],
)
def test_a_run_resumes_on_another_number_of_processes(files, processes, sharing, later):
    changes: dict[str, Any] = {"steps": 20, "save_every": 10, "log_every": 1}
    train(options(files, "undisturbed", **changes), console=quiet())
    process = torchrun(processes, *arguments(files, "moved", **changes, **sharing))
    output, _ = process.communicate()
    assert process.returncode == 0, output
    weights = load_file(files / "moved" / "checkpoint-10" / "model.safetensors")
    expected = load_file(files / "undisturbed" / "checkpoint-10" / "model.safetensors")
    assert {name: x.shape for name, x in weights.items()} == {name: x.shape for name, x in expected.items()}
    shutil.rmtree(files / "moved" / "checkpoint-20")
    processes, *options_given = later
    process = torchrun(processes, "train", "--resume", f"--output={files / 'moved'}", *options_given)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert losses(files / "moved") == pytest.approx(losses(files / "undisturbed"), rel=1e-3)
    load(files / "moved")


@pytest.mark.slow
@linux_only
def test_processes_restarted_after_a_loss_resume_as_if_undisturbed(files):
    changes: dict[str, Any] = {"steps": 100, "save_every": 20, "log_every": 10, "sequence_parallel": 2}
    process = torchrun(2, *arguments(files, "undisturbed", **changes))
    process.communicate()
    process = torchrun(2, *arguments(files, "disturbed", **changes), restarts=1)
    os.kill(workers_after(files / "disturbed" / "checkpoint-40", process)[-1], signal.SIGKILL)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert "resuming from" in output
    assert losses(files / "disturbed") == pytest.approx(losses(files / "undisturbed"), rel=1e-4)


@pytest.mark.slow
@linux_only
def test_a_lost_process_ends_the_others_with_an_error_line(files):
    process = torchrun(2, *arguments(files, steps=10_000, save_every=20, sequence_parallel=2))
    os.kill(workers_after(files / "run" / "checkpoint-20", process)[-1], signal.SIGKILL)
    output, _ = process.communicate()
    assert process.returncode != 0
    ours = output.split("torch/distributed/elastic")[0]  # torchrun has a report of its own
    assert "Traceback" not in ours
    assert re.search("^lightning-attention: .*another process of the run was lost", output, re.MULTILINE)
    load(files / "run")


@pytest.mark.slow
@linux_only
def test_sigterm_ends_a_process_that_waits_for_a_frozen_one(files):
    process = torchrun(2, *arguments(files, steps=10_000, save_every=20, sequence_parallel=2))
    waiting, stopped = workers_after(files / "run" / "checkpoint-20", process)
    os.kill(stopped, signal.SIGSTOP)
    time.sleep(1)
    os.kill(waiting, signal.SIGTERM)
    wait_for_end(waiting, 20)
    os.kill(stopped, signal.SIGKILL)
    output, _ = process.communicate()
    ours = output.split("torch/distributed/elastic")[0]
    assert "Traceback" not in ours
    assert re.search("^lightning-attention: ended by SIGTERM.* another process .* was lost", output, re.MULTILINE)
    load(files / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        (
            {"sequence_parallel": 2},
            "sequence_parallel must divide the number of processes, which torchrun sets: 1, got 2",
        ),
        ({"fsdp": True}, "fsdp needs the processes that torchrun starts"),
        ({"sequence_length": 100_000}, "fewer than one sequence of 100000"),
        ({"config": Path("nowhere.json")}, "nowhere.json is not a model configuration"),
        ({"config": Path("typo.json")}, "unknown option hiden_size"),
        ({"config": None, "size": "2B"}, "size must be one of"),
        ({"decay_preset": "fast"}, "decay_preset must be one of"),
        (
            {"attention": "fast"},
            "attention must be one of lightning, lightning-1, elu, cosformer, rfa, performer,",
        ),
        ({"attention": "elu", "decay_preset": "alibi"}, "decay_preset go with lightning attention, elu has no decay"),
        ({"config": Path("short.json")}, "64 tokens exceed the 63 positions"),
        ({"config": Path("labels.json")}, "labels.json is not a model configuration"),
        ({"tokenizer": "nowhere"}, "there is no file nowhere"),
    ],
)
def test_invalid_options_start_no_run(files, changes, message):
    (files / "typo.json").write_text('{"hiden_size": 8}')
    short = MODEL | {"linear_attention": "cosformer", "max_position_embeddings": 63}
    (files / "short.json").write_text(json.dumps(short))
    (files / "labels.json").write_text('{"id2label": ["a"]}')
    if changes.get("config") in (Path("typo.json"), Path("short.json"), Path("labels.json")):
        changes = {"config": files / changes["config"]}
    with pytest.raises(ValueError, match=message):
        train(options(files, **changes), console=quiet())
    assert not (files / "run" / "run.json").exists()
    assert checkpoints(files / "run") == []


RESULTS = {
    "tuples": {"return_dict": False},
    "hidden states": {"output_hidden_states": True},
    "no cache": {"use_cache": False},
    "tuples of hidden states": {"return_dict": False, "output_hidden_states": True, "use_cache": True},
}


@pytest.mark.parametrize("segment_length", [None, 17])
@pytest.mark.parametrize("given", RESULTS.values(), ids=RESULTS)
def test_a_run_does_not_depend_on_what_the_configuration_returns_and_saves_it(files, given, segment_length):
    changes: dict[str, Any] = {"steps": 4, "log_every": 1, "eval_every": 2, "segment_length": segment_length}
    train(options(files, "plain", **changes), console=quiet())
    (files / "model.json").write_text(json.dumps(MODEL | given))
    checkpoint = train(options(files, "other", **changes), console=quiet())
    plain, other = (read_metrics(files / name / "metrics.jsonl") for name in ("plain", "other"))
    for name in ("loss", "eval_loss"):
        assert [record.get(name) for record in other] == [record.get(name) for record in plain]
    config = LightningConfig.from_pretrained(checkpoint)
    defaults = {"return_dict": True, "output_hidden_states": False, "use_cache": True}
    assert {name: getattr(config, name) for name in defaults} == defaults | given


def test_a_resumed_run_saves_the_configuration_of_its_checkpoint(files):
    train(options(files, steps=4, save_every=2), console=quiet())
    saved = (files / "run" / "checkpoint-4" / "config.json").read_bytes()
    shutil.rmtree(files / "run" / "checkpoint-4")
    train(TrainingOptions.load(files / "run"), resume=True, console=quiet())
    assert (files / "run" / "checkpoint-4" / "config.json").read_bytes() == saved


def test_a_forward_pass_of_a_step_keeps_no_hidden_states(files, monkeypatch):
    (files / "model.json").write_text(json.dumps(MODEL | {"output_hidden_states": True}))
    returned, forward = [], LightningForCausalLM.forward

    def recorded(*args, **kwargs):
        returned.append(forward(*args, **kwargs))
        return returned[-1]

    monkeypatch.setattr(LightningForCausalLM, "forward", recorded)
    train(options(files, steps=1, eval_every=1), console=quiet())
    assert len(returned) > 1
    assert {name for outputs in returned for name in outputs} == {"loss"}


@pytest.mark.parametrize("attention", ["elu", "cosformer", "rfa", "performer"])
def test_other_attentions_train_and_resume(files, attention):
    chosen = {"attention": attention, "steps": 10, "save_every": 5, "segment_length": 20}
    train(options(files, **chosen), console=quiet())
    config = load(files / "run")[0].config
    assert (config.linear_attention, config.max_position_embeddings) == (attention, 64)
    found = losses(files / "run")
    assert found[10] < found[5]
    shutil.rmtree(files / "run" / "checkpoint-10")
    train(TrainingOptions.load(files / "run"), resume=True, console=quiet())
    assert losses(files / "run") == found


def test_a_process_works_on_one_device(files, monkeypatch):
    """The Trainer would use DataParallel and twice the batch size on two devices."""
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    single = training_arguments(options(files, batch_size=3), Execution(bf16=False, compiled=False, description=""))
    assert single.n_gpu == 1
    assert single.train_batch_size == 3


@pytest.mark.parametrize("attention", ["lightning", "softmax", "1:1", "elu"])
@pytest.mark.parametrize(
    "saved",
    [
        {},
        {"layer_pattern": "0:1"},
        {"layer_types": ["full_attention", "linear_attention"]},
        {"layer_types": ["sliding_attention", "linear_attention"], "sliding_window": 8},
        {"linear_attention": "rfa", "max_position_embeddings": 64},
    ],
    ids=str,
)
def test_the_attention_replaces_that_of_the_file(files, saved, attention):
    (files / "model.json").write_text(json.dumps(MODEL | saved))
    config = model_config(options(files, attention=attention), byte_tokenizer())
    kinds = {"softmax": ["full_attention"] * 2, "1:1": ["linear_attention", "full_attention"]}
    assert config.layer_types == kinds.get(attention, ["linear_attention"] * 2)
    assert config.linear_attention == ("elu" if attention == "elu" else "lightning")


def test_a_preset_replaces_decays_of_the_file(files):
    (files / "model.json").write_text(json.dumps(MODEL | {"log_decay": [[-0.1, -0.2]] * 2}))
    config = model_config(options(files, decay_preset="retnet"), byte_tokenizer())
    assert (config.log_decay, config.decay_preset) == (None, "retnet")


@pytest.mark.parametrize("preset", ["transnormer", "alibi"])
def test_a_preset_without_decay_is_refused(files, preset):
    with pytest.raises(ValueError, match="decay_preset"):
        model_config(options(files, decay_preset=preset, attention="softmax"), byte_tokenizer())


def test_a_size_beside_a_config_is_refused(files):
    with pytest.raises(ValueError, match="config and size '45M' describe two models"):
        options(files, size="45M")


def test_resuming_needs_a_run(tmp_path):
    with pytest.raises(ValueError, match="no run to resume in"):
        TrainingOptions.load(tmp_path)


@pytest.mark.parametrize(("attention", "excluded"), [("lightning", "theta"), ("rfa", "sigma")])
def test_weight_decay_excludes_frequencies_and_scales(attention, excluded):
    model = LightningForCausalLM(make_config(linear_attention=attention, max_position_embeddings=8))
    assert any(excluded in name for name, _ in model.named_parameters())
    trainer = CheckpointingTrainer.__new__(CheckpointingTrainer)
    names = CheckpointingTrainer.get_decay_parameter_names(trainer, model)
    assert "model.layers.0.attention.qkvu_proj.weight" in names
    assert not any(excluded in name for name in names)


def test_evaluation_counts_only_symbols():
    """The reference is the formula."""
    torch.manual_seed(0)
    model = LightningForCausalLM(make_config()).eval()
    tokens = np.array([40, 3, 4, 41, 40, 5, 6, 7, 8, 9], dtype=np.uint16)
    dataset = PackedDataset(tokens, 5, document_starts=np.array([0, 4]))
    unigram = torch.arange(1.0, 51).log()
    result = evaluate(model, dataset, unigram, num_symbols=40, batch_size=1)
    with torch.no_grad():
        first, second = (
            model(torch.from_numpy(part.astype(np.int64))[None]).logits[0] for part in (tokens[:5], tokens[5:])
        )
    nll = [-first[0].log_softmax(-1)[3], -first[1].log_softmax(-1)[4]]
    nll += [-second[t].log_softmax(-1)[6 + t] for t in range(4)]
    assert result.num_tokens == 6
    assert result.loss == pytest.approx(sum(x.item() for x in nll) / 6, rel=1e-5)
    assert result.uniform == pytest.approx(math.log(40))
    frequencies = torch.arange(1.0, 41) / torch.arange(1.0, 41).sum()
    assert result.unigram == pytest.approx(-frequencies[[3, 4, 6, 7, 8, 9]].log().mean().item(), rel=1e-5)
    with pytest.raises(ValueError, match="no token to predict"):
        evaluate(model, dataset, unigram, num_symbols=2)


def test_metrics_are_read_without_a_last_line_that_was_cut_off(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "tokens": 10, "loss": 2.0}\n{"step": 2, "tokens": 20, "loss": 1.0}\n{"step": 3, "lo')
    assert [record["step"] for record in read_metrics(file)] == [1, 2]
    drop_after(file, 1)
    assert [record["step"] for record in read_metrics(file)] == [1]
    plot_loss(file, tmp_path / "loss.png", {"unigram": 3.0})
    assert (tmp_path / "loss.png").stat().st_size > 1000
    assert read_metrics(tmp_path / "none.jsonl") == []
