"""Models with sequence parallelism or sharding have the gradients of one process."""

import pytest
import torch
from distributed import faults_of_models as faults
from distributed import models as jobs
from distributed.ranks import WORLD_SIZE
from distributed.test_agreement import SECONDS, remote_error
from oracle import needs_two_gpus
from tiny_model import make_model
from torch import Tensor

CASES = [(24, [], 24), (41, [], 10), (41, [7, 10, 20, 21], 10), (33, [5, 16], 40), (13, [1, 2, 3], 3)]


def assert_sum(parts: list[dict[str, Tensor]], expected: dict[str, Tensor], tolerance: float) -> None:
    """Check the sum of the ranks, relative to each gradient or a hundredth of the largest; `theta` is float32."""
    largest = max(x.norm() for x in expected.values())
    for name, exact in expected.items():
        error = (sum(part[name] for part in parts) - exact).norm() / max(exact.norm(), largest / 100)
        assert error < (max(tolerance, 1e-6) if "theta" in name else tolerance), name


@pytest.mark.parametrize("strategy", ["all-gather", "ring"])
@pytest.mark.parametrize("members", [(0, 1), (0, 1, 2, 3)], ids=["two", "four"])
@pytest.mark.parametrize(("T", "starts", "segment_length"), CASES)
def test_segmented_gradients_equal_one_process(ranks, T, starts, segment_length, members, strategy):
    """The ranks share every training segment; some have no token of the last one."""
    parts = ranks(jobs.gradients_by_segments, T, starts, segment_length, strategy, members=members)
    assert_sum(parts, jobs.gradients_of_one_process(T, starts), 1e-10)


@pytest.mark.parametrize("attention", ["elu", "cosformer", "rfa", "performer"])
def test_gradients_of_other_attentions_equal_one_process(ranks, attention):
    options = {"linear_attention": attention, "max_position_embeddings": 64}
    parts = ranks(jobs.gradients_by_segments, 41, [7, 20, 21], 10, "all-gather", options, members=(0, 1))
    assert_sum(parts, jobs.gradients_of_one_process(41, [7, 20, 21], **options), 1e-10)


@pytest.mark.parametrize("segment_length", [None, 7], ids=["one pass", "training segments"])
@pytest.mark.parametrize("num_labels", [0, 1, 9])
def test_ranks_without_labels_add_nothing(ranks, num_labels, segment_length):
    """Loss and gradients are 0 if no rank has a label."""
    parts = ranks(jobs.gradients_of_last_labels, 20, num_labels, segment_length)
    expected = jobs.gradients_of_last_labels(None, 20, num_labels, None)
    assert segment_length is not None or parts[0]["loss"] == 0
    assert (expected["loss"] == 0) == (num_labels == 0)
    if num_labels:
        assert_sum(parts, expected, 1e-10)
    else:
        assert all(x.eq(0).all() for part in parts for x in part.values())


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", ["all-gather", "ring"])
def test_segmented_gradients_on_one_gpu_equal_one_process(ranks, strategy):
    parts = ranks(jobs.gradients_on_a_gpu, 1000, 300, strategy)
    assert_sum(parts, on_the_host(jobs.gradients_of_one_process_on_a_gpu(1000)), 1e-4)


@pytest.mark.gpu
@pytest.mark.nccl
@needs_two_gpus
@pytest.mark.parametrize("strategy", ["all-gather", "ring"])
def test_segmented_gradients_over_nccl_equal_one_process(ranks, strategy):
    members = range(min(torch.cuda.device_count(), WORLD_SIZE))
    parts = ranks(jobs.gradients_over_nccl, 1000, 300, strategy, members=members)
    assert_sum(parts, on_the_host(jobs.gradients_of_one_process_on_a_gpu(1000)), 1e-4)


def on_the_host(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.cpu() for name, x in gradients.items()}


@pytest.mark.parametrize("members", [(0, 1), (0, 1, 2, 3)], ids=["two", "four"])
def test_segmented_gradients_of_a_sharded_model_equal_one_pass(ranks, members):
    expected = ranks(jobs.gradients_sharded, 29, None, members=members)[0]
    actual = ranks(jobs.gradients_sharded, 29, 8, members=members)[0]
    assert len(expected) > 10
    assert_equal(actual, expected)


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Check float32 gradients, relative to each or a hundredth of the largest."""
    largest = max(x.norm() for x in expected.values())
    for name, exact in expected.items():
        assert (actual[name] - exact).norm() < 1e-5 * max(exact.norm(), largest / 100), name


MODELS = {
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "hybrid": {"layer_pattern": "1:1", "num_key_value_heads": 1},
    "softmax": {"layer_pattern": "0:1", "block": "llama"},
    "random features": {"linear_attention": "rfa", "max_position_embeddings": 64},
}


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("wrapper", ["replicated", "sharded"])
def test_loss_without_logits_of_a_wrapped_model_equals_one_process(ranks, wrapper, options):
    expected = jobs.gradients_averaged(2, 29, options)
    if wrapper == "replicated":
        parts = ranks(jobs.gradients_replicated, 29, options, members=(0, 1))
    else:
        parts = ranks(jobs.gradients_sharded, 29, None, options, members=(0, 1))
    torch.testing.assert_close(torch.stack([part.pop("loss") for part in parts]).mean(), expected.pop("loss"))
    for part in parts:
        assert_equal(part, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "segment_length"), [("sequences", None), ("sequences", 8), ("model", None), ("model", 8), ("tokens", 8)]
)
def test_gradients_with_compiled_layers_equal_eager(ranks, kind, segment_length):
    """Ranks that share tokens communicate between graphs; others have no graph break."""
    eager = ranks(jobs.gradients_compiled, kind, 29, segment_length, False, members=(0, 1))
    compiled = ranks(jobs.gradients_compiled, kind, 29, segment_length, True, members=(0, 1))
    for (expected, _), (actual, num_breaks) in zip(eager, compiled, strict=True):
        assert (num_breaks > 0) == (kind == "tokens")
        for name, exact in expected.items():
            torch.testing.assert_close(actual[name], exact, rtol=1e-4, atol=1e-5, msg=name)


def assert_every_rank_raises(outcomes: list, name: str) -> None:
    """Check the errors of all ranks, and that the right forward pass after them equals one process."""
    _, message = (faults.RAISED | faults.DIFFERENT)[name]
    own, of_others = (message, remote_error(message, 1)) if name in faults.RAISED else (f"ValueError: {message}",) * 2
    for rank, (error, seconds, _) in enumerate(outcomes):
        assert error.startswith(own if rank == 1 else of_others), rank
        assert seconds < SECONDS
    expected = make_model()(**faults.all_inputs()).logits
    torch.testing.assert_close(torch.cat([logits for *_, logits in outcomes], dim=1), expected)


@pytest.mark.parametrize("name", [*faults.RAISED, *faults.DIFFERENT])
def test_fault_of_one_rank_raises_on_every_rank(ranks, name):
    assert_every_rank_raises(ranks(faults.outcome, name), name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["argument-unknown", "log_decay"])
def test_fault_of_one_compiled_model_raises_on_every_rank(ranks, name):
    assert_every_rank_raises(ranks(faults.outcome_compiled, name), name)
