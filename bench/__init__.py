"""Benchmarks: ``python -m planish.bench encoder --json FILE --threads N``. Importing this package loads no torch."""
