"""A token of a whole model against context length, beside the same layers with softmax attention and a KV cache."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from lightning_attention.inference.decoder import Decoder
from lightning_attention.inference.pool import StatePool
from lightning_attention.models import LightningConfig, LightningForCausalLM

from .baselines.softmax import SoftmaxDecoder, cache_shape
from .cases import ContextCase
from .harness import Call, Contest, free_bytes, peak_bytes, release
from .peers import OURS, PEERS, Peer
from .report import Column, Record, Table, dtype_name, rounded
from .run import Plan
from .scaling import num_parameters

Model = Callable[[], LightningForCausalLM]


def random_model(size: str, dtype: torch.dtype, device: torch.device) -> LightningForCausalLM:
    """A model of a size in `SIZES` with random weights, for decoding."""
    torch.manual_seed(0)
    model: Any = LightningForCausalLM(LightningConfig.from_size(size))
    return model.to(device=device, dtype=dtype).eval()


def plan(cases: list[ContextCase], model: Model, size: str, device: torch.device, *, seconds: float) -> Plan:
    """Of `measure` beside every softmax attention for the device; `model` is called when its turn comes."""
    peers = [peer for peer in PEERS if peer.device == device.type and peer.is_softmax]

    def measured(bandwidth: float) -> Iterator[list[Record]]:
        return measure(cases, model(), size, peers, seconds=seconds)

    needed = max(needed_bytes(size, case.batch_size) for case in cases)
    return Plan("model", cases, measured, _title, _TABLE, needed)


def needed_bytes(size: str, sequences: int) -> int:
    """Memory of the weights of a model, of 2 bytes each, and of the states of sequences, at least."""
    config = LightningConfig.from_size(size)
    state = sum(prod(config.layer_state_shape(i)) for i in range(config.num_hidden_layers))
    return 2 * num_parameters(config) + torch.float32.itemsize * sequences * state


def measure(
    cases: Iterable[ContextCase], model: LightningForCausalLM, size: str, peers: Iterable[Peer], *, seconds: float
) -> Iterator[list[Record]]:
    """The records of one case after the other, ours and then one for every softmax attention.

    A record has the sizes and then `milliseconds` of a step, on the clock of the host from tokens to logits;
    `times_ours`; `state_bytes` of the states or the KV cache; and `peak_bytes` of a step beyond them and the weights,
    where it is not recorded as a graph. What raises, or does not fit in memory, has `not_measured` instead.

    Args:
        cases: batches and lengths.
        model: in eval mode.
        size: its name, for the records.
        peers: implementations of softmax attention, all for the device of the model.
        seconds: to spend on each timing, about.
    """
    peers = list(peers)
    for case in cases:
        yield _measure_case(case, model, size, peers, seconds)


@dataclass(frozen=True)
class _Steps:
    """A step as it is timed, and what is known of it before."""

    step: Call
    state_bytes: int
    peak_bytes: int | None


def _measure_case(
    case: ContextCase, model: LightningForCausalLM, size: str, peers: list[Peer], seconds: float
) -> list[Record]:
    contest: Contest[_Steps] = Contest(model.device)
    contest.prepare(OURS, lambda: _ours(model, case))
    cache: list[Tensor] = []
    for peer in peers:
        contest.prepare(peer.name, lambda peer=peer: _softmax(model, case, peer, cache))
    times = contest.times(lambda steps: steps.step, seconds, "wall")

    def facts(name: str, steps: _Steps) -> Record:
        return {
            "milliseconds": rounded(times[name] * 1e3),
            "times_ours": rounded(times[name] / times[OURS]) if OURS in times else None,
            "state_bytes": steps.state_bytes,
            "peak_bytes": steps.peak_bytes,
        }

    sizes = {"size": size, "batch_size": case.batch_size, "length": case.length, "dtype": dtype_name(model.dtype)}
    names = [OURS, *(peer.name for peer in peers)]
    return [contest.record(name, sizes, lambda steps, name=name: facts(name, steps)) for name in names]


def _ours(model: LightningForCausalLM, case: ContextCase) -> _Steps:
    """The length is nothing but the position; states are random."""
    B, device = case.batch_size, model.device
    pool = StatePool(model.config, B, device=device)
    slots = [pool.allocate() for _ in range(B)]
    for state in pool.states:
        state.normal_()
    decoder = Decoder(model, pool, B)
    tokens, positions = _tokens(B), [case.length - 1] * B
    rows = torch.tensor([tokens, positions, slots], device=device)
    decoder.step(rows)
    peak = peak_bytes(lambda: decoder.step(rows), device)
    return _Steps(lambda: decoder(tokens, positions, slots), pool.nbytes, peak)


def _softmax(model: LightningForCausalLM, case: ContextCase, peer: Peer, cache: list[Tensor]) -> _Steps:
    """`cache` is filled at the first call, and then common to all."""
    device = model.device
    if not cache:
        cache.extend(random_cache(model, case))
    decoder = SoftmaxDecoder(model, cache, peer.context)
    tokens, position = _tokens(case.batch_size), case.length - 1
    rows = torch.tensor([*tokens, position], device=device)
    decoder.step(rows)
    peak = peak_bytes(lambda: decoder.step(rows), device)
    return _Steps(lambda: decoder(tokens, position), sum(x.nbytes for x in cache), peak)


def random_cache(model: LightningForCausalLM, case: ContextCase) -> Sequence[Tensor]:
    """Keys and values of all layers.

    Raises:
        MemoryError: they do not fit.
    """
    shape = cache_shape(model.config, case.batch_size, case.length)
    needed = model.config.num_hidden_layers * prod(shape) * model.dtype.itemsize
    release(model.device)
    free = free_bytes(model.device)
    if free is not None and needed > free:
        raise MemoryError(f"a KV cache of {needed / 2**30:.4g} GiB does not fit: {free / 2**30:.4g} GiB are free")
    return [torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(model.config.num_hidden_layers)]


def _tokens(batch_size: int) -> list[int]:
    return [1] * batch_size


def _title(case: ContextCase, bandwidth: float) -> str:
    return f"B {case.batch_size}, {case.length} tokens"


def _mebibytes(field: str) -> Callable[[Record], float | None]:
    return lambda record: None if record[field] is None else record[field] / 2**20


_TABLE = Table(
    {
        "a token": [
            Column("ms", 11, lambda record: record["milliseconds"], ".4g"),
            Column("ours", 9, lambda record: record["times_ours"], ".3g", "x"),
        ],
        "memory, MiB": [
            Column("state", 13, _mebibytes("state_bytes"), ".4g"),
            Column("step", 9, _mebibytes("peak_bytes"), ".3g"),
        ],
    }
)
