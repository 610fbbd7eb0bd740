"""Many requests at once by the engine, beside transformers' `generate()` one by one."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from lightning_attention.inference import Engine, SamplingOptions
from lightning_attention.models import LightningForCausalLM

from .cases import ServingCase
from .decode_model import Model, needed_bytes
from .harness import Contest
from .peers import OURS
from .report import Column, Record, Table, dtype_name, rounded
from .run import Plan

Request = tuple[list[int], SamplingOptions]
Serve = Callable[[list[Request]], int]


def plan(cases: list[ServingCase], model: Model, size: str, device: torch.device, *, seconds: float) -> Plan:
    """Of `measure` with `WAYS`; `model` is called when its turn comes."""

    def measured(bandwidth: float) -> Iterator[list[Record]]:
        return measure(cases, model(), size, WAYS, seconds=seconds)

    needed = max(needed_bytes(size, case.max_requests) for case in cases)
    return Plan("engine", cases, measured, _title, _TABLE, needed)


def engine(model: LightningForCausalLM, case: ServingCase) -> Serve:
    """The engine, to be given requests; it returns the number of tokens that it has answered."""
    engine = Engine(model, max_requests=case.max_requests)

    def serve(requests: list[Request]) -> int:
        for prompt, options in requests:
            engine.submit(prompt, options)
        count = 0
        while engine.has_work:
            count += sum(output.token is not None for output in engine.step())
        return count

    return serve


def one_by_one(model: LightningForCausalLM, case: ServingCase) -> Serve:
    """The same by `generate()`."""
    untyped: Any = model  # transformers types generate() for a protocol that its own models do not satisfy

    def serve(requests: list[Request]) -> int:
        count = 0
        for prompt, options in requests:
            ids = torch.tensor([prompt], device=model.device)
            answer = untyped.generate(ids, attention_mask=torch.ones_like(ids), **options.for_generate())
            count += answer.shape[1] - len(prompt)
        return count

    return serve


# Ours, and what it is beside; true where it answers a sample.
WAYS: dict[str, tuple[Callable[[LightningForCausalLM, ServingCase], Serve], bool]] = {
    OURS: (engine, False),
    "generate() one by one": (one_by_one, True),
}


def measure(
    cases: Iterable[ServingCase],
    model: LightningForCausalLM,
    size: str,
    ways: dict[str, tuple[Callable[[LightningForCausalLM, ServingCase], Serve], bool]],
    *,
    seconds: float,
) -> Iterator[list[Record]]:
    """The records of one case after the other, one for every way to answer.

    A record has the sizes, of which `sampled_from` is the number of requests where only the first `requests` of them
    were answered, so that its throughput stands for that of all; `prompt_tokens` and `answer_tokens` in all; and
    `seconds`, prompts included, `tokens_per_second` of answers, and `times_ours` of the time of a token. Answers are
    greedy, and nothing ends them but their length. Runs are medians after one that is not counted.

    Args:
        cases: requests.
        model: with no `eos_token_id`.
        size: its name, for the records.
        ways: by name, from a model to what answers requests and returns the number of tokens; and whether a sample is
            enough of it.
        seconds: to spend on each timing, about.
    """
    for case in cases:
        yield _measure_case(case, model, size, ways, seconds)


def random_requests(case: ServingCase, vocab_size: int) -> list[Request]:
    """Prompts of random tokens, always the same."""
    generator = torch.Generator("cpu").manual_seed(0)
    return [
        (
            torch.randint(vocab_size, (prompt,), generator=generator, device="cpu").tolist(),
            SamplingOptions(max_new_tokens=answer, temperature=0),
        )
        for prompt, answer in case.sizes()
    ]


def _measure_case(
    case: ServingCase,
    model: LightningForCausalLM,
    size: str,
    ways: dict[str, tuple[Callable[[LightningForCausalLM, ServingCase], Serve], bool]],
    seconds: float,
) -> list[Record]:
    requests = random_requests(case, model.config.vocab_size)
    contest: Contest[tuple[Serve, list[Request]]] = Contest(model.device)
    for name, (build, is_sampled) in ways.items():
        asked = requests[: case.sample] if is_sampled else requests
        contest.prepare(name, lambda build=build, asked=asked: (build(model, case), asked))
    times = contest.times(lambda ready: lambda: _answer_all(*ready), seconds, "wall")

    def facts(name: str, asked: list[Request]) -> Record:
        answers = _answer_tokens(asked)
        a_token, our_token = times[name] / answers, None
        if OURS in times:
            our_token = times[OURS] / _answer_tokens(contest.ready[OURS][1])
        return {
            "requests": len(asked),
            "sampled_from": len(requests) if len(asked) < len(requests) else None,
            "prompt_tokens": sum(len(prompt) for prompt, _ in asked),
            "answer_tokens": answers,
            "seconds": rounded(times[name]),
            "tokens_per_second": rounded(1 / a_token),
            "times_ours": None if our_token is None else rounded(a_token / our_token),
        }

    sizes = {"size": size, "dtype": dtype_name(model.dtype), "max_requests": case.max_requests}
    return [contest.record(name, sizes, lambda ready, name=name: facts(name, ready[1])) for name in ways]


def _answer_all(serve: Serve, requests: list[Request]) -> None:
    expected, count = _answer_tokens(requests), serve(requests)
    if count != expected:
        raise ArithmeticError(f"wrong: {count} tokens instead of {expected}")


def _answer_tokens(requests: list[Request]) -> int:
    return sum(options.max_new_tokens for _, options in requests)


def _title(case: ServingCase, bandwidth: float) -> str:
    return f"{case.requests} requests, {case.max_requests} at a time"


_TABLE = Table(
    {
        "": [
            Column("requests", 11, lambda record: record["requests"], "d"),
            Column("answers", 9, lambda record: record["answer_tokens"], "d"),
            Column("seconds", 9, lambda record: record["seconds"], ".3g"),
            Column("tokens/s", 10, lambda record: record["tokens_per_second"], ".4g"),
            Column("ours", 8, lambda record: record["times_ours"], ".3g", "x"),
        ]
    }
)
