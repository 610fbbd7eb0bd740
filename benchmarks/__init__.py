"""Benchmarks: implementations measured side by side in one run. Run from a clone by `python -m benchmarks`."""
