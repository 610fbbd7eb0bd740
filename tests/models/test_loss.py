"""The loss of the model: the same from chunks of logits and from all logits, and the module's where it is not plain."""

import pytest
import torch
import torch.nn.functional as F
from tiny_model import VOCAB, make_model, tokens
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss

from lightning_attention.models import LightningForCausalLM
from lightning_attention.training import segmented_loss

IDS = tokens(2, 9)
SOME = IDS.masked_fill(tokens(2, 9, seed=1) < 20, -100)
ARGUMENTS = {
    "labels": {"labels": IDS},
    "some ignored": {"labels": SOME},
    "another ignored": {"labels": SOME.masked_fill(SOME == -100, 3), "ignore_index": 3},
    "shifted": {"shift_labels": SOME},
    "labels and shifted": {"labels": IDS, "shift_labels": SOME},
    "shifted and flat": {"shift_labels": SOME.flatten()},
    "number of items": {"labels": SOME, "num_items_in_batch": 7},
    "tensor of items": {"labels": SOME, "num_items_in_batch": torch.tensor(7)},
    "no items": {"labels": SOME, "num_items_in_batch": 0},
}


def gradients(model: LightningForCausalLM, **inputs) -> tuple[Tensor, list[Tensor]]:
    loss = model(IDS, **inputs).loss
    return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters())))


def all_logits(**inputs) -> Tensor:
    """transformers' loss, as a function of the user."""
    return ForCausalLMLoss(**inputs)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("skip_logits", [False, True])
@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
def test_loss_in_chunks_equals_that_of_all_logits(arguments, skip_logits, tied):
    model = make_model(torch.float32, tie_word_embeddings=tied)
    found = gradients(model, **arguments, skip_logits=skip_logits)
    model.loss_function = all_logits
    torch.testing.assert_close(found, gradients(model, **arguments), rtol=1e-4, atol=1e-5)


PADDED = {"left": [0, 0, 1, 1, 1, 1, 1, 1, 1], "inside": [1, 1, 1, 0, 0, 1, 1, 1, 1], "right": [1] * 6 + [0] * 3}


@pytest.mark.parametrize("has_own_loss", [False, True], ids=["in chunks", "all logits"])
@pytest.mark.parametrize("where", PADDED)
def test_padding_predicts_nothing(where, has_own_loss):
    """The reference is the formula, of the tokens alone."""
    model, mask = make_model(), torch.tensor([[1] * 9, PADDED[where]])
    if has_own_loss:
        model.loss_function = all_logits
    labels = IDS.masked_fill(mask == 0, -100)
    kept = IDS[1, mask[1] == 1]
    nll = [F.cross_entropy(model(x[None]).logits[0, :-1], x[1:], reduction="none") for x in (IDS[0], kept)]
    if where == "inside":  # the label after the gap is that of padding
        nll[1] = torch.cat([nll[1][:2], nll[1][3:]])
    expected = torch.cat(nll).mean()
    for given in ({"labels": labels}, {"shift_labels": F.pad(labels[:, 1:], (0, 1), value=-100)}):
        loss = model(IDS, attention_mask=mask, **given).loss.double()  # transformers' function is float32
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("labels", [IDS.T.contiguous(), IDS[:, :-1], IDS.flatten()[:-1]], ids=["T, B", "short", "flat"])
@pytest.mark.parametrize("name", ["labels", "shift_labels"])
def test_labels_of_another_shape_are_refused(name, labels):
    with pytest.raises(ValueError, match=rf"^{name} must be \[B, T\] = \[2, 9\], got shape"):
        make_model()(IDS, **{name: labels})


def test_loss_of_a_float64_model_is_float64():
    model = make_model()
    logits = model(IDS).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(model(IDS, labels=IDS).loss, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("skip_logits", [False, True])
def test_no_labels_give_0_with_zero_gradients(skip_logits):
    loss, found = gradients(make_model(), labels=torch.full_like(IDS, -100), skip_logits=skip_logits)
    assert loss == 0
    assert all(x.eq(0).all() for x in found)


def test_logits_are_returned_unless_skipped():
    model = make_model()
    kept, skipped = model(IDS, labels=IDS), model(IDS, labels=IDS, skip_logits=True)
    torch.testing.assert_close(kept.logits, model(IDS).logits)
    assert skipped.logits is None
    assert skipped.loss == kept.loss
    assert model(IDS, labels=IDS, skip_logits=True, return_dict=False)[0] == kept.loss
    with pytest.raises(ValueError, match="skip_logits needs labels"):
        model(IDS, skip_logits=True)
    with pytest.raises(ValueError, match="labels need all logits"):
        model(IDS, labels=IDS, logits_to_keep=1, skip_logits=True)


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **kwargs or {})
        for x in outputs if isinstance(outputs, (tuple, list)) else [outputs]:
            self.numel = max(self.numel, x.numel() if isinstance(x, Tensor) else 0)
        return outputs


@pytest.mark.parametrize("segment_length", [None, 50], ids=["model", "segments"])
def test_training_without_logits_makes_none(segment_length):
    model, ids = make_model(vocab_size=1000), tokens(2, 100)
    with Largest() as largest:
        if segment_length is None:
            model(ids, labels=ids, skip_logits=True).loss.backward()
        else:
            segmented_loss(model, ids, segment_length=segment_length).backward()
    assert largest.numel < 2 * (segment_length or 100) * 1000


@pytest.mark.parametrize("skip_logits", [False, True])
def test_own_loss_function_is_called(skip_logits):
    model = make_model()
    model.loss_function = lambda logits, labels, **_: (logits.sum() * 2, labels.sum())[0]
    output = model(IDS, labels=IDS, skip_logits=skip_logits)
    torch.testing.assert_close(output.loss, model(IDS).logits.sum() * 2)
    assert (output.logits is None) == skip_logits


class Doubled(nn.Module):
    """Wraps a head, as adapters do."""

    def __init__(self, head: nn.Linear):
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.head(x)


class DoubledLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def wrap(head: nn.Linear) -> nn.Module:
    return Doubled(head)


def subclass(head: nn.Linear) -> nn.Module:
    head.__class__ = DoubledLinear
    return head


def hook(head: nn.Linear) -> nn.Module:
    head.register_forward_hook(lambda module, inputs, output: output.mul(2))
    return head


def hook_inputs(head: nn.Linear) -> nn.Module:
    head.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    return head


def replace_forward(head: nn.Linear) -> nn.Module:
    forward = head.forward
    head.forward = lambda input: 2 * forward(input)
    return head


def parametrize(head: nn.Linear) -> nn.Module:
    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    return nn.utils.parametrize.register_parametrization(head, "weight", Double())


@pytest.mark.parametrize("skip_logits", [False, True])
@pytest.mark.parametrize("change", [wrap, subclass, hook, hook_inputs, replace_forward, parametrize])
def test_a_head_that_is_not_plain_is_called(change, skip_logits):
    model = make_model(torch.float32, tie_word_embeddings=False)
    expected = F.cross_entropy(2 * model(IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    model.lm_head = change(model.lm_head)
    torch.testing.assert_close(model(IDS, labels=IDS, skip_logits=skip_logits).loss, expected)


def test_a_bias_of_the_head_is_added_and_trained():
    model = make_model(torch.float32)
    model.lm_head.bias = nn.Parameter(torch.arange(float(VOCAB)))
    expected = F.cross_entropy(model(IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    loss = model(IDS, labels=IDS, skip_logits=True).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert model.lm_head.bias.grad is not None


def test_hooks_on_the_gradient_of_the_head_are_called():
    model, seen = make_model(), []
    model.lm_head.register_full_backward_hook(lambda module, d_inputs, d_outputs: seen.append(d_outputs[0].shape))
    model(IDS, labels=IDS, skip_logits=True).loss.backward()
    assert seen == [(2, 9, VOCAB)]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_gradient_checkpointing_changes_nothing():
    model = make_model().train()
    expected = gradients(model, labels=IDS, skip_logits=True)
    model.gradient_checkpointing_enable()
    torch.testing.assert_close(gradients(model, labels=IDS, skip_logits=True), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_models_have_a_float32_loss(dtype):
    model = make_model(torch.float32)
    expected = model(IDS, labels=IDS).loss
    output = model.to(dtype)(IDS, labels=IDS, skip_logits=True)
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, expected, rtol=3e-2, atol=0)
    output.loss.backward()
    weight = model.lm_head.weight
    assert weight.grad is not None
    assert weight.grad.dtype == dtype


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("skip_logits", [False, True])
def test_compiled_without_graph_breaks_equals_eager_at_every_length(skip_logits):
    model = make_model()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    parameters = list(model.parameters())

    def found(model, ids: Tensor) -> tuple[Tensor, ...]:
        loss = model(ids, labels=ids, use_cache=False, skip_logits=skip_logits).loss
        return loss, *torch.autograd.grad(loss, parameters)

    expected = {length: found(model, tokens(2, length)) for length in (20, 33)}
    torch.testing.assert_close(found(compiled, tokens(2, 20)), expected[20])
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(found(compiled, tokens(2, 33)), expected[33])


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
def test_compiled_on_a_gpu_equals_eager():
    model, ids = make_model(torch.float32, hidden_size=96).cuda(), tokens(2, 200).cuda()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    losses = [m(ids, labels=ids, use_cache=False, skip_logits=True).loss for m in (model, compiled)]
    both = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*both, rtol=1e-3, atol=1e-5)


def test_label_smoothing_of_the_trainer_predicts_the_next_token(tmp_path):
    model, ids = make_model(torch.float32), tokens(2, 9)
    arguments = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, report_to="none", use_cpu=True)
    loss = Trainer(model, arguments).compute_loss(model, {"input_ids": ids, "labels": ids.clone()})
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    torch.testing.assert_close(loss, F.cross_entropy(logits, ids[:, 1:].flatten(), label_smoothing=0.1))
