"""The last lines of a training command: the folder, the held-out numbers, the pictures and the next command."""

from pathlib import Path
from shlex import quote

from accelerate import PartialState

from smalti.core.invocation import as_invoked
from smalti.latentsets.reader import LatentSet
from smalti.training.run_folder import last_metrics

MOST_NUMBERS = 6


def print_end_of_tokenizer(folder: Path) -> None:
    """Prints the last lines of `train_tokenizer`, on the main process."""
    _print_end(folder, "reconstructions.png", f"python scripts/build_latents.py --tokenizer {quote(str(folder))}")


def print_end_of_prior(folder: Path, latents: Path, level: int) -> None:
    """Prints the last lines of `train_prior`, on the main process; the next level is trained before sampling."""
    levels = len(LatentSet(latents).layout.levels)
    if level < levels - 1:
        command = f"accelerate launch scripts/train_prior.py --latents {quote(str(latents))} --level {level + 1}"
    else:
        others = f" and the priors of the other {levels - 1} level(s)" if levels > 1 else ""
        command = f"python scripts/sample.py --prior {quote(str(folder))}{others}"
    _print_end(folder, "samples.png", command)


def _print_end(folder: Path, pictures: str, following: str) -> None:
    if not PartialState().is_main_process:
        return
    metrics = last_metrics(folder)
    held_out = [f"{name} {value:.4g}" for name, value in metrics.items() if name.startswith("held_out_")]
    print(f"{folder}: {metrics['step']:.0f} steps; {', '.join(held_out[:MOST_NUMBERS]) or 'no images are held out'}")
    if (folder / pictures).exists():
        print(f"pictures: {folder / pictures}")
    print(as_invoked(f"next: {following}"))
