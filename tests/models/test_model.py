import math

import pytest
import torch
import torch.nn.functional as F
from tiny_model import VOCAB, make_config, tokens
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache

from lightning_attention.models import LightningCache, LightningForCausalLM, LightningModel
from lightning_attention.ops.chunked import CHUNK_SIZE


@pytest.fixture
def model() -> LightningForCausalLM:
    torch.manual_seed(0)
    return LightningForCausalLM(make_config(positions="lrpe-d")).eval()


def test_is_the_architecture_of_the_paper(model):
    """The whole model once more, from its formulas, token by token."""
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
@pytest.mark.parametrize("pieces", [[100, 50], [1] * 8 + [142], [CHUNK_SIZE, 1, 1, 20], [149, 1]], ids=str)
def test_pieces_are_the_whole(model, pieces, dtype):
    model = model.to(dtype)
    ids = tokens(2, 150)
    with torch.no_grad():
        whole, cache, logits = model(ids, use_cache=False).logits, None, []
        for piece in ids.split([*pieces, 150 - sum(pieces)], dim=1):
            output = model(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits)
    error = (torch.cat(logits, dim=1) - whole).float().norm() / whole.float().norm()
    assert error < {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    assert cache.get_seq_length() == 150


@pytest.mark.parametrize("use_cache", [False, True], ids=["alone", "cached"])
def test_a_long_sequence_goes_in_pieces(model, monkeypatch, use_cache):
    ids = tokens(2, 70)
    with torch.no_grad():
        whole = model(ids, use_cache=use_cache, output_hidden_states=True)
        monkeypatch.setattr("lightning_attention.models.model.TOKENS_PER_PASS", 16)
        pieces = model(ids, use_cache=use_cache, output_hidden_states=True)
    torch.testing.assert_close(pieces.logits, whole.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pieces.hidden_states, whole.hidden_states, rtol=1e-4, atol=1e-4)
    assert (pieces.past_key_values is not None) == use_cache
    if use_cache:
        assert pieces.past_key_values.get_seq_length() == 70


def test_the_cache_does_not_grow(model):
    with torch.no_grad():
        short = model(tokens(1, 5), use_cache=True).past_key_values
        long = model(tokens(1, 500), use_cache=True).past_key_values
    assert short.nbytes() == long.nbytes() == 3 * 3 * 16 * 8 * 4
    assert all(layer.recurrent_states[0].dtype == torch.float32 for layer in long.layers)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_changes_nothing(model, side):
    """Wherever padding stands: the logits of the tokens, the states, and what follows are those without it."""
    lengths = [7, 12, 1]
    left = {"left": lambda n: 12 - n, "right": lambda n: 0, "both": lambda n: (12 - n) // 2}[side]
    ids, mask = torch.zeros(3, 12, dtype=torch.long), torch.zeros(3, 12, dtype=torch.long)
    for row, n in enumerate(lengths):
        at = slice(left(n), left(n) + n)
        ids[row, at], mask[row, at] = tokens(n, seed=row), 1
    following = tokens(3, 4, seed=9)
    with torch.no_grad():
        padded = model(ids, attention_mask=mask, use_cache=True)
        next_mask = torch.cat([mask, torch.ones(3, 4, dtype=torch.long)], dim=1)
        then = model(following, attention_mask=next_mask, past_key_values=padded.past_key_values)
        for row, n in enumerate(lengths):
            at = slice(left(n), left(n) + n)
            alone = model(torch.cat([ids[row : row + 1, at], following[row : row + 1]], dim=1), use_cache=False)
            torch.testing.assert_close(padded.logits[row, at], alone.logits[0, :n], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(then.logits[row], alone.logits[0, n:], rtol=1e-4, atol=1e-4)


def test_a_row_of_padding_keeps_its_state(model):
    """A conversation that pauses while others in the batch go on."""
    ids = tokens(2, 6)
    mask = torch.tensor([[1] * 6, [1] * 3 + [0] * 3])
    with torch.no_grad():
        cache = model(ids[:, :3], use_cache=True).past_key_values
        before = [layer.recurrent_states[0][1].clone() for layer in cache.layers]
        model(ids[:, 3:], attention_mask=mask, past_key_values=cache)
    assert all(torch.equal(layer.recurrent_states[0][1], b) for layer, b in zip(cache.layers, before, strict=True))
    assert cache.positions.tolist() == [6, 3]


@pytest.mark.parametrize("how", ["cu_seqlens", "int32", "position_ids", "rows"])
def test_packed_documents_do_not_leak(model, how):
    """Each document gives the logits it gives alone, and no gradient reaches another."""
    lengths = [9, CHUNK_SIZE + 2, 1, 20]
    documents = [tokens(1, n, seed=n) for n in lengths]
    embeds = model.model.embed_tokens(torch.cat(documents, dim=1)).detach().requires_grad_()
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    options = {
        "cu_seqlens": lambda: {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0), "inputs_embeds": embeds},
        "int32": lambda: {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int(), "inputs_embeds": embeds},
        "position_ids": lambda: {"position_ids": positions, "inputs_embeds": embeds},
        "rows": lambda: {"position_ids": positions.view(2, -1), "inputs_embeds": embeds.view(2, -1, embeds.shape[-1])},
    }[how]()
    output = model(**options)
    assert output.past_key_values is None
    logits = output.logits.flatten(0, 1).split(lengths)
    for i, document in enumerate(documents):
        if how == "rows" and i == 1:
            continue  # cut in two by the row
        torch.testing.assert_close(logits[i], model(document).logits[0], rtol=1e-4, atol=1e-4)
        (gradient,) = torch.autograd.grad(logits[i].sum(), embeds, retain_graph=True)
        per_document = [g.abs().max() for g in gradient[0].split(lengths)]
        assert [bool(g > 0) for g in per_document] == [j == i for j in range(4)]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_gradient_checkpointing_gives_the_same_gradients(model):
    ids = tokens(2, 30)
    gradients = []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable()
        model.train()
        model.zero_grad()
        output = model(ids, labels=ids, use_cache=enable)
        assert output.past_key_values is None
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


def test_save_and_load(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    for loaded in (LightningForCausalLM.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert isinstance(loaded, LightningForCausalLM)
        with torch.no_grad():
            assert torch.equal(loaded.eval()(tokens(1, 20)).logits, model(tokens(1, 20)).logits)
    assert isinstance(AutoModel.from_pretrained(tmp_path), LightningModel)


@pytest.mark.parametrize("how", ["from_pretrained", "to"])
def test_low_precision_keeps_decays_and_positions(model, how, tmp_path):
    """The slowest decay, exp(-slope) with slope 1e-5 / 2^8, is 1 in bfloat16 and not in float32."""
    theta = model.model.layers[0].attention.lrpe.theta.detach().clone()
    if how == "to":
        low = model.to(torch.bfloat16)
    else:
        model.save_pretrained(tmp_path)
        low = LightningForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert low.dtype == torch.bfloat16
    for i, layer in enumerate(low.model.layers):
        assert torch.equal(layer.attention.decay.log_decay, model.config.layer_log_decay(i))
        assert layer.attention.decay.log_decay.dtype == torch.float32
    assert torch.equal(low.model.layers[0].attention.lrpe.theta, theta)
    with torch.no_grad():
        assert low(tokens(1, 9)).logits.dtype == torch.bfloat16


def test_resize_embeddings(model):
    ids = tokens(1, 9)
    with torch.no_grad():
        before = model(ids).logits
        model.resize_token_embeddings(VOCAB + 6, mean_resizing=False)
        after = model(ids).logits
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert after.shape[-1] == VOCAB + 6
    torch.testing.assert_close(after[..., :VOCAB], before)


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_compile_without_a_graph_break(model, train):
    ids = tokens(2, 30)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    if train:
        losses = [m(ids, labels=ids, use_cache=False).loss for m in (model, compiled)]
        gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
        torch.testing.assert_close(*gradients)
    else:
        with torch.no_grad():
            caches = [LightningCache(3), LightningCache(3)]
            for piece in (ids, ids[:, :1], ids[:, 1:2]):
                outputs = [m(piece, past_key_values=c).logits for m, c in zip((model, compiled), caches, strict=True)]
                torch.testing.assert_close(*outputs)


def test_hidden_states(model):
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    with torch.no_grad():
        output = model(tokens(2, 3), attention_mask=mask, output_hidden_states=True)
    assert [tuple(h.shape) for h in output.hidden_states] == [(2, 3, 24)] * 4
    assert model(tokens(2, 3)).hidden_states is None


def test_tuple_outputs_and_some_logits(model):
    with torch.no_grad():
        full = model(tokens(2, 9), return_dict=False)[0]
        last = model(tokens(2, 9), logits_to_keep=2).logits
        picked = model(tokens(2, 9), logits_to_keep=torch.tensor([0, 4])).logits
    torch.testing.assert_close(last, full[:, -2:])
    torch.testing.assert_close(picked, full[:, [0, 4]])


def bad_inputs(model):
    ids, cache = tokens(2, 6), LightningCache(3)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    packed = {"input_ids": ids[:1], "cu_seqlens": torch.tensor([0, 2, 6])}
    restarting = torch.tensor([[0, 1, 2, 0, 1, 2]]).expand(2, -1)
    return [
        ({}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": ids, "inputs_embeds": torch.zeros(2, 6, 24)}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": ids, "attention_mask": torch.ones(2, 5)}, r"attention_mask must be \[B, T\] = \[2, 6\]"),
        ({"input_ids": ids, "attention_mask": torch.ones(2, 1, 6, 6)}, "attention_mask must be"),
        ({"input_ids": ids, "attention_mask": torch.ones(2, 9).long()}, "attention_mask must be"),
        ({"input_ids": ids, "position_ids": torch.ones(2, 5)}, r"position_ids must be \[B, T\] = \[2, 6\]"),
        ({"input_ids": ids, "position_ids": restarting, "past_key_values": cache}, "which a cache cannot hold"),
        ({"input_ids": ids, "cu_seqlens": torch.tensor([0, 6])}, r"cu_seqlens goes with one batch row \(B = 1\)"),
        (packed | {"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]])}, "cu_seqlens goes with"),
        (packed | {"past_key_values": LightningCache(3)}, "cu_seqlens goes with"),
        ({"input_ids": ids[:1], "past_key_values": cache}, r"the cache holds states of shape \(2, 3, 16, 8\)"),
    ]


@pytest.mark.parametrize("index", range(11))
def test_errors(model, index):
    arguments, message = bad_inputs(model)[index]
    with pytest.raises(ValueError, match=message):
        model(**arguments)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_caches_that_cannot_be(model):
    with pytest.raises(TypeError, match=r"cache must be a LightningCache\(num_hidden_layers\), got DynamicCache"):
        model(tokens(1, 3), past_key_values=DynamicCache(config=model.config))
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing would advance the cache twice"):
        model.train()(tokens(1, 3), past_key_values=LightningCache(3))
