"""The last lines of the commands that make models: the folder, held-out numbers, the pictures and the next command."""

from pathlib import Path

from accelerate import PartialState

from smalti.core.errors import as_invoked
from smalti.core.models import read_config
from smalti.training.run_folder import last_metrics

MOST_NUMBERS = 6


def print_end(folder: Path, *, pictures: str, following: str) -> None:
    """Prints the last lines of a training, on the main process.

    Args:
        folder: of the run.
        pictures: name of the file of pictures in it, which may be missing.
        following: the next command.
    """
    if not PartialState().is_main_process:
        return
    metrics = last_metrics(folder, until=read_config(folder)["provenance"]["steps"])  # early stopping keeps the best
    held_out = [f"{name} {value:.4g}" for name, value in metrics.items() if name.startswith("held_out_")]
    print(f"{folder}: {metrics['step']:.0f} steps; {', '.join(held_out[:MOST_NUMBERS]) or 'no images are held out'}")
    if (folder / pictures).exists():
        print(f"pictures: {folder / pictures}")
    print_next(following)


def print_next(following: str) -> None:
    """Prints the next command, on the main process."""
    if PartialState().is_main_process:
        print(as_invoked(f"next: {following}"))
