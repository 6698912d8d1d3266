"""What the benchmarks of all families share: cases, sides, the harness, probed limits, results and their report."""
