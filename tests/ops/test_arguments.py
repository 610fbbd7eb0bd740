"""Arguments of wrong types: one error that names the argument."""

import math
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch

from lightning_attention import (
    decay,
    distributed,
    lightning_attention,
    lightning_attention_commit,
    lightning_attention_prefill,
    lightning_attention_prefill_,
    lightning_attention_step,
    lightning_attention_verify,
)

x, log_decay, state = torch.randn(1, 6, 2, 4), torch.tensor([-0.5, -1.0]), torch.zeros(1, 2, 4, 4)
indices = torch.zeros(1, dtype=torch.int64)
QKV: dict[str, Any] = {"q": x, "k": x, "v": x, "log_decay": log_decay}
SEQUENCES = {"initial_state": state, "cu_seqlens": torch.tensor([0, 6])}
DRAFTS = {"state": state, "state_indices": indices, "parents": torch.full((1, 6), -1)}
CALLS: dict[str, tuple[Callable, dict[str, Any]]] = {
    "attention": (lightning_attention, QKV | SEQUENCES),
    "prefill": (lightning_attention_prefill, QKV | SEQUENCES | {"state_positions": torch.tensor([2, 6])}),
    "prefill_": (
        lightning_attention_prefill_,
        QKV
        | {"state": state, "state_indices": indices, "has_initial_state": torch.tensor([True])}
        | {"state_positions": torch.tensor([2]), "saved_indices": torch.tensor([[-1]])}
        | {"cu_seqlens": torch.tensor([0, 6])},
    ),
    "step": (
        lightning_attention_step,
        QKV | {"state": state, "state_indices": indices, "saved_indices": torch.tensor([[0] + 5 * [-1]])},
    ),
    "verify": (lightning_attention_verify, QKV | DRAFTS),
    "commit": (
        lightning_attention_commit,
        {name: value for name, value in QKV.items() if name != "q"} | DRAFTS | {"last": indices},
    ),
    "distributed": (distributed.lightning_attention, QKV | SEQUENCES),
}
TENSORS = [(call, name) for call, (_, arguments) in CALLS.items() for name in arguments]
OPTIONAL = (
    "log_decay",
    "initial_state",
    "cu_seqlens",
    "state_indices",
    "saved_indices",
    "parents",
    "has_initial_state",
)
tensors = pytest.mark.parametrize(("call", "name"), TENSORS, ids=[f"{call}-{name}" for call, name in TENSORS])


@tensors
@pytest.mark.parametrize("value", [[1.0], 1.0, None, numpy.ones(2), "x"], ids=["list", "float", "None", "numpy", "str"])
def test_arguments_that_are_not_tensors_are_refused(call, name, value):
    function, arguments = CALLS[call]
    if value is None and (name in OPTIONAL or (call, name) == ("prefill_", "state_positions")):
        return  # the default
    with pytest.raises(TypeError, match=rf"^{name} must (be|hold) "):
        function(**arguments | {name: value})


@tensors
@pytest.mark.filterwarnings("ignore")
def test_sparse_and_nested_tensors_are_refused(call, name):
    function, arguments = CALLS[call]
    sparse = arguments[name].to_sparse()
    nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)])
    for value in (sparse, nested):
        with pytest.raises(TypeError, match=f"^{name} must be a dense tensor.*got (torch.sparse_coo|a nested)"):
            function(**arguments | {name: value})


@pytest.mark.parametrize("name", "qkv")
@pytest.mark.parametrize(
    "convert",
    [lambda x: x.to(torch.complex64), lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)],
    ids=["complex", "quantized"],
)
@pytest.mark.filterwarnings("ignore")
def test_complex_and_quantized_tensors_are_refused(name, convert):
    with pytest.raises(TypeError, match=f"^{name} must (be one of|have the dtype of q)"):
        lightning_attention(**QKV | {name: convert(x)})


SCALED = [call for call in CALLS if call != "commit"]


@pytest.mark.parametrize("call", SCALED)
@pytest.mark.parametrize(
    ("scale", "kind", "message"),
    [
        (math.nan, ValueError, "scale must be finite, got nan"),
        (-math.inf, ValueError, "scale must be finite, got -inf"),
        (10**400, ValueError, "scale must be finite, got inf"),
        (torch.tensor(1.0), TypeError, "scale must be a number, got Tensor"),
        ("1", TypeError, "scale must be a number, got str"),
        (None, TypeError, "scale must be a number, got NoneType"),
        (True, TypeError, "scale must be a number, got bool"),
    ],
    ids=str,
)
def test_bad_scales_are_refused(call, scale, kind, message):
    function, arguments = CALLS[call]
    with pytest.raises(kind, match=message):
        function(**arguments, scale=scale)


@pytest.mark.parametrize("scale", [2, numpy.float32(2), numpy.int64(2)], ids=["int", "float32", "int64"])
def test_any_real_number_is_a_scale(scale):
    assert torch.equal(lightning_attention(**QKV, scale=scale).output, lightning_attention(**QKV, scale=2.0).output)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("backend", [None, 1, ["chunked"]], ids=str)
def test_backend_must_be_a_string(call, backend):
    function, arguments = CALLS[call]
    with pytest.raises(TypeError, match="backend must be a string, got"):
        function(**arguments, backend=backend)


@pytest.mark.parametrize("call", ["attention", "distributed"])
@pytest.mark.parametrize("value", [1, None, "yes", torch.tensor(True)], ids=["int", "None", "str", "tensor"])
def test_output_final_state_must_be_a_bool(call, value):
    function, arguments = CALLS[call]
    with pytest.raises(TypeError, match="output_final_state must be True or False, got"):
        function(**arguments, output_final_state=value)


@pytest.mark.parametrize("positions", [[1.0], [True], ["2"], [None], [[1]]], ids=str)
def test_state_positions_must_be_integers(positions):
    with pytest.raises(TypeError, match="state_positions must hold integers, got"):
        lightning_attention_prefill(**QKV, state_positions=positions)


@pytest.mark.parametrize("positions", [[2, 4], (2, 4), range(2, 5, 2), [numpy.int64(2), 4]], ids=repr)
def test_sequences_of_integers_are_state_positions(positions):
    expected = lightning_attention_prefill(**QKV, state_positions=torch.tensor([2, 4]))
    found = lightning_attention_prefill(**QKV, state_positions=positions)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("call", ["attention", "prefill", "step", "verify", "commit"])
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_positive_slopes_are_refused(call, backend):
    function, arguments = CALLS[call]
    slopes = decay.alibi_slopes(2)
    with pytest.raises(ValueError, match=r"log_decay must be <= 0, got a maximum of 0\.06.*: pass -slopes"):
        function(**arguments | {"log_decay": slopes}, backend=backend)


HEAD_FIRST = [
    (lightning_attention, {"log_decay": log_decay}),
    (lightning_attention, {"initial_state": state}),
    (lightning_attention_prefill, {"log_decay": log_decay, "state_positions": [1]}),
    (lightning_attention_step, {"state": state}),
    (lightning_attention_step, {"log_decay": log_decay, "state": state}),
    (lightning_attention_verify, {"state": state}),
]


@pytest.mark.parametrize(
    ("function", "arguments"), HEAD_FIRST, ids=[f"{f.__name__}-{'-'.join(a)}" for f, a in HEAD_FIRST]
)
def test_head_first_tensors_are_refused_with_a_hint(function, arguments):
    y = x.transpose(1, 2)
    with pytest.raises(ValueError, match=r"looks like \[B, H, T, D\]: pass q, k and v as x\.transpose\(1, 2\)"):
        function(y, y, y, **arguments)


def test_a_wrong_number_of_decays_gets_no_hint_at_transposing():
    with pytest.raises(ValueError, match=r"log_decay must be \[H\] = \[2\], got shape \(3,\)$"):
        lightning_attention(x, x, x, -torch.ones(3))


@pytest.mark.parametrize("num_heads", [8.0, True, "8", None], ids=repr)
def test_num_heads_must_be_an_integer(num_heads):
    for call in (lambda: decay.alibi_slopes(num_heads), lambda: decay.log_decay(num_heads, preset="alibi")):
        with pytest.raises(TypeError, match="num_heads must be an integer, got"):
            call()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preset": None}, "preset must be a string, got NoneType"),
        ({"preset": 1}, "preset must be a string, got int"),
        ({"layer_idx": True}, "layer_idx must be an integer, got True"),
        ({"layer_idx": 1.0}, "layer_idx must be an integer, got 1.0"),
        ({"num_layers": 2.0}, "num_layers must be an integer, got 2.0"),
        ({"num_layers": "2"}, "num_layers must be an integer, got '2'"),
    ],
    ids=str,
)
def test_arguments_of_log_decay_must_have_the_documented_types(change, message):
    with pytest.raises(TypeError, match=message):
        decay.log_decay(**{"num_heads": 4, "layer_idx": 0, "num_layers": 2} | change)


@pytest.mark.parametrize("call", ["step", "commit"])
def test_a_state_is_updated_once(call):
    """Elements of an expanded tensor share memory; a slot that is named twice would lose an update."""
    function, arguments = CALLS[call]
    batch = {name: value.expand(2, *value.shape[1:]) for name, value in arguments.items() if value is not log_decay}
    batch |= {"log_decay": log_decay, "state": state.expand(2, -1, -1, -1), "state_indices": None}
    batch.pop("saved_indices", None)
    with pytest.raises(ValueError, match=r"^state is updated in place.*must not share memory"):
        function(**batch)
    overlapping = torch.zeros(64).as_strided((2, 2, 4, 4), (16, 16, 4, 1))
    with pytest.raises(ValueError, match=r"^state is updated in place.*strides \(16, 16, 4, 1\)"):
        function(**batch | {"state": overlapping})
    with pytest.raises(ValueError, match=r"^state_indices must differ.*got \[1, 1\]"):
        function(**batch | {"state": torch.zeros(3, 2, 4, 4), "state_indices": torch.tensor([1, 1])})
    function(**batch | {"state": torch.zeros(3, 2, 4, 4), "state_indices": torch.tensor([-1, -1])})


def test_a_state_that_is_only_read_may_be_expanded():
    arguments = QKV | {name: QKV[name].expand(2, -1, -1, -1) for name in "qkv"}
    expanded = torch.ones(1, 2, 4, 4).expand(2, -1, -1, -1)
    expected = lightning_attention_verify(**arguments, state=expanded.contiguous())
    assert torch.equal(lightning_attention_verify(**arguments, state=expanded), expected)
