"""The Trainer of packed sequences: the same steps and losses on any number of processes."""

import math
import time
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import default_collate
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import speed_metrics

from .batches import Share, TrainingBatches, held_out_batches, num_labels
from .checkpoint import CheckpointingTrainer
from .corpus import PackedDataset
from .parallel import Ranks, one_row, sum_over_processes
from .segments import segmented_loss


class PackedTrainer(CheckpointingTrainer):
    """Train on packed sequences, whole or by segments, in the order of `TrainingBatches`.

    Loss and gradient of a step are means over the tokens that it predicts, and `eval_loss` over all held-out tokens
    that are predicted, on any number of processes. `state.num_input_tokens_seen` counts the tokens read; checkpoints
    keep it, and a resumed run reads on from there.

    Args:
        segment_length: see `segmented_loss`; None reads whole sequences.
        ranks: the processes that share sequences, if any.
        options: of `CheckpointingTrainer`; both datasets are `PackedDataset`s, and there are `max_steps`.
    """

    def __init__(self, segment_length: int | None, ranks: Ranks | None, **options: Any):
        collate = default_collate
        if ranks is not None:
            collate = ranks.collate if segment_length is None else one_row
        super().__init__(**options, data_collator=collate)
        self.args.ignore_data_skip = True  # the batches start where a checkpoint was saved
        self.segment_length, self.ranks = segment_length, ranks
        sequences = self._share(self.args.train_batch_size).total * self.args.gradient_accumulation_steps
        self.add_callback(_CountTokens(sequences, len(options["train_dataset"]), self._sequence_length))
        if isinstance(self.model, FSDPModule):  # autocast and compilation, but no DistributedDataParallel
            prepare: Any = self.accelerator.prepare_model
            self.model_wrapped = prepare(self.model, device_placement=False, evaluation_mode=True)

    @property
    def _sequence_length(self) -> int:
        return cast(PackedDataset, self.train_dataset).sequence_length

    def _share(self, batch_size: int) -> Share:
        if self.ranks is None:
            return Share(self.args.process_index, self.args.world_size, batch_size)
        return Share(self.ranks.data_rank, self.ranks.data_size, batch_size)

    def get_train_dataloader(self) -> Any:
        return TrainingBatches(
            cast(PackedDataset, self.train_dataset),
            self.data_collator,
            self._share(self.args.train_batch_size),
            self.args.seed if self.args.data_seed is None else self.args.data_seed,
            self.args.max_steps * self.args.gradient_accumulation_steps,
            start=lambda: self.state.num_input_tokens_seen // self._sequence_length,
        )

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.segment_length is not None and self.ranks is not None and num_items_in_batch is not None:
            num_items_in_batch = num_items_in_batch / self.ranks.sequence_parallel.size  # each has counted all labels
        return super().compute_loss(self._reading(model), inputs, return_outputs, num_items_in_batch)

    def _reading(self, model: Any) -> Any:
        """The model, or what reads its inputs by segments."""
        return model if self.segment_length is None else partial(_by_segments, model, self.segment_length)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Compute the mean loss over all tokens of the dataset that are predicted, and log it.

        Returns:
            `eval_loss` in nats a token, and how long it took.

        Raises:
            ValueError: no token of the dataset is to be predicted.
        """
        dataset = cast(PackedDataset, self.eval_dataset if eval_dataset is None else eval_dataset)
        started, read = time.time(), self._reading(cast(Any, self.model).eval())
        count, losses = 0, []
        for sequences in held_out_batches(dataset, self._share(self.args.eval_batch_size)):
            count += num_labels(sequences)
            inputs = self._prepare_inputs(self.data_collator(sequences))
            with torch.no_grad(), self.accelerator.autocast():
                losses.append(read(**inputs, num_items_in_batch=1)["loss"])
        group_size = 1 if self.ranks is None else self.ranks.sequence_parallel.size
        total, count = sum_over_processes(
            [math.fsum(torch.stack(losses).tolist()), count / group_size], self.args.device
        )
        if count == 0:
            raise ValueError("the held-out sequences hold no token to predict")
        metrics = {f"{metric_key_prefix}_loss": total / count}
        metrics |= speed_metrics(metric_key_prefix, started, num_samples=len(dataset))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class _CountTokens(TrainerCallback):
    """Keeps in the state, and so in checkpoints, how many tokens all processes have read, and the epochs they make."""

    def __init__(self, sequences_per_step: int, sequences_per_epoch: int, sequence_length: int):
        self.tokens_per_step = sequences_per_step * sequence_length
        self.tokens_per_epoch = sequences_per_epoch * sequence_length

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        if state.num_input_tokens_seen == 0:  # checkpoints of version 0.1.0 do not hold it
            state.num_input_tokens_seen = state.global_step * self.tokens_per_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any):
        state.num_input_tokens_seen += self.tokens_per_step
        state.epoch = state.num_input_tokens_seen / self.tokens_per_epoch


def _by_segments(model: Any, segment_length: int, **inputs: Any) -> dict[str, Tensor]:
    return {"loss": segmented_loss(model, **inputs, segment_length=segment_length)}
