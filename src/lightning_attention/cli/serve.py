"""`lightning-attention serve`: an OpenAI-compatible server."""

import signal
import sys
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any

from typer import Context, Exit, Option

from .imports import quick_imports
from .options import check_at_least, given_options, option_names

# Options of the own engine only; --tensor-parallel is one of vLLM only.
OWN = "prefix_slots", "max_waiting", "max_tokens_per_request", "max_body_bytes", "drain_seconds"
INTERRUPTED = 130
NO_VLLM = "vLLM, which is not installed"


def serve(
    context: Context,
    checkpoint: Annotated[Path, Option(help="Checkpoint, or output folder of a run.")],
    host: Annotated[str, Option(help="Name or address to listen on.")] = "127.0.0.1",
    port: Annotated[int, Option(help="Port to listen on; 0 for any that is free.", min=0, max=65535)] = 8000,
    api_key: Annotated[
        str | None,
        Option(envvar="LIGHTNING_API_KEY", help="Key that clients must send. Others can see arguments of a process."),
    ] = None,
    served_model_name: Annotated[
        str | None, Option(help="Name of the model for clients. By default the name of the folder.")
    ] = None,
    chat_template: Annotated[
        Path | None, Option(help="File with a Jinja template. By default the template of the checkpoint.")
    ] = None,
    bf16: Annotated[bool, Option("--bf16", help="Run in bfloat16.")] = False,
    engine: Annotated[
        str, Option(help="own or vllm. auto is vllm where it is installed and the checkpoint is of this library.")
    ] = "auto",
    max_requests: Annotated[int, Option(help="Answers generated at a time; more wait.")] = 64,
    max_length: Annotated[int | None, Option(help="Tokens of a prompt and its answer, at most.")] = None,
    max_waiting: Annotated[int, Option(help="Answers that wait, at most. Further requests get 429. Own engine.")] = 256,
    max_tokens_per_request: Annotated[int, Option(help="New tokens per answer, at most. Own engine.")] = 16384,
    max_body_bytes: Annotated[int, Option(help="Size of a request, at most. Own engine.")] = 16777216,
    prefix_slots: Annotated[int, Option(help="States in the prefix cache. Own engine.")] = 16,
    drain_seconds: Annotated[
        float, Option(help="Seconds after SIGTERM or Ctrl-C for requests that run. Own engine.")
    ] = 30.0,
    tensor_parallel: Annotated[int, Option(help="GPUs that share the model. vLLM.")] = 1,
) -> None:
    """Serve a model by an OpenAI-compatible API, with a chat page at /."""
    values: dict[str, Any] = dict(locals())
    if engine not in ("auto", "own", "vllm"):
        raise ValueError(f"--engine must be auto, own or vllm, got {engine}")
    check_at_least(0, prefix_slots=prefix_slots, max_waiting=max_waiting, drain_seconds=drain_seconds)
    check_at_least(1, max_requests=max_requests, max_tokens_per_request=max_tokens_per_request)
    check_at_least(1, max_body_bytes=max_body_bytes, tensor_parallel=tensor_parallel)
    check_at_least(2, max_length=max_length)
    with quick_imports():
        from ..models.checkpoint import ADAPTER_CONFIG, last_checkpoint
        from ..serving import vllm

    folder = last_checkpoint(checkpoint)
    has_adapters = (folder / ADAPTER_CONFIG).is_file()
    if has_adapters and engine == "vllm":
        raise ValueError(f"--engine vllm needs a plain checkpoint: run lightning-attention merge on {folder}")
    is_for_vllm = not has_adapters and vllm.is_installed() and vllm.is_ours(folder)
    uses_vllm = engine == "vllm" or (engine == "auto" and is_for_vllm)
    _check_engine(context, uses_vllm, vllm.is_installed(), tensor_parallel)
    values["served_model_name"] = served_model_name or checkpoint.resolve().name
    if api_key is None and not _is_local(host):
        print(
            f"lightning-attention: warning: everyone who can reach {host} may use this server: set --api-key",
            file=sys.stderr,
        )
    if uses_vllm:
        _exec_vllm(folder, given_options(context), values)
    else:
        _serve(folder, values)


def _check_engine(context: Context, uses_vllm: bool, has_vllm: bool, tensor_parallel: int) -> None:
    """Raise a ValueError for options of the other engine, or if vLLM is needed and not installed."""
    if uses_vllm and not has_vllm:
        raise ValueError(f"--engine vllm needs {NO_VLLM}")
    if tensor_parallel > 1 and not uses_vllm:
        raise ValueError(f"--tensor-parallel {tensor_parallel} needs {'--engine vllm' if has_vllm else NO_VLLM}")
    given = given_options(context)
    if extra := [name for name in OWN if uses_vllm and name in given]:
        raise ValueError(f"{option_names(extra)} {'needs' if len(extra) == 1 else 'need'} --engine own")


def _exec_vllm(folder: Path, given: set[str], values: dict[str, Any]) -> None:
    from ..serving import bind
    from ..serving.vllm import VllmOptions

    host, port, template = values["host"], values["port"], values["chat_template"]
    if port == 0:
        raise ValueError("--port 0 needs --engine own")
    if template is not None:
        _read_template(template)
    bind(host, port).close()
    options = VllmOptions(
        folder,
        values["served_model_name"],
        host,
        port,
        values["api_key"],
        values["max_requests"] if "max_requests" in given else None,
        values["max_length"],
        values["tensor_parallel"],
        values["bf16"],
        template,
    )
    _announce("vLLM", options.model, host, port)
    options.exec()


def _serve(folder: Path, values: dict[str, Any]) -> None:
    with quick_imports():
        from transformers.utils.logging import disable_progress_bar

        from ..inference import load
        from ..serving import ServerOptions, bind, create_app, serve

    disable_progress_bar()
    host = values["host"]
    template = values["chat_template"]
    options = ServerOptions(
        values["served_model_name"],
        max_requests=values["max_requests"],
        max_waiting=values["max_waiting"],
        max_tokens=values["max_tokens_per_request"],
        max_length=values["max_length"],
        prefix_slots=values["prefix_slots"],
        api_key=values["api_key"],
        hosts=("localhost", "127.0.0.1", "::1", host) if _is_local(host) else None,
        max_body_bytes=values["max_body_bytes"],
        chat_template=None if template is None else _read_template(template),
    )
    bind(host, values["port"]).close()  # before the model is loaded, which may take long
    model, tokenizer = load(folder, bf16=values["bf16"])
    app = create_app(model, tokenizer, options)
    opened = bind(host, values["port"])
    _announce("the engine of lightning-attention", options.model, host, opened.getsockname()[1])
    if serve(app, opened, drain_seconds=values["drain_seconds"]) == signal.SIGINT:
        raise Exit(INTERRUPTED)


def _read_template(file: Path) -> str:
    from ..inference.chat import read_template

    return read_template(file)


def _announce(engine: str, model: str, host: str, port: int) -> None:
    address = f"[{host}]" if ":" in host else host
    print(f"lightning-attention: {engine} serves {model} at http://{address}:{port}", flush=True)


def _is_local(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
