"""Runs the studies of `docs/reproductions/queue.md` one after the other (`python -m smalti.studies run`)."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from smalti import cli
from smalti.benchmarks.command_queue import commands, run_all
from smalti.core.devices import cores
from smalti.core.errors import UserError, require_at_least_one

PAGE = Path("docs/reproductions/queue.md")
ABOUT = """Runs the studies in the order of docs/reproductions/queue.md, the most informative first, for some hours.

$ python -m smalti.studies run --hours 6
$ python -m smalti.studies run --hours 12 --processes 2 --data my/data

Run it again to go on: finished studies are skipped, and trainings resume. Reports are written after each result."""


@dataclass(frozen=True)
class RunStudies:
    """Settings of the queue.

    Raises:
        UserError: for no hours or processes, or a page that is not there.
    """

    action: Positional[Literal["run"]]
    """Run the studies."""
    hours: float = 6.0
    """Time after which what still runs saves its state and stops."""
    processes: int = 1
    """Studies that run at once; each gets its share of the CPU cores."""
    data: Path = Path(".")
    """Folder of the Parquet files that studies name, such as mnist-train.parquet. Studies whose files are not there are
    left out; a name that is not there is also found with a suffix, as in cifar10-train-25k.parquet."""
    page: Path = PAGE
    """The page whose indented commands are the queue."""
    logs: Path = Path("runs/studies")
    """Folder of the studies' outputs."""

    def __post_init__(self) -> None:
        require_at_least_one(self, "processes")
        if not self.hours > 0:
            raise UserError("--hours must be above 0")
        if not self.page.is_file():
            raise UserError(f"there is no page {self.page}; run it in a checkout, or give --page")


def with_data(line: str, folder: Path) -> tuple[str, list[str]]:
    """Replaces the names of Parquet files in a command by those of a folder; returns it and the names not found."""
    words, missing = [], []
    for word in line.split(" "):
        if word.endswith(".parquet"):
            others = sorted(folder.glob(f"{escape(word.removesuffix('.parquet'))}*.parquet"))
            found = [folder / word] if (folder / word).is_file() else others
            missing += [] if found else [word]
            word = shlex.quote(str(found[0])) if found else word
        words.append(word)
    return " ".join(words), missing


def run_studies(config: RunStudies) -> None:
    """Runs the queue."""
    lines = runnable(commands(config.page.read_text()), config.data)
    if hasattr(os, "nice"):
        os.nice(19)  # of the studies too: they give way to everything else
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // config.processes)))
    finished = run_all(lines, config.logs, minutes=60 * config.hours, processes=config.processes)
    print("all studies are finished" if finished else "not all are finished; run the same command again to go on")


def runnable(lines: Sequence[str], folder: Path) -> list[str]:
    """Returns the commands whose data is in the folder, and prints what the others need."""
    chosen = []
    for line in lines:
        command, missing = with_data(line, folder)
        if missing:
            print(f"left out, without {' and '.join(missing)} in {folder}: {line}")
        else:
            chosen.append(command)
    return chosen


def main() -> None:
    """Runs the command line."""
    cli.run(run_studies, RunStudies, about=ABOUT)


if __name__ == "__main__":
    main()
