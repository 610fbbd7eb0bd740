"""Cost model of sequence parallelism, for more GPUs than were measured; see docs/scaling.md."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import inf

from lightning_attention.distributed.exchange import RING_BLOCKS
from lightning_attention.models import LightningConfig

# Published for data parallelism on 256 H100s: ZeCO, arXiv 2507.01004, a 1B GLA with 32768 tokens per GPU.
REFERENCE_SIZE, REFERENCE_TOKENS_PER_SECOND = "1B", 46_588
# Fitted to LASP-2 at 256 GPUs: bytes of gathered states per second, all costs included.
FITTED_BANDWIDTH = 15.64e9
BLOCKS = RING_BLOCKS


@dataclass(frozen=True)
class Model:
    """Model as an exchange sees it: `(H, K, V)` of every layer's state, and sequences in a batch."""

    states: Sequence[tuple[int, int, int]]
    batch_size: int = 1


@dataclass(frozen=True)
class Link:
    """Link: bytes per second in one direction, and seconds of latency per message."""

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Cluster:
    """H100 or H200: NVLink 4, 450 GB/s each way, and a 400 Gb/s InfiniBand card for every GPU."""

    node_size: int = 8
    # Latencies that NCCL assumes for rings: src/graph/tuning.cc, protocol Simple.
    node: Link = Link(450e9, 3.4e-6)
    network: Link = Link(50e9, 14e-6)

    def links(self, gpus: int) -> list[Link]:
        """Links of a chain through all GPUs, node after node."""
        return [self.network if i % self.node_size == 0 else self.node for i in range(1, gpus)]


@dataclass(frozen=True)
class Compute:
    """Tokens per second and GPU without exchange, and seconds of the operator per element of v."""

    tokens_per_second: float
    # B 4, T 32768, H 32, D 128 in benchmarks/results/h200/hopper.json.
    forward: float = 1.037e-3 / (4 * 32768 * 32 * 128)
    backward: float = 2.598e-3 / (4 * 32768 * 32 * 128)


def all_gather(cluster: Cluster, state_bytes: int, gpus: int, bandwidth: float = inf) -> float:
    """Seconds of an all-gather, P - 1 steps of a ring: `Σ latency + (P - 1) bytes / bandwidth of the slowest link`."""
    links = cluster.links(gpus)
    slowest = min([bandwidth, *(link.bandwidth for link in links)])
    return sum(link.latency for link in links) + len(links) * state_bytes / slowest


def ring(cluster: Cluster, state_bytes: int, gpus: int, blocks: int = BLOCKS) -> float:
    """Seconds of a pipelined ring: `Σ (latency + t) + (blocks - 1) max t`, with t the seconds of a block on a link."""
    hops = [(link.latency, state_bytes / blocks / link.bandwidth) for link in cluster.links(gpus)]
    return sum(latency + block for latency, block in hops) + (blocks - 1) * max((b for _, b in hops), default=0.0)


@dataclass(frozen=True)
class Strategy:
    """Seconds of an exchange; `in_turn` if ranks work one after another, not all during the exchange."""

    exchange: Callable[[Cluster, int, int], float]
    in_turn: bool = False


def strategies(blocks: int) -> dict[str, Strategy]:
    return {
        "ring": Strategy(partial(ring, blocks=blocks)),
        "all-gather": Strategy(all_gather),
        "all-gather, fitted": Strategy(partial(all_gather, bandwidth=FITTED_BANDWIDTH)),
        "LASP": Strategy(partial(ring, blocks=1), in_turn=True),
    }


def tokens_per_second(
    model: Model, compute: Compute, cluster: Cluster, strategy: Strategy, *, tokens: int, gpus: int
) -> float:
    """Tokens per second and GPU, with `tokens` tokens on each GPU, if ranks synchronize at every layer."""
    seconds = tokens / compute.tokens_per_second
    for heads, key_dim, value_dim in model.states if gpus > 1 else ():
        elements = tokens * heads * (key_dim + value_dim) / 2
        exchange = strategy.exchange(cluster, 4 * model.batch_size * heads * key_dim * value_dim, gpus)
        passes = elements * compute.forward, elements * compute.backward
        if strategy.in_turn:
            seconds += sum(exchange + (gpus - 1) * work for work in passes)
        else:
            # 4 tensors are read to make the states, and 3 moved to correct each of o, dq, dk and dv; forward moves 4.
            seconds += 4 * passes[0] + sum(max(0.0, exchange - work) for work in passes)
    return tokens / seconds


def num_parameters(config: LightningConfig) -> int:
    layer = 5 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size
    return config.num_hidden_layers * layer + config.vocab_size * config.hidden_size


def scaled_tokens_per_second(config: LightningConfig) -> float:
    """Published speed scaled to another model, assuming the same time per weight."""
    reference = LightningConfig.from_size(REFERENCE_SIZE)
    return REFERENCE_TOKENS_PER_SECOND * num_parameters(reference) / num_parameters(config)


# Tokens per second and GPU, from the same source.
PUBLISHED_GPUS, PUBLISHED_TOKENS = 256, 32768
PUBLISHED = {"ring": 40967, "all-gather": 25402}
# LASP-2's Linear-Llama3-1B, since only "1B, 16 heads" is known of ZeCO's model.
PUBLISHED_MODEL = Model([(16, 128, 128)] * 16)


def table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    return (f"| {' | '.join(cells)} |" for cells in (heading, ["---"] * len(heading), *rows))


def predictions(
    model: Model, compute: Compute, cluster: Cluster, blocks: int, tokens: Sequence[int], gpus: Sequence[int]
) -> Iterator[str]:
    """Markdown table of tokens per second and GPU, and their share of the speed without exchange."""
    chosen, alone, rows = strategies(blocks), compute.tokens_per_second, []
    for n, p in product(tokens, gpus):
        speeds = [tokens_per_second(model, compute, cluster, each, tokens=n, gpus=p) for each in chosen.values()]
        rows.append([f"{n:,}", f"{p:,}", f"{alone:,.0f}", *(f"{speed:,.0f} ({speed / alone:.0%})" for speed in speeds)])
    return table(["tokens/GPU", "GPUs", "no exchange", *chosen], rows)


def check() -> Iterator[str]:
    """Markdown table of predicted and published tokens per second and GPU."""
    compute, rows = Compute(REFERENCE_TOKENS_PER_SECOND), []
    for name, strategy in strategies(BLOCKS).items():
        if given := PUBLISHED.get(name.removesuffix(", fitted")):
            predicted = tokens_per_second(
                PUBLISHED_MODEL, compute, Cluster(), strategy, tokens=PUBLISHED_TOKENS, gpus=PUBLISHED_GPUS
            )
            rows.append([name, f"{given:,}", f"{predicted:,.0f}", f"{predicted / given - 1:+.0%}"])
    return table(["", "published", "predicted", "error"], rows)
