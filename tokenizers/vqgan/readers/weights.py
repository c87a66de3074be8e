"""Builds a VQ-GAN of a checked size and fills it with another system's weights. Each format's reader ends here."""

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from smalti.core.checkpoint_checks import StoredTensor, build_without_weights, require_sizes, some
from smalti.core.errors import UserError
from smalti.tokenizers.vqgan.vqgan import VQGAN, VQGANConfig

MOST_STAGES = 16  # each halves the image
PUBLISHED_SIZE = 256  # height and width of the images that tokenizers without a description were trained on


@dataclass(frozen=True)
class Checkpoint:
    """Another system's weights.

    Attributes:
        state: the tokenizer's weights by name, without the prefix that they have in a larger model's file.
        source: the file that they are from, or the folder if they are from several.
        stored_bytes: size of these files.
        description: the file that describes their network; `source` itself if the sizes follow from the weights.
        format: what this checkpoint is, in the user's words.
    """

    state: dict[str, Tensor]
    source: Path
    stored_bytes: int
    description: Path
    format: str

    def without(self, *names: str) -> "Checkpoint":
        """Returns the checkpoint without weights that inference does not need."""
        state = {name: tensor for name, tensor in self.state.items() if name not in names}
        return dataclasses.replace(self, state=state)

    def refusal(self, problem: str) -> UserError:
        """Returns the error that the weights differ from those of the recognised network."""
        network = "this network" if self.source == self.description else f"the network in {self.description.name}"
        return UserError(f"{self.source} was recognised as {self.format}; for {network}, {problem}")

    def axes(self, name: str, count: int) -> tuple[int, ...]:
        """Returns the shape of a weight from which sizes are derived.

        Raises:
            UserError: if there is no such weight, or it has another number of axes.
        """
        if name not in self.state:
            raise self.refusal(f"it lacks {name}")
        shape = tuple(self.state[name].shape)
        if len(shape) != count:
            raise self.refusal(f"{name} is {shape[:8]}, not of {count} axes")
        return shape

    def count(self, pattern: str) -> int:
        """Returns how many weights of a numbered name there are, numbered from 0; `{}` stands for the number."""
        number = 0
        while pattern.format(number) in self.state:
            number += 1
        return number


def config_of(
    checkpoint: Checkpoint, *, size: int, widths: tuple[int, ...], norm_groups: int = 32, **network: Any
) -> VQGANConfig:
    """Returns a config that continues training as the imported network was trained: codebooks learn by gradients.

    Raises:
        UserError: if a size is impossible, whatever the weights.
    """
    source = checkpoint.description
    sizes = {"stages": len(widths), "size": size, "groups": norm_groups}
    sizes |= {name: value for name, value in network.items() if type(value) is int}
    if wrong := [name for name, value in sizes.items() if value < (name != "residual_blocks")]:
        raise UserError(f"{source} does not describe a VQ-GAN: its {wrong[0]} is {sizes[wrong[0]]}")
    if len(widths) > MOST_STAGES:
        raise UserError(f"{source} does not describe a VQ-GAN: it has {len(widths)} stages, the most is {MOST_STAGES}")
    if odd := [width for width in widths if width < 1 or width % norm_groups]:
        raise UserError(f"{source} does not describe a VQ-GAN: a width of {odd[0]} has no {norm_groups} groups")
    training = {"codebook_learning": "gradient", "codebook_init": "uniform", "revive_below": 0.0}
    network |= {"height": size, "width": size, "widths": widths, "norm_groups": norm_groups}
    return VQGANConfig(**training, **network)


def import_weights(
    config: VQGANConfig, checkpoint: Checkpoint, names: Callable[[VQGAN], Iterable[tuple[str, str]]]
) -> VQGAN:
    """Builds a network and fills it, after the sizes in its config were compared with the weights.

    Args:
        config: the network's settings.
        checkpoint: the weights.
        names: returns smalti's name and the checkpoint's name of every weight.

    Raises:
        UserError: if they do not match, or a weight is not a finite floating-point number.
    """
    state, source, description = checkpoint.state, checkpoint.source, checkpoint.description
    header = {name: StoredTensor(tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
    declared = sum(tensor.numel() * tensor.itemsize for tensor in state.values())
    if declared > checkpoint.stored_bytes:  # in a pickle, many tensors may be views of one
        raise UserError(f"{source} declares {declared} bytes of weights, more than it has; download it again")
    require_sizes(dataclasses.asdict(config), header, description, source)
    network = build_without_weights(lambda: VQGAN(config), header, description, source)
    assert network is not None
    expected, matched = network.state_dict(), dict(names(network))
    missing, unknown = set(matched.values()) - set(state), set(state) - set(matched.values())
    if missing or unknown:
        problems = (("lacks", missing), ("also has", unknown))
        examples = [f"{verb} {some(sorted(which))}" for verb, which in problems if which]
        raise checkpoint.refusal(f"it {' and '.join(examples)}")
    converted: dict[str, Tensor] = {}
    for mine, theirs in matched.items():
        tensor, needed = state[theirs], expected[mine].shape
        if [n for n in tensor.shape if n > 1] != [n for n in needed if n > 1]:  # 1x1 convolutions may be matrices
            raise checkpoint.refusal(f"{theirs} is {tuple(tensor.shape)}, not {tuple(needed)}")
        converted[mine] = tensor.float().reshape(needed) if tensor.is_floating_point() else tensor
        if not tensor.is_floating_point() or not converted[mine].isfinite().all():
            raise UserError(f"{source}: {theirs} has values that are not finite numbers; download it again")
    model = VQGAN(config)
    model.load_state_dict(converted)
    model.provenance = {"converted_from": source.name, "format": checkpoint.format}
    return model.eval()
