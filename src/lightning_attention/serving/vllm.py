"""vLLM's OpenAI server, in place of this process."""

import json
import os
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

MODULE = "vllm.entrypoints.openai.api_server"


@dataclass(frozen=True)
class VllmOptions:
    """Options of vLLM's server.

    Attributes:
        checkpoint: folder with a model.
        model: name of the model for clients.
        host: name or address to listen on.
        port: port to listen on.
        api_key: key that clients must send.
        max_requests: requests that run at the same time; None for vLLM's default.
        max_length: tokens of a prompt and its answer; None for vLLM's default.
        tensor_parallel: number of GPUs that share the model.
        bf16: run in bfloat16, instead of float32.
        chat_template: file of a Jinja template.
    """

    checkpoint: Path
    model: str
    host: str
    port: int
    api_key: str | None = None
    max_requests: int | None = None
    max_length: int | None = None
    tensor_parallel: int = 1
    bf16: bool = False
    chat_template: Path | None = None

    def arguments(self) -> list[str]:
        """Arguments of vLLM's server. The key is not among them: other users of a machine can read arguments."""
        given = {
            "--model": self.checkpoint,
            "--served-model-name": self.model,
            "--host": self.host,
            "--port": self.port,
            "--dtype": "bfloat16" if self.bf16 else "float32",
            "--tensor-parallel-size": self.tensor_parallel,
            "--max-num-seqs": self.max_requests,
            "--max-model-len": self.max_length,
            "--chat-template": self.chat_template,
        }
        return [str(word) for name, value in given.items() if value is not None for word in (name, value)]

    def exec(self) -> None:
        """Replace this process by vLLM's server, so that signals reach it."""
        environment = dict(os.environ)
        if self.api_key is not None:
            environment["VLLM_API_KEY"] = self.api_key
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, [sys.executable, "-m", MODULE, *self.arguments()], environment)


def is_installed() -> bool:
    """True if vLLM can be imported."""
    return find_spec("vllm") is not None


def is_ours(checkpoint: Path) -> bool:
    """True if a folder holds a model of this library."""
    from ..models import LightningConfig

    try:
        config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and config.get("model_type") == LightningConfig.model_type
