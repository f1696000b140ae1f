"""Benchmarks: the asv suite, and speed ratios to other libraries (`bench.ratios`)."""
