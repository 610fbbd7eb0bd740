"""Trainer of packed sequences: equal steps and losses on any number of processes."""

import math
import time
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import default_collate
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import speed_metrics

from ..distributed.parallel import SequenceParallel
from .batches import (
    Share,
    TrainingBatches,
    held_out_batches,
    join_and_slice,
    join_sequences,
    num_labels,
    pack_sequences,
)
from .checkpoint import CheckpointingTrainer
from .corpus import PackedDataset
from .measurements import Measurements
from .prefetch import prefetch
from .processes import sum_over_processes
from .segments import FOR_LOSS, segmented_loss
from .text_bytes import num_text_bytes


class PackedTrainer(CheckpointingTrainer):
    """Train on packed sequences, at once or by training segments, in the order of `TrainingBatches`.

    Loss and gradient of a step are means over the tokens that it predicts, and `eval_loss` is the mean over all
    predicted held-out tokens, on any number of processes. `state.num_input_tokens_seen` counts the tokens read;
    checkpoints keep it, and a resumed run reads on from there.

    Args:
        segment_length: see `segmented_loss`; None reads sequences at once.
        sequence_parallel: the group of processes that shares sequences with this one, if any.
        token_bytes: bytes of text of each token, see `text_bytes.token_bytes`; None if unknown.
        measurements: measurements to add to what is logged, if any.
        options: see `CheckpointingTrainer`; both datasets are `PackedDataset`s, and `max_steps` is set.
    """

    def __init__(
        self,
        segment_length: int | None,
        sequence_parallel: SequenceParallel | None,
        token_bytes: np.ndarray | None = None,
        measurements: Measurements | None = None,
        **options: Any,
    ):
        collate: Any = pack_sequences if segment_length is None else default_collate
        if sequence_parallel is not None:
            collate = partial(join_and_slice, sequence_parallel) if segment_length is None else join_sequences
        super().__init__(**options, data_collator=collate)
        self.args.ignore_data_skip = True  # TrainingBatches skips what was read before the checkpoint
        self.segment_length, self.token_bytes, self.measurements = segment_length, token_bytes, measurements
        self.group_size = 1 if sequence_parallel is None else sequence_parallel.size
        sequences = self._share(self.args.train_batch_size).total * self.args.gradient_accumulation_steps
        self.add_callback(_CountTokens(sequences, len(options["train_dataset"]), self._sequence_length))
        if isinstance(self.model, FSDPModule):  # autocast, but no DistributedDataParallel
            prepare: Any = self.accelerator.prepare_model
            self.model_wrapped = prepare(self.model, device_placement=False, evaluation_mode=True)

    @property
    def _sequence_length(self) -> int:
        return cast(PackedDataset, self.train_dataset).sequence_length

    def _share(self, batch_size: int) -> Share:
        index, count = self.args.process_index, self.args.world_size
        return Share(index // self.group_size, count // self.group_size, batch_size)

    def get_train_dataloader(self) -> Any:
        return TrainingBatches(
            cast(PackedDataset, self.train_dataset),
            self.data_collator,
            self._share(self.args.train_batch_size),
            self.args.seed if self.args.data_seed is None else self.args.data_seed,
            self.args.max_steps * self.args.gradient_accumulation_steps,
            start=lambda: self.state.num_input_tokens_seen // self._sequence_length,
            device=self.args.device,
        )

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        # Each process of a group has counted the labels of the sequences, not those of its slice.
        if self.segment_length is not None and self.group_size > 1 and num_items_in_batch is not None:
            num_items_in_batch = num_items_in_batch / self.group_size
        return super().compute_loss(self._loss_model(model), inputs, return_outputs, num_items_in_batch)

    def _loss_model(self, model: Any) -> Any:
        """The model with no other result, or a function that computes its loss by training segments."""
        length = self.segment_length
        if length is None:
            return partial(model, **FOR_LOSS)
        return lambda **inputs: {"loss": segmented_loss(model, **inputs, segment_length=length)}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs if self.measurements is None else self.measurements.added_to(logs, self.state), start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Compute and log the mean loss over all predicted tokens of the dataset.

        Returns:
            `eval_loss` in nats per token, `eval_bits_per_byte` if the bytes of tokens are known, and the time taken.

        Raises:
            ValueError: the dataset has no token to predict.
        """
        dataset = cast(PackedDataset, self.eval_dataset if eval_dataset is None else eval_dataset)
        started, loss_model = time.time(), self._loss_model(cast(Any, self.model).eval())
        count, num_bytes, losses = 0, 0, []
        sequences = held_out_batches(dataset, self._share(self.args.eval_batch_size))
        batches = ((self._counted(items), self.data_collator(items)) for items in sequences)
        for counted, inputs in prefetch(batches, self.args.device):
            count, num_bytes = count + counted[0], num_bytes + counted[1]
            with torch.no_grad(), self.accelerator.autocast():
                losses.append(loss_model(**inputs, num_items_in_batch=1)["loss"])
        total, count, num_bytes = sum_over_processes(
            [math.fsum(torch.stack(losses).tolist()), count / self.group_size, num_bytes / self.group_size],
            self.args.device,
        )
        if count == 0:
            raise ValueError("the held-out sequences hold no token to predict")
        metrics = {f"{metric_key_prefix}_loss": total / count}
        if num_bytes:
            metrics[f"{metric_key_prefix}_bits_per_byte"] = total / math.log(2) / num_bytes
        metrics |= speed_metrics(metric_key_prefix, started, num_samples=len(dataset))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._consider(total / count)
        return metrics

    def _counted(self, items: list[dict[str, torch.Tensor]]) -> tuple[int, int]:
        """Numbers of predicted tokens and of their bytes of text, 0 if unknown."""
        return num_labels(items), 0 if self.token_bytes is None else num_text_bytes(items, self.token_bytes)


class _CountTokens(TrainerCallback):
    """Count the tokens and epochs that all processes have read, in the state that checkpoints keep."""

    def __init__(self, sequences_per_step: int, sequences_per_epoch: int, sequence_length: int):
        self.tokens_per_step = sequences_per_step * sequence_length
        self.tokens_per_epoch = sequences_per_epoch * sequence_length

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if state.num_input_tokens_seen == 0:  # checkpoints of version 0.1.0 do not hold it
            state.num_input_tokens_seen = state.global_step * self.tokens_per_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        state.num_input_tokens_seen += self.tokens_per_step
        state.epoch = state.num_input_tokens_seen / self.tokens_per_epoch
