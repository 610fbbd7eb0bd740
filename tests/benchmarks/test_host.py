"""The benchmark of host times."""

import torch

from benchmarks import host

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_plain_calls_do_what_a_step_does(monkeypatch):
    """All update one state: each is called after the state was set back."""
    made = []
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *args, **options: made.append(zeros(*args, **options)) or made[-1])
    calls = host.steps(2, 4, 16, DEVICE)
    (state,) = made
    before = state.normal_().clone()
    results = []
    for call in calls.values():
        state.copy_(before)
        results.append((call(), state.clone()))
    (expected, expected_state), *others = results
    assert not torch.equal(expected_state, before)
    for o, after in others:
        torch.testing.assert_close(o, expected)
        torch.testing.assert_close(after, expected_state)


def test_every_call_is_measured(monkeypatch):
    monkeypatch.setattr(host, "ROUNDS", 1)
    records = host.measure(DEVICE)
    assert [record["case"] for record in records].count("decoding step") == 2
    assert all(time > 0 for record in records for time in record["microseconds"].values())
