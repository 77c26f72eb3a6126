"""Benchmarks: ``python -m planish.bench NAME --json FILE``. Importing this package loads no torch."""

MIN_ROUNDS = 7
"""Fewest timed rounds that give an interval; here, because the command line needs it before numpy is loaded."""
