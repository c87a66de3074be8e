"""How a VQ-GAN is trained: L1, perceptual and adversarial losses, and the discriminator. Its network is in `vqgan.py`.

Legend: b batch, c channels, h w image, p q grid of patches.
"""

import math
from collections import deque
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.func import functional_call

from smalti.core.distributed import mean
from smalti.core.errors import UserError
from smalti.images.decoding import to_float
from smalti.tokenizers.reconstruction import logged_mse
from smalti.tokenizers.vq.vqvae import OneGrid
from smalti.tokenizers.vqgan.perceptual import PerceptualDistance, check_size, find_perceptual
from smalti.training.config import FitConfig, Phase

BETAS = (0.5, 0.9)  # of both optimisers: adversaries move, so less of the past is remembered
LARGEST_ADAPTIVE_WEIGHT = 1e4


def phases(tokenizer: OneGrid, fit: FitConfig) -> list[Phase]:
    """The phases of a step: the tokenizer's, then, if the config has one, the discriminator's.

    Raises:
        UserError: as `VQGAN.phases` does.
    """
    config = tokenizer.config
    if fit.compile:
        raise UserError(
            f"{tokenizer.kind} takes gradients at one layer within a step, which is not compiled; leave --compile out"
        )
    judge = None
    if config.adversarial_weight:
        judge = Discriminator(config.image_channels, config.discriminator_width, config.discriminator_layers)
        judge.check_size(config.height, config.width)
    perceptual = None
    if config.perceptual_weight:
        check_size(config.height, config.width)
        perceptual = find_perceptual(config.perceptual)
    generator = Generator(tokenizer, perceptual, judge)
    found = [Phase("generator", generator, fit.optimizer_of(generator, betas=BETAS))]
    if judge is not None:
        adversary = Adversary(judge, generator.made)
        found.append(Phase("discriminator", adversary, fit.optimizer_of(adversary, betas=BETAS)))
    return found


class Discriminator(nn.Sequential):
    """PatchGAN (arXiv 1611.07004): says of each patch how real it is; patches overlap.

    Deviation: GroupNorm in place of BatchNorm, so that what is said of an image does not depend on the batch around it,
    nor on the number of processes.
    """

    def __init__(self, image_channels: int, width: int, layers: int) -> None:
        widths = [image_channels, *(width * min(2**layer, 8) for layer in range(layers + 1))]
        made: list[nn.Module] = []
        for layer, (before, after) in enumerate(pairwise(widths)):
            made += [nn.Conv2d(before, after, 4, stride=2 if layer < layers else 1, padding=1)]
            made += [nn.GroupNorm(math.gcd(32, after), after)] if layer else []
            made += [nn.LeakyReLU(0.2)]
        super().__init__(*made, nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.layers = layers
        for module in self:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)

    def check_size(self, height: int, width: int) -> None:
        """Refuses images on which there is no patch to judge.

        Raises:
            UserError: so.
        """
        if min(height, width) < 3 * 2**self.layers:
            raise UserError(
                f"images of {height}x{width} are too small for {self.layers} layers of a discriminator; "
                f"give fewer --discriminator-layers, or --adversarial-weight 0"
            )

    def frozen(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 p q"]:
        """The same, with gradients to the images alone: what trains the generator must not train this."""
        return functional_call(self, {name: tensor.detach() for name, tensor in self.named_parameters()}, (images,))


class Generator(nn.Module):
    """The tokenizer's loss: its own terms, the perceptual one, and from a step on the discriminator's (Eqs. 5-7).

    Held-out losses, computed in evaluation mode, are without the discriminator's, which compare with no other step's.
    Logs each term; `mse`, the squared error in [0, 1] units of what decoding gives; and with a discriminator
    `adversarial`, minus the mean of what it says, and `adaptive_weight`.

    Deviation: a step's adaptive weight is that of the step before it, which all processes and all slices of a batch
    have measured together: the result depends on neither. The first step that hears the discriminator has weight 0.

    Attributes:
        made: reconstructions, one tensor a slice of this step, for the discriminator's phase.
    """

    steps: Int64[Tensor, ""]
    weight: Float[Tensor, ""]

    def __init__(self, tokenizer: OneGrid, perceptual: PerceptualDistance | None, judge: Discriminator | None) -> None:
        super().__init__()
        self.tokenizer, self.config, self._perceptual = tokenizer, tokenizer.config, perceptual
        self._judge = (judge,)  # in a tuple, as it belongs to the other phase: its device, its gradients, its state
        self.made: deque[Tensor] = deque()
        self._gradients: list[tuple[Tensor, Tensor]] = []  # of likeness and discriminator, of this step's slices
        # saved, so that a resumed run hears the discriminator when and as it would have
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("weight", torch.zeros(()))
        self._read, self._most = -1, -1  # `steps` when it was last read, and the most it may be by now; -1: never read
        self.register_load_state_dict_post_hook(lambda module, _: setattr(module, "_read", -1))

    def forward(self, batch: dict[str, Tensor]) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """The loss, and scalars to log, of a batch whose `images` are uint8 `(b, c, h, w)`."""
        images = to_float(batch["images"])
        output = self.tokenizer(images, batch["seeds"] if self.training else None)
        made, terms = output.reconstruction, dict(output.losses)
        likeness = terms["reconstruction"]
        if self._perceptual is not None:
            terms["perceptual"] = self.config.perceptual_weight * self._perceptual(made, images)
            likeness = likeness + terms["perceptual"]
        loss = torch.stack(list(terms.values())).sum()
        terms["mse"] = logged_mse(made, images)
        (judge,), heard = self._judge, self._heard() if self.training else 0.0
        if judge is not None and heard:
            self.made.append(made.detach())
            terms["adversarial"], terms["adaptive_weight"] = -judge.frozen(made).float().mean(), self.weight.clone()
            self._gradients.append((self._at_last_layer(likeness), self._at_last_layer(terms["adversarial"])))
            loss = loss + self.config.adversarial_weight * heard * terms["adaptive_weight"] * terms["adversarial"]
        return loss, {name: value.detach() for name, value in terms.items()}

    @torch.no_grad()
    def after_step(self, seeds: Int64[Tensor, " b"], bad: Bool[Tensor, ""]) -> None:
        """Counts the step, and measures the next one's weight; if it was bad, the training loop puts both back."""
        self.steps += 1
        self._most += 1  # also for a bad step, of which only the device knows
        if self._gradients:
            likeness, adversarial = (mean(torch.stack(of).mean(0)) for of in zip(*self._gradients, strict=True))
            self._gradients.clear()
            self.weight.copy_(adaptive_weight(likeness, adversarial))

    def _at_last_layer(self, loss: Tensor) -> Tensor:
        last = self.tokenizer.decoder[-1].get_parameter("weight")
        return torch.autograd.grad(loss, last, retain_graph=True)[0].float()

    def _heard(self) -> float:
        """How much the discriminator counts at this step, from 0 (before it starts) to 1 (after the ramp).

        The device, which counts the steps, is waited for on the ramp alone.
        """
        start, ramp = self.config.discriminator_start, self.config.discriminator_ramp
        if self._read < 0 or (self._most >= start and self._read < start + ramp):
            self._read = self._most = int(self.steps)
        after = (self._read if self._most >= start else self._most) - start
        return min(1.0, (after + 1) / max(1, ramp)) if after >= 0 else 0.0


def adaptive_weight(likeness: Float[Tensor, "*shape"], adversarial: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """How much longer one gradient at the decoder's last layer is than the other (Eq. 7), from 0 to 10 000."""
    return (likeness.norm() / (adversarial.norm() + 1e-4)).clamp(max=LARGEST_ADAPTIVE_WEIGHT)


class Adversary(nn.Module):
    """The discriminator's loss: the hinge loss on images and on the reconstructions that the generator's phase made.

    Logs `real` and `fake`, the means of what it says of both. Until it starts, its loss is 0.
    """

    def __init__(self, judge: Discriminator, made: deque[Tensor]) -> None:
        super().__init__()
        self.judge, self._made = judge, made

    def forward(self, batch: dict[str, Tensor]) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """The loss, and scalars to log, of the batch that the generator's phase has just had."""
        if not self._made:  # a gradient of zeros for every parameter, as data-parallel wrappers want one
            return torch.stack([parameter.sum() for parameter in self.parameters()]).sum() * 0, {}
        real, fake = (self.judge(x).float() for x in (to_float(batch["images"]), self._made.popleft()))
        loss = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
        return loss, {"real": real.detach().mean(), "fake": fake.detach().mean()}
