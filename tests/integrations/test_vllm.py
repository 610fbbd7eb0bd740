"""vLLM with our plug-in gives the tokens of `generate()`, in a process for each configuration."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_attention.integrations import vllm as plugin
from lightning_attention.models import LightningConfig, LightningForCausalLM
from lightning_attention.training import byte_tokenizer

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make vllm"),
]

PROCESS = Path(__file__).with_name("vllm_process.py")
SIZES: dict[str, Any] = {
    "num_hidden_layers": 4,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "intermediate_size": 192,
    "vocab_size": 259,
    "max_position_embeddings": 2048,
}
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "NUMBA_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
}
NEW = 24
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 2}
SPECULATION = {"speculative_config": NGRAM, "enable_prefix_caching": False}  # not both on a CPU
HYBRID = {"layer_pattern": "3:1"}

CASES = {
    "LRPE-d in the first layer": ({}, {}),
    "LRPE-d in all layers, untied": ({"positions": "lrpe-d", "tie_word_embeddings": False}, {}),
    "decay, three heads": ({"positions": "decay", "hidden_size": 96, "num_attention_heads": 3}, {}),
    "LayerNorm": ({"norm": "layer", "qk_activation": "1+elu", "glu_activation": "silu"}, {}),
    "RMSNorm, no gate, lightning-1": ({"norm": "rms", "output_gate": False, "linear_attention": "lightning-1"}, {}),
    "hybrid": (HYBRID, {}),
    "hybrid with windows": (
        {"layer_types": ["linear_attention", "sliding_attention"] * 2, "sliding_window": 48, "num_key_value_heads": 2},
        {},
    ),
    "softmax, LLaMA's block": ({"layer_pattern": "0:1", "block": "llama", "num_key_value_heads": 2}, {}),
    "drafts": ({}, SPECULATION),
    "drafts, hybrid": (HYBRID, SPECULATION),
    "compiled": ({}, {"enforce_eager": False}),
    "two processes with half of the heads": ({}, {"tensor_parallel_size": 2}),
    "half of the heads, LayerNorm": ({"norm": "layer", "positions": "lrpe-d"}, {"tensor_parallel_size": 2}),
    "half of the heads, hybrid, RMSNorm": (
        HYBRID | {"norm": "rms", "num_key_value_heads": 2},
        {"tensor_parallel_size": 2},
    ),
    "two processes with half of the layers": ({}, {"pipeline_parallel_size": 2, "enforce_eager": False}),
}


def make_model(folder: Path, **options) -> LightningForCausalLM:
    """A model whose tokens depend on all earlier ones, saved in a folder."""
    torch.manual_seed(1)
    model = LightningForCausalLM(LightningConfig(**SIZES | options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(1 if "embed" in name or "theta" in name or parameter.dim() == 1 else 3)
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    return model


def make_prompts(lengths) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths]
    repeated = torch.randint(0, 256, (9,), generator=generator).tolist()
    return [*prompts, repeated * 5]


def generated(model: LightningForCausalLM, prompt: list[int], new: int) -> list[int]:
    ids = torch.tensor([prompt])
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(ids, max_new_tokens=new, min_new_tokens=new, **options)[0, len(prompt) :].tolist()


def served(folder: Path, rounds, new, **engine) -> SimpleNamespace:
    """Answers of a process of vLLM."""
    request, answers = folder / "request.json", folder / "answers.json"
    request.write_text(json.dumps({"rounds": rounds, "new": new, "engine": engine}))
    command = [sys.executable, PROCESS, folder, request, answers]
    process = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-6000:]
    return SimpleNamespace(**json.loads(answers.read_text()))


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_generate(tmp_path, case):
    """Prompts longer than a step reads, beside decoding; in the second round from used states, and cached prefixes."""
    options, engine = CASES[case]
    model = make_model(tmp_path, **options)
    prompts = make_prompts([1, 2, 7, 33, 64, 129, 300, 517])
    found = served(tmp_path, [prompts, prompts], [NEW] * len(prompts), **engine)
    expected = [generated(model, prompt, NEW) for prompt in prompts]
    assert found.rounds == [expected, expected]
    is_speculative = "speculative_config" in engine
    assert (found.accepted > 10) == is_speculative
    assert (found.cached > 500) != is_speculative


def assert_first_tokens_are_those_of(model: LightningForCausalLM, folder: Path) -> None:
    """Later tokens may differ by rounding."""
    prompts = make_prompts([33, 129])
    (answers,) = served(folder, [prompts], [NEW] * len(prompts), dtype="bfloat16").rounds
    assert [answer[0] for answer in answers] == [generated(model, prompt, 1)[0] for prompt in prompts]


def test_bfloat16_gives_the_tokens_of_generate_but_for_rounding(tmp_path):
    assert_first_tokens_are_those_of(make_model(tmp_path).bfloat16(), tmp_path)


def test_quantised_weights_are_read(tmp_path):
    """Weights of the linear layers in int8, with a scale for each output, as compressed-tensors has them."""
    model = make_model(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        scale = weights[name].abs().amax(dim=1, keepdim=True) / 127
        weights[f"{name}_scale"], weights[name] = scale, (weights[name] / scale).round().to(torch.int8)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    numbers = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": numbers | {"strategy": "channel", "dynamic": False},
        "input_activations": numbers | {"strategy": "token", "dynamic": True},
    }
    scheme = {"quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed"}
    scheme |= {"ignore": ["lm_head"], "config_groups": {"group_0": group}}
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": scheme}))
    assert_first_tokens_are_those_of(model, tmp_path)


def test_many_requests_that_share_beginnings_and_evict_prefixes(tmp_path):
    model, random = make_model(tmp_path), torch.Generator().manual_seed(0)
    *shared, _ = make_prompts([200, 90, 150])
    prompts, new = [], []
    for i in range(40):
        begin = shared[i % 3][: int(torch.randint(1, 200, (), generator=random))]
        prompts.append(begin + torch.randint(0, 256, (1 + i % 7,), generator=random).tolist())
        new.append(1 + i % 20)
    found = served(tmp_path, [prompts, prompts], new, num_gpu_blocks_override=40, max_num_seqs=8)
    expected = [generated(model, prompt, n) for prompt, n in zip(prompts, new, strict=True)]
    assert found.rounds == [expected, expected]
    assert found.cached > 0


@pytest.mark.parametrize(
    ("options", "engine", "message"),
    [
        (
            HYBRID | {"num_key_value_heads": 1},
            {"tensor_parallel_size": 2},
            "tensor parallelism of 2 must divide num_key_value_heads = 1",
        ),
        ({"linear_attention": "elu"}, {}, "vLLM serves lightning attention, not elu"),
        ({}, {"mamba_cache_dtype": "bfloat16"}, "states are float32: leave mamba_cache_dtype out, got bfloat16"),
    ],
    ids=["heads", "another attention", "states in bfloat16"],
)
def test_what_cannot_be_served_is_refused(tmp_path, options, engine, message):
    make_model(tmp_path, **options)
    with pytest.raises(AssertionError) as error:
        served(tmp_path, [[[1]]], [1], **engine)
    assert message in str(error.value)


def test_a_vllm_that_was_not_tested_serves_none_of_our_models(monkeypatch):
    import vllm
    from vllm import ModelRegistry

    registered = []
    monkeypatch.setattr(ModelRegistry, "register_model", lambda *names: registered.append(names))
    monkeypatch.setattr(vllm, "__version__", "0.99.1")
    plugin.register()
    assert registered == [
        ("LightningForCausalLM", "lightning_attention.integrations.vllm.untested:LightningForCausalLM")
    ]
    with pytest.raises(ImportError, match=r"was tested with vLLM 0.32.\*"):
        import lightning_attention.integrations.vllm.untested  # noqa: F401


def test_the_plugin_raises_in_no_process_of_others(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "lightning_attention.models", None)
    plugin.register()
    assert "vLLM can serve no models of lightning-attention" in caplog.text


def test_vllm_finds_the_plugin():
    (found,) = [x for x in entry_points(group="vllm.general_plugins") if x.name == "lightning_attention"]
    assert found.load() is plugin.register


def test_the_openai_server_completes_text(tmp_path):
    tokenizer, model = byte_tokenizer(), make_model(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", tmp_path, "--enforce-eager"]
    command += ["--dtype", "float32", "--max-model-len", "512", "--host", "127.0.0.1", "--port", port]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*map(str, command)], env=os.environ | ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        address = f"http://127.0.0.1:{port}"
        wait_until_it_answers(f"{address}/health", process, tmp_path / "log")
        prompt = tokenizer("The state has constant size").input_ids
        body = {"model": str(tmp_path), "prompt": prompt, "max_tokens": NEW, "temperature": 0, "ignore_eos": True}
        body["return_token_ids"] = True
        request = urllib.request.Request(f"{address}/v1/completions", json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=120) as answer:
            (choice,) = json.load(answer)["choices"]
        assert choice["token_ids"] == generated(model, prompt, NEW)
    finally:
        process.terminate()
        process.wait(60)


def wait_until_it_answers(address: str, process: subprocess.Popen, log: Path) -> None:
    for _ in range(240):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    raise AssertionError("the server does not answer")
