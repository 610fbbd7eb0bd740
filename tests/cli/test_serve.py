"""Options of `serve` that are refused, in this process; tests/serving runs servers."""

import io
import socket
import sys
from pathlib import Path

import pytest
from tiny_model import make_config, save_checkpoint

from lightning_attention.cli import main
from lightning_attention.models import LightningForCausalLM
from lightning_attention.serving import vllm
from lightning_attention.training import byte_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("serve")
    save_checkpoint(root / "run" / "checkpoint-7")
    softmax = make_config(vocab_size=259, layer_pattern="2:1")
    LightningForCausalLM(softmax).save_pretrained(root / "hybrid")
    byte_tokenizer().save_pretrained(root / "hybrid")
    (root / "empty.jinja").touch()
    (root / "latin.jinja").write_bytes("façade".encode("latin-1"))
    (root / "bad.jinja").write_text("{% for %}")
    (root / "cut").mkdir()
    for file in (root / "run" / "checkpoint-7").iterdir():
        (root / "cut" / file.name).write_bytes(file.read_bytes())
    (root / "cut" / "model.safetensors").write_bytes(b"\0" * 20)
    return root


def run(monkeypatch, capsys, folder: Path, *arguments: object, key: str | None = None) -> tuple[int, str, str]:
    monkeypatch.chdir(folder)
    if key is None:
        monkeypatch.delenv("LIGHTNING_API_KEY", raising=False)
    else:
        monkeypatch.setenv("LIGHTNING_API_KEY", key)
    monkeypatch.setattr(sys, "argv", ["lightning-attention", "serve", *map(str, arguments)])
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0), *capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing option '--checkpoint'"),
        (["--checkpoint", "nowhere"], "no checkpoint in nowhere"),
        (["--checkpoint", "cut"], "cut is not a checkpoint"),
        (["--checkpoint", "run", "--engine", "tgi"], "--engine must be auto, own or vllm, got tgi"),
        (["--checkpoint", "run", "--engine", "vllm"], "--engine vllm needs vLLM, which is not installed"),
        (["--checkpoint", "run", "--tensor-parallel", "2"], "--tensor-parallel 2 needs vLLM, which is not installed"),
        (["--checkpoint", "run", "--max-length", "1"], "--max-length must be at least 2, got 1"),
        (["--checkpoint", "run", "--port", "70000"], "Invalid value for '--port'"),
        (["--checkpoint", "run", "--max-requests", "0"], "--max-requests must be at least 1, got 0"),
        (["--checkpoint", "run", "--max-waiting", "-1"], "--max-waiting must be at least 0, got -1"),
        (["--checkpoint", "run", "--prefix-slots", "-1"], "--prefix-slots must be at least 0, got -1"),
        (["--checkpoint", "run", "--max-tokens-per-request", "0"], "--max-tokens-per-request must be at least 1"),
        (["--checkpoint", "run", "--drain-seconds", "nan"], "--drain-seconds must be a finite number"),
        (["--checkpoint", "run", "--api-key", "ключ"], "api_key must consist of printable ASCII"),
        (["--checkpoint", "run", "--served-model-name", "\udcff"], "model must be a name in UTF-8"),
        (["--checkpoint", "run", "--api-key", ""], "--api-key must not be empty"),
        (["--checkpoint", "run", "--chat-template", "none.jinja"], "No such file or directory"),
        (["--checkpoint", "run", "--chat-template", "empty.jinja"], "empty.jinja holds no chat template"),
        (["--checkpoint", "run", "--chat-template", "latin.jinja"], "latin.jinja is not UTF-8"),
        (["--checkpoint", "run", "--chat-template", "bad.jinja"], "the chat template is not valid"),
        (["--checkpoint", "run", "--host", "no.such.host.invalid"], "host no.such.host.invalid: "),
        (["--checkpoint", "hybrid"], "softmax attention"),
    ],
    ids=lambda value: " ".join(value[2:]) or " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_served_is_one_line(monkeypatch, capsys, folder, arguments, message):
    port = [] if "--port" in arguments else ["--port", 0]
    code, out, err = run(monkeypatch, capsys, folder, *arguments, *port)
    lines = [line for line in err.splitlines() if "warning" not in line]
    assert (code, out, len(lines)) == (2, "", 1)
    assert lines[0].startswith("lightning-attention: ")
    assert message in lines[0]


def test_a_port_in_use_is_one_line(monkeypatch, capsys, folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, out, err = run(monkeypatch, capsys, folder, "--checkpoint", "run", "--port", port)
    assert (code, out) == (2, "")
    assert err == f"lightning-attention: host 127.0.0.1, port {port}: Address already in use\n"


def test_a_key_from_the_environment_is_checked(monkeypatch, capsys, folder):
    code, _, err = run(monkeypatch, capsys, folder, "--checkpoint", "run", "--port", 0, key="ключ")
    assert code == 2
    assert "api_key must consist of printable ASCII" in err


@pytest.mark.parametrize(
    ("host", "key", "warns"),
    [("0.0.0.0", None, True), ("::", None, True), ("0.0.0.0", "sesame", False), ("localhost", None, False)],
)
def test_an_open_address_without_a_key_is_a_warning(monkeypatch, capsys, folder, host, key, warns):
    arguments = ["--checkpoint", "run", "--chat-template", "none.jinja", "--host", host]
    _, _, err = run(monkeypatch, capsys, folder, *arguments, key=key)
    warning = f"lightning-attention: warning: everyone who can reach {host} may use this server: set --api-key\n"
    assert err.startswith(warning) == warns
    assert err.count("\n") == 1 + warns


def test_options_of_the_own_engine_are_refused_with_vllm(monkeypatch, capsys, folder, tmp_path):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    arguments = ["--checkpoint", "run", "--prefix-slots", 3, "--drain-seconds", 1]
    code, out, err = run(monkeypatch, capsys, folder, *arguments)
    assert (code, out) == (2, "")
    assert err == "lightning-attention: --prefix-slots, --drain-seconds need --engine own\n"


@pytest.mark.parametrize(("config", "is_ours"), [('{"model_type": "llama"}', False), ("[", False), (None, False)])
def test_only_checkpoints_of_this_library_go_to_vllm(tmp_path, folder, config, is_ours):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    assert vllm.is_ours(tmp_path) == is_ours
    assert vllm.is_ours(folder / "run" / "checkpoint-7")
