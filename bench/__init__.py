"""Benchmarks: `python bench/report.py` compares every operator with its peers, `pytest bench` times single sides."""
