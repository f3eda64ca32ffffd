"""Benchmarks of the operators: ``python benchmarks/overlap.py --help``."""
