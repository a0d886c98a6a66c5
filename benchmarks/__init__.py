"""Benchmarks: each module of ``speed`` and ``studies`` is one command that prints a table and writes JSON."""
