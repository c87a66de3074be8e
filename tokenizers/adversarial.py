"""How a VQ-GAN is trained: L1, perceptual and adversarial losses, and the discriminator. Its network is in `vqgan.py`.

Legend: b batch, c channels, h w image, p q grid of patches.
"""

import math
from collections import deque
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.func import functional_call

from smalti.errors import UserError
from smalti.fit_config import FitConfig, Phase
from smalti.preprocess import to_float
from smalti.processes import mean
from smalti.tokenizers.perceptual import PerceptualDistance

if TYPE_CHECKING:
    from smalti.tokenizers.vqgan import VQGAN

BETAS = (0.5, 0.9)  # of both optimisers: adversaries move, so less of the past is remembered
LARGEST_ADAPTIVE_WEIGHT = 1e4


def phases(tokenizer: "VQGAN", fit: FitConfig) -> list[Phase]:
    """The phases of a step: the tokenizer's, then, if the config has one, the discriminator's.

    Raises:
        UserError: as `VQGAN.phases` does.
    """
    config = tokenizer.config
    judge = None
    if config.adversarial_weight:
        judge = Discriminator(config.image_channels, config.discriminator_width, config.discriminator_layers)
        judge.check_size(config.height, config.width)
    generator = Generator(tokenizer, PerceptualDistance() if config.perceptual_weight else None, judge)
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

    Attributes:
        steps: how many have counted; saved, so that a resumed run starts the discriminator where it would have.
        made: reconstructions, one tensor a slice of this step, for the discriminator's phase.
    """

    steps: Int64[Tensor, ""]

    def __init__(self, tokenizer: "VQGAN", perceptual: PerceptualDistance | None, judge: Discriminator | None) -> None:
        super().__init__()
        self.tokenizer, self.config, self._perceptual = tokenizer, tokenizer.config, perceptual
        self._judge = (judge,)  # in a tuple, as it belongs to the other phase: its device, its gradients, its state
        self.made: deque[Tensor] = deque()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

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
        terms["mse"] = (made.detach().clamp(-1, 1) - images).square().mean() / 4
        heard = self._heard() if self.training else 0.0
        if (judge := self._judge[0]) is not None and heard:
            self.made.append(made.detach())
            terms["adversarial"] = -judge.frozen(made).float().mean()
            weight = adaptive_weight(likeness, terms["adversarial"], self.tokenizer.decoder[-1].weight)
            terms["adaptive_weight"] = weight
            loss = loss + self.config.adversarial_weight * heard * weight * terms["adversarial"]
        return loss, {name: value.detach() for name, value in terms.items()}

    def after_step(self, seeds: Int64[Tensor, " b"], bad: Bool[Tensor, ""]) -> None:
        """Counts the step; if it was bad, the training loop puts the count back."""
        self.steps += 1

    def _heard(self) -> float:
        """How much the discriminator counts at this step, from 0 (before it starts) to 1 (after the ramp)."""
        after = int(self.steps) - self.config.discriminator_start
        return min(1.0, (after + 1) / max(1, self.config.discriminator_ramp)) if after >= 0 else 0.0


def adaptive_weight(likeness: Tensor, adversarial: Tensor, last_layer: nn.Parameter) -> Float[Tensor, ""]:
    """How many times the gradient of one loss at the decoder's last layer is that of the other (Eq. 7), in float32.

    Gradients are means over processes, so that the weight is the same on all; of a batch taken in slices, each slice
    has its own.
    """
    gradients = (torch.autograd.grad(loss, last_layer, retain_graph=True)[0] for loss in (likeness, adversarial))
    of_likeness, of_adversarial = (mean(gradient.float()).norm() for gradient in gradients)
    return (of_likeness / (of_adversarial + 1e-4)).clamp(max=LARGEST_ADAPTIVE_WEIGHT).detach()


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
