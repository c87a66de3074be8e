"""Measures the hot paths; see `smalti.benchmarks.run`."""

from smalti import cli
from smalti.benchmarks.run import Benchmark, benchmark

ABOUT = """Measures each hot path beside the naive way, a peer where there is one, and the limit.

$ python scripts/benchmark.py                                   # everything, in some minutes on two CPU cores
$ python scripts/benchmark.py --only search
$ python scripts/benchmark.py --out docs/benchmarks.md          # also writes the tables there"""


def main() -> None:
    """The command."""
    cli.run(benchmark, Benchmark, about=ABOUT)


if __name__ == "__main__":
    main()
