"""Models with every linear attention: training, decoding, saving, and options that do not go together."""

from collections.abc import Iterator

import pytest
import torch
from tiny_model import make_config, make_model, tokens
from torch.export import Dim, export

from lightning_attention.inference import Engine, SamplingOptions
from lightning_attention.models import (
    LightningCache,
    LightningConfig,
    LightningForCausalLM,
    LinearAttention,
    compile_layers,
    register_attention,
)
from lightning_attention.models.mixers import ATTENTIONS
from lightning_attention.nn import EluFeatures, LearnedPositions, NormalizedLinearAttention
from lightning_attention.nn.feature_maps import RandomFeatures
from lightning_attention.training import segmented_loss

LIMIT = 64
OPTIONS = {
    "elu": {"linear_attention": "elu"},
    "elu without positions": {"linear_attention": "elu", "positions": "none"},
    "cosformer": {"linear_attention": "cosformer"},
    "rfa": {"linear_attention": "rfa", "num_features": 12},
    "performer": {"linear_attention": "performer", "feature_seed": 5},
}
LENGTHS = {"input_ids": {1: Dim("T", min=2, max=60)}, "use_cache": None}
BY_NAME = pytest.mark.parametrize("name", OPTIONS)


def make(name: str, dtype: torch.dtype = torch.float64, **changes) -> LightningForCausalLM:
    return make_model(dtype, **OPTIONS[name] | {"max_position_embeddings": LIMIT} | changes).eval()


def gradients(model: LightningForCausalLM, loss: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@BY_NAME
@torch.no_grad()
def test_cached_calls_equal_one_call(name):
    model, ids, cache = make(name), tokens(2, 30), LightningCache(3)
    logits = [model(part, cache=cache).logits for part in ids.split([12, 1, 1, 5, *[1] * 11], dim=1)]
    torch.testing.assert_close(torch.cat(logits, dim=1), model(ids).logits, rtol=1e-9, atol=1e-9)
    assert cache.nbytes() == 3 * 8 * 2 * sum(torch.tensor(model.config.layer_state_shape(0)).prod(0, keepdim=True))


@BY_NAME
def test_packed_and_padded_equals_separate(name):
    model, lengths = make(name), [5, 1, 20]
    parts = [tokens(1, n, seed=n) for n in lengths]
    expected = torch.cat([model(part).logits for part in parts], dim=1)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    bounds = torch.cat([bounds[:2], bounds[1:]])  # and an empty one
    packed = model(torch.cat(parts, dim=1), cu_seqlens=bounds, use_cache=False).logits
    torch.testing.assert_close(packed, expected, rtol=1e-9, atol=1e-9)
    ids, mask = torch.zeros(3, 20, dtype=torch.long), torch.zeros(3, 20, dtype=torch.long)
    for b, part in enumerate(parts):
        ids[b, 20 - part.shape[1] :], mask[b, 20 - part.shape[1] :] = part, 1
    padded = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(padded[mask == 1][None], expected, rtol=1e-9, atol=1e-9)


@BY_NAME
def test_generate_and_engine_equal_recomputation(name):
    model, prompts = make(name), [tokens(n, seed=n).tolist() for n in (3, 9)]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        for _ in range(12):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(dim=-1)], dim=1)
        expected.append(ids[0].tolist())
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    ids, mask = torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9, dtype=torch.long)
    for b, prompt in enumerate(prompts):
        ids[b, 9 - len(prompt) :], mask[b, 9 - len(prompt) :] = torch.tensor(prompt), 1
    batch = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert [row[9 - len(prompt) :].tolist() for row, prompt in zip(batch, prompts, strict=True)] == expected
    engine = Engine(model, prefill_tokens=4, prefix_slots=2, prefix_block=2)
    answers = engine.run(prompts, SamplingOptions(max_new_tokens=12, temperature=0))
    assert [prompt + answer.tokens for prompt, answer in zip(prompts, answers, strict=True)] == expected


@BY_NAME
def test_training_segments_have_the_gradients_of_one_pass(name):
    model, ids = make(name).train(), tokens(2, 33)
    position_ids = torch.cat([torch.arange(13), torch.arange(20)]).expand(2, -1)
    expected = gradients(model, model(ids, labels=ids, position_ids=position_ids).loss)
    found = gradients(model, segmented_loss(model, ids, position_ids=position_ids, segment_length=8))
    for x, exact in zip(found, expected, strict=True):
        assert (x - exact).norm() <= 1e-9 * exact.norm() + 1e-12


@BY_NAME
@pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:The .grad attribute:UserWarning"
)
def test_checkpointed_and_compiled_have_the_gradients_of_eager(name):
    model, ids = make(name).train(), tokens(2, 30)
    expected = gradients(model, model(ids, labels=ids).loss)
    compiled = make(name).train()
    torch.compiler.reset()
    compile_layers(compiled, "aot_eager")
    model.gradient_checkpointing_enable()
    for changed in (model, compiled):
        torch.testing.assert_close(gradients(changed, changed(ids, labels=ids).loss), expected)


@BY_NAME
@torch.no_grad()
def test_exported_equals_eager_and_meta_has_its_shapes(name):
    model = make(name, torch.float32)
    exported = export(model, (tokens(2, 30),), {"use_cache": False}, dynamic_shapes=LENGTHS).module()
    for T in (30, 50):
        expected = model(tokens(2, T)).logits
        torch.testing.assert_close(exported(tokens(2, T), use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
    assert model.to("meta")(tokens(2, 9).to("meta")).logits.shape == (2, 9, 50)


@BY_NAME
def test_bfloat16_autocast_is_close(name):
    model, ids = make(name, torch.float32), tokens(2, 60)
    expected = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids).logits
    assert (logits - expected).norm() < 0.05 * expected.norm()


@pytest.mark.gpu
@BY_NAME
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_gpu_computes_what_a_cpu_does(name, head_dim):
    """Training in float32 and bfloat16 autocast, decoding, and positions out of range, which are NaN."""
    sizes = {"hidden_size": 2 * head_dim, "num_attention_heads": 2, "num_hidden_layers": 2, "initializer_range": 0.05}
    (model, on_gpu), ids = (make(name, torch.float32, **sizes) for _ in range(2)), tokens(2, 60)
    on_gpu, ids_on_gpu = on_gpu.cuda(), ids.cuda()
    expected = [model(ids).logits.detach(), *gradients(model, model(ids, labels=ids).loss)]
    logits = on_gpu(ids_on_gpu).logits.detach()
    found = [logits, *gradients(on_gpu, on_gpu(ids_on_gpu, labels=ids_on_gpu).loss)]
    for x, exact in zip(found, expected, strict=True):
        assert (x.cpu() - exact).norm() <= 2e-3 * exact.norm()
    with torch.autocast("cuda", torch.bfloat16):
        assert (on_gpu(ids_on_gpu).logits.cpu() - expected[0]).norm() <= 0.05 * expected[0].norm()
        assert all(x.isfinite().all() for x in gradients(on_gpu, on_gpu(ids_on_gpu, labels=ids_on_gpu).loss))
    cache = LightningCache(2)
    with torch.no_grad():
        cached = [on_gpu(part, cache=cache).logits for part in ids_on_gpu.split([40, *[1] * 20], dim=1)]
    torch.testing.assert_close(torch.cat(cached, dim=1), logits, rtol=1e-2, atol=1e-2)
    answers = Engine(on_gpu).run(ids[:, :20].tolist(), SamplingOptions(max_new_tokens=5, temperature=0))
    assert all(len(answer.tokens) for answer in answers)
    if on_gpu.config.position_limit is not None:
        position_ids = torch.arange(LIMIT - 2, LIMIT + 1, device="cuda")[None]
        beyond = on_gpu(ids_on_gpu[:1, :3], position_ids=position_ids, use_cache=False).logits
        assert beyond[:, 2].isnan().all()


@BY_NAME
def test_loaded_equals_saved(name, tmp_path):
    model, ids = make(name, torch.float32), tokens(2, 20)
    for module in model.modules():
        if isinstance(module, RandomFeatures):
            module.directions += 1  # what is saved counts, not the seed
    model.save_pretrained(tmp_path)
    loaded = LightningForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    half = LightningForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    kept = {n: x for n, x in half.state_dict().items() if n.endswith(("sigma", "directions"))}
    assert all(torch.equal(x, model.state_dict()[n]) for n, x in kept.items())
    assert bool(kept) == (name in ("rfa", "performer"))


@pytest.mark.parametrize("name", ["rfa", "performer"])
def test_random_features_depend_on_layer_and_seed_alone(name):
    def directions(**changes) -> list[torch.Tensor]:
        model = LightningForCausalLM(make_config(max_position_embeddings=LIMIT, linear_attention=name, **changes))
        return [module.directions for module in model.modules() if isinstance(module, RandomFeatures)]

    first = directions()
    torch.manual_seed(1)
    assert all(map(torch.equal, first, directions()))
    assert len({x.sum().item() for x in [*first, *directions(feature_seed=1)]}) == 6


def test_hidden_states_hold_positions():
    model, ids = make("elu"), tokens(2, 9)
    (positions,) = [module for module in model.modules() if isinstance(module, LearnedPositions)]
    mask = torch.tensor([[0, 0, *[1] * 7], [1] * 9])
    expected = model.model.embed_tokens(ids)
    expected[0, 2:], expected[1] = expected[0, 2:] + positions.weight[:7], expected[1] + positions.weight[:9]
    hidden = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    torch.testing.assert_close(hidden[0][mask == 1], expected[mask == 1] * 24**0.5)


@pytest.mark.parametrize("name", ["elu", "cosformer"])
def test_contexts_beyond_the_positions_are_refused(name):
    model, message = make(name), "65 tokens exceed the 64 positions of this model"
    model(tokens(2, LIMIT))
    with pytest.raises(ValueError, match=message):
        model(tokens(2, LIMIT + 1))
    with pytest.raises(ValueError, match=message):
        model.generate(tokens(1, 60), max_new_tokens=6, min_new_tokens=6)
    engine = Engine(model)
    options = SamplingOptions(max_new_tokens=6, temperature=0)
    with pytest.raises(ValueError, match=message):
        engine.submit(tokens(60).tolist(), options)
    assert len(engine.run([tokens(59).tolist()], options)[0].tokens) <= 6
    with pytest.raises(ValueError, match="positions must be in"):
        model(tokens(1, 3), position_ids=torch.tensor([[62, 63, 64]]))
    packed = torch.arange(2 * LIMIT)[None] % LIMIT  # two sequences of the longest context
    assert model(tokens(1, 2 * LIMIT), position_ids=packed, use_cache=False).logits.isfinite().all()


REFUSED = [
    ({"linear_attention": "linformer"}, "linear_attention must be one of lightning, lightning-1, elu, cosformer,"),
    (
        {"linear_attention": "elu", "positions": "mix"},
        "positions must be one of learned, none, got 'mix' for elu",
    ),
    ({"positions": "learned"}, "positions must be one of mix, lrpe-d, decay, got 'learned' for lightning"),
    ({"linear_attention": "elu"}, "max_position_embeddings is needed by elu attention with positions 'learned'"),
    ({"linear_attention": "cosformer"}, "max_position_embeddings is needed by cosformer"),
    ({"linear_attention": "elu", "decay_preset": "alibi"}, "decay_preset go with lightning attention"),
    ({"linear_attention": "elu", "log_decay": [[0.0] * 3] * 3}, "log_decay and decay_preset go with lightning"),
    ({"num_features": 8}, "num_features goes with rfa and performer, not with lightning"),
    ({"linear_attention": "rfa", "num_features": 7, "positions": "none"}, "num_features must be even"),
    ({"linear_attention": "performer", "num_features": 0, "positions": "none"}, "num_features must be at least 1"),
    ({"feature_seed": -1}, "feature_seed must be at least 0"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LightningForCausalLM(make_config(**options))


CHOSEN = "linear_attention", "positions", "num_features", "feature_seed", "max_position_embeddings"


def test_configurations_keep_their_attention(tmp_path):
    for name, options in OPTIONS.items():
        config = make_config(max_position_embeddings=LIMIT, **options)
        config.save_pretrained(tmp_path / name)
        loaded = LightningConfig.from_pretrained(tmp_path / name)
        assert {key: getattr(loaded, key) for key in CHOSEN} == {key: getattr(config, key) for key in CHOSEN}
    assert make_config().positions == "mix"


@pytest.fixture
def squared() -> Iterator[str]:
    """Name of a registered attention, whose features are the squares of 1 + elu."""

    class Squared(EluFeatures):
        def forward(self, x, positions, *, is_query):
            return super().forward(x, positions, is_query=is_query).square()

    def make_squared(config: LightningConfig, layer_idx: int) -> NormalizedLinearAttention:
        return NormalizedLinearAttention(
            config.hidden_size, config.num_attention_heads, Squared(config.hidden_size // config.num_attention_heads)
        )

    name = "squared in a test"  # an example of the docs registers "squared"
    register_attention(name, attention := LinearAttention(make_squared, ("none",)))
    register_attention(name, attention)
    with pytest.raises(ValueError, match=f"there is an attention '{name}' already"):
        register_attention(name, LinearAttention(make_squared))
    yield name
    del ATTENTIONS[name]


def test_a_gate_that_a_mixer_was_not_made_with_is_refused(squared):
    with pytest.raises(ValueError, match="output_gate is False, which NormalizedLinearAttention was not made with"):
        LightningForCausalLM(make_config(linear_attention=squared, output_gate=False))


def test_a_registered_attention_trains_decodes_and_loads(squared, tmp_path):
    model, ids = make_model(linear_attention=squared), tokens(2, 20)
    assert model.config.positions == "none"
    expected = gradients(model, model(ids, labels=ids).loss)
    torch.testing.assert_close(gradients(model, segmented_loss(model, ids, segment_length=6)), expected)
    model.eval().save_pretrained(tmp_path)
    loaded = LightningForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    (answer,) = Engine(loaded).run([ids[0].tolist()], SamplingOptions(max_new_tokens=5, temperature=0))
    generated = model.generate(ids[:1], max_new_tokens=5, do_sample=False)
    assert generated[0, 20:].tolist() == answer.tokens
