"""Losses, data order and counts of a run do not depend on the number of processes or how they share it."""

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_model import make_config, make_model, tokens
from torch import Tensor
from training.runs import arguments, options, quiet, torchrun, write_inputs
from transformers import TrainingArguments

from lightning_attention.models import LightningForCausalLM
from lightning_attention.training import Corpus, PackedDataset, evaluate, segmented_loss, train
from lightning_attention.training.batches import (
    Share,
    TrainingBatches,
    has_labels,
    held_out_batches,
    num_labels,
    shuffled_epochs,
)
from lightning_attention.training.metrics import read_metrics
from lightning_attention.training.prefetch import AHEAD
from lightning_attention.training.signals import StopRequest
from lightning_attention.training.trainer import PackedTrainer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
EOS = 41


def dataset(num_sequences: int, length: int = 4) -> PackedDataset:
    """Dataset whose sequence i holds only the token i."""
    text = np.repeat(np.arange(num_sequences, dtype=np.uint16), length)
    return PackedDataset(text, length, document_starts=np.array([0]))


def indices(batch: list[dict[str, Tensor]]) -> list[int]:
    return [int(item["input_ids"][0]) for item in batch]


# Order of sequences


@pytest.mark.parametrize("start", [0, 5, 7, 30], ids="from {}".format)
def test_every_epoch_reads_every_sequence_once(start):
    order = list(islice(shuffled_epochs(7, seed=3), 28 + start))
    epochs = [order[i : i + 7] for i in range(0, 28, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    assert list(islice(shuffled_epochs(7, seed=3, start=start), 28)) == order[start:]
    assert list(islice(shuffled_epochs(7, seed=4), 28)) != order[:28]


@pytest.mark.parametrize("length", [255, 256, 70_000])
def test_the_order_is_that_of_64_bit_indices(length):
    """Indices take as few bytes as they need; runs of earlier versions keep their order."""
    expected = np.random.default_rng([3, 1]).permutation(length).tolist()
    assert list(islice(shuffled_epochs(length, seed=3, start=length), length)) == expected


def step_sequences(processes: int, batch_size: int, accumulate: int, steps: int, start: int = 0) -> list[list[int]]:
    """Sequences of each step, over all processes."""
    read = [
        TrainingBatches(
            dataset(29), indices, Share(rank, processes, batch_size), 0, 100, lambda: start, torch.device("cpu")
        )
        for rank in range(processes)
    ]
    batches = [list(islice(iter(batches), steps * accumulate)) for batches in read]
    return [
        sorted(i for mine in batches for batch in mine[n * accumulate : (n + 1) * accumulate] for i in batch)
        for n in range(steps)
    ]


@pytest.mark.parametrize(
    ("processes", "batch_size", "accumulate"),
    [(1, 4, 2), (2, 4, 1), (4, 2, 1), (4, 1, 2), (8, 1, 1)],
    ids=lambda value: str(value),
)
def test_the_sequences_of_a_step_do_not_depend_on_the_processes(processes, batch_size, accumulate):
    """Four epochs of 29 sequences, 8 per step, also from step 5 on, within an epoch."""
    expected = step_sequences(1, 8, 1, steps=15)
    assert step_sequences(processes, batch_size, accumulate, steps=15) == expected
    assert step_sequences(processes, batch_size, accumulate, steps=10, start=40) == expected[5:]


@pytest.mark.parametrize("num_sequences", [1, 3, 7, 8, 29, 64])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("processes", [1, 3, 4])
def test_evaluation_reads_every_sequence_once(num_sequences, batch_size, processes):
    """Ranks without a sequence read one without labels."""
    sequences = dataset(num_sequences)
    ranks = [list(held_out_batches(sequences, Share(rank, processes, batch_size))) for rank in range(processes)]
    counted = [item for batches in ranks for batch in batches for item in batch if num_labels([item])]
    assert sorted(indices(counted)) == list(range(num_sequences))
    sizes = [[len(batch) for batch in batches] for batches in ranks]
    assert all(size == sizes[0] for size in sizes)
    assert max(sizes[0]) <= batch_size


# Losses without a label

READERS = {
    "the model": lambda model, ids, labels, **given: model(ids, labels=labels, **given).loss,
    "shifted labels": lambda model, ids, labels, **given: model(ids, shift_labels=labels, **given).loss,
    "segments": lambda model, ids, labels, **given: segmented_loss(model, ids, labels, segment_length=3, **given),
}


@pytest.mark.parametrize("items", [None, 0, torch.tensor(0)], ids=["not counted", "a number", "a tensor"])
@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_without_labels_loss_and_gradients_are_zero(read, items):
    model, ids = LightningForCausalLM(make_config()), tokens(2, 8)
    loss = read(model, ids, torch.full_like(ids, -100), num_items_in_batch=items)
    loss.backward()
    assert loss == 0
    assert all(parameter.grad.eq(0).all() for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_losses_are_divided_by_num_items_in_batch(read):
    model, ids = LightningForCausalLM(make_config()), tokens(2, 8)
    labels = ids.masked_fill(tokens(2, 8, seed=1) < 20, -100)
    count = (labels if read is READERS["shifted labels"] else labels[:, 1:]).ne(-100).sum()
    mean = read(model, ids, labels)
    for items in (1, torch.tensor(1.0), 5):
        torch.testing.assert_close(read(model, ids, labels, num_items_in_batch=items) * items, mean * count)


def test_sequence_parallelism_needs_shifted_labels(monkeypatch):
    """The label of the last token of a slice is on the next rank."""
    model, ids = make_model(), tokens(1, 8)
    monkeypatch.setattr(model.model, "sequence_parallel", object())
    with pytest.raises(ValueError, match="give shift_labels"):
        model(ids, labels=ids)


# Means over held-out tokens


class RecordingDataset(PackedDataset):
    """Dataset that records the indices that are read."""

    def __init__(self, dataset: PackedDataset):
        self.__dict__ |= vars(dataset)
        self.read: list[int] = []

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        self.read.append(index)
        return super().__getitem__(index)


def trainer(
    model: LightningForCausalLM,
    folder: Path,
    sequences: PackedDataset,
    *,
    batch_size: int = 8,
    accumulate: int = 1,
    segment_length: int | None = None,
    steps: int = 1,
) -> PackedTrainer:
    arguments = TrainingArguments(
        str(folder),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        max_steps=steps,
        data_seed=0,
        save_strategy="steps",
        save_steps=1,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        gradient_accumulation_steps=accumulate,
    )
    return PackedTrainer(
        segment_length,
        None,
        stop=StopRequest(),
        record={},
        model=model,
        args=arguments,
        train_dataset=sequences,
        eval_dataset=sequences,
    )


def packed(*documents: int, length: int = 16) -> PackedDataset:
    """Dataset of documents with the given numbers of tokens."""
    text = [*(token for size in documents for token in [*tokens(size - 1).tolist(), EOS])]
    starts = np.cumsum([0, *documents[:-1]])
    return PackedDataset(np.array(text, dtype=np.uint16), length, starts)


HELD_OUT = packed(1, 1, 1, 2, 30, 1, 1, 1, 20, 5, 50)  # 7 sequences with different numbers of labels


@pytest.mark.parametrize("segment_length", [None, 5], ids=["at once", "by segments"])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 8])
def test_eval_loss_is_the_mean_over_tokens(tmp_path, batch_size, segment_length):
    model = LightningForCausalLM(make_config())
    counts = [num_labels([HELD_OUT[i]]) for i in range(len(HELD_OUT))]
    assert len(counts) == 7
    assert len(set(counts)) > 1
    exact = model.double()
    total = 0.0
    for i in range(7):
        item = {name: x[None] for name, x in HELD_OUT[i].items()}
        log_p = exact(item["input_ids"], position_ids=item["position_ids"]).logits[0, :-1].log_softmax(-1)
        labels = item["labels"][0, 1:]
        total -= log_p[labels != -100].gather(1, labels[labels != -100, None]).sum().item()
    run = trainer(model.float(), tmp_path, HELD_OUT, batch_size=batch_size, segment_length=segment_length)
    assert run.evaluate()["eval_loss"] == pytest.approx(total / sum(counts), rel=1e-6)
    unigram = torch.zeros(50)
    results = [evaluate(model, HELD_OUT, unigram, num_symbols=50, batch_size=size) for size in (batch_size, 7)]
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-6)
    assert results[0].num_tokens == sum(counts)


def test_held_out_sequences_without_labels_are_refused(tmp_path):
    nothing = packed(*[1] * 32)
    assert not has_labels(nothing)
    assert has_labels(packed(*[1] * 30, 2))
    model = LightningForCausalLM(make_config()).train()
    with pytest.raises(ValueError, match="no token to predict"):
        trainer(model, tmp_path, HELD_OUT).evaluate(nothing)
    with pytest.raises(ValueError, match="no token to predict"):
        evaluate(model, nothing, torch.zeros(50), num_symbols=50)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": -2}, "batch_size must be at least 1, got -2"),
        ({"num_symbols": 0}, "num_symbols must be between 1 and the 50 tokens of unigram, got 0"),
        ({"num_symbols": 51}, "num_symbols must be between 1 and the 50 tokens of unigram, got 51"),
    ],
    ids=str,
)
def test_evaluate_refuses_numbers_out_of_range(given, message):
    model = LightningForCausalLM(make_config())
    with pytest.raises(ValueError, match=message):
        evaluate(model, HELD_OUT, torch.zeros(50), **{"num_symbols": 50} | given)


# Runs: 29 sequences with 8 in a step, 7 held-out sequences

STEPS = {"steps": 10, "save_every": 10, "eval_every": 10, "log_every": 1, "eval_tokens": 7 * 64, "held_out": 0.2}
FROZEN = {"learning_rate": 1e-12, "batch_size": 8}  # constant weights: losses differ only by the rounding of sums


@pytest.fixture
def small(tmp_path: Path) -> Path:
    write_inputs(tmp_path)
    text = (tmp_path / "data.txt").read_text()
    (tmp_path / "data.txt").write_text(text[:2328])
    return tmp_path


def numbers(output: Path, name: str) -> list[float]:
    return [record[name] for record in read_metrics(output / "metrics.jsonl") if name in record]


def run(folder: Path, name: str, processes: int, **changes: Any) -> Path:
    if processes == 1:
        train(options(folder, name, **STEPS | FROZEN | changes), console=quiet())
    else:
        process = torchrun(processes, *arguments(folder, name, **STEPS | FROZEN | changes))
        output, _ = process.communicate()
        assert process.returncode == 0, output
    return folder / name


def assert_alike(one: Path, other: Path) -> None:
    """Compare losses and norms of gradients up to the rounding of float32 sums, and counts exactly."""
    for name in ("loss", "grad_norm", "eval_loss"):
        assert numbers(one, name) == pytest.approx(numbers(other, name), rel=2e-6), name
    for name in ("step", "tokens", "epoch"):
        assert numbers(one, name) == numbers(other, name), name


TOPOLOGIES = {
    "accumulated": (1, {"batch_size": 4, "accumulate": 2}),
    "by segments": (1, {"segment_length": 17}),
    "data": (2, {"batch_size": 4}),
    "data, accumulated": (4, {"batch_size": 1, "accumulate": 2}),
    "model, by segments": (4, {"batch_size": 2, "fsdp": True, "segment_length": 17}),
    "sequence": (4, {"sequence_parallel": 4}),
    "sequence x data": (4, {"batch_size": 4, "sequence_parallel": 2}),
    "sequence x data, accumulated": (4, {"batch_size": 2, "accumulate": 2, "sequence_parallel": 2}),
    "sequence x data and model, by segments": (
        4,
        {"batch_size": 4, "sequence_parallel": 2, "fsdp": True, "segment_length": 17},
    ),
}
IN_ONE_PROCESS = [name for name, (processes, _) in TOPOLOGIES.items() if processes == 1]


@pytest.mark.parametrize(
    ("processes", "changes"),
    [
        pytest.param(*given, id=name, marks=[] if name in IN_ONE_PROCESS else pytest.mark.slow)
        for name, given in TOPOLOGIES.items()
    ],
)
def test_losses_do_not_depend_on_the_processes(small, processes, changes):
    one, other = run(small, "one", 1), run(small, "other", processes, **changes)
    corpus = Corpus.open(one / "corpus")
    assert (corpus.num_train // 64, corpus.num_held_out // 64) == (29, 7)
    assert numbers(one, "tokens")[:10] == [step * 8 * 64 for step in range(1, 11)]
    assert_alike(other, one)


@pytest.mark.slow
def test_losses_in_bfloat16_do_not_depend_on_the_processes(small):
    one, other = run(small, "one", 1, dtype="bfloat16"), run(small, "other", 4, dtype="bfloat16", batch_size=2)
    for name in ("loss", "eval_loss"):
        assert numbers(one, name) == pytest.approx(numbers(other, name), rel=1e-5), name


@pytest.mark.parametrize("batch_size", [3, 20], ids=["below the data", "above the data"])
def test_the_token_count_equals_the_tokens_read(tmp_path, batch_size):
    """A step of 20 reads some of the 7 sequences three times."""
    sequences = RecordingDataset(HELD_OUT)
    run = trainer(LightningForCausalLM(make_config()), tmp_path, sequences, steps=4, batch_size=batch_size)
    sequences.read.clear()
    run.train()
    used = 4 * batch_size  # and some are read ahead
    assert sequences.read[:used] == list(islice(shuffled_epochs(7, 0), used))
    assert len(sequences.read) <= used + AHEAD * batch_size
    assert run.state.num_input_tokens_seen == used * 16
    assert run.state.epoch == pytest.approx(used / 7)


def test_a_resumed_run_reads_on_within_an_epoch(small):
    changes = {"eval_every": 5, "save_every": 5}
    complete, part = run(small, "complete", 1, **changes), run(small, "part", 1, steps=5, **changes)
    train(options(small, "part", **STEPS | FROZEN | changes), resume=True, console=quiet())
    assert_alike(part, complete)


def test_a_resumed_run_with_other_step_sizes_continues_order_and_count(tmp_path):
    """2 steps of 4 sequences, then 3 steps of 3, of 7 sequences."""
    model, sequences = LightningForCausalLM(make_config()), RecordingDataset(HELD_OUT)
    first = trainer(model, tmp_path, sequences, steps=2, batch_size=2, accumulate=2)
    later = trainer(model, tmp_path, sequences, steps=5, batch_size=3)
    sequences.read.clear()
    first.train()
    read = sequences.read[: 2 * 4]  # and some are read ahead
    sequences.read.clear()
    later.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    read += sequences.read[: 3 * 3]
    assert read == list(islice(shuffled_epochs(7, 0), 2 * 4 + 3 * 3))
    assert later.state.num_input_tokens_seen == (2 * 4 + 3 * 3) * 16
