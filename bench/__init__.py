"""Benchmarks: what operations cost, measured on a real server of this checkout."""
