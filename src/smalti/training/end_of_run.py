"""The last lines of the commands that make models: the folder, held-out numbers, the pictures and the next command."""

from pathlib import Path

from accelerate import PartialState

from smalti.core.errors import as_invoked
from smalti.core.models import read_config
from smalti.core.provenance import last_metrics, logged_values
from smalti.training.snapshots import Snapshots

MOST_NUMBERS = 6
OVERFITTING_RISE = 0.02  # of the lowest held-out loss


def print_end(folder: Path, *, pictures: str, following: str, remedies: str = "") -> None:
    """Prints the last lines of a training, on the main process.

    Args:
        folder: of the run.
        pictures: name of the file of pictures in it, which may be missing.
        following: the next command.
        remedies: what to do if the held-out loss has risen; "" if a rise means nothing.
    """
    if not PartialState().is_main_process:
        return
    steps = read_config(folder)["provenance"]["steps"]  # early stopping keeps the best
    metrics = last_metrics(folder, until=steps)
    held_out = [f"{name} {value:.4g}" for name, value in metrics.items() if name.startswith("held_out_")]
    done = f"{metrics['step']:.0f} step{'s' * (metrics['step'] != 1)}"
    print(f"{folder}: {done}; {', '.join(held_out[:MOST_NUMBERS]) or 'no images are held out'}")
    if remedies and (lowest := _lowest_held_out_loss(folder, steps)):
        step, loss = lowest
        weights = Snapshots(folder).path(step)
        kept = f" (its weights: {weights})" if weights.exists() else ""
        print(f"overfitting: the held-out loss rose from {loss:.4g} after step {step}{kept}. {remedies}")
    if (folder / pictures).exists():
        print(f"pictures: {folder / pictures}")
    print_next(following)


def print_finished(folder: Path, ending: str, *, more: str) -> None:
    """Prints that a run has all of its steps, on the main process.

    Args:
        folder: of the run.
        ending: how it ended; see `Run.end`.
        more: the flags that train on, see `Run.advice`; "" for a run that must stay as it is.
    """
    advice = f" Give {more} to train on, or --resume never." if more else ""
    if PartialState().is_main_process:
        print(f"{folder} is finished: {ending}.{advice}")


def _lowest_held_out_loss(folder: Path, until: int) -> tuple[int, float] | None:
    """Returns the step and the value of the lowest held-out loss of a run, if it has risen since; otherwise None."""
    losses = {step: loss for step, loss in logged_values(folder, "held_out_loss").items() if step <= until}
    if not losses:
        return None
    step, lowest = min(losses.items(), key=lambda item: item[1])
    return (step, lowest) if losses[max(losses)] > lowest + OVERFITTING_RISE * abs(lowest) else None


def print_next(following: str) -> None:
    """Prints the next command, on the main process."""
    if PartialState().is_main_process:
        print(as_invoked(f"next: {following}"))
