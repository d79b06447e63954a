"""Benchmarks behind docs/performance.md; run with `make bench` or `python -m tests.benchmarks [NAME ...]`."""
