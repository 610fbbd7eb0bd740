"""Data of a run: its corpora, and their sequences."""

from pathlib import Path
from typing import NamedTuple

from rich.live import Live
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from transformers import PreTrainedTokenizerFast

from .batches import has_labels
from .corpus import Corpus, PackedDataset
from .documents import Sources, standard_library
from .folder import CORPUS, VALIDATION
from .options import TrainingOptions
from .run_log import RunLog

NOT_EVALUATED = "no held-out losses: the run trains on all of its text"


class DataSources(NamedTuple):
    """Files to train on, and those to evaluate on; None if these are held out of the first."""

    training: Sources
    validation: Sources | None


def find_sources(options: TrainingOptions, log: RunLog) -> DataSources:
    """Find the data of a run.

    Raises:
        ValueError, OSError, ImportError: see `Sources.find`.
    """
    if not options.data:
        training = Sources.find([standard_library()], seed=options.seed, without=("test", "tests"))
    else:
        training = Sources.find(options.data, options.text_field, options.seed)
    if not options.validation:
        return DataSources(training, None)
    validation = Sources.find(options.validation, options.text_field, options.seed)
    known = {file.resolve() for file in training.files}
    if both := sum(file.resolve() in known for file in validation.files):
        log.print(f"the run trains on files that it is validated on: {both:,}")
    return DataSources(training, validation)


def prepare_corpora(
    sources: DataSources, folder: Path, tokenizer: PreTrainedTokenizerFast, held_out_fraction: float, log: RunLog
) -> None:
    """Tokenize the data of a run, and its validation, into the run's folder.

    Raises:
        ValueError, OSError, ImportError: see `Corpus.prepare`.
    """
    training, validation = sources
    _tokenize(folder / CORPUS, training, tokenizer, 0.0 if validation else held_out_fraction, log)
    if validation:
        try:
            _tokenize(folder / VALIDATION, validation, tokenizer, 1.0, log)
        except ValueError as error:
            raise ValueError(f"validation: {error}") from error


def _tokenize(
    folder: Path, sources: Sources, tokenizer: PreTrainedTokenizerFast, held_out_fraction: float, log: RunLog
) -> None:
    columns = TextColumn("tokenizing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    progress = Progress(*columns)
    task = progress.add_task("tokenizing", total=None)
    with Live(progress, console=log.console, transient=True):  # unlike Progress, prints nothing to a file

        def report(num_read: int, num_bytes: int) -> None:
            if num_read and not progress.tasks[0].total:
                log.print(f"tokenizing goes on after {num_read:,} of {num_bytes:,} bytes")
            progress.update(task, completed=num_read, total=num_bytes)

        corpus = Corpus.prepare(folder, sources, tokenizer, held_out_fraction, report)
    if skipped := sources.describe_skipped(corpus.skipped_files - sum(sources.skipped.values())):
        log.print(skipped)


def datasets(
    corpus: Corpus, validation: Corpus, options: TrainingOptions
) -> tuple[PackedDataset, PackedDataset | None]:
    """Training and held-out sequences; the latter are None if the run is not evaluated.

    Raises:
        ValueError: a part is shorter than a sequence, or has no token to predict.
    """
    if options.evaluates and validation.num_held_out < options.sequence_length:
        name, remedy = ("validation", "text") if options.validation else ("held-out part", "data, a larger held_out")
        raise ValueError(
            f"the {name} has {validation.num_held_out} tokens, fewer than one sequence of "
            f"{options.sequence_length}: give more {remedy}, or a shorter sequence_length"
        )
    training, held_out = corpus.training_set(options.sequence_length), None
    if options.evaluates:
        held_out = validation.held_out_set(options.sequence_length, options.eval_tokens)
    for part, dataset in (("training", training), ("held-out", held_out)):
        if dataset is not None and not has_labels(dataset):
            why = "its documents hold one token each"
            if dataset.context.size:
                limit = f", of eval_tokens {options.eval_tokens:,} at most" if dataset is held_out else ""
                why = f"no answer of a conversation is in its sequences{limit}"
            raise ValueError(f"the {part} part has no token to predict: {why}")
    return training, held_out


def describe_corpora(
    corpus: Corpus, validation: Corpus, training_set: PackedDataset, options: TrainingOptions
) -> list[str]:
    """Lines on conversations and on the text to evaluate on."""
    lines = []
    if corpus.num_context_ranges:
        lines.append(
            f"chat data: loss on {corpus.num_predicted_train:,} of these tokens: answers, and documents that are text"
        )
    if training_set.num_left_out:
        lines.append(f"sequences left out, since no token in them has loss: {training_set.num_left_out:,}")
    if options.validation:
        lines.append(f"validation: {validation.num_held_out:,} tokens of {validation.num_documents:,} documents")
    elif not options.evaluates:
        lines.append(NOT_EVALUATED)
    return lines
