"""Benchmarks: `pytest bench` for single figures, `python bench/report.py` for the comparison with its report."""
