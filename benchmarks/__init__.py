"""Benchmarks: implementations measured side by side in one run.

Run from a clone: `pip install -e ".[bench]"`, then `python -m benchmarks`.
"""
