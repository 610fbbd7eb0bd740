"""Runs that push their last checkpoint to the Hugging Face Hub."""

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from ..models.hub import check_access, check_name, create, upload

if TYPE_CHECKING:
    from .options import TrainingOptions

OPTIONS = ("push_to_hub", "hub_private", "hub_base_model", "license")


def check_push(options: "TrainingOptions") -> None:
    """Check the options of the Hub against each other and the others.

    Raises:
        ValueError: a name is malformed, or an option lacks another.
    """
    check_name("push_to_hub", options.push_to_hub)
    check_name("hub_base_model", options.hub_base_model)
    if options.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+_-]*", options.license):
        raise ValueError(f"license must be an id of the Hub, such as 'apache-2.0', got {options.license!r}")
    if options.hub_private and options.push_to_hub is None:
        raise ValueError("hub_private needs push_to_hub")
    if options.hub_base_model is not None and options.init_from is None:
        raise ValueError("hub_base_model names the model of init_from on the Hub: give both")
    if options.push_to_hub is not None and options.lora_rank is not None and options.hub_base_model is None:
        raise ValueError(
            "push_to_hub with lora_rank needs hub_base_model, the base model on the Hub; or merge the adapters after "
            "the run, and push the merged model"
        )


def repository_of(options: "TrainingOptions") -> str | None:
    """Name of the repository that a run is pushed to, with its namespace; None if it is not pushed.

    Raises:
        OSError: there is no token, or the Hub cannot be reached or refuses something.
    """
    if options.push_to_hub is None:
        return None
    return check_access(options.push_to_hub, license=options.license, base_model=options.hub_base_model)


def create_repository(options: "TrainingOptions", repository: str | None) -> None:
    """Create the repository if there is none; a run that must not push fails here, before its work.

    Raises:
        OSError: the Hub refuses that.
    """
    if repository is not None:
        create(repository, private=options.hub_private)


def push_run(options: "TrainingOptions", repository: str, checkpoint: Path) -> str:
    """Push the last checkpoint of a run; return the address of the repository.

    Raises:
        OSError: the upload failed; the message says how to push later.
    """
    try:
        return upload(checkpoint, repository, license=options.license, base_model=options.hub_base_model)
    except (OSError, ValueError) as error:
        command = ["lightning-attention", "push", str(options.output), repository]
        command += ["--private"] if options.hub_private else []
        for option, value in (("--license", options.license), ("--base-model", options.hub_base_model)):
            command += [option, value] if value is not None else []
        raise OSError(f"{error}; the run is complete, to push it later: {shlex.join(command)}") from error
