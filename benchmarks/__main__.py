"""`python -m benchmarks`: the command line."""

from lightning_attention.cli import main

main("python -m benchmarks", "benchmarks.commands")
