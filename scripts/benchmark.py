"""The command that measures speed and memory; see `smalti.benchmarks.run`."""

from smalti import cli
from smalti.benchmarks.run import Benchmark, benchmark

ABOUT = """Measures speed and memory of the critical parts beside naive implementations, another library and a limit.

$ python scripts/benchmark.py                                   # everything, in some minutes on two CPU cores
$ python scripts/benchmark.py --only search
$ python scripts/benchmark.py --out docs/benchmarks.md          # also writes the tables to this file"""


def main() -> None:
    """Runs the command."""
    cli.run(benchmark, Benchmark, about=ABOUT)


if __name__ == "__main__":
    main()
