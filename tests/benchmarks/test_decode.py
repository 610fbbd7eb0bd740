"""The benchmarks of decoding measure what they claim. No test here is about speed."""

import json
from contextlib import contextmanager

import pytest
import torch
from tiny_model import make_config, tokens

from benchmarks import cases, decode_engine, decode_kernel, decode_model
from benchmarks.baselines.softmax import SoftmaxDecoder, cache_shape
from benchmarks.cases import ContextCase, ServingCase, StepCase
from benchmarks.implementations import IMPLEMENTATIONS, STEP_IMPLEMENTATIONS, StepImplementation
from benchmarks.plot import plot_model
from benchmarks.report import OURS
from lightning_attention.models import SIZES, LightningForCausalLM

CPU = torch.device("cpu")
STEP = StepCase(batch_size=2, num_heads=3, head_dim=8, dtype=torch.float32)
SERVING = ServingCase(requests=3, sample=2, max_requests=2, prompt_tokens=(2, 5), answer_tokens=(1, 4))
OUR_STEP, RING_STEP, PLAIN_STEP = (found for found in STEP_IMPLEMENTATIONS if found.device == "cpu")
(SOFTMAX,) = (found for found in IMPLEMENTATIONS if found.device == "cpu" and found.is_softmax)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def small_caches(monkeypatch):
    monkeypatch.setattr(decode_kernel, "FLUSHED_BYTES", 1 << 15)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LightningForCausalLM(make_config(eos_token_id=None)).eval()


@torch.no_grad()
def softmax_logits(model, input_ids):
    """Logits of all tokens, from attention over the full sequence at once."""
    body, (_, T) = model.model, input_ids.shape
    x = body.embed_tokens(input_ids) * body.config.hidden_size**0.5
    for layer in body.layers:
        attention = layer.attention
        q, k, v, u = attention.qkvu_proj(layer.attention_norm(x)).chunk(4, dim=-1)
        q, k, v = (y.unflatten(-1, (attention.num_heads, attention.head_dim)) for y in (q, k, v))
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / attention.head_dim**0.5
        scores.masked_fill_(torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1), float("-inf"))
        o = torch.einsum("bhij,bjhd->bihd", scores.softmax(dim=-1), v)
        x = x + attention.out_proj(attention.norm(o.flatten(-2)) * u)
        x = x + layer.mlp(layer.mlp_norm(x))
    return model.lm_head(body.norm(x))


@pytest.mark.parametrize("device", DEVICES)
def test_the_softmax_baseline_is_attention_over_the_sequence(model, device):
    """Each step attends to a view of the cache with one more token."""
    model.to(device=device, dtype=torch.float64)
    input_ids = tokens(2, 7).to(device)
    caches = [torch.full(cache_shape(model.config, 2, 7), float("nan")).to(input_ids.device) for _ in range(3)]
    caches = [cache.double() for cache in caches]
    exact = softmax_logits(model, input_ids)
    for t in range(7):
        decoder = SoftmaxDecoder(model, [cache[:, :, :, : t + 1] for cache in caches])
        for _ in range(2):  # on a GPU, captured and then replayed
            torch.testing.assert_close(decoder(input_ids[:, t].tolist(), t), exact[:, t])


def test_a_step_moves_the_state_twice():
    case = StepCase(batch_size=2, num_heads=3, head_dim=4, dtype=torch.bfloat16)
    assert case.state_bytes == 2 * 3 * 4 * 4 * 4
    assert case.minimal_bytes == 2 * case.state_bytes + 4 * (2 * 3 * 4 * 2)


@pytest.mark.parametrize(
    ("batch_size", "sets", "calls"), [(2, 22, 22), (32, 2, 20), (1 << 10, 1, 20)], ids=["small", "medium", "large"]
)
def test_states_exceed_the_caches(batch_size, sets, calls):
    case = StepCase(batch_size, 3, 8, torch.float32)
    inputs = decode_kernel.StepInputs(case, CPU)
    assert (len(inputs.sets), inputs.calls) == (sets, calls)
    assert sets * case.state_bytes >= 1 << 15


def _altered(change):
    def build(log_decay):
        step = OUR_STEP.build(log_decay)
        return lambda q, k, v, state: change(*step(q, k, v, state))

    return build


def _not_installed(log_decay):
    import no_such_package  # noqa: F401  # pyright: ignore[reportMissingImports]


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (_altered(lambda o, state: (1.1 * o, state)), "wrong: relative error of o is 1.0e-01, above 3e-03"),
        (_altered(lambda o, state: (o, 0.9 * state)), "wrong: relative error of state is 1.0e-01, above 3e-03"),
        (_altered(lambda o, state: (o, state / 0)), "wrong: relative error of state is inf"),
        (_not_installed, "ModuleNotFoundError: No module named 'no_such_package'"),
    ],
    ids=["output", "state", "inf", "import"],
)
def test_a_wrong_or_failing_step_is_reported_and_not_timed(build, why):
    implementations = [StepImplementation("bad", "cpu", build), OUR_STEP]
    bad, good = decode_kernel.measure(STEP, 1e9, implementations=implementations, device=CPU, seconds=0.0)
    assert why in bad["not_measured"]
    assert not bad.keys() & {"error", "eager", "graph", "host"}
    assert good["error"] < 1e-5
    assert good["eager"]["microseconds"] > 0
    assert good["eager"]["times_ours"] == 1
    floor = STEP.minimal_bytes / 1e9 * 1e6
    assert good["eager"]["times_floor"] == pytest.approx(good["eager"]["microseconds"] / floor, rel=1e-3)
    assert good["graph"] is good["host"] is None


def test_a_kv_cache_grows_with_the_context_and_a_state_does_not(model):
    """A KV cache has 2 W numbers per token and layer."""
    contexts = [ContextCase(2, length) for length in (16, 32)]
    results = [decode_model.measure(case, model, "tiny", [SOFTMAX], seconds=0.0) for case in contexts]
    found = [(r["implementation"], r["length"], r["state_bytes"]) for records in results for r in records]
    state = results[0][0]["state_bytes"]
    assert found == [
        (OURS, 16, state),
        (SOFTMAX.name, 16, 3 * 2 * 2 * 16 * 24 * 4),
        (OURS, 32, state),
        (SOFTMAX.name, 32, 3 * 2 * 2 * 32 * 24 * 4),
    ]
    for record in results[0]:
        assert record["milliseconds"] > 0
        assert record["times_ours"] > 0
        assert (record["size"], record["batch_size"], record["dtype"]) == ("tiny", 2, "float32")


def test_a_cache_that_does_not_fit_is_reported(model, monkeypatch):
    monkeypatch.setattr(decode_model, "free_bytes", lambda device: 20_000)
    contexts = [ContextCase(1, length) for length in (64, 16)]
    results = [decode_model.measure(case, model, "tiny", [SOFTMAX], seconds=0.0) for case in contexts]
    (ours, too_long), (_, fits) = results
    assert ours["milliseconds"] > 0
    assert too_long["not_measured"] == ("MemoryError: a KV cache of 3.433e-05 GiB does not fit: 1.863e-05 GiB are free")
    assert fits["milliseconds"] > 0


def test_an_attention_that_raises_does_not_stop_the_others(model):
    @contextmanager
    def refuses():
        raise RuntimeError("no available kernel")
        yield

    bad = type(SOFTMAX)("bad", "cpu", SOFTMAX.build, context=refuses)
    records = decode_model.measure(ContextCase(1, 8), model, "tiny", [bad, SOFTMAX], seconds=0.0)
    assert [r.get("not_measured") for r in records] == [None, "RuntimeError: no available kernel", None]


def test_requests_are_the_same_at_every_call():
    requests = decode_engine.random_requests(SERVING, vocab_size=50)
    assert requests == decode_engine.random_requests(SERVING, vocab_size=50)
    sizes = [(len(prompt), options.max_new_tokens) for prompt, options in requests]
    assert sizes == SERVING.sizes()
    assert all(2 <= prompt <= 5 and 1 <= answer <= 4 for prompt, answer in sizes)


def test_throughput_is_answer_tokens_over_seconds(model):
    ours, one_by_one = decode_engine.measure(SERVING, model, "tiny", decode_engine.SERVERS, seconds=0.0)
    answers = [answer for _, answer in SERVING.sizes()]
    assert (ours["requests"], ours["sampled_from"], ours["answer_tokens"]) == (3, None, sum(answers))
    assert (one_by_one["requests"], one_by_one["sampled_from"]) == (2, 3)
    assert one_by_one["answer_tokens"] == sum(answers[:2])
    assert one_by_one["prompt_tokens"] == sum(prompt for prompt, _ in SERVING.sizes()[:2])
    for record in (ours, one_by_one):
        assert record["tokens_per_second"] == pytest.approx(record["answer_tokens"] / record["seconds"], rel=1e-3)
    slower = ours["tokens_per_second"] / one_by_one["tokens_per_second"]
    assert one_by_one["times_ours"] == pytest.approx(slower, rel=1e-2)


def test_answers_of_another_length_are_reported(model):
    servers = {OURS: decode_engine.Server(lambda model, case: lambda requests: 1)}
    (record,) = decode_engine.measure(SERVING, model, "tiny", servers, seconds=0.0)
    expected = sum(answer for _, answer in SERVING.sizes())
    assert record["not_measured"] == f"ArithmeticError: wrong: 1 tokens instead of {expected}"


@pytest.fixture
def tiny(monkeypatch):
    sizes = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    monkeypatch.setitem(SIZES, "demo", sizes | {"num_attention_heads": 3})
    monkeypatch.setattr(cases, "STEP_BATCHES", {"cpu": (1,)})
    monkeypatch.setattr(cases, "REQUESTS", {"cpu": (2, 1)})


def test_the_command_writes_results_and_a_plot(tiny, bench, tmp_path, capsys):
    sizes = "--length 32 --length 16 --batch-size 2 --max-requests 1 --seconds 0 --device cpu --output"
    command = bench("decode", *sizes.split(), tmp_path)
    runs = json.loads((tmp_path / "decode.json").read_text())["runs"]
    found = {kind: [r["implementation"] for r in run["results"]] for kind, run in runs.items()}
    assert found == {
        "kernel": [OURS, RING_STEP.name, PLAIN_STEP.name],
        "model": [OURS, SOFTMAX.name, OURS, SOFTMAX.name],
        "engine": [OURS, "generate() one by one"],
    }
    assert not any("not_measured" in record for run in runs.values() for record in run["results"])
    assert {run["command"] for run in runs.values()} == {" ".join(command)}
    assert [record["length"] for record in runs["model"]["results"]] == [16, 16, 32, 32]
    assert {path.name for path in tmp_path.iterdir()} == {"decode.json", "decode.png"}
    out = capsys.readouterr().out
    for line in ("B 1, H 64, D 128: floor", "B 2, 16 tokens", "2 requests, 1 at a time"):
        assert line in out


def test_a_run_keeps_results_of_other_kinds(tiny, bench, tmp_path):
    options = ["--seconds", 0, "--device", "cpu", "--output", tmp_path]
    bench("decode", "--only", "kernel", *options)
    assert {path.name for path in tmp_path.iterdir()} == {"decode.json"}
    bench("decode", "--only", "model", "--length", 8, *options)
    assert json.loads((tmp_path / "decode.json").read_text())["runs"].keys() == {"kernel", "model"}


def test_the_plot_leaves_out_what_was_not_measured(tmp_path):
    sizes = {"size": "tiny", "batch_size": 1, "dtype": "float32"}
    results = [
        {"implementation": "a", "length": 1024, **sizes, "milliseconds": 1.0, "state_bytes": 1 << 20},
        {"implementation": "b", "length": 1024, **sizes, "not_measured": "why"},
    ]
    for name, shown in (("some", results), ("none", results[1:])):
        plot_model({"machine": {"device": "a"}, "runs": {"model": {"results": shown}}}, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
