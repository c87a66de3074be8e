"""Stage one: trains a tokenizer on images, layer by layer for the kinds that need it."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from shlex import quote
from typing import Any, Generic, Literal, TypeAlias, TypeVar, cast

import torch

from smalti.commands.codebook_usage import CodebookAlarm
from smalti.commands.model_paths import (
    TOKENIZERS,
    as_typed,
    find_initial_model,
    layer_name,
    layer_source,
    load_tokenizer,
    require_config,
)
from smalti.core import models
from smalti.core.config import added_values, flatten, former_switches, read_json, store_paths
from smalti.core.devices import Device, Precision, generators_kept
from smalti.core.errors import UserError
from smalti.core.files import require_no_input
from smalti.core.progress import print_note
from smalti.images.decoding import to_float
from smalti.images.image_set import ImageRows, ImageSet
from smalti.images.reading import Reading, read_images
from smalti.images.sheets import save_sheet
from smalti.images.sources import local_paths
from smalti.tokenizers.base import PartName, Tokenizer
from smalti.tokenizers.hqa.feature_cache import with_feature_cache
from smalti.tokenizers.hqa.hqa import HQA
from smalti.tokenizers.reconstruction import Reconstruction
from smalti.training.accelerator import accelerator, accelerator_kept, main_first, tracked
from smalti.training.config import FitConfig, Phase
from smalti.training.end_of_run import print_end, print_finished
from smalti.training.loop import fit
from smalti.training.run_folder import RUN_NAME, Resume, Run, forget
from smalti.training.snapshots import Snapshots
from smalti.transfer.weights import Taken, changed_settings, take_discriminator, take_weights

C = TypeVar("C")
Preset: TypeAlias = Literal[
    "small",
    "small64",
    "paper32",
    "paper64",
    "paper128",
    "paper256",
    "f16-1024",
    "f16-16384",
    "f8-gumbel-8192",
    "f32-megapixel",
]

# Codebooks start from the features of this many images: enough for START_VECTORS vectors, within these limits.
START_IMAGES, MOST_START_IMAGES = 512, 2**14
START_VECTORS, START_PIXELS = 2**15, 2**25
SIZE = frozenset({"height", "width"})
"""Settings that do not change how an image is encoded."""
RESIZABLE = SIZE | {"image_channels", "quantizer", "branching", "depth", "codebook_size", "levels", "shared_codebooks"}
"""Settings of a network that may differ from those of `--init`."""
EIGHT_BIT_KINDS = ("selfvae", "vae")
"""Kinds whose likelihood is one of the 256 values of a pixel."""
SHEET_IMAGES = 12


@dataclass(frozen=True)
class TrainTokenizer(Generic[C]):
    """Settings of `train_tokenizer`.

    From Python, `tokenizer` must be the kind of `model`. The defaults of `fit` are those of `hrvq`;
    `smalti.commands.presets.small(kind)` has those of another kind.
    """

    model: C
    """The network."""
    fit: FitConfig = field(default_factory=lambda: FitConfig(steps=3_000, batch_size=16, optimizer="muon"))
    tokenizer: str = "hrvq"
    """Kind of tokenizer. Each kind has its own options: see `--tokenizer KIND --help`."""
    preset: Preset = "small"
    """Defaults of the other settings: `small` and `small64` are for 32x32 and 64x64 images on two CPU cores
    (`small64` of hrvq, vqvae and vqgan only), the others for GPUs. Use `paperN` for the VQ-VAE family and images of N
    pixels, `fN-...` for vqgan."""
    init: str | None = None
    """Start from the weights of this trained tokenizer: the name of one in the package, a kind, a folder, or a hub id.
    Network settings that are not given are its own. The image channels, the quantizer and the number of codes may be
    others: what does not fit them starts untrained [default: start untrained]."""
    freeze: tuple[PartName, ...] = ()
    """Parts that keep the weights of --init. With encoder and codebook frozen, all codes stay the same: latent sets
    and priors of the old tokenizer remain valid [default: train all parts]."""
    images: str = "portraits"
    """`portraits` or `emoji` (embedded), a folder of images, tar or zip archives such as 'shards-{000..127}.tar', a
    list of paths (.csv, .txt), arrays (.npz), Parquet files, or a data set's hub id."""
    reading: Reading = field(default_factory=Reading)
    flips: bool = True
    """Also train on the mirror images."""
    layer_steps: tuple[int, ...] = ()
    """Optimizer steps of each layer, from the image upwards, for kinds that are trained layer by layer. Upper layers
    are cheaper and can take more [default: --steps each]."""
    layer_batch_sizes: tuple[int, ...] = ()
    """Batch size of each layer, from the image upwards, for kinds that are trained layer by layer [default:
    --batch-size each]."""
    device: Device = "auto"
    """Device to train on; `auto` is the best one."""
    precision: Precision = "auto"
    """Precision of the networks (mixed precision); `auto` is bf16 where the hardware is fast in it, fp16 on older CUDA
    GPUs, else fp32."""
    out: Path | None = None
    """Folder of the run [default: runs/tokenizers/KIND]."""
    resume: Resume = "auto"
    """`auto` resumes from the newest snapshot, if there is one; `never` deletes an existing run and starts over; a step
    number rolls back to the snapshot of that step and discards everything after it."""

    def __post_init__(self) -> None:
        store_paths(self, names=("images", "init"), paths=("out",))


@generators_kept()
@accelerator_kept()
def train_tokenizer(config: TrainTokenizer[Any], images: ImageSet | None = None) -> Path:
    """Trains a tokenizer, or resumes a stopped run; returns its folder.

    The folder holds `model.safetensors` and `config.json`, `run.json`, `metrics.jsonl` and `reconstructions.png`. Kinds
    that are trained layer by layer have a run for each layer: the top layer's in the folder itself, the others in its
    subfolders `layer-1`, `layer-2`, ..., each a whole tokenizer of the layers so far.

    Args:
        config: the settings.
        images: the images that the config names, if the caller has opened them already.

    Raises:
        UserError: for unsuitable images or settings, or an unsuitable folder.
        Interrupted: if a signal stopped the run.
    """
    if not isinstance(images, ImageSet | None):
        raise UserError(f"images is given as {type(images).__name__}; give the ImageSet that open_images returns")
    folder = config.out or TOKENIZERS / config.tokenizer
    require_no_input([folder], [*local_paths(config.images), *config.reading.held_out_paths])
    if config.reading.image_depth == 16 and config.tokenizer in EIGHT_BIT_KINDS:
        raise UserError(f"{config.tokenizer} models pixels of 8 bits; leave --image-depth out")
    kind = cast(type[Tokenizer], models.class_of_kind("tokenizer", config.tokenizer))
    require_config(kind, config.model)
    *lower_models, top_model = kind.stages(config.model)
    *lower_fits, top_fit = _layer_fits(config, len(lower_models) + 1)
    if lower_models:
        kind(top_model)  # refuses unsuitable settings of an upper layer before a lower one is trained
    lower, folders = None, [*(folder / layer_name(number + 1) for number in range(len(lower_models))), folder]
    for number, (model, layer_fit) in enumerate(zip(lower_models, lower_fits, strict=True), 1):
        resume = config.resume if config.resume == "never" else "auto"  # a step number is for the top layer alone
        init = config.init and layer_source(config.init, number)
        stage = replace(config, model=model, fit=layer_fit, init=init, out=folders[number - 1], resume=resume)
        lower, images = _train(stage, images, lower, above=folders[number:])
    return _train(replace(config, model=top_model, fit=top_fit, out=folder), images, lower)[0]


def print_end_of_tokenizer(folder: Path) -> None:
    """Prints the last lines of the command, on the main process."""
    command = f"python scripts/build_latents.py --tokenizer {quote(as_typed(folder, 'tokenizer'))}"
    print_end(folder, pictures="reconstructions.png", following=command)


def _layer_fits(config: TrainTokenizer[Any], layers: int) -> list[FitConfig]:
    """Returns the training settings of each layer.

    Raises:
        UserError: if a setting for each layer has too few, too many or too small values.
    """
    for flag, values in (("--layer-steps", config.layer_steps), ("--layer-batch-sizes", config.layer_batch_sizes)):
        if len(values) not in (0, layers):
            raise UserError(
                f"{flag} names {len(values)} layers, but {config.tokenizer} has {layers}; give one number for each "
                "layer, or none"
            )
        if min(values, default=1) < 1:
            raise UserError(f"{flag} must be at least 1 each, not {values}")
    steps = config.layer_steps or (config.fit.steps,) * layers
    sizes = config.layer_batch_sizes or (config.fit.batch_size,) * layers
    return [replace(config.fit, steps=count, batch_size=size) for count, size in zip(steps, sizes, strict=True)]


def _train(
    config: TrainTokenizer[Any], images: ImageSet | None, lower_folder: Path | None, above: Sequence[Path] = ()
) -> tuple[Path, ImageSet]:
    """Trains one stage on top of the stage before it; returns its folder and the opened images.

    Args:
        config: the settings, with the model and the folder of this stage.
        images: the opened images, or None before the first stage.
        lower_folder: the folder of the stage below, if there is one.
        above: the folders of the stages above, the next one first. With `--resume never` their runs are deleted too,
            since they were trained on this one.

    Raises:
        UserError: as `train_tokenizer` does; if the stage above was trained on this one and this one would change.
    """
    folder = config.out
    assert folder is not None
    process = accelerator(config.precision, config.fit.trackers, folder, config.device)
    torch.manual_seed(config.fit.seed)
    tokenizer = cast(Tokenizer, models.class_of_kind("tokenizer", config.tokenizer)(config.model))
    if images is None:
        size = {"height": config.model.height, "width": config.model.width, "channels": tokenizer.image_channels}
        asked, main = (config.images, config.reading), process.is_main_process
        images = main_first(process, lambda: read_images(*asked, **size, shown=main))
    settings = {**flatten(config), "image_fingerprint": images.fingerprint, "precision": process.mixed_precision}
    settings["fit"] = None if config.reading.fit == "crop" else config.reading.fit  # the default, and that of old runs
    initial = find_initial_model(config.init, "tokenizer", folder) if config.init else None
    other = load_tokenizer(initial) if initial else None
    settings["init_digest"] = other.digest() if other else None
    lower = load_tokenizer(lower_folder) if lower_folder else None
    if lower:
        tokenizer.build_on(lower)
        settings["below"] = lower.digest()  # a run does not resume on other lower layers than it was trained on
    with process.main_process_first():  # it may delete earlier runs
        if config.resume == "never" and process.is_main_process:
            for upper in (each for each in reversed(above) if each.exists()):
                forget(upper)
        off, switches = added_values(config), former_switches(config.model)
        run = Run(folder, settings, main=process.is_main_process, resume=config.resume, off=off, switches=switches)
    if ending := run.end(config.fit.steps, config.fit.patience):
        more_steps = "more --layer-steps for the last layer" if lower else "--steps"
        print_finished(
            folder, ending, more="" if above else run.advice(config.fit.steps, config.fit.patience, more_steps)
        )
        process.wait_for_everyone()  # the main process may have just put the best model there
        return folder, images
    if run.step and above and _is_trained_on(above[0], folder):
        raise UserError(
            f"{above[0]} was trained on {folder} with its {run.step} steps, which must stay as it is; give "
            f"--layer-steps with {run.step} for it, another --out, or --resume never to train all layers again"
        )
    train = ImageRows(images, split="train", flips=config.flips)
    train_rows = with_feature_cache(lower, train, process) if isinstance(lower, HQA) else train
    held_out = ImageRows(images, split="held_out", flips=False)
    tokenizer.provenance = {
        "image_source": config.images,
        "image_fingerprint": images.fingerprint,
        "images": {"training": len(train) // (1 + config.flips), "held_out": len(held_out)},
        "preprocessing": images.preprocessing,
        "flips": config.flips,
        **({"skipped_images": int(images.left_out.sum())} if images.left_out.any() else {}),
        **({"init": config.init, "init_digest": settings["init_digest"]} if config.init else {}),
    }
    taken = _take_weights(config, tokenizer, other)
    tokenizer.freeze(config.freeze)
    if not run.step:
        _init_from_images(tokenizer, train, taken, shown=process.is_main_process)
        if config.init and other and taken and process.is_main_process:
            changed = changed_settings(tokenizer, other, but=RESIZABLE | tokenizer.training_settings)
            for line in taken.without_changed(tokenizer, other).lines(config.init, other.digest(), changed=changed):
                print_note(line)
    phases = tokenizer.phases(config.fit)
    if not phases:
        objective = Reconstruction(tokenizer)
        phases = [Phase("tokenizer", objective, config.fit.optimizer_of(objective))]
    if initial and not run.step and len(phases) > 1:
        fits = take_discriminator(Snapshots(initial), phases[1].objective)
        if process.is_main_process:
            print_note(f"the {phases[1].name} starts {f'from that of the run {initial}' if fits else 'untrained'}")
    shown, alarm = held_out if len(held_out) else train, CodebookAlarm()
    with tracked(process, settings):
        fit(
            process,
            phases,
            train_rows,
            config.fit,
            model=tokenizer,
            run=run,
            held_out=held_out,
            on_report=lambda _step, trained: alarm.measure(trained, shown),
            draw=lambda trained: save_reconstructions(trained, shown, folder / "reconstructions.png"),
            what=f"training {folder.name}",
        )
    return folder, images


def _is_trained_on(above: Path, folder: Path) -> bool:
    """Returns whether the run in the folder of a stage was trained on the present model of the stage below it."""
    run = above / RUN_NAME
    return run.exists() and read_json(run)["settings"].get("below") == models.read_config(folder)["digest"]


def _take_weights(config: TrainTokenizer[Any], tokenizer: Tokenizer, other: Tokenizer | None) -> Taken | None:
    """Takes the weights of `--init`, if it is given.

    Raises:
        UserError: if the two networks do not fit, a frozen part is new, codes that are to stay would change, or
            `--freeze` is used without `--init`.
    """
    if config.init is None or other is None:
        if config.freeze:
            raise UserError("--freeze keeps the weights of --init, so it needs --init")
        return None
    taken = take_weights(tokenizer, other, config.init, resizable=RESIZABLE)
    for part in config.freeze:
        if untrained := [name for name in taken.new if name.partition(".")[0] in tokenizer.parts.get(part, ())]:
            raise UserError(f"--freeze {part} keeps the weights of --init, which has no {untrained[0]} of this size")
    if {"encoder", "codebook"} <= set(config.freeze):
        if changed := changed_settings(tokenizer, other, but=SIZE | tokenizer.training_settings):
            flags = " ".join(changed)
            raise UserError(
                f"--freeze encoder codebook keeps the codes of {config.init}, which another {flags} would change; "
                f"leave {flags} out"
            )
        tokenizer.keep_codes_of(other)
    return taken


def _init_from_images(tokenizer: Tokenizer, train: ImageRows, taken: Taken | None, *, shown: bool) -> None:
    """Runs the data-dependent initialization on evenly spaced training images, but not if codebooks are those of
    `--init`. The fewer codes an image has, the more images a codebook needs; a line is printed if `shown`."""
    modules = tokenizer.parts.get("codebook")
    new = taken is None or any(modules is None or name.partition(".")[0] in modules for name in taken.new)
    if not (new and tokenizer.starts_from_data(tuned=taken is not None)):
        return
    if shown:
        parts = "codebooks" if any(level.radices for level in tokenizer.layout.levels) else "network"
        print_note(f"initializing the {parts} from training images")
    image_pixels = tokenizer.config.height * tokenizer.config.width
    positions = max(level.height * level.width for level in tokenizer.layout.levels)
    images = max(START_IMAGES, min(START_VECTORS // positions, START_PIXELS // image_pixels, MOST_START_IMAGES))
    spread = to_float(train.spread(min(images, len(train))))
    if taken is None:
        tokenizer.init_from_data(spread)
    else:
        tokenizer.init_new_from_data(spread, taken.tensors)


@torch.no_grad()
def save_reconstructions(tokenizer: Tokenizer, rows: ImageRows, path: Path) -> Path:
    """Saves a sheet of images and their reconstructions, from whole codes and from parts of them; returns its path."""
    pixels = rows.spread(min(SHEET_IMAGES, len(rows)))
    shown = to_float(pixels)
    reconstructions = tokenizer.reconstructions(shown.to(tokenizer.device))
    original = "original" if pixels.dtype == torch.uint8 else "original, 8 of 16 bits"
    save_sheet(path, {original: shown, **{caption: images.cpu() for caption, images in reconstructions.items()}})
    return path
