"""A saved model loads by its path, in a process that has not imported this package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from tiny_model import make_config, save_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lightning_attention.inference import load
from lightning_attention.models import LightningConfig, LightningForCausalLM, LightningModel
from lightning_attention.models.remote_code import AUTO_MAP, MODULE, SOURCE

MODULE_FILE = f"{MODULE}.py"
ROOT = str(Path(__file__).parents[2] / "src")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("run") / "checkpoint-20")


def fresh(script: str, *arguments: Path, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a new process, as `python -c`, without standard input."""
    modules = str(arguments[0].parent / "modules")
    settings = {"HF_MODULES_CACHE": modules, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ROOT, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=os.environ | settings | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not check or result.returncode == 0, result.stderr
    return result


HEADER = """
import sys
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
path, *rest = sys.argv[1:]
ours = lambda: sys.modules.get("lightning_attention.models")
assert ours() is None
"""

SCRIPTS = {
    "AutoConfig": """
config = AutoConfig.from_pretrained(path, trust_remote_code=True)
assert type(config) is ours().LightningConfig
""",
    "AutoModel": """
model = AutoModel.from_pretrained(path, trust_remote_code=True)
assert type(model) is ours().LightningModel
assert type(model(model.dummy_inputs["input_ids"], use_cache=True).past_key_values) is ours().LightningCache
""",
    "AutoModelForCausalLM, once more and saved again": """
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
assert type(model) is ours().LightningForCausalLM
assert type(AutoModelForCausalLM.from_pretrained(path)) is type(model)
assert type(AutoModelForCausalLM.from_config(model.config)) is type(model)
assert type(AutoModel.from_pretrained(path, trust_remote_code=True)) is ours().LightningModel
model.save_pretrained(rest[0])
""",
    "pipeline": """
generator = pipeline("text-generation", model=path, trust_remote_code=True)
assert type(generator.model) is ours().LightningForCausalLM
text = generator("ab", max_new_tokens=5, do_sample=False)[0]["generated_text"]
import torch
from lightning_attention.inference import load
model, tokenizer = load(path)
ids = model.generate(torch.tensor([[256, *b"ab"]]), max_new_tokens=5, do_sample=False)
assert text == tokenizer.decode(ids[0], skip_special_tokens=True), text
""",
    "the tokenizer before anything else": """
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
assert tokenizer("ab").input_ids == [256, 97, 98]
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_model_loads_by_its_path(checkpoint, tmp_path, script):
    result = fresh(HEADER + script, checkpoint, tmp_path / "again")
    assert "Do you wish" not in result.stdout
    if "save_pretrained" in script:
        assert sorted(path.name for path in (tmp_path / "again").glob("*.py")) == [MODULE_FILE]
        assert json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"] == AUTO_MAP


@pytest.mark.slow
def test_without_trust_the_error_says_what_to_pass(checkpoint):
    result = fresh(HEADER + "AutoModelForCausalLM.from_pretrained(path)", checkpoint, check=False)
    assert result.returncode == 1
    error = result.stderr[result.stderr.rindex("\nValueError: ") :]
    assert "contains custom code which must be executed" in error
    assert "Please pass the argument `trust_remote_code=True`" in error


@pytest.mark.slow
def test_without_the_package_the_error_says_what_to_install(checkpoint):
    script = 'import sys; sys.modules["lightning_attention"] = None' + HEADER.replace("assert ours() is None", "")
    result = fresh(script + "AutoConfig.from_pretrained(path, trust_remote_code=True)", checkpoint, check=False)
    assert result.returncode == 1
    assert (
        result.stderr.strip()
        .splitlines()[-1]
        .startswith("ImportError: this model needs lightning-attention, run pip install 'lightning-attention[models]'")
    )


def test_imported_package_needs_no_trust(checkpoint, monkeypatch):
    def asked(*_: object) -> str:
        raise AssertionError("a question")

    monkeypatch.setattr("builtins.input", asked)
    for trust in ({}, {"trust_remote_code": False}, {"trust_remote_code": True}):
        assert type(AutoConfig.from_pretrained(checkpoint, **trust)) is LightningConfig
        assert type(AutoModelForCausalLM.from_pretrained(checkpoint, **trust)) is LightningForCausalLM
        assert AutoTokenizer.from_pretrained(checkpoint, **trust)("a").input_ids == [256, 97]


SAVED = {
    "config": lambda folder: make_config().save_pretrained(folder),
    "config.json": lambda folder: (folder.mkdir(), make_config().to_json_file(folder / "config.json")),
    "LightningModel": lambda folder: LightningModel(make_config()).save_pretrained(folder),
    "LightningForCausalLM": lambda folder: LightningForCausalLM(make_config()).save_pretrained(folder),
    "after register_for_auto_class": lambda folder: (
        LightningConfig.register_for_auto_class(),
        LightningForCausalLM.register_for_auto_class("AutoModelForCausalLM"),
        LightningForCausalLM(make_config()).save_pretrained(folder),
    ),
}


@pytest.mark.parametrize("save", SAVED.values(), ids=SAVED)
def test_saving_writes_the_module(tmp_path, save):
    folder = tmp_path / "saved"
    save(folder)
    assert [path.name for path in folder.glob("*.py")] == [MODULE_FILE]
    assert (folder / MODULE_FILE).read_text() == SOURCE
    assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert LightningConfig.from_pretrained(folder).auto_map == AUTO_MAP


def test_configuration_from_the_hub_gets_our_classes(tmp_path):
    from_hub = {name: f"someone/model--{reference}" for name, reference in AUTO_MAP.items()}
    config = LightningConfig.from_dict(make_config().to_dict() | {"auto_map": from_hub | {"AutoModelForX": "x.X"}})
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP | {"AutoModelForX": "x.X"}


def test_other_json_files_get_no_module(tmp_path):
    make_config().to_json_file(tmp_path / "model.json")
    assert [path.name for path in tmp_path.iterdir()] == ["model.json"]


@pytest.mark.parametrize("kind", [make_config, lambda: LightningForCausalLM(make_config())], ids=["config", "model"])
def test_push_to_hub_uploads_the_module(tmp_path, monkeypatch, kind):
    uploaded: list[str] = []

    def commit(self: HfApi, repo_id: str, operations: list, **_: object) -> None:
        uploaded.extend(operation.path_in_repo for operation in operations)

    created = type("Repository", (), {"repo_id": "someone/model"})
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: created)
    monkeypatch.setattr(HfApi, "create_commit", commit)
    monkeypatch.setattr(HfApi, "create_branch", lambda *_, **__: None)
    monkeypatch.setattr("transformers.modeling_utils.create_and_tag_model_card", lambda *_, **__: Card())
    make_config().save_pretrained(tmp_path)  # an older save, whose files are not uploaded again unless rewritten
    os.utime(tmp_path / MODULE_FILE, (0, 0))
    kind().save_pretrained(str(tmp_path), push_to_hub=True, repo_id="someone/model")
    assert {"config.json", MODULE_FILE} <= set(uploaded)


class Card:
    """Empty model card, since the real one asks the Hub."""

    def save(self, path: str) -> None:
        Path(path).write_text("")


@pytest.mark.slow
def test_derived_class_saves_its_own_source(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from lightning_attention.models import LightningConfig\n"
        "class MyConfig(LightningConfig):\n"
        "    model_type = 'mine'\n"
    )
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from mine import MyConfig; MyConfig.register_for_auto_class()\n"
    )
    fresh(script + "MyConfig().save_pretrained(sys.argv[2])", tmp_path, tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["config.json", "mine.py"]
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["auto_map"] == {"AutoConfig": "mine.MyConfig"}


def test_load_runs_no_code_from_the_folder(checkpoint, tmp_path):
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    for file in checkpoint.glob("*.*"):
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "custom_generate").mkdir()
    for file in (folder / MODULE_FILE, folder / "custom_generate" / "generate.py", folder / "evil.py"):
        file.write_text("raise SystemExit('code of the folder was run')")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = dict.fromkeys(AUTO_MAP, "evil.Model")
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer_config["auto_map"] = {"AutoTokenizer": [None, "evil.Tokenizer"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    model, tokenizer = load(folder)
    assert type(model) is LightningForCausalLM
    assert tokenizer("a").input_ids == [256, 97]
