"""Training by segments equals training at once."""

import weakref
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import make_model, tokens
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_attention.training import segmented_loss


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_alike(actual, expected, tolerance):
    """Compare norms of errors, relative to each gradient or to a hundredth of the largest one."""
    largest = max(gradient.norm() for gradient in expected.values())
    for name, gradient in expected.items():
        error = (actual[name] - gradient).norm() / max(gradient.norm(), largest / 100)
        assert error <= tolerance, name


def restarts(T: int, *starts: int) -> torch.Tensor:
    """Position ids of documents that start at token 0 and at `starts`."""
    at = torch.arange(T)
    bounds = torch.tensor([0, *starts])
    return at - bounds[torch.searchsorted(bounds, at, right=True) - 1]


MODEL = make_model()


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 2),
    st.integers(2, 40),
    st.integers(1, 45),
    st.lists(st.integers(1, 39), max_size=4),
    st.booleans(),
)
def test_loss_and_gradients_equal_those_of_the_model(B, T, segment_length, starts, some_are_ignored):
    """Documents start anywhere, also at segment starts, and differ between batch rows."""
    input_ids = tokens(B, T)
    labels = input_ids.masked_fill(tokens(B, T, seed=1) < 18, -100) if some_are_ignored else input_ids
    labels[0, 1] = input_ids[0, 1]  # at least one label
    shifted = [restarts(T, *sorted({(x + b) % T for x in starts} - {0})) for b in range(B)]
    position_ids = torch.stack(shifted) if starts else None
    expected = MODEL(input_ids, labels=labels, position_ids=position_ids).loss
    loss = segmented_loss(MODEL, input_ids, labels, position_ids=position_ids, segment_length=segment_length)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    assert_alike(gradients(MODEL, loss), gradients(MODEL, expected), 1e-10)


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("segment_length", [1, 7, 33, 99, 100, 128])
def test_float32_gradients_equal_those_of_the_model_and_of_float64(segment_length, documents):
    model, input_ids = make_model(torch.float32), tokens(4, 100)
    labels = input_ids.masked_fill(tokens(4, 100, seed=1) < 18, -100) if documents else input_ids
    position_ids = torch.stack([restarts(100, 20 + b, 33, 80) for b in range(4)]) if documents else None
    loss = segmented_loss(model, input_ids, labels, position_ids=position_ids, segment_length=segment_length)
    actual = gradients(model, loss)
    for reference in (model, MODEL):
        expected = reference(input_ids, labels=labels, position_ids=position_ids).loss
        torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-5, atol=0)
        assert_alike(actual, gradients(reference, expected), 1e-5)


def test_gradients_accumulate_and_scale_with_the_loss():
    input_ids = tokens(2, 11)
    expected = gradients(MODEL, 5 * MODEL(input_ids, labels=input_ids).loss)
    MODEL.zero_grad()
    for factor in (2, 3):
        (factor * segmented_loss(MODEL, input_ids, segment_length=4)).backward()
    assert_alike({name: parameter.grad for name, parameter in MODEL.named_parameters()}, expected, 1e-10)


@pytest.mark.parametrize(("segment_length", "reads"), [(4, 5), (6, 3), (11, 1)])
def test_every_segment_but_the_last_is_read_twice(segment_length, reads):
    model, input_ids = make_model(), tokens(2, 11)
    expected = gradients(model, model(input_ids, labels=input_ids).loss)
    counted = []
    model.register_forward_hook(lambda *_: counted.append(None))
    loss = segmented_loss(model, input_ids, segment_length=segment_length)
    assert_alike(gradients(model, loss), expected, 1e-10)
    assert len(counted) == reads


def test_a_second_backward_pass_adds_the_same_gradients():
    input_ids = tokens(2, 11)
    expected = gradients(MODEL, 2 * MODEL(input_ids, labels=input_ids).loss)
    loss = segmented_loss(MODEL, input_ids, segment_length=4)
    MODEL.zero_grad()
    for _ in range(2):
        loss.backward(retain_graph=True)
    assert_alike({name: parameter.grad for name, parameter in MODEL.named_parameters()}, expected, 1e-10)


@pytest.mark.parametrize("name", ["input_ids", "labels", "position_ids"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_other_than_integers_are_refused(name, dtype):
    given: dict[str, Any] = {"input_ids": tokens(1, 8)} | {name: tokens(1, 8).to(dtype)}
    with pytest.raises(TypeError, match=rf"{name} must be integers, got {dtype}"):
        segmented_loss(MODEL, **given, segment_length=4)


def test_without_gradients_only_the_loss_is_computed():
    input_ids = tokens(2, 11)
    with torch.no_grad():
        loss = segmented_loss(MODEL, input_ids, segment_length=4)
        torch.testing.assert_close(loss, MODEL(input_ids, labels=input_ids).loss, rtol=1e-12, atol=0)
    assert not loss.requires_grad


@pytest.mark.parametrize("backward_is_within", [True, False], ids=["within", "after"])
def test_backward_uses_the_autocast_of_the_call(backward_is_within):
    model = make_model(torch.float32)
    input_ids = tokens(2, 33)
    with torch.autocast("cpu", torch.bfloat16):
        expected = gradients(model, model(input_ids, labels=input_ids).loss)
        loss = segmented_loss(model, input_ids, segment_length=8)
    with torch.autocast("cpu", torch.bfloat16) if backward_is_within else nullcontext():
        actual = gradients(model, loss)
    assert_alike(actual, expected, 0.03)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_checkpointing_changes_no_gradient():
    model, input_ids = make_model(), tokens(1, 23)
    expected = gradients(model, model(input_ids, labels=input_ids).loss)
    model.gradient_checkpointing_enable()
    assert_alike(gradients(model, segmented_loss(model, input_ids, segment_length=8)), expected, 1e-10)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_compiling_changes_no_gradient():
    model, input_ids = make_model(), tokens(2, 24)
    expected = gradients(model, model(input_ids, labels=input_ids).loss)
    compiled: Any = torch.compile(model, backend="aot_eager")
    assert_alike(gradients(model, segmented_loss(compiled, input_ids, segment_length=8)), expected, 1e-10)


def test_truncated_gradients_end_at_a_cut_while_states_do_not():
    input_ids = tokens(1, 20)
    exact = gradients(MODEL, segmented_loss(MODEL, input_ids, segment_length=5))
    uncut = segmented_loss(MODEL, input_ids, segment_length=5, truncate_every=4)
    assert_alike(gradients(MODEL, uncut), exact, 0.0)
    loss = segmented_loss(MODEL, input_ids, segment_length=5, truncate_every=2)
    torch.testing.assert_close(loss, MODEL(input_ids, labels=input_ids).loss, rtol=1e-12, atol=0)
    actual = gradients(MODEL, loss)
    labels = F.pad(input_ids[:, 1:], (0, 1), value=-100)
    states = [torch.zeros(1, *MODEL.config.layer_state_shape(i), dtype=torch.float64) for i in range(3)]
    expected = 0
    for half in (slice(0, 10), slice(10, 20)):
        outputs = MODEL(
            input_ids[:, half],
            position_ids=torch.arange(20)[None, half],
            labels=labels[:, half],
            shift_labels=labels[:, half],
            num_items_in_batch=19,
            states=[state.detach() for state in states],
        )
        expected, states = expected + outputs.loss, outputs.states
    assert_alike(actual, gradients(MODEL, expected), 1e-10)
    assert any((actual[name] - exact[name]).norm() > 1e-3 * exact[name].norm() for name in exact)


def test_a_gradient_reaches_a_token_39_segments_back():
    """A token that occurs once, in the first of 40 segments, and a loss on the last token alone."""
    T = 400
    model = make_model(decay_preset="paper", tie_word_embeddings=False)  # its first head has no decay
    input_ids = torch.full((1, T), 7)
    input_ids[0, 3] = 8
    labels = torch.full((1, T), -100)
    labels[0, -1] = 9
    expected = gradients(model, model(input_ids, labels=labels).loss)["model.embed_tokens.weight"]
    loss = segmented_loss(model, input_ids, labels, segment_length=10)
    actual = gradients(model, loss)["model.embed_tokens.weight"]
    assert expected[8].norm() > 1e-8
    torch.testing.assert_close(actual[8], expected[8], rtol=1e-8, atol=0)
    cut = gradients(model, segmented_loss(model, input_ids, labels, segment_length=10, truncate_every=1))
    assert cut["model.embed_tokens.weight"][8].norm() == 0


class Memory(TorchDispatchMode):
    """Peak memory of the tensors that operators create."""

    def __init__(self):
        super().__init__()
        self.storages: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and (storage := x.untyped_storage())._cdata not in self.storages:
                self.storages[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.freed, storage._cdata)
        return result

    def freed(self, key: int) -> None:
        self.now -= self.storages.pop(key)


def test_memory_for_activations_does_not_grow_with_segments():
    """Memory without the states between segments and the tokens, at 4 and at 64 segments."""
    model = make_model(torch.float32)
    state_bytes = sum(4 * np.prod(model.config.layer_state_shape(i)) for i in range(3))
    activations = {}
    for num_segments in (4, 64):
        input_ids = tokens(1, 128 * num_segments)
        model.zero_grad()
        with Memory() as memory:
            segmented_loss(model, input_ids, segment_length=128).backward()
        activations[num_segments] = memory.peak - num_segments * state_bytes - input_ids.nbytes
    assert activations[64] <= 1.1 * activations[4]
    with Memory() as memory:
        model(input_ids[:, :1024], labels=input_ids[:, :1024]).loss.backward()
    assert memory.peak > 3 * activations[64]


def test_tokens_may_be_memory_mapped_in_any_integer_dtype(tmp_path):
    input_ids = tokens(1, 50)
    file = tmp_path / "tokens.bin"
    file.write_bytes(input_ids.numpy().astype(np.uint16).tobytes())
    mapped = torch.from_numpy(np.memmap(file, dtype=np.uint16, mode="r+"))[None]
    expected = gradients(MODEL, MODEL(input_ids, labels=input_ids).loss)
    assert_alike(gradients(MODEL, segmented_loss(MODEL, mapped, segment_length=16)), expected, 1e-10)


class Other(nn.Module):
    pass


REFUSED = [
    ({"model": nn.DataParallel(MODEL)}, TypeError, "segments do not go through DataParallel"),
    ({"model": Other()}, TypeError, "a LightningForCausalLM, got Other"),
    ({"input_ids": tokens(7)}, ValueError, r"input_ids must be \[B, T\] with T at least 1, got shape \(7,\)"),
    ({"input_ids": tokens(2, 0)}, ValueError, r"with T at least 1, got shape \(2, 0\)"),
    ({"labels": tokens(2, 6)}, ValueError, r"labels must be \[B, T\] = \[2, 7\], got shape \(2, 6\)"),
    ({"position_ids": tokens(1, 7)}, ValueError, r"position_ids must be \[B, T\] = \[2, 7\], got shape \(1, 7\)"),
    ({"segment_length": 0}, ValueError, "segment_length must be at least 1, got 0"),
    ({"truncate_every": 0}, ValueError, "truncate_every must be at least 1, got 0"),
]


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_invalid_arguments_are_refused(changes, error, message):
    arguments: dict[str, Any] = {"model": MODEL, "input_ids": tokens(2, 7), "segment_length": 3} | changes
    with pytest.raises(error, match=message):
        segmented_loss(**arguments)


def test_a_model_refuses_invalid_states():
    states = [torch.zeros(1, *MODEL.config.layer_state_shape(i), dtype=torch.float64) for i in range(3)]
    with pytest.raises(ValueError, match="states go with position_ids"):
        MODEL(tokens(1, 4), states=states)
    with pytest.raises(ValueError, match="states must be one for each of 3 layers, got 2"):
        MODEL(tokens(1, 4), position_ids=torch.arange(4)[None], states=states[:2])


@pytest.mark.gpu
@pytest.mark.parametrize("offload_states", [False, True], ids=["device", "host"])
def test_bfloat16_gradients_on_a_gpu_are_as_close_as_those_of_the_model(offload_states):
    """Segments are as close to the float32 gradients as the model at once; tokens stay on the host."""
    model: Any = make_model(torch.float32, hidden_size=96, num_attention_heads=3, initializer_range=0.02)
    model.cuda()
    input_ids = tokens(2, 3000)
    on_gpu = input_ids.cuda()
    expected = gradients(model, model(on_gpu, labels=on_gpu).loss)
    with torch.autocast("cuda", torch.bfloat16):
        baseline = gradients(model, model(on_gpu, labels=on_gpu).loss)
        loss = segmented_loss(model, input_ids, segment_length=700, offload_states=offload_states)
    actual = gradients(model, loss)
    largest = max(x.norm() for x in expected.values())
    for name, exact in expected.items():
        size = max(exact.norm(), largest / 100)
        assert (actual[name] - exact).norm() <= 2 * (baseline[name] - exact).norm() + 0.01 * size, name


@pytest.mark.gpu
def test_memory_for_activations_on_a_gpu_does_not_grow_with_segments():
    model: Any = make_model(torch.float32, hidden_size=96, num_attention_heads=3)
    model.cuda()
    peaks = {}
    for num_segments in (4, 64):
        input_ids = tokens(1, 4096 * num_segments)
        segmented_loss(model, input_ids, segment_length=4096).backward()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        segmented_loss(model, input_ids, segment_length=4096).backward()
        peaks[num_segments] = torch.cuda.max_memory_allocated() - before
    state_bytes = sum(4 * np.prod(model.config.layer_state_shape(i)) for i in range(3))
    assert peaks[64] - 64 * state_bytes <= 1.1 * (peaks[4] - 4 * state_bytes)


@pytest.mark.gpu
def test_a_gradient_reaches_a_token_a_million_tokens_back():
    T, needle = 1 << 20, 5
    sizes = {"hidden_size": 48, "num_hidden_layers": 2}
    model: Any = make_model(torch.float32, decay_preset="paper", tie_word_embeddings=False, **sizes)
    model.cuda()
    input_ids = torch.full((1, T), 7)
    input_ids[0, needle] = 8
    labels = torch.full((1, T), -100)
    labels[0, -1] = 9
    loss = model(input_ids.cuda(), labels=labels.cuda(), use_cache=False).loss
    expected = gradients(model, loss)["model.embed_tokens.weight"]
    actual = gradients(model, segmented_loss(model, input_ids, labels, segment_length=1 << 16))
    assert expected[8].norm() > 0
    assert (actual["model.embed_tokens.weight"][8] - expected[8]).norm() < 0.01 * expected[8].norm()
    input_ids[0, needle] = 7
    without = gradients(model, segmented_loss(model, input_ids, labels, segment_length=1 << 16))
    assert without["model.embed_tokens.weight"][8].norm() == 0
