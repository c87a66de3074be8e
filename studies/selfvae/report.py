"""What is written of selfVAE's study: our numbers beside the paper's in a table, and the pictures of Figs. 4 to 6.

Which runs there are: `reproduce_selfvae.py`.
"""

import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from smalti.benchmarks.run import insert
from smalti.commands.selfvae_modes import load_hierarchy
from smalti.core.devices import best_device, resolve
from smalti.core.files import write_json
from smalti.core.provenance import machine
from smalti.core.randomness import derive, row_seeds
from smalti.evaluation.config import EvaluationSettings, LikelihoodEvaluation, ModesEvaluation
from smalti.evaluation.image_likelihood import evaluate_likelihood
from smalti.evaluation.modes import evaluate_modes
from smalti.images.decoding import to_float
from smalti.images.image_set import ImageRows, ImageSet
from smalti.images.sheets import save_grid, save_sheet
from smalti.studies.selfvae.study import ModelName, ReproduceSelfVAE, open_data, trained
from smalti.tokenizers.selfvae.hierarchical_vae import Hierarchy, Transmitted

NAMES: dict[ModelName, str] = {
    "vae": "VAE",
    "selfvae-downscale": "selfVAE-downscale",
    "selfvae-downscale-3lvl": "selfVAE-downscale-3lvl",
    "selfvae-sketch": "selfVAE-sketch",
}
PAPER: dict[ModelName, tuple[str, str]] = {"vae": ("3.51", "41.36"), "selfvae-downscale": ("3.65", "34.71")}
"""Bits per dimension and FID of CIFAR10 (Table 1); the paper has the other rows of other data sets alone."""
LADDER = {
    "bytes_sent": ".0f",
    "compression_ratio": ".2f",
    "mse": ".4f",
    "psnr_db": ".1f",
    "ssim": ".2f",
    "frechet": ".1f",
}
"""Scores of the ladder's columns, and their digits."""
SHOWN, STEPS, REDRAWN = 12, 7, 6  # images in a row; steps of an interpolation; draws of z at one u


def reproduce_selfvae(config: ReproduceSelfVAE) -> None:
    """Trains and measures what is missing, model by model, and writes the table anew after each; then the pictures.

    Raises:
        UserError: for images that will not do.
        Interrupted: if a signal stopped a run; the same command goes on with it.
    """
    images, done = open_data(config), {}
    for name in config.models:
        done[name] = trained(name, config, images)
        measured(done[name], config)
        insert(config.out, f"{config.data} table", table(config, done))
    for name, folder in done.items():
        pictures(name, folder, config, images)
    shown = "\n\n".join(of_pictures(name, config) for name in done)
    insert(config.out, f"{config.data} pictures", shown)


def measured(folder: Path, config: ReproduceSelfVAE) -> dict[str, Any]:
    """Bits of held-out images and the ladder of ways; measured once of so many, and kept in the run's folder."""
    of = f"{config.num}-{config.reference}-{config.likelihood_num}-{config.samples}"
    path = folder / f"result-{of}.json"
    if path.exists():
        return json.loads(path.read_text())
    likelihood, _ = evaluate_likelihood(
        LikelihoodEvaluation(
            tokenizer=str(folder), images=config.images, num=config.likelihood_num, samples=config.samples
        )
    )
    settings = EvaluationSettings(images=config.images, num=config.num, reference=config.reference, precision="fp32")
    modes, _ = evaluate_modes(ModesEvaluation(tokenizer=str(folder), protocol=settings))
    parameters = sum(parameter.numel() for parameter in load_hierarchy(str(folder)).parameters())
    found = {"likelihood": likelihood, "modes": modes, "parameters": parameters}
    write_json(path, found)
    return found


def table(config: ReproduceSelfVAE, done: dict[ModelName, Path]) -> str:
    """Table 1's rows, and for each model the ladder of what is sent."""
    warm_up = f", warm-up {config.warm_up:.0%}" if config.warm_up else ""
    lines = [
        f"Table 1, {config.data}, {config.steps} steps of {config.batch_size} images{warm_up}: bits per dimension of "
        f"{config.likelihood_num} held-out images by {config.samples} importance samples, their standard error, the "
        f"bound of one sample; Fréchet distance of {config.num} generations to {config.reference} training images, and "
        "that of as many real ones.",
        "",
        "| | paper: bpd | FID | ours: bpd | ± | bound | Fréchet | real | parameters |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    ladder = [
        "",
        "| | way | bytes sent | ratio | MSE | PSNR, dB | SSIM | Fréchet |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, folder in done.items():
        found = measured(folder, config)
        likelihood, modes = found["likelihood"], found["modes"]
        bpd, fid = PAPER.get(name, ("", "")) if config.data == "cifar10" else ("", "")
        numbers = [likelihood[key]["model"] for key in ("bits_per_dim", "bits_per_dim_standard_error")]
        bound = likelihood["bound_bits_per_dim"]["model"]
        frechet = [f"{modes['frechet'][who]:.1f}" for who in ("generation", "real")]
        ours = [*(f"{number:.2f}" for number in (*numbers, bound)), *frechet, f"{found['parameters']:,}"]
        lines.append(f"| {' | '.join([NAMES[name], bpd, fid, *ours])} |")
        for mode in sorted(modes["mse"], key=lambda mode, sent=modes["bytes_sent"]: sent[mode]):
            cells = [f"{modes[key][mode]:{form}}" for key, form in LADDER.items()]
            ladder.append(f"| {' | '.join([NAMES[name], mode, *cells])} |")
    of = f"{config.channels} channels, dense blocks of {config.dense_layers} layers of {config.growth}"
    budget = f"{of}, AdaMax at 2e-3, trained in {resolve(config.precision)}"
    return "\n".join([*lines, *ladder, "", f"{machine()}; {budget}."])


@torch.no_grad()
def pictures(name: ModelName, folder: Path, config: ReproduceSelfVAE, images: ImageSet) -> None:
    """Figs. 4, 5 and 6 of one model, beside the report."""
    model = load_hierarchy(str(folder)).to(best_device())
    where, rows = best_device(), ImageRows(images, split="held_out", flips=False)
    shown, seeds = to_float(rows.spread(SHOWN)).to(where), row_seeds(0, torch.arange(4 * SHOWN)).to(where)
    save_grid(_picture(config, name, "generations"), model.generation(seeds).cpu())
    ladder = {"original": shown, **model.reconstructions(shown)}
    save_sheet(_picture(config, name, "ladder"), {caption: row.cpu() for caption, row in ladder.items()})
    save_sheet(_picture(config, name, "latents"), latents(model, shown))


def latents(model: Hierarchy, images: Float[Tensor, "b c h w"]) -> dict[str, Float[Tensor, "_n c h w"]]:
    """Fig. 6: between the u of pairs of images, and, where there are other latents, new ones at the u of each."""
    (u,) = model.encode(images)
    found = {}
    for pair in range(3):
        a, b = u[2 * pair], u[2 * pair + 1]
        between = torch.stack([torch.lerp(a, b, place) for place in torch.linspace(0, 1, STEPS).tolist()])
        ends = images[2 * pair : 2 * pair + 2]
        row = torch.cat([ends[:1], model.decode_from(Transmitted(u=between)), ends[1:]])
        found[f"between the u of two images, pair {pair + 1}"] = row.cpu()
    for number in range(3 if model.top else 0):
        seeds = row_seeds(number, torch.arange(REDRAWN)).to(u.device)
        same = u[number : number + 1].expand(REDRAWN, -1, -1, -1)
        row = torch.cat([images[number : number + 1], model.decode_from(Transmitted(u=same), derive(seeds, 1))])
        found[f"its u, and z drawn anew, image {number + 1}"] = row.cpu()
    return found


def of_pictures(name: ModelName, config: ReproduceSelfVAE) -> str:
    """Markdown that shows a model's pictures."""
    captions = {
        "generations": f"Fig. 4: {NAMES[name]}, generations",
        "ladder": f"Fig. 5: {NAMES[name]}, by what is sent",
        "latents": f"Fig. 6: {NAMES[name]}, interpolations of u" + (", z drawn anew" if name != "vae" else ""),
    }
    return "\n\n".join(
        f"{caption}.\n\n![{caption}]({_picture(config, name, what).name})" for what, caption in captions.items()
    )


def _picture(config: ReproduceSelfVAE, name: ModelName, what: str) -> Path:
    return config.out.with_name(f"{config.out.stem}-{config.data}-{name}-{what}.png")
