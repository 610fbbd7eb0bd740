"""Throughput of the engine on many requests, next to `generate()` on one request after another."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lightning_attention.inference import Engine, SamplingOptions
from lightning_attention.models import LightningForCausalLM

from .cases import ServingCase
from .decode_model import MakeModel, needed_bytes
from .harness import Comparison
from .report import OURS, Column, Record, Table, dtype_name, field, rounded, times_ours
from .run import Benchmark

Request = tuple[list[int], SamplingOptions]
Serve = Callable[[list[Request]], int]


@dataclass(frozen=True)
class Server:
    """Way to answer requests.

    Args:
        build: function from a model and a case to a function that answers requests and returns the number of tokens.
        is_sampled: True to answer a sample of the requests only.
    """

    build: Callable[[LightningForCausalLM, ServingCase], Serve]
    is_sampled: bool = False


def engine(model: LightningForCausalLM, case: ServingCase) -> Serve:
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
    untyped: Any = model  # transformers types generate() for a protocol that its own models do not satisfy

    def serve(requests: list[Request]) -> int:
        count = 0
        for prompt, options in requests:
            ids = torch.tensor([prompt], device=model.device)
            answer = untyped.generate(ids, attention_mask=torch.ones_like(ids), **options.for_generate())
            count += answer.shape[1] - len(prompt)
        return count

    return serve


SERVERS = {OURS: Server(engine), "generate() one by one": Server(one_by_one, is_sampled=True)}


def benchmark(
    cases: list[ServingCase], make_model: MakeModel, size: str, device: torch.device, *, seconds: float
) -> Benchmark:
    """Measure `SERVERS`; `make_model` is called for the first case."""

    def measure_case(case: ServingCase, bandwidth: float) -> list[Record]:
        return measure(case, make_model(), size, SERVERS, seconds=seconds)

    needed = max(needed_bytes(size, case.max_requests) for case in cases)
    return Benchmark("engine", cases, measure_case, _title, _TABLE, needed)


@dataclass(frozen=True)
class _Prepared:
    serve: Serve
    requests: list[Request]

    @property
    def answer_tokens(self) -> int:
        return sum(options.max_new_tokens for _, options in self.requests)

    def run(self) -> None:
        if (count := self.serve(self.requests)) != self.answer_tokens:
            raise ArithmeticError(f"wrong: {count} tokens instead of {self.answer_tokens}")


def measure(
    case: ServingCase, model: LightningForCausalLM, size: str, servers: dict[str, Server], *, seconds: float
) -> list[Record]:
    """Measure a case. Answers are greedy and end at their length.

    Args:
        case: requests.
        model: model without `eos_token_id`.
        size: name of the model's size, to record.
        servers: ways to answer, by name.
        seconds: approximate time to spend on each measurement.

    Returns:
        Sizes of the case and results of every server: `requests` answered; `sampled_from`, the number of requests that
        they are a sample of; `prompt_tokens` and `answer_tokens`; `seconds`, prompts included; `tokens_per_second` of
        answers; and `times_ours`, of the time per token. What raises or is wrong has `not_measured` instead.
    """
    requests = random_requests(case, model.config.vocab_size)
    comparison: Comparison[_Prepared] = Comparison(model.device)

    def prepare(server: Server) -> _Prepared:
        return _Prepared(server.build(model, case), requests[: case.sample] if server.is_sampled else requests)

    for name, server in servers.items():
        comparison.prepare(name, partial(prepare, server))
    times = comparison.times(lambda prepared: prepared.run, seconds, "wall")
    token_times = {name: time / comparison.prepared[name].answer_tokens for name, time in times.items()}

    def results(name: str, prepared: _Prepared) -> Record:
        answered = len(prepared.requests)
        return {
            "requests": answered,
            "sampled_from": len(requests) if answered < len(requests) else None,
            "prompt_tokens": sum(len(prompt) for prompt, _ in prepared.requests),
            "answer_tokens": prepared.answer_tokens,
            "seconds": rounded(times[name]),
            "tokens_per_second": rounded(1 / token_times[name]),
            "times_ours": times_ours(token_times, name),
        }

    sizes = {"size": size, "dtype": dtype_name(model.dtype), "max_requests": case.max_requests}
    return comparison.records(sizes, results)


def random_requests(case: ServingCase, vocab_size: int) -> list[Request]:
    """Requests with prompts of random tokens, the same at every call."""
    generator = torch.Generator("cpu").manual_seed(0)
    return [
        (
            torch.randint(vocab_size, (prompt,), generator=generator, device="cpu").tolist(),
            SamplingOptions(max_new_tokens=answer, temperature=0),
        )
        for prompt, answer in case.sizes()
    ]


def _title(case: ServingCase, bandwidth: float) -> str:
    return f"{case.requests} requests, {case.max_requests} at a time"


_TABLE = Table(
    {
        "": [
            Column("requests", 11, field("requests"), ".0f"),
            Column("answers", 9, field("answer_tokens"), ".0f"),
            Column("seconds", 9, field("seconds"), ".3g"),
            Column("tokens/s", 10, field("tokens_per_second"), ".4g"),
            Column("ours", 8, field("times_ours"), ".3g", "x"),
        ]
    }
)
