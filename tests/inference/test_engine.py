"""Continuous batching gives every request the tokens that it has alone."""

import gc
import random
import re
from collections import defaultdict
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import VOCAB, make_config, tokens

from lightning_attention.inference import Engine, FinishReason, SamplingOptions
from lightning_attention.inference.decoder import Decoder
from lightning_attention.inference.pool import StatePool
from lightning_attention.inference.requests import Request
from lightning_attention.models import LightningForCausalLM
from lightning_attention.ops.backends import BACKENDS

GREEDY = SamplingOptions(max_new_tokens=6, temperature=0)


def make_model(**options) -> LightningForCausalLM:
    torch.manual_seed(1)
    return LightningForCausalLM(make_config(**options)).double().eval()


EOS = [3, 4, 5, 6, 7, 8]
MODEL = make_model(eos_token_id=EOS)


def generated(prompt: list[int], options: SamplingOptions, model: LightningForCausalLM = MODEL) -> list[int]:
    """New tokens of transformers' `generate()` for one prompt."""
    ids = model.generate(torch.tensor([prompt]), **options.for_generate())
    return ids[0, len(prompt) :].tolist()


def prompts(count: int, longest: int = 20, seed: int = 0) -> list[list[int]]:
    """Prompts with common prefixes."""
    generator, common = random.Random(seed), tokens(longest, seed=seed).tolist()
    return [
        common[: generator.randrange(longest)] + tokens(1 + generator.randrange(longest), seed=seed + i).tolist()
        for i in range(count)
    ]


ENGINES = {
    "plain": {},
    "one request at a time": {"max_requests": 1},
    "small prompt chunks": {"prefill_tokens": 3},
    "prefix cache": {"prefix_slots": 5, "prefix_block": 4, "prefill_tokens": 11},
    "cache of one prefix": {"prefix_slots": 1, "prefix_block": 1, "max_requests": 2},
}


@pytest.mark.parametrize("options", ENGINES.values(), ids=ENGINES.keys())
@pytest.mark.parametrize("positions", ["mix", "lrpe-d", "decay"])
def test_greedy_answers_equal_generate(options, positions):
    model = make_model(eos_token_id=EOS, positions=positions)
    engine, given = Engine(model, **options), prompts(12)
    completions = engine.run(given, GREEDY)
    assert [completion.tokens for completion in completions] == [generated(x, GREEDY, model) for x in given]
    for completion in completions:
        stopped = completion.finish_reason == FinishReason.STOP
        assert stopped == (completion.tokens[-1] in EOS)
        assert stopped or len(completion.tokens) == 6
    assert {completion.finish_reason for completion in completions} == {FinishReason.STOP, FinishReason.LENGTH}


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 30),
    st.integers(0, 3),
    st.integers(1, 9),
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9), st.booleans()), max_size=12),
    st.integers(0, 1000),
)
def test_answers_do_not_depend_on_arrivals_and_cancellations(
    max_requests, prefill_tokens, prefix_slots, prefix_block, arrivals, seed
):
    """An arrival is the steps before it, the length of its answer, and True to cancel an earlier request."""
    engine = Engine(
        MODEL,
        max_requests=max_requests,
        prefill_tokens=prefill_tokens,
        prefix_slots=prefix_slots,
        prefix_block=prefix_block,
    )
    for states in engine.pool.states:
        states.fill_(float("nan"))
    answers, reasons, given, cancelled = defaultdict(list), {}, {}, set()

    def step() -> None:
        for output in engine.step():
            assert output.request not in reasons
            if output.token is not None:
                answers[output.request].append(output.token)
            if output.finish_reason is not None:
                reasons[output.request] = output.finish_reason

    for (steps, length, is_cancelled), prompt in zip(arrivals, prompts(len(arrivals), seed=seed), strict=True):
        for _ in range(steps):
            step()
        options = SamplingOptions(max_new_tokens=length + 1, temperature=0)
        request = engine.submit(prompt, options)
        given[request] = prompt, options
        victim = request - length % 3
        if is_cancelled and engine.cancel(victim):
            cancelled.add(victim)
            assert not engine.cancel(victim)
    while engine.has_work:
        step()
    assert set(reasons) == set(given)
    for request, (prompt, options) in given.items():
        expected = generated(prompt, options)
        if request in cancelled:
            assert reasons[request] == FinishReason.CANCELLED
            assert answers[request] == expected[: len(answers[request])]
        else:
            assert reasons[request] != FinishReason.CANCELLED
            assert answers[request] == expected
    assert engine.pool.num_free == engine.pool.num_slots - len(engine.prefixes)


def test_a_sampled_answer_does_not_depend_on_other_requests():
    options = [SamplingOptions(max_new_tokens=9, top_p=0.9, seed=seed) for seed in range(6)]
    given, together = prompts(6), Engine(MODEL)
    answers = defaultdict(list)
    numbers = [together.submit(x, option, stop_token_ids=()) for x, option in zip(given, options, strict=True)]
    while together.has_work:
        for output in together.step():
            answers[output.request].append(output.token)
    for number, prompt, option in zip(numbers, given, options, strict=True):
        alone = Engine(MODEL, max_requests=1, prefill_tokens=2)
        alone.submit(prompt, option, stop_token_ids=())
        tokens_alone = []
        while alone.has_work:
            tokens_alone += [output.token for output in alone.step()]
        assert answers[number] == tokens_alone


def count_prompt_tokens(monkeypatch) -> list[int]:
    """List to which every step appends the number of prompt tokens that it reads."""
    counts, advance = [], MODEL.model.advance

    def counted(input_ids, position_ids, states, slots, *cu_seqlens):
        if cu_seqlens:  # decoding steps have none
            counts.append(input_ids.numel())
        return advance(input_ids, position_ids, states, slots, *cu_seqlens)

    monkeypatch.setattr(MODEL.model, "advance", counted)
    return counts


def test_an_engine_made_in_inference_mode_works_outside():
    with torch.inference_mode():
        engine = Engine(MODEL, max_requests=2, prefix_slots=2, prefix_block=4)
        engine.run(prompts(1), GREEDY)
    [answer] = engine.run(prompts(1, seed=3), GREEDY)
    assert list(answer.tokens) == generated(prompts(1, seed=3)[0], GREEDY)


def test_a_cached_prefix_is_not_read_again(monkeypatch):
    counts, engine = count_prompt_tokens(monkeypatch), Engine(MODEL, prefix_slots=8, prefix_block=10)
    common, prompt, completion = tokens(35).tolist(), [], None
    for end, num_read in (([3, 4], 37), ([5, 6, 8], 8), ([3, 4], 7)):
        prompt = common + end
        (completion,) = engine.run([prompt], GREEDY)
        assert completion.tokens == generated(prompt, GREEDY)
        assert sum(counts) == num_read
        counts.clear()
    # A conversation: prompt, answer, and new tokens. The last token of the answer has not been read.
    assert completion is not None
    conversation = prompt + completion.tokens + [9, 10]
    assert engine.run([conversation], GREEDY)[0].tokens == generated(conversation, GREEDY)
    assert sum(counts) == 3


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_no_prefix_is_kept_that_other_weights_have_read(fused):
    """Weights change in place between requests, and while one runs; nothing else tells the engine."""
    model, prompt = deepcopy(MODEL), tokens(35).tolist()
    engine = Engine(model, prefix_slots=8, prefix_block=10)
    engine.run([prompt], GREEDY)
    options = SamplingOptions(max_new_tokens=40, temperature=0)
    running = engine.submit(prompt, options, stop_token_ids=())
    engine.step()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=fused)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) * 0.05
    optimizer.step()
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert {output.request for output in outputs} == {running}
    assert len(engine.prefixes) == 0
    assert engine.pool.num_free == engine.pool.num_slots
    for _ in range(2):
        assert engine.run([prompt], GREEDY)[0].tokens == generated(prompt, GREEDY, model)
    assert len(engine.prefixes) > 0


def test_a_step_reads_at_most_prefill_tokens(monkeypatch):
    counts, engine = count_prompt_tokens(monkeypatch), Engine(MODEL, prefill_tokens=8)
    engine.run(prompts(10), GREEDY)
    assert max(counts) == 8
    assert sum(counts) == sum(map(len, prompts(10)))


def test_every_request_says_why_it_ended():
    engine = Engine(MODEL)
    prompt = prompts(1)[0]
    expected = generated(prompt, SamplingOptions(max_new_tokens=8, temperature=0), make_model(eos_token_id=None))
    options = SamplingOptions(max_new_tokens=8, temperature=0)

    def broken(_):
        raise RuntimeError("broken")

    numbers = {
        engine.submit(prompt, options, stop_token_ids=[expected[3]]): FinishReason.STOP,
        engine.submit(prompt, options, stop_token_ids=(), is_finished=lambda new: len(new) == 4): FinishReason.STOP,
        engine.submit(prompt, options, stop_token_ids=()): FinishReason.LENGTH,
        engine.submit(prompt, options, stop_token_ids=(), is_finished=broken): FinishReason.FAILED,
    }
    answers, reasons = defaultdict(list), {}
    while engine.has_work:
        for output in engine.step():
            answers[output.request].append(output.token)
            if output.finish_reason:
                reasons[output.request] = output.finish_reason
    assert reasons == numbers
    first = expected.index(expected[3]) + 1
    assert list(answers.values()) == [expected[:first], expected[:4], expected, expected[:1]]


REFUSED = {
    "no tokens": ({"prompt": []}, ValueError, "prompt must hold at least one token"),
    "not in the vocabulary": (
        {"prompt": [3, VOCAB]},
        ValueError,
        rf"prompt must be token ids in \[0, {VOCAB}\), got 3 to {VOCAB}",
    ),
    "negative": ({"prompt": [-1, 4]}, ValueError, "got -1 to 4"),
    "text": ({"prompt": "to be"}, TypeError, "prompt must be token ids, got str"),
    "one token": ({"prompt": 3}, TypeError, "prompt must be token ids, got int"),
    "texts": ({"prompt": ["a"]}, TypeError, "prompt must be token ids, which are whole numbers, got str"),
    "batch rows": (
        {"prompt": tokens(1, 3)},
        TypeError,
        "prompt must be token ids, which are whole numbers, got Tensor",
    ),
    "a bool": ({"prompt": [3, True]}, TypeError, "prompt must be token ids, which are whole numbers, got bool"),
    "options in a dict": (
        {"options": {"max_new_tokens": 3}},
        TypeError,
        "options must be SamplingOptions, got dict",
    ),
    "empty options": ({"options": {}}, TypeError, "options must be SamplingOptions, got dict"),
    "one stop token": ({"stop_token_ids": 3}, TypeError, "stop_token_ids must be token ids, got int"),
    "a stop text": ({"stop_token_ids": ["a"]}, TypeError, "stop_token_ids must be token ids, which are whole .* str"),
    "half a stop token": ({"stop_token_ids": [2.5]}, TypeError, "stop_token_ids must be token ids, .* float"),
    "a stop token not in the vocabulary": (
        {"stop_token_ids": [3, VOCAB]},
        ValueError,
        rf"stop_token_ids must be token ids in \[0, {VOCAB}\), got 3 to {VOCAB}",
    ),
    "is_finished": ({"is_finished": True}, TypeError, "is_finished must be callable or None, got True"),
    "on_error": ({"on_error": "log"}, TypeError, "on_error must be callable or None, got 'log'"),
}


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_an_invalid_request_does_not_affect_other_requests(changes, error, message):
    engine, good = Engine(MODEL), prompts(1)[0]
    engine.submit(good, GREEDY)
    engine.step()
    with pytest.raises(error, match=message):
        engine.submit(**{"prompt": good} | changes)
    answer = []
    while engine.has_work:
        answer += [output.token for output in engine.step()]
    assert answer == generated(good, GREEDY)[1:]


def test_run_reads_no_prompt_if_one_is_invalid():
    engine = Engine(MODEL)
    with pytest.raises(ValueError, match="prompt must hold at least one token"):
        engine.run([prompts(1)[0], []], GREEDY)
    assert not engine.has_work


REFUSED_SIZES = {
    **{name: ({name: 0}, ValueError, "at least 1, got 0") for name in ("max_requests", "prefill_tokens")},
    "prefix_block": ({"prefix_block": 0}, ValueError, "at least 1, got 0"),
    "prefix_slots": ({"prefix_slots": -1}, ValueError, "at least 0, got -1"),
    "a fraction": ({"max_requests": 2.5}, TypeError, "an integer, got 2.5"),
    "a float": ({"prefill_tokens": 4096.0}, TypeError, "an integer, got 4096.0"),
    "text": ({"prefix_slots": "4"}, TypeError, "an integer, got '4'"),
    "a bool": ({"prefix_slots": True}, TypeError, "an integer, got True"),
    "None": ({"prefix_block": None}, TypeError, "an integer, got None"),
    "more than 64 bits": ({"max_requests": 10**30}, ValueError, r"below 2\^63, got 1000"),
}


@pytest.mark.parametrize(("sizes", "error", "message"), REFUSED_SIZES.values(), ids=REFUSED_SIZES)
def test_an_invalid_size_is_refused_by_name(sizes, error, message):
    with pytest.raises(error, match=f"{next(iter(sizes))} must be {message}"):
        Engine(MODEL, **sizes)


def test_numbers_of_numpy_are_taken():
    engine, prompt = Engine(MODEL, max_requests=np.int64(2), prefix_slots=np.int32(1)), prompts(1)[0]  # pyright: ignore[reportArgumentType]
    (answer,) = engine.run([np.array(prompt)], GREEDY)  # pyright: ignore[reportArgumentType]
    assert answer.tokens == generated(prompt, GREEDY)


class Adapted:
    """Stands for a PEFT model."""

    def merge_and_unload(self) -> LightningForCausalLM:
        return MODEL


def sharing_sequences() -> LightningForCausalLM:
    model: Any = make_model()
    model.model.set_sequence_parallel(object())
    return model


REFUSED_MODELS = {
    "text": (lambda: "run", TypeError, "model must be a LightningForCausalLM, got str"),
    "without a head": (lambda: MODEL.model, TypeError, "model must be a LightningForCausalLM, got LightningModel"),
    "with adapters": (Adapted, TypeError, r"got Adapted: pass what its merge_and_unload\(\) returns"),
    "sequence parallel": (sharing_sequences, ValueError, r"call its model.set_sequence_parallel\(None\) first"),
}


@pytest.mark.parametrize(("make", "error", "message"), REFUSED_MODELS.values(), ids=REFUSED_MODELS)
def test_a_model_that_cannot_run_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        Engine(make())


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
def test_a_compiled_model_gives_the_answers_of_its_model():
    compiled: Any = torch.compile(MODEL)
    (answer,) = Engine(compiled).run([prompts(1)[0]], GREEDY)
    assert answer.tokens == generated(prompts(1)[0], GREEDY)


@pytest.mark.parametrize("pool_dtype", [torch.bool, torch.int8, torch.float16, torch.float64, "bfloat16"], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_pool_dtype_that_operators_do_not_take_is_refused(dtype, pool_dtype):
    message = f"pool_dtype must be torch.float32 or torch.bfloat16 for a {dtype} model, got {pool_dtype!r}"
    with pytest.raises(TypeError, match=re.escape(message)):
        Engine(make_model().to(dtype), pool_dtype=pool_dtype)


@pytest.mark.parametrize("pool_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_states_of_a_float64_model_are_float64(pool_dtype):
    assert Engine(MODEL, pool_dtype=torch.float64).pool.states[0].dtype == torch.float64
    with pytest.raises(TypeError, match=r"pool_dtype must be torch.float64 for a torch.float64 model, got torch\."):
        Engine(MODEL, pool_dtype=pool_dtype)


def test_bfloat16_states_take_half_the_memory():
    model = make_model(eos_token_id=None).float()
    full, half = Engine(model), Engine(model, pool_dtype=torch.bfloat16)
    assert 2 * half.pool.nbytes == full.pool.nbytes
    given = prompts(4)
    agreements = [
        x == y
        for one, other in zip(full.run(given, GREEDY), half.run(given, GREEDY), strict=True)
        for x, y in zip(one.tokens, other.tokens, strict=True)
    ]
    assert sum(agreements) > len(agreements) / 2


def test_ten_thousand_requests_leave_no_memory_or_slot_behind():
    model = LightningForCausalLM(make_config(num_hidden_layers=1, positions="decay", eos_token_id=None)).eval()
    engine = Engine(model, max_requests=256, prefix_slots=16, prefix_block=4)
    generator, finished = random.Random(0), 0
    for _ in range(10_000):
        engine.submit([generator.randrange(VOCAB) for _ in range(1 + generator.randrange(8))], GREEDY)
        if generator.random() < 0.1:
            engine.cancel(generator.randrange(10_000))
        if generator.random() < 0.02:
            finished += sum(output.finish_reason is not None for output in engine.step())
    while engine.has_work:
        finished += sum(output.finish_reason is not None for output in engine.step())
    assert finished == 10_000
    assert len(engine.prefixes) == 16
    assert engine.pool.num_free == 256
    gc.collect()
    assert not [x for x in gc.get_objects() if type(x) is Request]


def test_large_steps_are_graphs_on_hopper_too(monkeypatch):
    """The Hopper backend is chosen for large problems only; both backends decode with the same kernels."""
    monkeypatch.setattr(BACKENDS["hopper"], "unsupported_reasons", lambda problem: [])
    decoder = Decoder(MODEL, StatePool(make_config(), 4), max_batch_size=1 << 16)
    assert decoder._supports_cuda_graphs(torch.empty(4, 16, 128, 128, device="meta"))


@pytest.mark.parametrize(
    "options",
    [GREEDY, SamplingOptions(6, temperature=0.5, top_k=3, top_p=0.8, repetition_penalty=1.5, seed=3)],
    ids=["greedy", "sampled"],
)
def test_logprobs_are_those_of_the_model(options):
    """Neither other requests nor the options for the choice change them."""
    engine, given = Engine(MODEL, prefill_tokens=7), prompts(6)
    counts = [None, 0, 3, 1, None, VOCAB + 5]
    requests = [engine.submit(x, options, logprobs=count) for x, count in zip(given, counts, strict=True)]
    found: dict[int, list] = {request: [] for request in requests}
    while engine.has_work:
        for output in engine.step():
            found[output.request].append(output)
    for request, prompt, count in zip(requests, given, counts, strict=True):
        new_tokens = [output.token for output in found[request]]
        if count is None:
            assert all(output.logprobs is None for output in found[request])
            continue
        with torch.no_grad():
            logits = MODEL(torch.tensor([prompt + new_tokens])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)
        for i, output in enumerate(found[request]):
            assert output.logprobs.chosen == pytest.approx(expected[i, output.token].item(), abs=1e-5)
            top = expected[i].topk(min(count, VOCAB))
            assert list(output.logprobs.top) == top.indices.tolist()
            assert list(output.logprobs.top.values()) == pytest.approx(top.values.tolist(), abs=1e-5)


@pytest.mark.parametrize(("logprobs", "error"), [(-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_a_number_of_logprobs_that_is_none_is_refused(logprobs, error):
    with pytest.raises(error, match="logprobs must be"):
        Engine(MODEL).submit([3], logprobs=logprobs)
