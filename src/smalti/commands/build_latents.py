"""Builds a latent set: encodes every image with a tokenizer, on any number of processes.

Images are decoded and encoded one block at a time (`encoding/encoder.py`). Finished blocks are kept in
`latentsets/building/blocks.py` until the file, or each file of a set of several ones, is complete.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from accelerate import PartialState

from smalti.commands.model_paths import LATENTS, images_for, layer_name, layer_source, load_tokenizer
from smalti.core.config import store_paths
from smalti.core.devices import Device, cores, device, generators_kept
from smalti.core.errors import UserError
from smalti.core.hub.public_names import public_values
from smalti.core.provenance import command, versions
from smalti.encoding.build import Engine, encode
from smalti.encoding.encoder import Encoder
from smalti.images.contents import held_out_percent
from smalti.images.fitting import SMALLEST_CROP, TEN_CROP_SIDE, recorded_fit, ten_crops
from smalti.images.image_set import ImageSet
from smalti.images.reading import Reading
from smalti.latentsets.building.jobs import Job
from smalti.latentsets.conditions import ConditionSource
from smalti.latentsets.hdf5.captions import digest_of_captions
from smalti.latentsets.provenance import CAPTIONS_DIGEST, Provenance
from smalti.latentsets.reader import LatentSet
from smalti.latentsets.summary import describe
from smalti.tokenizers.base import Tokenizer
from smalti.training.accelerator import LONGEST_WAIT, accelerator_kept, main_first, note_single_process

SIDES = ("channels", "height", "width")
MOST_CROPS = 1_000
MOST_WORKERS = 4  # default limit: each worker holds a few blocks of images in memory


@dataclass(frozen=True)
class BuildLatents:
    """Settings of `build_latents`."""

    tokenizer: str = "hrvq"
    """A trained tokenizer: a kind (read from runs/tokenizers/KIND), a folder, or a hub id."""
    layer: int | None = None
    """Layer whose codes are stored, counted from 1 at the image; only for hqa and hams [default: the top layer]."""
    images: str | None = None
    """`portraits` or `emoji` (embedded), a folder of images, tar or zip archives such as 'shards-{000..127}.tar', a
    list of paths (.csv, .txt), arrays (.npz), Parquet files, or a data set's hub id [default: the images that the
    tokenizer was trained on]."""
    reading: Reading = field(default_factory=Reading)
    caption_column: str | None = None
    """Column of the captions to store, also of `metadata.csv` or in the `.json` beside an image [default: the `.txt`
    files beside images in shards]."""
    conditions: str | None = None
    """Vectors to store, for priors with `--condition vector`: FILE.npy with a vector for each image, in their order; or
    `module:function`, a function of yours that receives uint8 images `(b, c, h, w)` and returns `(b, width)` floats.
    Mirror images and crops get their image's vector."""
    height: int | None = None
    """Height of the images in pixels [default: as trained]."""
    width: int | None = None
    """Width of the images in pixels [default: as trained]."""
    flips: bool = True
    """Also store the mirror image of every image, as a row of its own."""
    crops: int = 0
    """Random crops of every training image to store too, as rows of their own, against overfitting of small sets."""
    ten_crop: bool = False
    """Also store the four corners and the centre of every training image, instead of random --crops; with their mirror
    images these are the ten crops that some priors are trained on."""
    batch_size: int = 256
    """Rows that each process encodes at once, mirror images and crops included. Lower it if memory runs out. A
    stopped build repeats at most one batch for each process."""
    workers: int = field(default_factory=lambda: min(MOST_WORKERS, cores()))
    """Processes that decode images for each encoding process; 0 decodes in the encoding process itself [default: one
    for each core, at most 4]."""
    device: Device = "auto"
    """Device that encodes the images."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the networks; the codebook search is always fp32. Choose bf16 for speed on recent GPUs: a few codes
    then differ from those of fp32, and the latent set records it."""
    shard_rows: int | None = None
    """Write a set of several files of at most so many rows each, in a folder, such as 1000000 for sets of many millions
    of images. The set reads as one, with the same digest [default: one file]."""
    out: Path | None = None
    """The file to write, or the folder with --shard-rows [default: runs/latents/KIND.h5, or KIND-layer-N.h5 with
    --layer N; without .h5 for a folder]."""
    overwrite: bool = False
    """Replace an existing file, even a latent set that holds these codes. Without it, such a set is left as it is, and
    only one of the same tokenizer and images is replaced."""

    def __post_init__(self) -> None:
        store_paths(self, names=("tokenizer", "images", "conditions"), paths=("out",))

    @property
    def crops_per_image(self) -> int:
        """The number of crops of every training image, without mirror images."""
        return len(ten_crops()) if self.ten_crop else self.crops

    @property
    def random_crops(self) -> int | None:
        """The number of random crops of every training image; None for the ten crops."""
        return None if self.ten_crop else self.crops


@generators_kept()
@accelerator_kept()
def build_latents(config: BuildLatents, engine: Engine | None = None) -> Path:
    """Encodes every image and stores the codes; returns the file, or the folder of a set of several files.

    A file that already holds exactly these codes is left as it is. Several processes share the work
    under `accelerate launch` or `torchrun`. Finished blocks survive every kind of stop, `kill -9`
    included: the same call resumes from them, with any number of processes. Codes are computed in
    float32 unless the config sets bf16, so that they do not depend on the device's preferred
    precision.

    Args:
        config: The settings.
        engine: Encodes the blocks in other processes, on the `device` that the config sets; without it, the processes
            of this command do.

    Raises:
        UserError: for an unsuitable tokenizer or unsuitable images, if the file is something else or
            another process writes it, or if the disk is full. The file is then unchanged.
    """
    if config.batch_size < 1 or config.workers < 0:
        raise UserError(
            f"--batch-size must be at least 1 and --workers 0, not {config.batch_size} and {config.workers}"
        )
    if not 0 <= config.crops <= MOST_CROPS:
        raise UserError(f"--crops must be from 0 to {MOST_CROPS}, not {config.crops}")
    if config.crops and config.ten_crop:
        raise UserError("--crops and --ten-crop are two choices of crops; leave one out")
    if config.shard_rows is not None and config.shard_rows < config.batch_size:
        raise UserError(f"--shard-rows must be at least --batch-size ({config.batch_size}), not {config.shard_rows}")
    wanted = device("cpu" if engine else config.device)
    note_single_process()
    process = PartialState(cpu=wanted.type == "cpu", timeout=LONGEST_WAIT)
    own_device = process.device  # with several GPUs, each process has its own
    encoding_device = own_device if own_device is not None and own_device.type == wanted.type else wanted
    tokenizer_source = layer_source(config.tokenizer, config.layer)
    tokenizer = load_tokenizer(tokenizer_source).to(encoding_device)
    asked = (config.tokenizer, config.images, config.height, config.width, config.reading, config.caption_column)
    images = main_first(process, lambda: images_for(tokenizer, *asked, shown=process.is_main_process))
    captions = images.captions()
    one = torch.zeros(1, *(images.preprocessing[side] for side in SIDES), device=encoding_device)
    blank = one.int() if images.preprocessing.get("image_depth") == 16 else one.byte()
    conditions = ConditionSource(config.conditions, len(images), blank) if config.conditions else None
    name = tokenizer.kind if config.layer is None else f"{tokenizer.kind}-{layer_name(config.layer)}"
    path = config.out or LATENTS / (name if config.shard_rows else f"{name}.h5")
    _require_form(path, config.shard_rows)
    if config.crops_per_image and recorded_fit(images.preprocessing) == "pad":
        raise UserError("crops would cut into white borders; leave them out, or train the tokenizer with another --fit")
    crops = {"crops": config.crops, "smallest_crop": SMALLEST_CROP} if config.crops else {}
    crops |= {"ten_crop_side": TEN_CROP_SIDE} if config.ten_crop else {}
    other = {} if config.precision == "fp32" else {"precision": config.precision}
    other |= {CAPTIONS_DIGEST: digest_of_captions(captions)} if captions else {}
    held_out = images.preprocessing.get("held_out", "")
    provenance = Provenance(
        tokenizer_kind=tokenizer.kind,
        tokenizer_config=dataclasses.asdict(tokenizer.config),
        tokenizer_digest=tokenizer.digest(),
        tokenizer_source=tokenizer_source,
        image_source=images.source,
        image_fingerprint=images.fingerprint,
        preprocessing=public_values({**images.preprocessing, "flips": config.flips, **crops, **other}),
        label_names=images.label_names,
        condition_source=conditions.source if conditions else "",
        held_out_source=held_out if held_out_percent(held_out) is None else "",
        command=command(),
    )
    device_type = config.device if engine else wanted.type
    job = job_of(tokenizer, images, path, provenance, config, conditions, device_type=device_type)
    encoder = Encoder(tokenizer, images, job, config.random_crops, config.device, config.precision, conditions)
    skips = config.reading.on_bad_image == "skip"
    settings = {"skips": skips, "overwrite": config.overwrite, "engine": engine}
    encode(encoder, provenance, process, config.workers, captions=captions, **settings)
    if process.is_main_process:
        print(describe(LatentSet(path)))
    return path


def _require_form(path: Path, shard_rows: int | None) -> None:
    """Refuses to write one file instead of a folder, and the other way round.

    Raises:
        UserError: if there is another form at the path.
    """
    if shard_rows and (path.suffix == ".h5" or path.is_file()):
        raise UserError(f"--out {path} is the name of a file; with --shard-rows, give that of a folder")
    if not shard_rows and path.is_dir():
        raise UserError(f"--out {path} is a folder; give a file, or --shard-rows for a set of several files")


def job_of(
    tokenizer: Tokenizer,
    images: ImageSet,
    path: Path,
    provenance: Provenance,
    config: BuildLatents,
    conditions: ConditionSource | None,
    *,
    device_type: str,
) -> Job:
    """Divides the images into blocks and files, with a key of everything that decides their codes.

    Raises:
        UserError: if the tokenizer cannot encode images of this size, or a file would not hold the rows of an image.
    """
    blank = torch.zeros(1, *(images.preprocessing[side] for side in SIDES), device=tokenizer.device)
    with torch.no_grad():
        codes = tokenizer.encode(blank)
    rows_per_image = (1 + config.crops_per_image) * (1 + config.flips)
    if config.shard_rows and config.shard_rows < rows_per_image:
        raise UserError(f"an image has {rows_per_image} rows, so --shard-rows must be at least as many")
    block_images = max(1, config.batch_size // rows_per_image)
    return Job(
        path,
        tokenizer.layout.resized([(grid.shape[-2], grid.shape[-1]) for grid in codes]),
        images=len(images),
        block_images=block_images,
        flips=config.flips,
        crops=config.crops_per_image,
        condition_width=conditions.width if conditions else 0,
        shard_blocks=config.shard_rows // (block_images * rows_per_image) if config.shard_rows else 0,
        most_rows=config.batch_size,
        key={
            "tokenizer_digest": provenance.tokenizer_digest,
            "image_fingerprint": provenance.image_fingerprint,
            "preprocessing": provenance.preprocessing,
            "device": device_type,
            "software": versions(),
            **({"condition_source": conditions.source} if conditions else {}),
        },
    )
