"""The ways of selfVAE to make images: new ones, or again from more or less of what given ones were (Section 3.3)."""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from smalti.commands.build_latents import images_for
from smalti.commands.model_paths import RUNS, load_tokenizer
from smalti.core.config import flatten
from smalti.core.devices import Device, device
from smalti.core.errors import UserError
from smalti.core.provenance import versions
from smalti.core.randomness import derive, row_seeds
from smalti.images.decoding import to_float
from smalti.images.image_set import ImageRows
from smalti.images.sheets import require_png, save_grid, save_sheet
from smalti.tokenizers.base import Tokenizer
from smalti.tokenizers.selfvae.hierarchical_vae import Hierarchy, Pixels, Way


@dataclass(frozen=True)
class SampleWay:
    """How to make images by one of selfVAE's ways.

    Raises:
        UserError: for a number below 1.
    """

    mode: Way
    """What is sent: for `generation` nothing; for `conditional-generation` the smallest representation, and the rest is
    drawn; for `conditional-reconstruction` the latents z too; for `reconstruction-1` the latents u; for
    `reconstruction-2` u and z."""
    tokenizer: str = "selfvae"
    """A trained selfvae or vae: a kind (the one in runs/tokenizers/KIND), a folder, or a hub id."""
    images: str | None = None
    """Images, of which held-out ones are sent: emoji, a folder, Parquet files or a hub id [default: what the tokenizer
    was trained on]."""
    num: int = 16
    """How many images."""
    draws: int = 3
    """How often what was not sent is drawn anew, where anything is: a row of the sheet each."""
    pixels: Pixels = "mean"
    """What is taken of the pixels' likelihoods: the `mean`, or a `sample`, with the noise that the model expects."""
    seed: int = 0
    """Decides which images, and all that is drawn."""
    device: Device = "auto"
    """Where to compute."""
    out: Path = RUNS / "way.png"
    """The sheet, a PNG with the settings embedded."""

    def __post_init__(self) -> None:
        if self.num < 1 or self.draws < 1:
            raise UserError(f"--num and --draws must be at least 1, not {self.num} and {self.draws}")


def load_hierarchy(source: str) -> Hierarchy:
    """A trained selfvae or vae; see `load_tokenizer`.

    Raises:
        UserError: also if it is of another kind.
    """
    tokenizer = load_tokenizer(source)
    if not isinstance(tokenizer, Hierarchy):
        raise UserError(f"{source} holds a {tokenizer.kind}; only selfvae and vae have a likelihood of images and ways")
    return tokenizer


@torch.no_grad()
def sample_way(config: SampleWay) -> Path:
    """Writes a sheet, prints what was sent of an image, and returns the sheet's path.

    Raises:
        UserError: for a tokenizer, way or images that will not do.
    """
    require_png(config.out)
    model = load_hierarchy(config.tokenizer).to(device(config.device))
    where, rows = next(model.parameters()).device, torch.arange(config.num)
    seeds = row_seeds(config.seed, rows).to(where)
    settings = {**flatten(config), "tokenizer_digest": model.digest(), "versions": versions()}
    if config.mode == "generation":
        save_grid(config.out, model.generation(seeds, config.pixels).cpu(), settings=settings)
        return config.out
    images = to_float(_held_out(model, config)).to(where)
    sent = model.transmit(images, config.mode, seeds[: len(images)])
    ratio = model.compression_ratio(sent, images)
    print(f"{config.mode}: {model.bits_sent(sent) / 8:.0f} bytes an image, {ratio:.3g}:1")
    sheet: dict[str, Float[Tensor, "_b _c _h _w"]] = {"original": images.cpu()}
    if sent.y is not None:
        sheet["representation"] = _enlarged(sent.y, images).cpu()
    for number in range(1 if model.says_all(sent) and config.pixels == "mean" else config.draws):
        drawn = model.decode_from(sent, derive(seeds[: len(images)], number), config.pixels)
        sheet[f"{config.mode}, draw {number + 1}"] = drawn.cpu()
    save_sheet(config.out, sheet, settings=settings)
    return config.out


def _held_out(model: Tokenizer, config: SampleWay) -> Tensor:
    """Evenly taken held-out images, uint8."""
    images = images_for(model, config.tokenizer, config.images, None, None)
    rows = ImageRows(images, split="held_out", flips=False)
    if not len(rows):
        raise UserError(f"{images.source} has no held-out images; give more --images")
    return rows.spread(min(config.num, len(rows)))


def _enlarged(y: Tensor, images: Tensor) -> Tensor:
    """Pixels repeated to the images' size, and grey ones in their channels, so that both fit on one sheet."""
    factor = images.shape[-1] // y.shape[-1]
    grown = y.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    return grown.expand(-1, images.shape[1], -1, -1)
