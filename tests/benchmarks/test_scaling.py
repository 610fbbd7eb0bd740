"""The cost model of sequence parallelism, published figures, and docs/scaling.md."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import scaling
from benchmarks.scaling import Cluster, Compute, Link, Model, all_gather, ring
from lightning_attention.cli import main
from lightning_attention.models import LightningConfig, LightningForCausalLM

ROOT = Path(__file__).parents[2]
STRATEGIES = scaling.strategies(scaling.BLOCKS)
MODEL, COMPUTE = Model([(16, 128, 128)] * 3), Compute(1e5)
STATE_BYTES = 4 * 16 * 128 * 128
# One kind of link, without latency.
FLAT = Cluster(node=Link(1e9, 0.0), network=Link(1e9, 0.0))


def seconds(strategy: str, *, tokens: int, gpus: int, model: Model = MODEL, compute: Compute = COMPUTE) -> float:
    """Seconds that exchanges add to a step."""
    speed = scaling.tokens_per_second(model, compute, Cluster(), STRATEGIES[strategy], tokens=tokens, gpus=gpus)
    return tokens / speed - tokens / compute.tokens_per_second


@pytest.fixture
def command(monkeypatch, capsys):
    """Function that runs `python -m benchmarks scaling`; returns exit code, standard output and standard error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["benchmarks", "scaling", *map(str, arguments)])
        code = 0
        try:
            main("python -m benchmarks", "benchmarks.commands")
        except SystemExit as stopped:
            code = stopped.code or 0
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_gpu_costs_nothing(strategy):
    assert STRATEGIES[strategy].exchange(Cluster(), STATE_BYTES, 1) == 0
    assert seconds(strategy, tokens=8192, gpus=1) == 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_exchange_does_not_depend_on_the_length(monkeypatch, strategy):
    asked = []

    def exchange(cluster, state_bytes, gpus):
        asked.append((state_bytes, gpus))
        return 0.0

    monkeypatch.setitem(STRATEGIES, strategy, replace(STRATEGIES[strategy], exchange=exchange))
    for tokens in (1024, 1 << 20):
        seconds(strategy, tokens=tokens, gpus=8, model=Model([(16, 256, 128), (16, 128, 128)], batch_size=3))
    assert asked == [(6 * STATE_BYTES, 8), (3 * STATE_BYTES, 8)] * 2


@pytest.mark.parametrize("gpus", [2, 8, 9, 64, 1000])
@pytest.mark.parametrize("node_size", [1, 8, 72])
def test_a_chain_has_a_network_link_between_nodes(gpus, node_size):
    links = Cluster(node_size).links(gpus)
    nodes = -(-gpus // node_size)
    assert len(links) == gpus - 1
    assert links.count(Cluster.network) == nodes - 1


def test_an_all_gather_grows_with_every_gpu():
    times = [all_gather(FLAT, STATE_BYTES, gpus) for gpus in (2, 3, 101)]
    assert times == pytest.approx([n * STATE_BYTES / 1e9 for n in (1, 2, 100)])
    across_nodes = [all_gather(Cluster(), STATE_BYTES, gpus) for gpus in (64, 128, 192)]
    assert across_nodes[2] - across_nodes[1] == pytest.approx(across_nodes[1] - across_nodes[0])


@pytest.mark.parametrize("blocks", [1, 2, 8, 1 << 20])
@pytest.mark.parametrize("gpus", [2, 8, 256])
def test_a_pipelined_ring_tends_to_the_time_of_one_state(gpus, blocks):
    one_state = STATE_BYTES / 1e9
    assert ring(FLAT, STATE_BYTES, gpus, blocks) == pytest.approx(one_state * (1 + (gpus - 2) / blocks))


@pytest.mark.parametrize("gpus", [2, 8, 9, 1024])
def test_every_hop_adds_its_latency(gpus):
    latency = sum(link.latency for link in Cluster().links(gpus))
    for exchange in (ring, all_gather):
        assert exchange(Cluster(), 0, gpus) == pytest.approx(latency)
    assert ring(Cluster(), STATE_BYTES, gpus, 1 << 20) > latency


def test_a_short_exchange_hides_behind_the_operator_and_a_long_one_does_not():
    operator = 16 * 128 * (COMPUTE.forward + COMPUTE.backward)
    corrections = 3 * 4 * 16 * 128 * COMPUTE.forward
    assert seconds("ring", tokens=1 << 20, gpus=8) == pytest.approx(corrections * (1 << 20))
    exchange = 3 * 2 * ring(Cluster(), STATE_BYTES, 1024)
    assert seconds("ring", tokens=1024, gpus=1024) == pytest.approx(exchange + 1024 * (corrections - 3 * operator))


def test_ranks_work_in_turn_with_lasp():
    longer = [seconds("LASP", tokens=n, gpus=5) for n in (1000, 2000)]
    operator = 3 * 1000 * 16 * 128 * (COMPUTE.forward + COMPUTE.backward)
    assert longer[1] - longer[0] == pytest.approx(4 * operator)


@pytest.mark.parametrize("size", ["demo", "385M", "1B"])
def test_the_number_of_parameters_is_that_of_the_model(size):
    config = LightningConfig.from_size(size)
    with torch.device("meta"):
        model = LightningForCausalLM(config)
    assert scaling.num_parameters(config) == pytest.approx(sum(p.numel() for p in model.parameters()), rel=1e-4)


def ratios_of(lines):
    """Predicted over published by name, from the table of `check`."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines][2:]
    return {
        name: float(predicted.replace(",", "")) / float(published.replace(",", ""))
        for name, published, predicted, _ in cells
    }


def test_the_page_states_the_errors_of_the_model():
    page, ratios = (ROOT / "docs/scaling.md").read_text(), ratios_of(scaling.check())
    stated = (
        f"{100 * (ratios['ring'] - 1):.0f} % too fast",
        f"{100 * (ratios['all-gather'] - 1):.0f} % too fast",
        f"at {scaling.FITTED_BANDWIDTH / 1e9} GB/s at most",
    )
    assert [text for text in stated if text not in page] == []
    assert ratios["all-gather, fitted"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("arguments", [(), ("--check",)], ids=["predictions", "check"])
def test_the_page_has_what_the_command_prints(command, arguments):
    code, out, _ = command(*arguments)
    assert code == 0
    assert out in (ROOT / "docs/scaling.md").read_text()


def test_one_gpu_has_the_speed_without_exchange(command):
    code, out, err = command("--size", "demo", "--tokens", 4096, "--gpus", 1, "--gpus", 16, "--speed", 1000)
    assert (code, err) == (0, "")
    one, many = out.splitlines()[2:]
    assert one == "| 4,096 | 1 | 1,000 | 1,000 (100%) | 1,000 (100%) | 1,000 (100%) | 1,000 (100%) |"
    assert many.startswith("| 4,096 | 16 | 1,000 |")


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        (("--network-gigabits", 800), ("--network-gigabits", 100)),
        (("--blocks", 64), ("--blocks", 1)),
        (("--node-size", 72), ("--node-size", 4)),
        (("--batch-size", 1), ("--batch-size", 8)),
    ],
    ids=lambda option: str(option[0]),
)
def test_a_shorter_exchange_is_faster(command, better, worse):
    def speed(option):
        line = command("--tokens", 8192, "--gpus", 256, *option)[1].splitlines()[2]
        return int(line.split("|")[4].split()[0].replace(",", ""))

    assert speed(better) > speed(worse)
