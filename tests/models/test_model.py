"""The model computes its formulas, for every way to cut a text into calls, pad it or pack it."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny_model import make_config, make_model, tokens

from lightning_attention.models import LightningCache, LightningForCausalLM
from lightning_attention.models.model import TOKENS_PER_PASS
from lightning_attention.ops.chunked import CHUNK_SIZE

THETA = "model.layers.0.attention.lrpe.theta"


@pytest.fixture
def model() -> LightningForCausalLM:
    torch.manual_seed(0)
    return LightningForCausalLM(make_config(positions="lrpe-d")).eval()


def test_forward_equals_formulas_token_by_token(model):
    config, weights = model.config, model.state_dict()
    W, H = config.hidden_size, config.num_attention_heads
    D, ids = W // H, tokens(40)

    def norm(x):
        return x / (x.norm() / math.sqrt(len(x)) + 1e-9)

    states = [torch.zeros(H, 2 * D, D) for _ in range(config.num_hidden_layers)]
    expected = []
    for t, token in enumerate(ids):
        x = weights["model.embed_tokens.weight"][token] * math.sqrt(W)
        for i in range(config.num_hidden_layers):
            layer = f"model.layers.{i}."
            q, k, v, u = (weights[layer + "attention.qkvu_proj.weight"] @ norm(x)).split(W)
            q, k, v = (F.silu(q).view(H, D), F.silu(k).view(H, D), v.view(H, D))
            angle = weights[layer + "attention.lrpe.theta"] * t
            q, k = (torch.cat([y * angle.cos(), y * angle.sin()], dim=-1) for y in (q, k))
            decay = torch.exp(config.layer_log_decay(i))[:, None, None]
            states[i] = decay * states[i] + k[:, :, None] * v[:, None, :]
            o = torch.einsum("hk,hkv->hv", q, states[i]).flatten()
            x = x + weights[layer + "attention.out_proj.weight"] @ (norm(o) * u)
            v, u = (weights[layer + "mlp.vu_proj.weight"] @ norm(x)).chunk(2)
            x = x + weights[layer + "mlp.out_proj.weight"] @ (v * u)
        expected.append(weights["lm_head.weight"] @ norm(x))
    with torch.no_grad():
        torch.testing.assert_close(model(ids[None]).logits[0], torch.stack(expected), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [[100, 50], [1] * 8 + [142], [CHUNK_SIZE, 1, 1, 20], [149, 1]], ids=str)
def test_cached_calls_equal_one_call(model, lengths, dtype):
    model, ids = model.to(dtype), tokens(2, 150)
    cache, logits = LightningCache(3), []
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        for part in ids.split([*lengths, 150 - sum(lengths)], dim=1):
            logits.append(model(part, cache=cache).logits)
    error = (torch.cat(logits, dim=1) - expected).float().norm() / expected.float().norm()
    assert error < {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    assert cache.get_seq_length() == 150


@pytest.mark.parametrize("use_cache", [False, True], ids=["uncached", "cached"])
def test_long_inputs_equal_one_pass(model, use_cache):
    """Without gradients, more than TOKENS_PER_PASS tokens go through the layers in several passes."""
    ids = tokens(2, TOKENS_PER_PASS + 70)
    with torch.no_grad():
        output = model(ids, use_cache=use_cache, output_hidden_states=True, logits_to_keep=100)
    expected = model(ids, use_cache=False, output_hidden_states=True, logits_to_keep=100)
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(output.hidden_states, expected.hidden_states, rtol=1e-3, atol=1e-3)
    assert (output.cache.get_seq_length() if use_cache else output.cache) == (ids.shape[1] if use_cache else None)


def test_cache_size_is_constant(model):
    with torch.no_grad():
        short = model(tokens(1, 5), use_cache=True).cache
        long = model(tokens(1, 500), use_cache=True).cache
    assert short.nbytes() == long.nbytes() == 3 * 3 * 16 * 8 * 4
    assert all(layer.recurrent_states[0].dtype == torch.float32 for layer in long.layers)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padded_equals_unpadded(model, side):
    """For the logits of the tokens, and for logits of later tokens from the cache."""
    lengths = [7, 12, 1]
    left = {"left": lambda n: 12 - n, "right": lambda n: 0, "both": lambda n: (12 - n) // 2}[side]
    ids, mask = torch.zeros(3, 12, dtype=torch.long), torch.zeros(3, 12, dtype=torch.long)
    for b, n in enumerate(lengths):
        at = slice(left(n), left(n) + n)
        ids[b, at], mask[b, at] = tokens(n, seed=b), 1
    following = tokens(3, 4, seed=9)
    with torch.no_grad():
        padded = model(ids, attention_mask=mask, use_cache=True)
        next_mask = torch.cat([mask, torch.ones(3, 4, dtype=torch.long)], dim=1)
        then = model(following, attention_mask=next_mask, cache=padded.cache)
        for b, n in enumerate(lengths):
            at = slice(left(n), left(n) + n)
            alone = model(torch.cat([ids[b : b + 1, at], following[b : b + 1]], dim=1), use_cache=False)
            torch.testing.assert_close(padded.logits[b, at], alone.logits[0, :n], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(then.logits[b], alone.logits[0, n:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [1, 3])
def test_padding_keeps_the_state_of_its_batch_row(model, length):
    """Single tokens take the decoding kernel, more tokens are packed."""
    ids, mask = tokens(3, 4 + length), torch.ones(3, 4 + length, dtype=torch.long)
    mask[[0, 2], 4:], mask[2, :2] = 0, 0
    with torch.no_grad():
        cache = model(ids[:, :4], attention_mask=mask[:, :4], use_cache=True).cache
        before = [layer.recurrent_states[0].clone() for layer in cache.layers]
        logits = model(ids[:, 4:], attention_mask=mask, cache=cache).logits
    assert cache.positions.tolist() == [4, 4 + length, 2]
    torch.testing.assert_close(logits[1], model(ids[1:2]).logits[0, 4:], rtol=1e-4, atol=1e-4)
    for layer, state in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.recurrent_states[0][[0, 2]], state[[0, 2]])


@pytest.mark.parametrize("how", ["cu_seqlens", "int32", "position_ids", "two batch rows"])
def test_packed_equals_separate(model, how):
    """For logits; and no gradient reaches another sequence."""
    lengths = [9, CHUNK_SIZE + 2, 1, 20]
    sequences = [tokens(1, n, seed=n) for n in lengths]
    embeds = model.model.embed_tokens(torch.cat(sequences, dim=1)).detach().requires_grad_()
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    options = {
        "cu_seqlens": lambda: {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0), "inputs_embeds": embeds},
        "int32": lambda: {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int(), "inputs_embeds": embeds},
        "position_ids": lambda: {"position_ids": positions, "inputs_embeds": embeds},
        "two batch rows": lambda: {"position_ids": positions.view(2, -1), "inputs_embeds": embeds.view(2, -1, 24)},
    }[how]()
    output = model(**options)
    assert output.cache is None
    logits = output.logits.flatten(0, 1).split(lengths)
    for i, sequence in enumerate(sequences):
        if how == "two batch rows" and i == 1:
            continue  # cut in two by the end of the batch row
        torch.testing.assert_close(logits[i], model(sequence).logits[0], rtol=1e-4, atol=1e-4)
        (gradient,) = torch.autograd.grad(logits[i].sum(), embeds, retain_graph=True)
        assert [bool(g.any()) for g in gradient[0].split(lengths)] == [j == i for j in range(4)]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_gradient_checkpointing_keeps_gradients(model):
    ids = tokens(2, 30)
    gradients = []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable()
        model.train()
        model.zero_grad()
        output = model(ids, labels=ids, use_cache=enable)
        assert output.cache is None
        output.loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_loss_is_the_mean_over_shifted_labels(model):
    ids = tokens(2, 20)
    labels = ids.clone()
    labels[0, :5] = -100
    with torch.no_grad():
        output = model(ids, labels=labels)
    log_p = output.logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    kept = labels[:, 1:] != -100
    torch.testing.assert_close(output.loss, -log_p[kept].mean())


@pytest.mark.parametrize("how", ["from_pretrained", "to"])
def test_bfloat16_keeps_decays_and_positions_in_float32(model, how, tmp_path):
    """The slowest decay, exp(-1e-5 / 2^8), is 1 in bfloat16 and not in float32."""
    theta = model.get_parameter(THETA).detach().clone()
    if how == "to":
        low = model.to(torch.bfloat16)
    else:
        model.save_pretrained(tmp_path)
        low = LightningForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert low.dtype == torch.bfloat16
    for i in range(3):
        log_decay = low.get_buffer(f"model.layers.{i}.attention.decay.log_decay")
        assert log_decay.dtype == torch.float32
        assert torch.equal(log_decay, model.config.layer_log_decay(i))
    assert torch.equal(low.get_parameter(THETA), theta)
    with torch.no_grad():
        assert low(tokens(1, 9)).logits.dtype == torch.bfloat16


def test_return_dict_false_gives_a_tuple(model):
    with torch.no_grad():
        assert torch.equal(model(tokens(2, 9), return_dict=False)[0], model(tokens(2, 9)).logits)


@pytest.mark.parametrize(
    ("kept", "at"),
    [(0, slice(None)), (2, slice(-2, None)), (torch.tensor([0, 4]), [0, 4])],
    ids=["all", "last", "indices"],
)
def test_logits_to_keep_selects_tokens(model, kept, at):
    with torch.no_grad():
        expected = model(tokens(2, 9)).logits[:, at]
        torch.testing.assert_close(model(tokens(2, 9), logits_to_keep=kept).logits, expected)


def test_logits_to_keep_selects_tokens_of_each_batch_row(model):
    ids = tokens(2, 9)
    with torch.no_grad():
        logits, mask = model(ids).logits, ids > 20
        indices = torch.tensor([[0, 8], [3, 4]])
        expected = torch.stack([logits[0, [0, 8]], logits[1, [3, 4]]])
        torch.testing.assert_close(model(ids, logits_to_keep=indices).logits, expected)
        torch.testing.assert_close(model(ids, logits_to_keep=mask).logits, logits[mask])


@pytest.mark.parametrize("positions", ["mix", "lrpe-d"])
def test_last_hidden_state_is_normalised(positions):
    """transformers' convention: the head of the model reads hidden_states[-1]."""
    model = make_model(torch.float32, positions=positions).eval()
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    with torch.no_grad():
        output = model(tokens(2, 4), attention_mask=mask, output_hidden_states=True)
        torch.testing.assert_close(model.lm_head(output.hidden_states[-1]), output.logits)
        assert model(tokens(2, 4)).hidden_states is None
    assert [tuple(x.shape) for x in output.hidden_states] == [(2, 4, 24)] * 4
    assert output.hidden_states[-1] is not output.hidden_states[-2]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_gradient_checkpointing_refuses_a_cache(model):
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing would advance the cache twice"):
        model.train()(tokens(1, 3), past_key_values=LightningCache(3))


def test_gradients_reach_every_hidden_state():
    torch.manual_seed(0)
    model = LightningForCausalLM(make_config())
    output = model(torch.randint(model.config.vocab_size, (2, 7)), output_hidden_states=True)
    for state in output.hidden_states:
        state.retain_grad()
    output.logits.sum().backward()
    assert all(state.grad is not None and state.grad.any() for state in output.hidden_states)
