"""Training steps of a model with several kernels, and kernels in several numbers of segments."""

import pytest
import torch
from torch.autograd.profiler_util import Interval

from benchmarks import segments, step
from benchmarks.cases import OpCase

needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)


def test_overlapping_kernels_count_once():
    spans = [Interval(start, end) for start, end in ((5000, 6000), (0, 2000), (500, 1000), (1000, 3000))]
    assert step.busy_milliseconds(spans) == 4.0


def test_a_step_can_ask_for_the_portable_kernels():
    measured = step.Step("demo", 8, torch.device("cpu"))
    measured.run()
    with pytest.raises(NotImplementedError, match="'triton' cannot run this"):
        measured.run_portable()


@pytest.mark.gpu
@needs_hopper
def test_a_step_is_measured_with_both_kinds_of_kernels():
    results = step.measure("45M", 256, torch.device("cuda"), seconds=0.0)
    assert results.keys() == {"hopper", "portable"}
    for record in results.values():
        assert record["graph_tokens_per_second"] > 0
        assert 0 < record["attention_share"] < 1


@pytest.mark.gpu
@needs_hopper
def test_every_number_of_segments_is_measured():
    record = segments.measure(OpCase(1, 2048, 1, 128, torch.bfloat16), [1, 2, 8], torch.device("cuda"))
    assert all(count > 1 for count in record["chosen"])
    for direction in ("forward", "backward"):
        times = record[f"{direction}_milliseconds"]
        assert times.keys() == {"chosen", "portable", "1", "2", "8"}
        assert all(time > 0 for time in times.values())
