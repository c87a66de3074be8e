"""selfVAE's generation modes: new images, or reconstructions from more or fewer transmitted latents (Section 3.3)."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from smalti.commands.model_paths import RUNS, image_inputs, images_for, load_tokenizer
from smalti.core import locks
from smalti.core.config import flatten
from smalti.core.devices import Device, device
from smalti.core.errors import UserError, require_at_least_one
from smalti.core.provenance import versions
from smalti.core.randomness import derive, row_seeds
from smalti.images.decoding import to_float
from smalti.images.reading import Reading, held_out_rows
from smalti.images.sheets import embedded_settings, require_png, save_grid, save_sheet
from smalti.tokenizers.base import Tokenizer
from smalti.tokenizers.selfvae.hierarchical_vae import GenerationMode, Hierarchy, Pixels


@dataclass(frozen=True)
class SampleMode:
    """Settings of `sample_mode`.

    Raises:
        UserError: for a number below 1.
    """

    mode: GenerationMode
    """Generation mode, by what is transmitted of an image: `generation` nothing; `conditional-generation` the smallest
    representation; `conditional-reconstruction` also the latents z; `reconstruction-1` the latents u;
    `reconstruction-2` u and z. The model samples the rest."""
    tokenizer: str = "selfvae"
    """A trained selfvae or vae: a kind (read from runs/tokenizers/KIND), a folder, or a hub id."""
    images: str | None = None
    """Images to transmit, from their held-out split: `portraits`, `emoji`, a folder, or any other source that
    `train-tokenizer` reads [default: the images that the tokenizer was trained on]."""
    reading: Reading = field(default_factory=Reading)
    num: int = 16
    """Number of images."""
    draws: int = 3
    """Samples of each image, each a row of the sheet, if the mode samples anything."""
    pixels: Pixels = "mean"
    """Value taken from each pixel's likelihood: its `mean`, or a `sample`, which adds the noise that the model
    expects."""
    seed: int = 0
    """Seed of the choice of images and of all sampling."""
    device: Device = "auto"
    """Device to run on."""
    out: Path = RUNS / "mode.png"
    """The sheet to write, a PNG with these settings embedded."""
    overwrite: bool = False
    """Replace an existing file. Without it, only a sheet that this command made with the same tokenizer is replaced."""

    def __post_init__(self) -> None:
        require_at_least_one(self, "num", "draws")


def load_hierarchy(source: str) -> Hierarchy:
    """Loads a trained selfvae or vae; see `load_tokenizer`.

    Raises:
        UserError: as `load_tokenizer` does, and for any other kind.
    """
    tokenizer = load_tokenizer(source)
    if not isinstance(tokenizer, Hierarchy):
        raise UserError(f"{source} holds a {tokenizer.kind}; only selfvae and vae have image likelihoods and modes")
    return tokenizer


@torch.no_grad()
def sample_mode(config: SampleMode) -> Path:
    """Writes a sheet of images and prints how much was transmitted; returns the sheet's path.

    Raises:
        UserError: for an unsuitable tokenizer, mode or images.
    """
    require_png(config.out)
    model = load_hierarchy(config.tokenizer).to(device(config.device))
    digest = model.digest()

    def is_own(path: Path) -> bool:
        settings = embedded_settings(path)
        return settings.get("command") == "sample" and settings.get("tokenizer_digest") == digest

    inputs = image_inputs(config.images, tokenizer=config.tokenizer)
    with locks.claim([config.out], inputs=inputs, overwrite=config.overwrite, is_own=is_own):
        settings = {"command": "sample", **flatten(config), "tokenizer_digest": digest, "versions": versions()}
        _sample_mode(config, model, settings)
    return config.out


def _sample_mode(config: SampleMode, model: Hierarchy, settings: dict[str, object]) -> None:
    seeds = row_seeds(config.seed, torch.arange(config.num)).to(model.device)
    if config.mode == "generation":
        save_grid(config.out, model.generation(seeds, config.pixels).cpu(), settings=settings)
        return
    images = to_float(_held_out_images(model, config)).to(model.device)
    transmitted = model.transmit(images, config.mode, seeds[: len(images)])
    ratio = model.compression_ratio(transmitted, images)
    print(f"{config.mode}: {model.bits_sent(transmitted) / 8:.0f} bytes an image, {ratio:.3g}:1")
    sheet: dict[str, Float[Tensor, "_b _c _h _w"]] = {"original": images.cpu()}
    if transmitted.y is not None:
        sheet["representation"] = _enlarged(transmitted.y, images).cpu()
    for number in range(1 if model.determines_latents(transmitted) and config.pixels == "mean" else config.draws):
        decoded = model.decode_from(transmitted, derive(seeds[: len(images)], number), config.pixels)
        sheet[f"{config.mode}, draw {number + 1}"] = decoded.cpu()
    save_sheet(config.out, sheet, settings=settings)


def _held_out_images(model: Tokenizer, config: SampleMode) -> Tensor:
    """Returns evenly spaced held-out images, uint8."""
    images = images_for(model, config.tokenizer, config.images, None, None, config.reading)
    rows = held_out_rows(images)
    return rows.spread(min(config.num, len(rows)))


def _enlarged(y: Tensor, images: Tensor) -> Tensor:
    """Repeats pixels up to the images' size, and grey channels up to theirs, so that both fit on one sheet."""
    factor = images.shape[-1] // y.shape[-1]
    enlarged = y.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    return enlarged.expand(-1, images.shape[1], -1, -1)
