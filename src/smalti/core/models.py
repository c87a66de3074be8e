"""Checkpoints of models: folders with `model.safetensors` and `config.json`, loaded strictly and without pickle.

Every network that a command trains is a `Checkpointed`: its class has a family and a kind, and its constructor takes
one frozen dataclass. The registry maps each kind to its class. What resuming a run needs besides the model is in
`training/run_folder.py` and `training/snapshots.py`.
"""

import dataclasses
import difflib
import hashlib
import json
import os
import re
from collections.abc import Collection
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Generic, Literal, Self, TypeAlias, TypeVar, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from smalti.core.checkpoint_checks import (
    CONFIG_NAME,
    TOKENIZER_FOLDER,
    WEIGHTS_NAME,
    read_config,
    read_header,
    require_matching,
    require_shapes,
    require_sizes,
    some,
)
from smalti.core.config import ADDED, RENAMED, config_from_json, former_switches, require_choices, with_switches
from smalti.core.devices import float32_by_default, generators_kept
from smalti.core.errors import UserError
from smalti.core.files import from_here, whole_file, write_json
from smalti.core.hub.ids import FORMS, HubId, find_hub_id, parse_target
from smalti.core.hub.model_files import download_model, former_pictures, model_files
from smalti.core.hub.upload import Files, upload

Family: TypeAlias = Literal["tokenizer", "prior"]

ConfigT = TypeVar("ConfigT", bound=Any)
C = TypeVar("C", bound=type)


class Checkpointed(nn.Module, Generic[ConfigT]):
    """A network that is rebuilt from its config and filled with its weights.

    Attributes:
        family: `tokenizer` or `prior`.
        kind: its name on the command line and in `config.json`.
        fills: whether it can fill masked parts of images.
        config_class: the frozen dataclass that its constructor takes.
        config: an instance of that dataclass.
        provenance: how this model was made (JSON values: sources, digests, settings), stored with the model.
        folder: the absolute path that `load` read it from; None for a model that was not loaded.
    """

    family: ClassVar[Family]
    kind: ClassVar[str]
    fills: ClassVar[bool] = False
    config_class: ClassVar[type]

    def __init__(self, config: ConfigT) -> None:
        super().__init__()
        require_choices(config)
        self.config = config
        self.provenance: dict[str, Any] = {}
        self.folder: Path | None = None

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    def recomputable(self) -> list[nn.Module]:
        """Returns the blocks that gradient checkpointing recomputes in the backward pass; by default none."""
        return []

    def digest(self) -> str:
        """Returns a SHA-256 over kind, config and every weight. Models with equal digests compute the same."""
        return digest(self.kind, self.config, self.state_dict())

    def save(self, folder: str | Path, *, half: bool = False) -> None:
        """Writes the two files, each atomically.

        `config.json` is written second and contains the weights' digest, so that loading detects a kill in between.

        Args:
            folder: the folder.
            half: store every float32 weight that float16 represents exactly as float16, for half the bytes. Loading
                gives the same weights; see `round_to_half`.
        """
        folder = Path(folder)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        with whole_file(folder / WEIGHTS_NAME) as partial:
            save_tensors({name: _halved(tensor) for name, tensor in state.items()} if half else state, partial)
        described = {"family": self.family, "kind": self.kind, "smalti": version("smalti")}
        stored = {"config": dataclasses.asdict(self.config), "digest": digest(self.kind, self.config, state)}
        write_json(folder / CONFIG_NAME, {**described, **stored, "provenance": self.provenance})

    @torch.no_grad()
    def round_to_half(self) -> None:
        """Rounds float32 weights to float16's precision in place, but for tensors with values beyond its range."""
        for tensor in self.state_dict().values():
            if tensor.dtype == torch.float32 and (rounded := tensor.half()).isfinite().all():
                tensor.copy_(rounded)

    def facts(self) -> dict[str, str]:
        """Returns what the model's card says of its network, by title."""
        return {"parameters": f"{sum(weights.numel() for weights in self.parameters()):,}"}

    def files_to_share(
        self,
        target: HubId,
        scratch: Path,
        *,
        license: str | None = None,
        sheet: bool = True,
        tokenizer: "Checkpointed | None" = None,
    ) -> Files:
        """Returns what `push_to_hub` uploads, by name. A model that differs from its `folder` is saved in `scratch`.

        Raises:
            UserError: if a prior has no tokenizer, or one that did not make its codes; or for an unsuitable licence.
        """
        folder = from_here(self.folder) if self.folder else None
        records = [scratch, *([folder] if folder else [])]
        stored = folder is not None and (folder / CONFIG_NAME).is_file()
        changed = folder is not None and stored and read_config(folder)["digest"] != self.digest()
        if folder is None or not stored or changed:
            self.save(folder := scratch)
        if tokenizer is not None:
            tokenizer.save(scratch / TOKENIZER_FOLDER)
        about = {"facts": self.facts(), "fills": self.fills, "changed": changed, "load": load}
        return model_files(folder, records, target, **about, license=license, sheet=sheet)

    def push_to_hub(
        self,
        hub_id: str,
        *,
        license: str | None = None,
        private: bool = False,
        revision: str | None = None,
        message: str | None = None,
        sheet: bool = True,
        tokenizer: "Checkpointed | None" = None,
    ) -> str:
        """Uploads the model with a card to the Hugging Face hub in one commit; returns the address of its page.

        Snapshots, optimizer states and logs stay here, and names in the uploaded copy have no local folders.

        Args:
            hub_id: `owner/name`, or a folder in it: `owner/name/folder`.
            license: the licence for the card's front matter, such as `mit`; by default the card gives none.
            private: create a private repository.
            revision: the branch, which is created if needed; by default the main one.
            message: the commit's message.
            sheet: upload the run's sheet of pictures too, which shows training or held-out images.
            tokenizer: of a prior, by default the copy in the folder that the prior was loaded from.

        Raises:
            UserError: as `files_to_share` does, or with the reason why nothing was uploaded.
        """
        target = parse_target(hub_id, revision)
        with TemporaryDirectory(prefix="smalti-push-") as scratch:
            files = self.files_to_share(target, Path(scratch), license=license, sheet=sheet, tokenizer=tokenizer)
            return upload(files, target, find_former=former_pictures, private=private, message=message)

    @classmethod
    @generators_kept()
    def load(cls, source: str | Path) -> Self:
        """Loads a model of this class from a folder or a hub id.

        Raises:
            UserError: if the folder has a model of another kind, or as `smalti.core.models.load` does.
        """
        model = load(source, cls.family)
        if not isinstance(model, cls):
            raise UserError(f"{source} holds a {model.kind}, not a {cls.kind}")
        return model


# The registry of kinds. Smalti's own are imported on first use, as core may not import them; `register` adds others.
_MODULES: dict[tuple[Family, str], str] = {
    ("tokenizer", "hams"): "smalti.tokenizers.hqa.hams",
    ("tokenizer", "hqa"): "smalti.tokenizers.hqa.hqa",
    ("tokenizer", "hrvq"): "smalti.tokenizers.vq.hrvq",
    ("tokenizer", "selfvae"): "smalti.tokenizers.selfvae.selfvae",
    ("tokenizer", "vae"): "smalti.tokenizers.selfvae.vae",
    ("tokenizer", "vqgan"): "smalti.tokenizers.vqgan.vqgan",
    ("tokenizer", "vqvae"): "smalti.tokenizers.vq.vqvae",
    ("tokenizer", "vqvae2"): "smalti.tokenizers.vq.vqvae2",
    ("prior", "hourglass"): "smalti.priors.networks.hourglass",
    ("prior", "maskgit"): "smalti.priors.networks.maskgit",
    ("prior", "pixelcnn"): "smalti.priors.networks.pixelcnn",
    ("prior", "realnvp"): "smalti.priors.networks.realnvp",
    ("prior", "transformer"): "smalti.priors.networks.transformer",
}
_CLASSES: dict[tuple[Family, str], type[Checkpointed]] = {}


def register(cls: C) -> C:
    """Registers, as a decorator, a `Checkpointed` class under its `family` and `kind`."""
    model = cast(type[Checkpointed], cls)
    _CLASSES[model.family, model.kind] = model
    return cls


def kinds(family: Family) -> list[str]:
    """Returns the registered kinds of one family, sorted."""
    return sorted({kind for owner, kind in (*_MODULES, *_CLASSES) if owner == family})


def class_of_kind(family: Family, kind: str) -> type[Checkpointed]:
    """Returns the registered class of a kind.

    Raises:
        UserError: if there is no such kind; suggests the nearest.
    """
    if (family, kind) not in _CLASSES and (family, kind) in _MODULES:
        import_module(_MODULES[family, kind])
    if (family, kind) not in _CLASSES:
        nearest = difflib.get_close_matches(kind, kinds(family), n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"kinds: {', '.join(kinds(family))}"
        raise UserError(f"there is no {family} of kind {kind!r}; {hint}")
    return _CLASSES[family, kind]


def class_described(described: dict[str, Any], source: str | Path, family: Family) -> type[Checkpointed]:
    """Returns the class of the model that a `config.json` describes; errors call the model `source`.

    Raises:
        UserError: if it is of another family or an unknown kind.
    """
    if described["family"] != family:
        raise UserError(f"{source} holds a {described['family']} ({described['kind']}), but a {family} is needed here")
    if (kind := described["kind"]) not in kinds(family):
        hint = "name the module that has it: SMALTI_IMPORT=module smalti ..."
        raise UserError(f"{source}: there is no {family} of kind {kind!r} in smalti itself; {hint}")
    return class_of_kind(family, kind)


@float32_by_default()
def load(source: str | Path, family: Family) -> Any:
    """Loads a trained model from a folder or a hub id, in evaluation mode on the CPU.

    Raises:
        UserError: if there is nothing at `source`, it is of another family, its config has missing or unknown fields,
            its weights have missing or unknown names, other shapes or NaN, or the digest does not match. Nothing of
            a declared size is allocated before the names and shapes match the weights' file.
    """
    folder = locate(source)
    described = read_config(folder)
    cls = class_described(described, source, family)
    config = config_from_json(cls.config_class, described["config"], str(folder / CONFIG_NAME))
    header = read_header(folder / WEIGHTS_NAME)
    require_sizes(described["config"], header, folder / CONFIG_NAME, folder / WEIGHTS_NAME)
    require_shapes(lambda: cls(config), header, folder / CONFIG_NAME, folder / WEIGHTS_NAME)
    model = cls(config)
    model.provenance = described["provenance"]
    try:
        weights = load_file(folder / WEIGHTS_NAME)
    except (SafetensorError, FileNotFoundError) as error:
        raise UserError(
            f"{folder / WEIGHTS_NAME} cannot be read ({error}); the checkpoint is damaged, fetch or train it again"
        ) from error
    expected = model.state_dict()
    require_matching(folder / WEIGHTS_NAME, expected=expected, stored=header)
    if broken := [name for name, tensor in weights.items() if tensor.is_floating_point() and tensor.isnan().any()]:
        raise UserError(f"{folder / WEIGHTS_NAME} has NaN in {some(broken)}; fetch or train it again")
    weights = {name: tensor.to(expected[name].dtype) for name, tensor in weights.items()}  # some may be float16
    if digest(model.kind, model.config, weights) != described["digest"]:
        raise UserError(
            f"{folder}: {WEIGHTS_NAME} and {CONFIG_NAME} do not belong together (digests differ); "
            "fetch it again, or run the same training command again"
        )
    model.load_state_dict(weights)
    model.folder = folder.absolute()  # the program may change its working directory
    return model.eval()


def locate(source: str | Path) -> Path:
    """Returns the folder of a checkpoint: a local one, or that of a hub id, which is downloaded.

    Raises:
        UserError: if it is neither, or with the reason why it cannot be downloaded.
    """
    if not isinstance(source, str | Path):
        raise UserError(f"a model is named by a text or a Path, not {source!r}; give a folder, a name or a hub id")
    if os.path.isdir(source):  # unlike `Path.is_dir`, returns False for names that are too long
        return Path(source)
    hub_id = find_hub_id(source.as_posix() if isinstance(source, Path) else source)
    if hub_id is None or os.path.isfile(source):
        raise UserError(
            f"no checkpoint at {source}: there is no such folder, and it is no hub id ({FORMS}); check the name, or "
            "train one first"
        )
    try:
        return download_model(hub_id)
    except UserError as error:
        raise UserError(f"no checkpoint at {source}: there is no such folder, and on the hub: {error}") from error


def digest(kind: str, config: Any, state: dict[str, Tensor], *, without: Collection[str] = ()) -> str:
    """Returns a SHA-256 over kind, config and weights, without the config's fields in `without`."""
    settings = dataclasses.asdict(config)
    for field in dataclasses.fields(config):
        if field.name in without or (ADDED in field.metadata and settings[field.name] == field.metadata[ADDED]):
            del settings[field.name]
            continue
        for old, new in field.metadata.get(RENAMED, {}).items():
            settings[field.name] = old if settings[field.name] == new else settings[field.name]
    settings = with_switches(settings, former_switches(config))
    sha = hashlib.sha256(json.dumps([kind, settings], sort_keys=True).encode())
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _halved(tensor: Tensor) -> Tensor:
    """Returns a float32 tensor as float16 if that loses nothing; any other tensor as it is."""
    exact = tensor.dtype == torch.float32 and tensor.half().float().equal(tensor)
    return tensor.half() if exact else tensor


def save_tensors(state: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file with the permissions that the umask gives every new file; the library's are 0600.

    Raises:
        OSError: if the file cannot be written; the library raises an error of its own.
    """
    path.touch()
    permissions = path.stat().st_mode & 0o777
    try:
        save_file(state, path, metadata)
    except SafetensorError as error:  # its message contains the system's error number
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
    path.chmod(permissions)
