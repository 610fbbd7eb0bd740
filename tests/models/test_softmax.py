"""Models with layers of softmax attention: hybrids, LLaMA's block, windows, caches, and what such layers cannot do."""

import json
from typing import Any, cast

import pytest
import torch
from tiny_model import make_config, make_model, tokens
from torch import Tensor
from torch.export import Dim, export
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from lightning_attention.inference import Engine, SamplingOptions, StatePool, load, stream
from lightning_attention.models import LightningCache, LightningConfig, LightningForCausalLM, compile_layers
from lightning_attention.training import TrainingOptions, segmented_loss, train
from lightning_attention.training.metrics import read_metrics

SIZES: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4}
OPTIONS: dict[str, dict[str, Any]] = {
    "hybrid": {"layer_pattern": "2:1"},
    "softmax": {"layer_pattern": "0:1", "num_key_value_heads": 2},
    "windows": {"layer_types": ["sliding_attention", "linear_attention", "full_attention"], "sliding_window": 5},
    "hybrid of elu": {"layer_pattern": "1:1", "linear_attention": "elu", "max_position_embeddings": 64},
    "llama": {"layer_pattern": "0:1", "block": "llama", "tie_word_embeddings": False},
    "llama hybrid": {"layer_pattern": "1:1", "block": "llama", "output_gate": True},
}
BY_NAME = pytest.mark.parametrize("name", OPTIONS)


def make(name: str, dtype: torch.dtype = torch.float64, **changes: Any) -> LightningForCausalLM:
    return make_model(dtype, **SIZES | OPTIONS[name] | changes).eval()


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def gradients(model: LightningForCausalLM, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@BY_NAME
@torch.no_grad()
def test_cached_calls_equal_one_call(name):
    model, ids, cache = make(name), tokens(2, 30), LightningCache(3)
    logits = [model(part, cache=cache).logits for part in ids.split([12, 1, 1, 5, *[1] * 11], dim=1)]
    close(torch.cat(logits, dim=1), model(ids).logits)


@BY_NAME
@torch.no_grad()
def test_cached_calls_with_padding_equal_separate_sequences(name):
    """On the left, on the right, inside, and whole calls of padding."""
    model, ids, cache = make(name), tokens(4, 24), LightningCache(3)
    mask = torch.ones_like(ids)
    mask[0, :7] = mask[1, 20:] = mask[2, 9:16] = mask[3, :18] = 0
    start, parts = 0, []
    for length in [9, 6, *[1] * 6, 3]:
        part = ids[:, start : start + length]
        parts.append(model(part, attention_mask=mask[:, : start + length], cache=cache).logits)
        start += length
    found = torch.cat(parts, dim=1)
    for b in range(4):
        is_token = mask[b] == 1
        expected = model(ids[b, is_token][None]).logits[0]
        close(found[b, is_token], expected)
        close(model(ids, attention_mask=mask).logits[b, is_token], expected)
    assert cache.positions is not None
    assert cache.positions.tolist() == mask.sum(1).tolist()


@BY_NAME
def test_packed_equals_separate(name):
    model, lengths = make(name), [5, 1, 0, 20]
    parts = [tokens(1, n, seed=n) for n in lengths]
    expected = torch.cat([model(part).logits for part in parts if part.numel()], dim=1)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    ids = torch.cat(parts, dim=1)
    close(model(ids, cu_seqlens=bounds, use_cache=False).logits, expected)
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    close(model(ids, position_ids=position_ids).logits, expected)


@BY_NAME
def test_generate_equals_recomputation(name):
    model, ids = make(name), tokens(2, 9)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    expected = ids
    for _ in range(12):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(dim=-1)], dim=1)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), expected)
    beams = [model.generate(ids, num_beams=3, use_cache=use_cache, **options) for use_cache in (True, False)]
    assert torch.equal(*beams)
    left = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], dim=1)
    assert torch.equal(model.generate(left, attention_mask=(left > 0).long(), **options)[:, 3:], expected)


@BY_NAME
def test_a_long_text_is_read_in_passes(name, monkeypatch):
    model, ids = make(name), tokens(2, 40)
    with torch.no_grad():
        expected = model(ids).logits
        monkeypatch.setattr("lightning_attention.models.model.TOKENS_PER_PASS", 7)
        close(model(ids).logits, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama hybrid", "windows"])
@pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:The .grad attribute:UserWarning"
)
def test_checkpointed_and_compiled_have_the_gradients_of_eager(name):
    model, ids = make(name).train(), tokens(2, 30)
    packed = {"position_ids": torch.cat([torch.arange(13), torch.arange(17)]).expand(2, -1)}
    expected = [gradients(model, model(ids, labels=ids, **given).loss) for given in ({}, packed)]
    checkpointed, compiled = make(name).train(), make(name).train()
    checkpointed.gradient_checkpointing_enable()
    torch.compiler.reset()
    compile_layers(compiled, "aot_eager")
    for other in (checkpointed, compiled):
        for given, exact in zip(({}, packed), expected, strict=True):
            for x, correct in zip(gradients(other, other(ids, labels=ids, **given).loss), exact, strict=True):
                assert (x - correct).norm() <= 1e-9 * correct.norm() + 1e-12
    with torch.no_grad():
        close(compiled.eval().generate(ids, max_new_tokens=5), model.eval().generate(ids, max_new_tokens=5))


@pytest.mark.parametrize("name", ["windows", "softmax"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_exported_graphs_take_any_length_and_padding(name):
    model, ids = make(name, torch.float32), tokens(2, 12)
    length = Dim("T", min=8, max=60)
    for mask in (None, (torch.arange(12) > 2).long().expand(2, -1)):
        given = {"input_ids": ids, "use_cache": False} | ({} if mask is None else {"attention_mask": mask})
        shapes = {key: None if key == "use_cache" else {1: length} for key in given}
        exported = export(model, (), given, dynamic_shapes=shapes).module()
        given["input_ids"] = tokens(2, 20)
        if mask is not None:
            given["attention_mask"] = torch.tensor([[0] * 5 + [1] * 15, [1] * 18 + [0] * 2])
        torch.testing.assert_close(exported(**given).logits, model(**given).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:The .grad:UserWarning", "ignore:Attempting to run cu"
)
@pytest.mark.parametrize("name", ["windows", "llama hybrid"])
def test_compiled_training_on_a_gpu_has_the_loss_and_gradients_of_eager(name):
    """In bfloat16 autocast: rows and packed documents of several lengths."""
    eager, compiled = (make(name, torch.float32).train().cuda() for _ in range(2))
    torch.compiler.reset()
    compile_layers(compiled)
    for length, document in ((64, 64), (96, 96), (64, 40), (150, 33)):
        ids = tokens(2, length, seed=length).cuda()
        position_ids = (torch.arange(length) % document).expand(2, -1).cuda()
        with torch.autocast("cuda", torch.bfloat16):
            losses = [model(ids, labels=ids, position_ids=position_ids).loss for model in (eager, compiled)]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-2, atol=1e-2)
        exact, found = (gradients(model, loss) for model, loss in zip((eager, compiled), losses, strict=True))
        difference = sum((x - y).square().sum().item() for x, y in zip(found, exact, strict=True))
        assert difference < 5e-2**2 * sum(x.square().sum().item() for x in exact)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["windows", "softmax", "llama hybrid"])
def test_generation_on_a_gpu_equals_that_on_a_cpu(name):
    model, ids = make(name, torch.float32), tokens(2, 30)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False}
    expected = model.generate(ids, **options)
    model.cuda()
    assert torch.equal(model.generate(ids.cuda(), **options).cpu(), expected)
    streamed = model.generate(ids.cuda(), cache=LightningCache(3, sinks=4, window=100), **options)
    assert torch.equal(streamed.cpu(), expected)


@BY_NAME
def test_a_saved_model_is_the_same(name, tmp_path):
    model, ids = make(name, torch.float32), tokens(1, 20)
    model.save_pretrained(tmp_path)
    loaded = LightningForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.layer_types == model.config.layer_types
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


@torch.no_grad()
def test_the_llama_block_is_the_llama_of_transformers():
    """Equal weights give equal logits, with grouped heads and another base."""
    rope = {"rope_theta": 5000.0}
    sizes: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    llama_config: Any = LlamaConfig(
        **sizes, **heads, rope_parameters={"rope_type": "default"} | rope, rms_norm_eps=1e-6
    )
    llama: Any = LlamaForCausalLM(llama_config).double().eval()
    for parameter in llama.parameters():
        parameter.normal_(std=0.3)
    ours = make("llama", num_key_value_heads=2, rope_parameters=rope, pad_token_id=None)
    weights = {
        "model.embed_tokens.weight": llama.model.embed_tokens.weight,
        "model.norm.weight": llama.model.norm.weight,
    }
    weights["lm_head.weight"] = llama.lm_head.weight
    for i, layer in enumerate(llama.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        parts = {
            "attention_norm": [layer.input_layernorm],
            "attention.qkvu_proj": [attention.q_proj, attention.k_proj, attention.v_proj],
            "attention.out_proj": [attention.o_proj],
            "mlp_norm": [layer.post_attention_layernorm],
            "mlp.vu_proj": [mlp.gate_proj, mlp.up_proj],
            "mlp.out_proj": [mlp.down_proj],
        }
        for part, modules in parts.items():
            weights[f"model.layers.{i}.{part}.weight"] = torch.cat([module.weight for module in modules])
    ours.load_state_dict(weights)
    ids = tokens(2, 40)
    torch.testing.assert_close(ours(ids).logits, llama(ids).logits, rtol=1e-4, atol=1e-4)  # its angles are float32


@torch.no_grad()
def test_positions_are_interpolated_at_loading(tmp_path):
    """A model that is loaded with a factor keeps its base; position 4 t has the angles of t."""
    model, ids = make("softmax", torch.float32, rope_parameters={"rope_theta": 300.0}), tokens(1, 20)
    model.save_pretrained(tmp_path)
    rope: Any = {"rope_type": "linear", "factor": 4.0}
    loaded = LightningForCausalLM.from_pretrained(tmp_path, rope_parameters=rope).eval()
    assert loaded.config.rope_parameters == rope | {"rope_theta": 300.0}
    assert AutoConfig.from_pretrained(tmp_path, rope_parameters=rope).rope_parameters == loaded.config.rope_parameters
    assert (loaded(ids).logits - model(ids).logits).abs().max() > 1e-2
    mixer: Any = loaded.model.layers[0].attention
    x = torch.randn(1, 20, 4, 8)
    plain: Any = model.model.layers[0].attention
    torch.testing.assert_close(mixer.rope(x, 4 * torch.arange(20)[None]), plain.rope(x, torch.arange(20)[None]))


def test_rotary_positions_that_are_set_later_are_checked():
    config = make_config(**SIZES, **OPTIONS["softmax"])
    config.rope_parameters = {"rope_type": "yarn", "factor": 4.0}
    with pytest.raises(ValueError, match='rope_type must be "default" or "linear", got \'yarn\''):
        LightningForCausalLM(config)


def test_a_saved_pattern_takes_another_number_of_layers(tmp_path):
    LightningConfig.from_size("demo", layer_pattern="1:1").save_pretrained(tmp_path)
    config = LightningConfig.from_pretrained(tmp_path, num_hidden_layers=3)
    assert config.layer_types == ["linear_attention", "full_attention", "linear_attention"]
    assert LightningConfig.from_pretrained(tmp_path, layer_pattern="3:1").layer_types == ["linear_attention"] * 3 + [
        "full_attention"
    ]
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["layer_types"] == ["linear_attention", "full_attention"] * 2


@pytest.mark.parametrize("name", ["hybrid", "llama"])
def test_heads_of_keys_are_as_many_as_heads_also_of_a_changed_configuration(name, tmp_path):
    """Tools such as PEFT multiply by the number."""
    config = make_config(**SIZES, **OPTIONS[name])
    assert config.num_key_value_heads == LightningConfig().num_key_value_heads // 2 == 4  # pyright: ignore
    config.save_pretrained(tmp_path)
    assert LightningConfig.from_pretrained(tmp_path, num_attention_heads=2).num_key_value_heads == 2


def test_seven_to_one_is_the_pattern_of_minimax():
    config = LightningConfig(num_hidden_layers=80, num_attention_heads=64, hidden_size=6144, layer_pattern="7:1")
    assert [i for i, kind in enumerate(config.layer_types or []) if kind == "full_attention"] == [*range(7, 80, 8)]


def test_lightning_models_have_no_rotary_positions():
    config = LightningConfig()
    assert config.rope_parameters is None
    assert config.to_dict().get("rope_parameters") is None
    assert not config.has_softmax


@pytest.mark.parametrize("name", ["hybrid", "softmax", "llama hybrid"])
@pytest.mark.parametrize(("sinks", "window"), [(4, 6), (0, 5), (2, 100)])
@torch.no_grad()
def test_streaming_generation_takes_constant_memory(name, sinks, window):
    """One call for the prompt gives the tokens of one call a token; a long window gives those of no window."""
    model, ids = make(name), tokens(2, 20)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    caches = [LightningCache(3, sinks=sinks, window=window) for _ in range(2)]
    options: dict[str, Any] = {"max_new_tokens": 15, "do_sample": False}
    found = model.generate(ids, cache=caches[0], **options)
    last = [model(ids[:, i : i + 1], cache=caches[1]).logits for i in range(20)][-1]
    nbytes, streamed = caches[1].nbytes(), [ids]
    for _ in range(15):
        streamed.append(last[:, -1:].argmax(-1))
        last = model(streamed[-1], cache=caches[1]).logits
    assert torch.equal(found, torch.cat(streamed, dim=1))
    assert caches[0].nbytes() == caches[1].nbytes() == nbytes
    without = model.generate(ids, **options)
    assert torch.equal(found, without) == (window == 100)
    layer: Any = caches[0].layers[model.config.layer_types.index("full_attention")]  # pyright: ignore
    assert layer.key_values.keys.shape[1] == sinks + window


def test_a_cache_of_another_kind_is_refused():
    hybrid, linear, ids = make("hybrid"), make_model(**SIZES).eval(), tokens(1, 5)
    cache = LightningCache(3)
    hybrid(ids, cache=cache)
    with pytest.raises(ValueError, match="the cache holds keys and values of layer 2, which has a state"):
        linear(ids, cache=cache)
    cache = LightningCache(3)
    linear(ids, cache=cache)
    with pytest.raises(ValueError, match="the cache holds a state of layer 2, which has keys and values"):
        hybrid(ids, cache=cache)
    cache = LightningCache(3)
    hybrid(ids, cache=cache)
    with pytest.raises(ValueError, match=r"the cache holds .* these inputs need"):
        hybrid(tokens(2, 1), cache=cache)
    with pytest.raises(ValueError, match="the cache has a window, and the model no layer of full_attention"):
        linear(ids, cache=LightningCache(3, window=5))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"window": 0}, ValueError, "window must be at least 1, got 0"),
        ({"window": 4.0}, TypeError, "window must be an integer"),
        ({"window": 4, "sinks": -1}, ValueError, "sinks must be at least 0, got -1"),
        ({"sinks": 4}, ValueError, "sinks go with a window"),
    ],
    ids=str,
)
def test_windows_of_a_cache_are_checked(options, kind, message):
    with pytest.raises(kind, match=message):
        LightningCache(3, **options)


@torch.no_grad()
def test_repeated_and_reordered_rows_keep_their_keys():
    model, ids = make("windows"), tokens(2, 12)
    cache, expected = LightningCache(3), LightningCache(3)
    model(ids[:, :8], cache=cache)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(cast(torch.LongTensor, torch.tensor([3, 0, 1])))
    rows = ids[[1, 0, 0]]
    model(rows[:, :8], cache=expected)
    for i in range(8, 12):
        close(model(rows[:, i : i + 1], cache=cache).logits, model(rows[:, i : i + 1], cache=expected).logits)
    cache.reset()
    assert cache.get_seq_length() == 0
    close(model(rows, cache=cache).logits, model(rows).logits)


@torch.no_grad()
def test_a_cache_made_under_inference_mode_goes_on_outside():
    model, ids, cache = make("hybrid"), tokens(2, 12), LightningCache(3)
    with torch.inference_mode():
        model(ids[:, :8], cache=cache)
    found = [model(ids[:, i : i + 1], cache=cache).logits for i in range(8, 12)]
    close(torch.cat(found, dim=1), model(ids).logits[:, 8:])


def test_calls_with_gradients_go_on_from_a_cache():
    model, ids, cache = make("hybrid"), tokens(2, 12), LightningCache(3)
    with torch.no_grad():
        model(ids[:, :8], cache=cache)
    logits = model(ids[:, 8:], cache=cache).logits
    close(logits, model(ids).logits[:, 8:])
    assert all(x.isfinite().all() for x in gradients(model, logits.square().sum()))


@pytest.mark.parametrize("name", ["hybrid", "softmax"])
def test_what_needs_states_of_constant_size_is_refused(name, tmp_path):
    model, ids = make(name, torch.float32), tokens(1, 20)
    layer = model.config.layer_types.index("full_attention")  # pyright: ignore[reportOptionalMemberAccess]
    message = f"pass on states of constant size, and layer {layer} has full_attention"
    with pytest.raises(ValueError, match=f"training segments {message}"):
        segmented_loss(model, ids, segment_length=8)
    with pytest.raises(ValueError, match=r"the engine keeps a state .* use model.generate"):
        Engine(model)
    with pytest.raises(ValueError, match="no state of constant size"):
        StatePool(model.config, 4)
    states = [torch.zeros(1, 4, 8, 8)] * 3
    with pytest.raises(ValueError, match="states go with layers of linear attention alone"):
        model(ids, states=states, position_ids=torch.arange(20)[None])
    (tmp_path / "data.txt").write_text("some text\n" * 400)
    config = tmp_path / "model.json"
    config.write_text(json.dumps(SIZES | OPTIONS[name] | {"num_hidden_layers": 3, "intermediate_size": 40}))
    options = TrainingOptions(
        tmp_path / "run", (tmp_path / "data.txt",), config=config, segment_length=8, sequence_length=64
    )
    with pytest.raises(ValueError, match=f"training segments {message}"):
        train(options)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_model_of_softmax_attention_trains_by_name_and_generates(tmp_path):
    (tmp_path / "data.txt").write_text("".join(f"{i} and {i + 1}\n" for i in range(2000)))
    options = TrainingOptions(
        tmp_path / "run", (tmp_path / "data.txt",), attention="softmax", steps=30, sequence_length=64, batch_size=4,
        learning_rate=3e-3, eval_every=30, eval_tokens=512, log_every=5, dtype="float32", compile=False,
    )  # fmt: skip
    checkpoint = train(options)
    losses = [record["loss"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in record]
    assert losses[-1] < losses[0] - 1
    model = LightningForCausalLM.from_pretrained(checkpoint)
    assert model.config.layer_types == ["full_attention"] * 4
    loaded, tokenizer = load(tmp_path / "run")
    text = "".join(stream(loaded, tokenizer, "7 and", SamplingOptions(max_new_tokens=8, temperature=0)))
    prompt = tokenizer("7 and", return_tensors="pt").input_ids
    expected = model.generate(prompt, max_new_tokens=8, do_sample=False)[0, prompt.shape[1] :]
    assert text == tokenizer.decode(expected, skip_special_tokens=True)


def test_a_config_of_another_attention_is_made_here():
    config = make_config(**SIZES, layer_pattern="0:1")
    assert (config.positions, config.rope_parameters) == ("rope", {"rope_type": "default", "rope_theta": 10000.0})
    learned = make_config(**SIZES, layer_pattern="0:1", positions="learned", max_position_embeddings=10)
    assert learned.position_limit == 10
    assert make_config(**SIZES, **OPTIONS["llama"]).norm == "rms"
