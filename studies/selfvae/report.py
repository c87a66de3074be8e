"""The report of the study of selfVAE: measurements beside the paper's numbers in a table, and Figs. 4 to 6.

The models are trained in `study.py`.
"""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from smalti.benchmarks.run import insert
from smalti.commands.selfvae_modes import load_hierarchy
from smalti.core.devices import best_device, resolve
from smalti.core.randomness import derive, row_seeds
from smalti.evaluation.config import EvaluationSettings, LikelihoodEvaluation, ModesEvaluation
from smalti.evaluation.image_likelihood import evaluate_likelihood
from smalti.evaluation.modes import evaluate_modes
from smalti.images.decoding import to_float
from smalti.images.image_set import ImageRows, ImageSet
from smalti.images.sheets import save_grid, save_sheet
from smalti.studies.experiment import Trial, count_parameters, picture_path, table_row, write_section
from smalti.studies.selfvae.study import DataName, ModelName, ReproduceSelfVAE, open_data, trained
from smalti.tokenizers.selfvae.hierarchical_vae import Hierarchy, Transmitted

NAMES: dict[ModelName, str] = {
    "vae": "VAE",
    "selfvae-downscale": "selfVAE-downscale",
    "selfvae-downscale-3lvl": "selfVAE-downscale-3lvl",
    "selfvae-sketch": "selfVAE-sketch",
}
PAPER: dict[DataName, dict[ModelName, tuple[str, str]]] = {
    "cifar10": {"vae": ("3.51", "41.36"), "selfvae-downscale": ("3.65", "34.71")},
    "celeba": {"vae": ("3.12", ""), "selfvae-sketch": ("3.24", ""), "selfvae-downscale-3lvl": ("2.88", "")},
    "imagenette": {"vae": ("3.85", ""), "selfvae-downscale-3lvl": ("3.70", "")},
}
"""Table 1: bits per dimension, and FID on CIFAR10. The paper has no other rows of its own models."""
MODE_SCORES = {
    "bytes_sent": ".0f",
    "compression_ratio": ".2f",
    "mse": ".4f",
    "psnr_db": ".1f",
    "ssim": ".2f",
    "frechet": ".1f",
}
"""Scores of the generation modes: the columns of the second table, with their number formats."""
SHOWN, STEPS, RESAMPLED = 12, 7, 6
"""Images in a row, points of an interpolation, and samples of z for one u."""


def reproduce_selfvae(config: ReproduceSelfVAE) -> None:
    """Trains and measures what is missing, and rewrites the table after each model; then draws the pictures.

    Raises:
        UserError: if the images cannot be used.
        Interrupted: if a signal stopped a training; the same command resumes it.
    """
    images, trials = open_data(config), {}
    for name in config.models:
        trials[name] = trained(name, config, images)
        measured(trials[name], config)
        budget = f"networks of size {config.size}, AdaMax at 2e-3, trained in {resolve(config.precision)}"
        write_section(config.out, f"{config.data} table", table(config, trials), budget)
    for name, trial in trials.items():
        pictures(name, trial, config, images)
    insert(config.out, f"{config.data} pictures", "\n\n".join(picture_links(name, config) for name in trials))


def measured(trial: Trial, config: ReproduceSelfVAE) -> dict[str, Any]:
    """Measures a model once: likelihood of held-out images, scores of its generation modes, and parameters."""
    tokenizer = str(trial.folder)

    def measure() -> dict[str, Any]:
        budget = {"images": config.images, "num": config.likelihood_num, "samples": config.samples}
        likelihood, _ = evaluate_likelihood(LikelihoodEvaluation(tokenizer=tokenizer, **budget))
        settings = EvaluationSettings(
            images=config.images,
            num=config.num,
            reference=config.reference,
            extractor=config.extractor,
            precision="fp32",
        )
        modes, _ = evaluate_modes(ModesEvaluation(tokenizer=tokenizer, protocol=settings))
        parameters = count_parameters(load_hierarchy(tokenizer))
        return {"likelihood": likelihood, "modes": modes, "parameters": parameters}

    key = f"{config.num}-{config.reference}-{config.likelihood_num}-{config.samples}"
    key += f"-{config.extractor}" if config.extractor != "lite0" else ""
    return trial.result(f"result-{key}", measure)


def table(config: ReproduceSelfVAE, trials: dict[ModelName, Trial]) -> str:
    """Formats the rows of Table 1 and, for each model, a table of its generation modes by the bytes they transmit."""
    warm_up = f", warm-up {config.warm_up:.0%}" if config.warm_up else ""
    lines = [
        f"Table 1, {config.data}, {config.steps} steps of {config.batch_size} images{warm_up}: bits per dimension of "
        f"{config.likelihood_num} held-out images by {config.samples} importance samples, their standard error, the "
        f"bound of one sample; Fréchet distance ({config.extractor}) of {config.num} generations to {config.reference} "
        "training images, and that of as many real ones.",
        "",
        "| | paper: bpd | FID | ours: bpd | ± | bound | Fréchet | real | parameters |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    mode_lines = [
        "",
        "| | way | bytes sent | ratio | MSE | PSNR, dB | SSIM | Fréchet |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, trial in trials.items():
        result = measured(trial, config)
        likelihood, modes = result["likelihood"], result["modes"]
        bpd, fid = PAPER.get(config.data, {}).get(name, ("", ""))
        numbers = [likelihood[key]["model"] for key in ("bits_per_dim", "bits_per_dim_standard_error")]
        bound = likelihood["bound_bits_per_dim"]["model"]
        frechet = [f"{modes['frechet'][images]:.1f}" for images in ("generation", "real")]
        ours = [*(f"{number:.2f}" for number in (*numbers, bound)), *frechet, f"{result['parameters']:,}"]
        lines.append(table_row([NAMES[name], bpd, fid, *ours]))
        for mode in sorted(modes["mse"], key=lambda mode, sent=modes["bytes_sent"]: sent[mode]):
            cells = [f"{modes[key][mode]:{form}}" for key, form in MODE_SCORES.items()]
            mode_lines.append(table_row([NAMES[name], mode, *cells]))
    return "\n".join([*lines, *mode_lines])


@torch.no_grad()
def pictures(name: ModelName, trial: Trial, config: ReproduceSelfVAE, images: ImageSet) -> None:
    """Draws Figs. 4, 5 and 6 of one model beside the report."""
    device, rows = best_device(), ImageRows(images, split="held_out", flips=False)
    model = load_hierarchy(str(trial.folder)).to(device)
    held_out, seeds = to_float(rows.spread(SHOWN)).to(device), row_seeds(0, torch.arange(4 * SHOWN)).to(device)
    save_grid(_picture(config, name, "generations"), model.generation(seeds).cpu())
    ladder = {"original": held_out, **model.reconstructions(held_out)}
    save_sheet(_picture(config, name, "ladder"), {caption: row.cpu() for caption, row in ladder.items()})
    save_sheet(_picture(config, name, "latents"), latents(model, held_out))


def latents(model: Hierarchy, images: Float[Tensor, "b c h w"]) -> dict[str, Float[Tensor, "_n c h w"]]:
    """Returns Fig. 6: interpolations between the u of two images and, if there is z, new samples of z for one u."""
    (u,) = model.encode(images)
    sheet = {}
    for pair in range(3):
        a, b = u[2 * pair], u[2 * pair + 1]
        between = torch.stack([torch.lerp(a, b, weight) for weight in torch.linspace(0, 1, STEPS).tolist()])
        ends = images[2 * pair : 2 * pair + 2]
        row = torch.cat([ends[:1], model.decode_from(Transmitted(u=between)), ends[1:]])
        sheet[f"between the u of two images, pair {pair + 1}"] = row.cpu()
    for number in range(3 if model.top else 0):
        seeds = row_seeds(number, torch.arange(RESAMPLED)).to(u.device)
        same = u[number : number + 1].expand(RESAMPLED, -1, -1, -1)
        row = torch.cat([images[number : number + 1], model.decode_from(Transmitted(u=same), derive(seeds, 1))])
        sheet[f"its u, and z drawn anew, image {number + 1}"] = row.cpu()
    return sheet


def picture_links(name: ModelName, config: ReproduceSelfVAE) -> str:
    """Returns Markdown that shows a model's pictures."""
    captions = {
        "generations": f"Fig. 4: {NAMES[name]}, generations",
        "ladder": f"Fig. 5: {NAMES[name]}, by what is sent",
        "latents": f"Fig. 6: {NAMES[name]}, interpolations of u" + (", z drawn anew" if name != "vae" else ""),
    }
    return "\n\n".join(
        f"{caption}.\n\n![{caption}]({_picture(config, name, picture).name})" for picture, caption in captions.items()
    )


def _picture(config: ReproduceSelfVAE, name: ModelName, picture: str) -> Path:
    return picture_path(config.out, config.data, name, picture)
