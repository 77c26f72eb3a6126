"""``python -m planish.bench NAME``."""

from planish.bench.cli import main

if __name__ == "__main__":
    main()
