"""Conditions a prior on vectors: on the mean colours of the four quarters of the portraits in the package.

$ smalti build-latents --tokenizer portraits --images portraits --no-flips \
    --conditions examples.condition_on_colours:mean_colours --out runs/colours/latents.h5
$ smalti train-prior --latents runs/colours/latents.h5 --condition vector --out runs/colours/prior
$ python examples/condition_on_colours.py runs/colours

The last command prints the held-out loss with the right vectors and with those of other images, and draws images given
the vectors of two held-out images, with rising guidance.
"""

import sys
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from smalti import LatentSet, Prior, load_prior, sample
from smalti.commands.model_paths import tokenizer_beside
from smalti.core.randomness import row_seeds
from smalti.images.decoding import to_float
from smalti.images.sheets import save_sheet
from smalti.latentsets.dataset import LatentRows


def mean_colours(images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 12"]:
    """Returns the mean red, green and blue of the upper left, upper right, lower left and lower right quarter."""
    quarters = images.float().unflatten(3, (2, -1)).unflatten(2, (2, -1)).mean((3, 5))  # b 3 2 2, from 0 to 255
    return quarters.movedim(1, -1).flatten(1) / 255


@torch.no_grad()
def held_out_losses(prior: Prior, latents: LatentSet, seed: int = 0) -> dict[str, float]:
    """Returns the held-out loss in nats per code given the right vectors, given shuffled ones, and given none."""
    rows = LatentRows(latents, split="held_out", conditions=True)
    objective = prior.method.objective(prior, prior.method.objective_config()).eval()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    batches = torch.arange(len(rows)).split(128)
    losses = {"right": 0.0, "shuffled": 0.0, "none": 0.0}
    for numbers in batches:
        batch = rows.__getitems__(numbers.tolist()) | {"seeds": row_seeds(seed, numbers)}
        shuffled = rows.__getitems__(order[numbers].tolist())["conditions"]
        none = torch.full_like(shuffled, torch.nan)
        for name, vectors in zip(losses, (batch["conditions"], shuffled, none), strict=True):
            loss, _ = objective({**batch, "conditions": vectors})
            losses[name] += float(loss) * len(numbers) / len(rows)
    return losses


def main(folder: str = "runs/colours", guidances: tuple[float, ...] = (0.0, 1.0, 2.0, 4.0), num: int = 8) -> None:
    """Prints the losses and writes `guidance.png`: for two held-out images, as decoded, a row for each guidance."""
    prior, latents = load_prior(Path(folder) / "prior"), LatentSet(Path(folder) / "latents.h5")
    print({name: round(loss, 4) for name, loss in held_out_losses(prior, latents).items()})
    held_out, rows = latents.held_out.nonzero().flatten().tolist(), {}
    vectors = latents.vectors(held_out)
    farthest = int((vectors - vectors[0]).norm(dim=1).argmax())
    for number in (0, farthest):
        vector = vectors[[number]]
        image = tokenizer_beside(prior).decode(latents.batch([held_out[number]]))
        rows[f"held-out image {number}"] = image
        for guidance in guidances:
            drawn = sample(prior, num=num, conditions=vector, sampling=prior.method.sampling(guidance=guidance))
            error = float((mean_colours(drawn) - vector).abs().mean())
            rows[f"image {number}, guidance {guidance}: colours {error:.3f} from its own"] = to_float(drawn)
    save_sheet(Path(folder) / "guidance.png", rows)


if __name__ == "__main__":
    main(*sys.argv[1:2])
