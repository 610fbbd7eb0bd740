"""The benchmark of several processes measures what it claims. No test here is about speed."""

import json

import pytest


@pytest.mark.slow
def test_every_way_is_measured_beside_one_process(bench, tmp_path):
    sizes = "--size demo --sharded-size demo --tokens 32 --length 16 --sequence-tokens 24 --steps 1 --device cpu"
    bench("parallel", *sizes.split(), "--processes", 2, "--output", tmp_path)
    results = json.loads((tmp_path / "parallel.json").read_text())["results"]
    assert [(record["kind"], record["processes"], record["length"]) for record in results] == [
        ("one process", 1, 16),
        ("data parallel", 2, 16),
        ("one process", 1, 16),
        ("sharded (FSDP2)", 2, 16),
        ("one process", 1, 24),
        ("sequence parallel (all-gather)", 2, 48),
        ("sequence parallel (ring)", 2, 48),
    ]
    alone = results[0]
    for record in results:
        alone = record if record["processes"] == 1 else alone
        assert record["tokens_per_second"] == pytest.approx(record["tokens_of_a_process"] / record["seconds"], rel=1e-2)
        assert record["of_one_process"] == pytest.approx(alone["seconds"] / record["seconds"], rel=1e-2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "1"], "--processes must be at least 2"),
        (["--tokens", "8", "--length", "16"], "--tokens must be at least 16"),
        (["--sharded-size", "2B"], "--size must be one of"),
    ],
)
def test_sizes_are_checked(bench, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit):
        bench("parallel", "--device", "cpu", *arguments, "--output", tmp_path / "out")
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
