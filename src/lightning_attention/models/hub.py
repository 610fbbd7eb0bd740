"""Pushing checkpoints to the Hugging Face Hub."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, ModelCardData, get_token
from huggingface_hub.utils import get_session, hf_raise_for_status, validate_repo_id
from transformers import PreTrainedTokenizerFast
from transformers.utils import CONFIG_NAME

from ..paths import PathLike
from .card import README, metadata, model_card, named
from .checkpoint import ADAPTER_CONFIG, last_checkpoint, load_model
from .configuration import LightningConfig
from .remote_code import MODULE, SOURCE, with_auto_map

# Files of a checkpoint that a repository holds: model, tokenizer, card; no state of the training.
UPLOADED = (
    CONFIG_NAME, "generation_config.json", "model*.safetensors", "model.safetensors.index.json", f"{MODULE}.py",
    ADAPTER_CONFIG, "adapter_model.safetensors", "tokenizer*.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "*.jinja", README, "LICENSE*",
)  # fmt: skip
# Files of an earlier push that would change what is loaded, if this push has no such file.
REPLACED = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json", "tokenizer*", "*.jinja")
MESSAGE = "Upload model with lightning-attention"


def push(
    checkpoint: PathLike, name: str, *, private: bool = False, license: str | None = None, base_model: str | None = None
) -> str:
    """Push a checkpoint to the Hugging Face Hub: weights, configuration, tokenizer and model card.

    Everything is checked before the upload: the files, the names, the token and its rights. The token is that of
    huggingface_hub: of `hf auth login`, or HF_TOKEN. A README.md in the folder is the card; a file is never changed.

    Args:
        checkpoint: folder of a model or of LoRA adapters, or output folder of a run, for its last checkpoint.
        name: of the repository, "namespace/name", or "name" for the user of the token; created if it does not exist.
        private: create it as a private one; refused if there is a public one.
        license: id of the Hub, such as "apache-2.0"; None is that in the card, if any.
        base_model: name on the Hub of the model that adapters are for, or that was fine-tuned.

    Returns:
        The address of the repository.

    Raises:
        TypeError: `checkpoint` is not a path.
        ValueError: a name is malformed, there is no loadable checkpoint, or a README.md has malformed metadata.
        OSError: there is no token, or the Hub cannot be reached or refuses something.

    Example:
        >>> from lightning_attention.models.hub import push
        >>> push("run", "someone/model", license="apache-2.0")  # doctest: +SKIP
        'https://huggingface.co/someone/model'
    """
    check_name("name", name)
    check_name("base_model", base_model)
    folder = last_checkpoint(checkpoint)
    if (folder / ADAPTER_CONFIG).is_file() and base_model is None:
        raise ValueError(f"{folder} holds LoRA adapters: give the name of their base model on the Hub, or merge them")
    load_model(folder)
    try:
        PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise ValueError(f"{folder} holds no tokenizer: {error}") from error
    _card(folder, name, license, base_model)
    name = check_access(name, license=license, base_model=base_model)
    create(name, private=private)
    return upload(folder, name, license=license, base_model=base_model)


def check_name(option: str, name: str | None) -> None:
    """Check the form of the name of a repository; None passes.

    Raises:
        ValueError: the name is malformed.
    """
    try:
        if name is not None:
            validate_repo_id(name)
    except ValueError as error:
        raise ValueError(f"{option} must be the name of a repository, namespace/name: {error}") from error


def check_access(name: str, *, license: str | None = None, base_model: str | None = None) -> str:
    """Check that the Hub knows the token, the license and the base model.

    Args:
        name: of the repository.
        license, base_model: see `push`.

    Returns:
        The name of the repository with its namespace.

    Raises:
        OSError: there is no token, or the Hub cannot be reached or refuses something.
    """
    api = HfApi()
    if get_token() is None:
        raise OSError(f"no token of the Hugging Face Hub to push to {name}: run hf auth login, or set HF_TOKEN")
    with _explained(f"the Hub at {api.endpoint} does not tell whose token this is"):
        user = api.whoami()
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise OSError(f"the token of {user['name']} may only read: to push to {name} take one that may write")
    if base_model is not None:
        with _explained(f"the Hub has no base model {base_model} for this token"):
            api.model_info(base_model)
    if license is not None:
        with _explained(f"the Hub does not take the license {license!r}"):
            _validate(f"---\n{ModelCardData(license=license).to_yaml()}\n---\n", api.endpoint)
    return name if "/" in name else f"{user['name']}/{name}"


def _validate(card: str, endpoint: str) -> None:
    """As `ModelCard.validate`, which in huggingface_hub 1 asks huggingface.co whatever the endpoint is."""
    body, headers = {"repoType": "model", "content": card}, {"Accept": "text/plain"}
    response = get_session().post(f"{endpoint}/api/validate-yaml", json=body, headers=headers)
    if response.status_code == 400:
        raise ValueError(response.text)
    hf_raise_for_status(response)


def create(name: str, *, private: bool) -> None:
    """Create a repository if there is none, and check that the token may write to it.

    Raises:
        OSError: the Hub refuses that, or the repository is public and shall be private.
    """
    api = HfApi()
    with _explained(f"cannot create {name} on the Hub at {api.endpoint}, or write to it"):
        api.create_repo(name, private=private or None, exist_ok=True)
        is_public = private and not api.model_info(name).private
        # Asks how a file is to be uploaded, which needs the right to write, and uploads nothing.
        api.preupload_lfs_files(name, [CommitOperationAdd(README, b"model card")])
    if is_public:
        raise OSError(f"{name} exists on the Hub and is public: make it private there, or choose another name")


def upload(folder: Path, name: str, *, license: str | None = None, base_model: str | None = None) -> str:
    """Upload a checkpoint to a repository in one commit, in place of the model that an earlier push has left there.

    Args:
        folder: the checkpoint.
        name: of an existing repository, with its namespace.
        license, base_model: see `push`.

    Returns:
        The address of the repository.

    Raises:
        OSError: the upload failed; the repository is unchanged.
    """
    api, files = HfApi(), _files(folder, name, license, base_model)
    with _explained(f"could not push {folder} to {name}"):
        left = [file for file in api.list_repo_files(name) if any(fnmatch(file, x) for x in REPLACED)]
        deletions = [CommitOperationDelete(file) for file in left if file not in files]
        additions = [CommitOperationAdd(path, content) for path, content in files.items()]
        api.create_commit(name, [*deletions, *additions], commit_message=MESSAGE)
    return f"{api.endpoint}/{name}"


def _files(folder: Path, name: str, license: str | None, base_model: str | None) -> dict[str, bytes | str]:
    """Content or path of every file of a repository, by its name there."""
    found = (path for path in sorted(folder.iterdir()) if any(fnmatch(path.name, pattern) for pattern in UPLOADED))
    files: dict[str, bytes | str] = {path.name: str(path) for path in found if path.is_file()}
    files |= {f"{path.parent.name}/{path.name}": str(path) for path in folder.glob("additional_chat_templates/*.jinja")}
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    auto_map = {"auto_map": with_auto_map(config.get("auto_map"))}
    files[CONFIG_NAME] = _json(config | auto_map | {"model_type": LightningConfig.model_type})
    files[f"{MODULE}.py"] = SOURCE.encode()
    if ADAPTER_CONFIG in files:
        adapters = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        files[ADAPTER_CONFIG] = _json(adapters | {"base_model_name_or_path": base_model})  # not a path of this machine
    files[README] = _card(folder, name, license, base_model).encode()
    return files


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _card(folder: Path, name: str, license: str | None, base_model: str | None) -> str:
    """Text of the card in a folder, or of a new one, for a repository."""
    try:
        has_card = (folder / README).is_file()
        card = ModelCard.load(folder / README) if has_card else model_card(folder)
        named(card, folder, name, base_model)
    except Exception as error:  # of the YAML parser too
        raise ValueError(f"{folder / README} is not a model card: {error}") from error
    if license is not None:
        metadata(card).license = license
    return str(card) if card.data.to_dict() else card.text  # of a user, without metadata


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Say in one line what failed: huggingface_hub, httpx and hf-xet raise errors of many kinds."""
    try:
        yield
    except Exception as error:
        causes = [error, error.__cause__] if isinstance(error, RuntimeError) else [error]  # of an upload, says less
        reasons = [" ".join(str(cause).split()) or type(cause).__name__ for cause in causes if cause is not None]
        raise OSError(": ".join([what, *reasons])) from error
