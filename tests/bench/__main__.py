"""``python -m bench [--rows N] [--runs N]``."""

import argparse

from bench.forward import compare


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    for per_transaction in (10, options.rows):
        compare(options.rows, options.runs, per_transaction)


if __name__ == "__main__":
    main()
