"""How each kind of model is judged: what is measured, on which images. Settings:
`judging.py`. Files, tables and repeating: `evaluate.py`.

Legend: n images judged, k fills of each, c channels, h w pixels.
"""

import math
import time
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from smalti.classics import biharmonic, ssim
from smalti.codes import Codes
from smalti.devices import Precision, autocast, device
from smalti.errors import UserError
from smalti.extractors import Extractor, find_extractor, moments
from smalti.images import ImageRows, open_images
from smalti.interfaces import Tokenizer
from smalti.latentsets.reader import perplexity
from smalti.masks import blank, strokes
from smalti.metrics import (
    Moments,
    diversity,
    frechet_distance,
    hole_mse,
    mse,
    nearest,
    precision_recall,
    psnr,
    seam_steps,
)
from smalti.pictures import save_sheet
from smalti.pipeline.fill import fill
from smalti.pipeline.generate import generate_images
from smalti.pipeline.judging import JudgeInpainting, JudgePrior, JudgeTokenizer, JudgeWays, Judging
from smalti.pipeline.places import load_priors, load_tokenizer
from smalti.pipeline.ways import load_hierarchy
from smalti.preprocess import to_float, to_uint8
from smalti.priors.prior import CausalPrior, Prior
from smalti.progress import SLOW_SECONDS, bar
from smalti.randomness import choose, derive, row_seeds
from smalti.tokenizers.hierarchy import Sent

_ROWS_AT_ONCE = 64
_TRAINING, _HELD_OUT, _HOLES, _FILLS = range(4)  # streams of the seed
_CANDIDATES_AT_ONCE = 384
NEIGHBOURS_SHOWN = 12
COPY_QUANTILE = 0.05
"""Of held-out images' distances to the nearest training image; of samples, too, no more should be nearer than that."""


Scores = dict[str, dict[str, float]]
"""By what was measured, then by whose images: `model`, `real` for other real images in their place, or another way."""
SPEEDS = ("images_per_second", "seconds_per_image")
"""Scores that hang on the machine."""


class Real:
    """Real images to judge by: held-out ones, and training images as the reference of distances.

    Args:
        judging: which, and how many.
        extractor: of the features that distances are taken of.
        height: of the images, pixels.
        width: likewise.
        channels: 3 for colour, 1 for grey.

    Attributes:
        judged: uint8 `(n, c, h, w)`, held out.
        features: of these.
        conditions: of a result, as JSON.

    Raises:
        UserError: for images that will not do, or too few of them.
    """

    def __init__(self, judging: Judging, extractor: Extractor, *, height: int, width: int, channels: int) -> None:
        images = open_images(judging.images, height=height, width=width, channels=channels)
        held_out, training = (ImageRows(images, split=side, flips=False) for side in ("held_out", "train"))
        if len(held_out) < 4:
            raise UserError(f"only {len(held_out)} image(s) of {judging.images} are held out; judge by more images")
        self._extractor, self._training = extractor, training
        self._chosen = choose(len(training), judging.reference, judging.seed, _TRAINING)
        self.judged: UInt8[Tensor, "n c h w"] = held_out.__getitems__(
            choose(len(held_out), judging.num, judging.seed, _HELD_OUT)
        )["images"]
        self.features = extractor(self.judged)
        self.conditions = {
            "images": len(self.judged),
            "reference_images": len(self._chosen),
            "images_fingerprint": images.fingerprint,
            "preprocessing": images.preprocessing,
            **extractor.describe(),
        }

    def training(self, indices: Int64[Tensor, " b"]) -> UInt8[Tensor, "b c h w"]:
        """Images of the reference, by their places in it."""
        return self._training.__getitems__([self._chosen[index] for index in indices.tolist()])["images"]

    def reference(self) -> Float[Tensor, "m d"]:
        """Features of the reference, with a progress bar."""
        blocks = [self._chosen[at : at + _ROWS_AT_ONCE] for at in range(0, len(self._chosen), _ROWS_AT_ONCE)]
        shown = bar(blocks, what="features of the reference", unit="batch", delay_seconds=SLOW_SECONDS)
        return torch.cat([self._extractor(self._training.__getitems__(block)["images"]) for block in shown])

    def distance(self, pixels: UInt8[Tensor, "n c h w"]) -> float:
        """The Fréchet distance of images to the reference."""
        return frechet_distance(moments(self._extractor, pixels.split(_ROWS_AT_ONCE)), self.reference_moments)

    @cached_property
    def reference_moments(self) -> Moments:
        """Of the features of the reference, which are computed once."""
        return Moments.of(self.reference())


def real_for(judging: Judging, tokenizer: Tokenizer, extractor: Extractor) -> Real:
    """Of the size a tokenizer makes images in; the conditions say which tokenizer that is."""
    size = {"height": tokenizer.config.height, "width": tokenizer.config.width}
    real = Real(judging, extractor, **size, channels=tokenizer.image_channels)
    real.conditions["tokenizer_digest"] = tokenizer.digest()
    return real


def judge_tokenizer(config: JudgeTokenizer) -> tuple[Scores, dict[str, Any]]:
    """Errors of reconstructions, how far they are from real images as a set, and how the codes are used."""
    where = device(config.judging.device)
    extractor, tokenizer = find_extractor(config.judging.extractor, where), load_tokenizer(config.tokenizer).to(where)
    real = real_for(config.judging, tokenizer, extractor)
    images, codes, seconds = _reconstruct(tokenizer, real.judged, where, config.judging.precision)
    errors = mse(to_float(images), to_float(real.judged))
    features, reference = extractor(images), real.reference_moments
    scores: Scores = {
        "mse": {"model": float(errors.mean())},
        "psnr_db": {"model": float(psnr(errors).mean())},
        "ssim": {"model": ssim(images, real.judged)},
        "frechet_to_originals": {"model": frechet_distance(Moments.of(features), Moments.of(real.features))},
        "frechet": {
            "model": frechet_distance(Moments.of(features), reference),
            "real": frechet_distance(Moments.of(real.features), reference),
        },
    }
    for index, (level, grid) in enumerate(zip(tokenizer.layout.levels, codes, strict=True)):
        if level.radices:
            counts = torch.bincount(grid.flatten(), minlength=level.codebook_size)
            name = f"_level_{index}" if len(codes) > 1 else ""
            scores[f"codes_used{name}"] = {"model": float((counts > 0).double().mean())}
            scores[f"perplexity{name}"] = {"model": perplexity(counts)}
    scores["images_per_second"] = {"model": len(images) / seconds}
    return scores, real.conditions


@torch.no_grad()
def judge_ways(config: JudgeWays) -> tuple[Scores, dict[str, Any]]:
    """What comes back of held-out images by each way of selfVAE's, a column each, and what is sent of one."""
    where = device(config.judging.device)
    extractor, model = find_extractor(config.judging.extractor, where), load_hierarchy(config.tokenizer).to(where)
    real = real_for(config.judging, model, extractor)
    reference, truth = real.reference_moments, to_float(real.judged)
    seeds = row_seeds(config.judging.seed, torch.arange(len(truth)))
    scores: Scores = {name: {} for name in ("bytes_sent", "compression_ratio", "mse", "psnr_db", "ssim", "frechet")}
    for way in model.ways:
        made, sent = [], Sent()
        for images, of_images in zip(truth.split(_ROWS_AT_ONCE), seeds.to(where).split(_ROWS_AT_ONCE), strict=True):
            with autocast(where, config.judging.precision):
                sent = model.sent(images.to(where), way, of_images)
                made.append(to_uint8(model.received(sent, of_images, config.pixels)).cpu())
        received = torch.cat(made)
        scores["bytes_sent"][way] = model.bits_sent(sent) / 8
        scores["frechet"][way] = frechet_distance(Moments.of(extractor(received)), reference)
        if way != "generation":
            errors = mse(to_float(received), truth)
            scores["compression_ratio"][way] = model.compression_ratio(sent, truth)
            scores["mse"][way], scores["psnr_db"][way] = float(errors.mean()), float(psnr(errors).mean())
            scores["ssim"][way] = ssim(received, real.judged)
    scores["frechet"]["real"] = frechet_distance(Moments.of(real.features), reference)
    return scores, real.conditions


def judge_prior(config: JudgePrior[Any]) -> tuple[Scores, dict[str, Any]]:
    """Samples against real images as sets, and against the nearest of the training images, which they may repeat."""
    where = device(config.judging.device)
    extractor = find_extractor(config.judging.extractor, where)
    priors, tokenizer = load_priors(config.prior, config.tokenizer)
    priors, tokenizer = [prior.to(where) for prior in priors], tokenizer.to(where)
    real = real_for(config.judging, tokenizer, extractor)
    start = time.perf_counter()
    samples = to_uint8(
        generate_images(
            priors,
            tokenizer,
            num=len(real.judged),
            seed=config.judging.seed,
            sampling=config.sampling,
            precision=config.judging.precision,
        )
    )
    seconds = time.perf_counter() - start
    reference = real.reference()
    of = {"model": extractor(samples), "real": real.features}
    alike = {who: precision_recall(reference[: len(each)], each) for who, each in of.items()}
    near = {who: nearest(each, reference) for who, each in of.items()}
    close = near["real"][0].quantile(COPY_QUANTILE)
    scores: Scores = {
        "frechet": {who: frechet_distance(Moments.of(each), Moments.of(reference)) for who, each in of.items()},
        "precision": {who: each.precision for who, each in alike.items()},
        "recall": {who: each.recall for who, each in alike.items()},
        "nearest_training_image": {who: float(distances.median()) for who, (distances, _) in near.items()},
        "share_too_near": {who: float((distances < close).double().mean()) for who, (distances, _) in near.items()},
        "seconds_per_image": {"model": seconds / len(samples)},
    }
    scores |= _bits(priors, tokenizer, real.judged, where)
    nearest_first = near["model"][0].argsort()[:NEIGHBOURS_SHOWN]
    rows = {
        "samples nearest to a training image": to_float(samples[nearest_first]),
        "these training images": to_float(real.training(near["model"][1][nearest_first])),
    }
    save_sheet(config.out.with_name(f"{config.out.stem}-neighbours.png"), rows)
    return scores, {**real.conditions, "prior_digests": [prior.digest() for prior in priors]}


def judge_inpainting(config: JudgeInpainting[Any]) -> tuple[Scores, dict[str, Any]]:
    """Fills of random strokes against the truth beneath, each other, and the mean colour and biharmonic fills."""
    where = device(config.judging.device)
    extractor = find_extractor(config.judging.extractor, where)
    priors, tokenizer = load_priors(config.prior, config.tokenizer)
    priors, tokenizer = [prior.to(where) for prior in priors], tokenizer.to(where)
    real = real_for(config.judging, tokenizer, extractor)
    truth, seeds = to_float(real.judged), row_seeds(config.judging.seed, torch.arange(len(real.judged)))
    hole = strokes(derive(seeds, _HOLES), *truth.shape[2:])
    filled = _fill(config, priors, tokenizer, real.judged, hole, derive(seeds, _FILLS), where)
    fills = to_float(filled)
    completed = {
        "model": filled[:, 0],
        "real": real.judged,
        "mean_colour": to_uint8(blank(truth, hole)),
        "biharmonic": biharmonic(real.judged, hole),
    }
    reference = real.reference_moments
    errors = torch.stack([hole_mse(each, truth, hole) for each in fills.unbind(1)])
    steps = {who: float(seam_steps(to_float(each), hole).mean()) for who, each in completed.items()}
    scores: Scores = {
        "frechet": {
            who: frechet_distance(moments(extractor, each.split(_ROWS_AT_ONCE)), reference)
            for who, each in completed.items()
        },
        "seam_steps": steps,
        "seam_steps_to_real": {who: value / steps["real"] for who, value in steps.items()},
        "mse_in_hole": {who: float(hole_mse(to_float(each), truth, hole).mean()) for who, each in completed.items()},
    }
    if config.fills > 1:
        scores[f"mse_in_hole_best_of_{config.fills}"] = {"model": float(errors.min(0).values.mean())}
        scores["diversity"] = {"model": float(diversity(fills, hole).mean())}
    return scores, {
        **real.conditions,
        "prior_digests": [prior.digest() for prior in priors],
        "share_of_hole": float(hole.float().mean()),
    }


@torch.no_grad()
def _bits(
    priors: Sequence[Prior], tokenizer: Tokenizer, pixels: UInt8[Tensor, "n c h w"], where: torch.device
) -> Scores:
    """Bits for each code of held-out images, whose class is not told, of the priors whose likelihood is exact."""
    scores: Scores = {}
    batches = [tokenizer.encode(to_float(batch).to(where)) for batch in pixels.split(_ROWS_AT_ONCE)]
    for level, prior in enumerate(priors):
        if isinstance(prior, CausalPrior):
            nats = [
                prior.head.nll(prior.features(codes[level], upper=codes[:level]), codes[level].flatten(1)).double()
                for codes in batches
            ]
            name = f"_level_{level}" if len(priors) > 1 else ""
            scores[f"bits_per_code{name}"] = {"model": float(torch.cat(nats).mean()) / math.log(2)}
    return scores


@torch.no_grad()
def _reconstruct(
    tokenizer: Tokenizer, pixels: UInt8[Tensor, "n c h w"], where: torch.device, precision: Precision
) -> tuple[UInt8[Tensor, "n c h w"], Codes, float]:
    """Reconstructions, their codes, and the seconds they took."""
    made, codes, start = [], [], time.perf_counter()
    with autocast(where, precision):
        for batch in pixels.split(_ROWS_AT_ONCE):
            codes.append(tokenizer.encode(to_float(batch).to(where)))
            made.append(to_uint8(tokenizer.decode(codes[-1])).cpu())
    seconds = time.perf_counter() - start
    return torch.cat(made), tuple(torch.cat(level).cpu() for level in zip(*codes, strict=True)), seconds


def _fill(
    config: JudgeInpainting[Any],
    priors: Sequence[Prior],
    tokenizer: Tokenizer,
    pixels: UInt8[Tensor, "n c h w"],
    hole: Bool[Tensor, "n h w"],
    seeds: Int64[Tensor, " n"],
    where: torch.device,
) -> UInt8[Tensor, "n k c h w"]:
    """Every image filled `config.fills` times, no more candidates at once than a batch of samples has rows."""
    k, filled = config.fills, []
    at_once = max(1, _CANDIDATES_AT_ONCE // (k * config.filling.candidates))
    parts = list(zip(pixels.split(at_once), hole.split(at_once), seeds.split(at_once), strict=True))
    for some, holes, of_some in bar(parts, what="filling", unit="batch"):
        of_fills = derive(of_some.repeat_interleave(k), torch.arange(k).repeat(len(some)))
        with autocast(where, config.judging.precision):
            done = fill(
                priors,
                tokenizer,
                some.repeat_interleave(k, 0),
                holes.repeat_interleave(k, 0),
                seeds=of_fills,
                sampling=config.sampling,
                filling=config.filling,
            )
        filled.append(done.unflatten(0, (len(some), k)))
    return torch.cat(filled)
