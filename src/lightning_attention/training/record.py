"""What every checkpoint keeps of its run, in its own run.json: options, and sizes for the model card."""

import json
from typing import Any

from ..models import LightningForCausalLM
from ..models.adapters import trained_weights
from .corpus import Corpus, PackedDataset
from .options import TrainingOptions


def record_of_run(
    options: TrainingOptions,
    sequences_per_step: int,
    model: LightningForCausalLM,
    corpus: Corpus,
    validation: Corpus,
    held_out: PackedDataset | None,
) -> dict[str, Any]:
    """Options of a run and sizes of its model and data, as JSON keeps them.

    Args:
        options: of the run.
        sequences_per_step: by all processes together.
        model: with its adapters, if there are any.
        corpus: the training text.
        validation: the corpus that is evaluated on; `corpus`, if its end is held out.
        held_out: the sequences that are evaluated; None if the run is not evaluated.
    """
    num_trained = sum(parameter.numel() for parameter in trained_weights(model).values())
    num_adapter_weights = 0 if options.lora_rank is None else num_trained
    sizes = {"corpus": corpus} | ({"validation_corpus": validation} if options.validation else {})
    return json.loads(options.to_json()) | {
        "sequences_per_step": sequences_per_step,
        "num_parameters": model.num_parameters() - num_adapter_weights,
        "num_trained": num_trained,
        "num_evaluated": 0 if held_out is None else len(held_out) * held_out.sequence_length,
        **{
            name: {"documents": x.num_documents, "train": x.num_train, "held_out": x.num_held_out}
            for name, x in sizes.items()
        },
    }
