"""After any exception in an engine every request ends or goes on, and no slot is lost."""

import asyncio
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from tiny_model import make_config, tokens

from lightning_attention.inference import Engine, FinishReason, SamplingOptions
from lightning_attention.inference import engine as engine_module
from lightning_attention.models import LightningForCausalLM

OPTIONS = SamplingOptions(max_new_tokens=5, seed=2)
COMMON = tokens(9).tolist()
PROMPTS = [COMMON[:n] + tokens(1 + n, seed=n).tolist() for n in (4, 9, 2, 7, 5, 8)]
LATE = 4  # the first prompt that is submitted while others decode

ENGINES = {
    "plain": {"max_requests": 4},
    "small prompt chunks": {"max_requests": 3, "prefill_tokens": 5},
    "prefix cache": {"max_requests": 3, "prefill_tokens": 11, "prefix_slots": 4, "prefix_block": 3},
    "cache of every prefix": {"max_requests": 2, "prefix_slots": 2, "prefix_block": 1},
}
# Methods that raise: the object, given the engine, and the name.
PLACES = {
    "layers": (lambda engine: engine.model.model, "advance"),
    "head": (lambda engine: engine.model.lm_head, "forward"),
    "sampling": (lambda _: engine_module, "choose_each"),
    "copy of a prefix": (lambda engine: engine.pool, "copy"),
    "zeroing": (lambda engine: engine.pool, "zero"),
}
ERRORS = {
    "exception": RuntimeError,
    "out of memory": torch.OutOfMemoryError,
    "interrupt": KeyboardInterrupt,
    "cancelled": asyncio.CancelledError,
}


@pytest.fixture(scope="module")
def model() -> LightningForCausalLM:
    torch.manual_seed(1)
    return LightningForCausalLM(make_config(eos_token_id=None)).double().eval()


@pytest.fixture(scope="module")
def expected(model) -> list[list[int]]:
    return [Engine(model).run([prompt], OPTIONS)[0].tokens for prompt in PROMPTS]


class Service:
    """Engine with all outputs of its steps; interruptions are caught, as in a server."""

    def __init__(self, model, **options):
        self.engine = Engine(model, **options)
        self.tokens: dict[int, list[int]] = defaultdict(list)
        self.reasons: dict[int, FinishReason] = {}
        self.interruptions: list[BaseException] = []

    def step(self) -> None:
        try:
            outputs = self.engine.step()
        except (KeyboardInterrupt, asyncio.CancelledError) as error:
            self.interruptions.append(error)
            return
        for output in outputs:
            assert output.request not in self.reasons
            if output.token is not None:
                self.tokens[output.request].append(output.token)
            if output.finish_reason is not None:
                self.reasons[output.request] = output.finish_reason

    def serve(self, **submitted) -> list[int]:
        numbers = [self.engine.submit(prompt, OPTIONS, **submitted) for prompt in PROMPTS[:LATE]]
        self.step()
        self.step()
        numbers += [self.engine.submit(prompt, OPTIONS, **submitted) for prompt in PROMPTS[LATE:]]
        while self.engine.has_work:
            self.step()
        return numbers

    def check(self, numbers: list[int], expected: list[list[int]], failed: set[FinishReason]) -> None:
        """Every request has ended, with its complete answer or, with a reason in `failed`, a part; no slot is lost."""
        for number, answer in zip(numbers, expected, strict=True):
            if self.reasons[number] == FinishReason.LENGTH:
                assert self.tokens[number] == answer
            else:
                assert self.reasons[number] in failed
                assert self.tokens[number] == answer[: len(self.tokens[number])]
        engine = self.engine
        assert engine.pool.num_free == engine.pool.num_slots - len(engine.prefixes)


@contextmanager
def failing(owner, name: str, call: int, error: BaseException, *, afterwards: bool) -> Iterator[list[int]]:
    """Make one call of a method raise, before or after its work; yield the count of calls."""
    original, count = getattr(owner, name), [0]

    def wrapped(*args, **kwargs):
        count[0] += 1
        if count[0] == call and not afterwards:
            raise error
        result = original(*args, **kwargs)
        if count[0] == call:
            raise error
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, wrapped)
        yield count


@pytest.mark.parametrize("name_of_error", ["out of memory", "interrupt"])
@pytest.mark.parametrize("options", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize(("owner_of", "name"), PLACES.values(), ids=PLACES)
def test_a_failure_ends_only_the_requests_in_flight(model, expected, owner_of, name, options, name_of_error):
    call, happened, error = 1, True, ERRORS[name_of_error]()
    while happened:
        service = Service(model, **options)
        with failing(owner_of(service.engine), name, call, error, afterwards=bool(call % 2)) as count:
            numbers = service.serve()
        happened = count[0] >= call
        service.check(numbers, expected, {FinishReason.FAILED})
        is_interruption = not isinstance(error, Exception)
        assert service.interruptions == [error] * (happened and is_interruption)
        failures = list(service.reasons.values()).count(FinishReason.FAILED)
        assert (failures > 0) == happened
        if name in ("copy", "zero"):  # called for one request
            assert failures <= 1
        # All requests again, with the prefix cache as it is now.
        numbers = service.serve()
        service.check(numbers, expected, set())
        call += 1 if call < 4 else 5
    assert call > 2 or name == "copy"


@pytest.mark.parametrize("options", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize("victim", range(len(PROMPTS)))
@pytest.mark.parametrize("name_of_error", ["exception", "interrupt", "cancelled"])
def test_a_callback_that_raises_ends_only_its_request(model, expected, options, victim, name_of_error, caplog):
    service, error = Service(model, **options), ERRORS[name_of_error]()
    errors, others = [], []

    def broken(new) -> bool:
        if len(new) == 3:
            raise error
        return False

    for i, prompt in enumerate(PROMPTS):
        is_finished, on_error = (broken, errors.append) if i == victim else (None, others.append)
        service.engine.submit(prompt, OPTIONS, is_finished=is_finished, on_error=on_error)
    while service.engine.has_work:
        service.step()
    service.check(list(range(len(PROMPTS))), expected, {FinishReason.FAILED})
    assert [i for i, reason in service.reasons.items() if reason == FinishReason.FAILED] == [victim]
    assert service.tokens[victim] == expected[victim][:3]
    assert service.interruptions == [error] * (not isinstance(error, Exception))
    assert (errors, others) == ([error], [])
    assert f"request {victim} failed" in caplog.text


def test_nonfinite_logits_end_only_their_request(model, expected, monkeypatch, caplog):
    service = Service(model, max_requests=3, prefix_slots=4, prefix_block=3)
    forward, calls = model.lm_head.forward, []

    def overflowing(hidden_states):
        logits = forward(hidden_states)
        calls.append(len(logits))
        if len(calls) == 4:
            logits[1, 7] = float("nan")
        return logits

    monkeypatch.setattr(model.lm_head, "forward", overflowing)
    numbers = service.serve()
    service.check(numbers, expected, {FinishReason.FAILED})
    assert list(service.reasons.values()).count(FinishReason.FAILED) == 1
    assert "logits are NaN or infinite" in caplog.text


@pytest.mark.parametrize("options", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize("target", [-1, 0, 1, 2], ids=lambda i: f"request {i:+}")
def test_a_callback_may_cancel_its_request_and_others(model, expected, options, target):
    service, cancelled = Service(model, **options), set()

    def cancelling(number: int):
        def is_finished(new) -> bool:
            if len(new) == 2 and number % 3 == 1 and service.engine.cancel(number + target):
                cancelled.add(number + target)
            return False

        return is_finished

    numbers = [service.engine.submit(prompt, OPTIONS, is_finished=cancelling(i)) for i, prompt in enumerate(PROMPTS)]
    while service.engine.has_work:
        service.step()
    service.check(numbers, expected, {FinishReason.CANCELLED})
    assert {i for i, reason in service.reasons.items() if reason == FinishReason.CANCELLED} == cancelled
    assert cancelled


def test_a_callback_gets_a_view_of_the_new_tokens(model):
    engine, seen, views = Engine(model), [], []

    def is_finished(new) -> bool:
        views.append(new)
        seen.append((len(new), new[-1], new[-2:], new[:], list(new), new == list(new)))
        return False

    engine.submit(PROMPTS[0], OPTIONS, is_finished=is_finished)
    answer = []
    while engine.has_work:
        answer += [output.token for output in engine.step()]
    prefixes = [answer[:n] for n in range(1, 6)]
    assert seen == [(len(x), x[-1], x[-2:], x, x, True) for x in prefixes]
    assert all(view is views[0] for view in views)
    with pytest.raises(IndexError):
        views[0][5]
    with pytest.raises(TypeError):
        views[0][0] = 1


def test_run_does_not_affect_other_requests(model, expected):
    service = Service(model, max_requests=3)
    numbers = [service.engine.submit(prompt, OPTIONS) for prompt in PROMPTS[:3]]
    service.step()
    service.engine.cancel(numbers[2])
    completions = service.engine.run(PROMPTS[3:], OPTIONS)
    assert [completion.tokens for completion in completions] == expected[3:]
    while service.engine.has_work:
        service.step()
    service.check(numbers, expected[:3], {FinishReason.CANCELLED})
    assert [service.reasons[i] for i in numbers] == ["length", "length", "cancelled"]


def test_run_with_an_invalid_prompt_submits_none(model):
    engine = Engine(model)
    with pytest.raises(ValueError, match="prompt must hold at least one token"):
        engine.run([*PROMPTS, []], OPTIONS)
    assert not engine.has_work
    assert engine.run([], OPTIONS) == []


def test_an_interrupted_run_cancels_its_requests(model, expected):
    service = Service(model, max_requests=2, prefix_slots=2, prefix_block=2)
    number = service.engine.submit(PROMPTS[0], OPTIONS)
    with failing(model.lm_head, "forward", 5, KeyboardInterrupt(), afterwards=False), pytest.raises(KeyboardInterrupt):
        service.engine.run(PROMPTS[1:], OPTIONS)
    while service.engine.has_work:
        service.step()
    assert set(service.reasons) == {number}
    service.check([number], expected[:1], {FinishReason.FAILED})


def test_any_thread_submits_and_cancels_while_one_steps(model, expected):
    service, numbers, cancelled = Service(model, max_requests=3, prefix_slots=3, prefix_block=3), {}, set()
    lock = threading.Lock()

    def submit(thread: int) -> None:
        for i in range(12):
            number = service.engine.submit(PROMPTS[(thread + i) % 6], OPTIONS)
            with lock:
                numbers[number] = (thread + i) % 6
            if i % 4 == 3 and service.engine.cancel(number):
                with lock:
                    cancelled.add(number)

    running = [threading.Thread(target=submit, args=(thread,)) for thread in range(4)]
    for thread in running:
        thread.start()
    while service.engine.has_work or any(thread.is_alive() for thread in running):
        service.step()
    assert len(numbers) == 48
    service.check(list(numbers), [expected[i] for i in numbers.values()], {FinishReason.CANCELLED})
    assert {i for i, reason in service.reasons.items() if reason == FinishReason.CANCELLED} == cancelled


def test_a_step_within_a_step_is_an_error(model, expected):
    service = Service(model)
    errors: list[str] = []

    def step_again() -> None:
        for call in (service.engine.step, lambda: service.engine.run(PROMPTS, OPTIONS)):
            try:
                call()
            except RuntimeError as error:
                errors.append(str(error))

    def is_finished(new) -> bool:
        if len(new) == 1:
            thread = threading.Thread(target=step_again)
            thread.start()
            thread.join()
            step_again()
        return False

    number = service.engine.submit(PROMPTS[0], OPTIONS, is_finished=is_finished)
    while service.engine.has_work:
        service.step()
    assert errors == ["a step of this engine is running already: let one thread do all of them"] * 4
    service.check([number], expected[:1], set())
