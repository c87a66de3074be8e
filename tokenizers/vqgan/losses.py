"""VQ-GAN's training objectives: L1, perceptual and adversarial losses, and the discriminator.

The tokenizer itself is in `vqgan.py`, the perceptual distances are in `perceptual.py`.

Legend: b batch, c channels, h w image, p q grid of patches.
"""

import math
from collections import deque
from dataclasses import replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.func import functional_call

from smalti.core.distributed import mean
from smalti.core.errors import UserError
from smalti.images.decoding import to_float
from smalti.tokenizers.layers.attention_blocks import GroupNorm
from smalti.tokenizers.reconstruction import logged_mse
from smalti.tokenizers.vq.vqvae import OneGrid
from smalti.tokenizers.vqgan.perceptual import PerceptualDistance, check_size, find_perceptual
from smalti.training.config import FitConfig, Phase

BETAS = (0.5, 0.9)  # of both optimizers: shorter averages than usual, since the adversary changes all the time
LARGEST_ADAPTIVE_WEIGHT = 1e4


def phases(tokenizer: OneGrid, fit: FitConfig) -> list[Phase]:
    """Returns the phases of a training step: the generator's, then, if the config has one, the discriminator's.

    Raises:
        UserError: as `VQGAN.phases` does.
    """
    config = tokenizer.config
    if fit.compile:
        raise UserError(
            f"{tokenizer.kind} computes gradients within its loss, which cannot be compiled; leave --compile out"
        )
    discriminator = None
    if config.adversarial_weight:
        discriminator = Discriminator(config.image_channels, config.discriminator_width, config.discriminator_layers)
        discriminator.check_size(config.height, config.width)
    perceptual = None
    if config.perceptual_weight:
        check_size(config.height, config.width, "use --perceptual-weight 0")
        perceptual = find_perceptual(config.perceptual)
    generator_loss = GeneratorLoss(tokenizer, perceptual, discriminator)
    result = [Phase("generator", generator_loss, fit.optimizer_of(generator_loss, betas=BETAS))]
    if discriminator is not None:
        discriminator_loss = DiscriminatorLoss(discriminator, generator_loss.reconstructions)
        plain = replace(fit, optimizer="adamw") if fit.optimizer == "muon" else fit
        result.append(Phase("discriminator", discriminator_loss, plain.optimizer_of(discriminator_loss, betas=BETAS)))
    return result


class Discriminator(nn.Sequential):
    """PatchGAN discriminator (arXiv 1611.07004): one logit, real or fake, per overlapping patch.

    Deviation: GroupNorm instead of BatchNorm, so that an image's logits do not depend on the rest of the batch or on
    the number of processes.
    """

    def __init__(self, image_channels: int, width: int, layers: int) -> None:
        widths = [image_channels, *(width * min(2**layer, 8) for layer in range(layers + 1))]
        modules: list[nn.Module] = []
        for layer, (before, after) in enumerate(pairwise(widths)):
            modules += [nn.Conv2d(before, after, 4, stride=2 if layer < layers else 1, padding=1)]
            modules += [GroupNorm(math.gcd(32, after), after, epsilon=1e-5)] if layer else []
            modules += [nn.LeakyReLU(0.2)]
        super().__init__(*modules, nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.layers = layers
        for module in self:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)

    def check_size(self, height: int, width: int) -> None:
        """Refuses images that are smaller than one patch.

        Raises:
            UserError: if the image is smaller than one discriminator patch.
        """
        if min(height, width) < 3 * 2**self.layers:
            raise UserError(
                f"images of {height}x{width} are too small for a discriminator with {self.layers} layers; "
                f"use fewer --discriminator-layers, or --adversarial-weight 0"
            )

    def frozen(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 p q"]:
        """Computes the logits with gradients to the images only, so that the generator's loss does not train this."""
        return functional_call(self, {name: tensor.detach() for name, tensor in self.named_parameters()}, (images,))


class GeneratorLoss(nn.Module):
    """The generator's objective: the tokenizer's own terms, the perceptual loss and the adversarial loss (Eqs. 5-7).

    The adversarial loss sets in after `discriminator_start` steps. Held-out losses, computed in evaluation mode, leave
    it out, since its values are not comparable between steps. Logs each term, `mse` (see `logged_mse`), and with a
    discriminator `adversarial`, minus the mean logit of reconstructions, and `adaptive_weight`.

    Deviations: the adversarial loss is the hinge loss of the authors' code, not the logarithms of Eq. 5, and Eq. 7's
    delta is 1e-4 as there, not 1e-6. A step uses the adaptive weight of the step before, averaged over all processes
    and micro-batches, so that the result depends on the number of neither. The first step with the adversarial loss has
    weight 0.

    Attributes:
        reconstructions: reconstructed images of this step, one tensor per micro-batch, for the discriminator's phase.
    """

    steps: Int64[Tensor, ""]
    weight: Float[Tensor, ""]

    def __init__(
        self, tokenizer: OneGrid, perceptual: PerceptualDistance | None, discriminator: Discriminator | None
    ) -> None:
        super().__init__()
        self.tokenizer, self.config, self._perceptual = tokenizer, tokenizer.config, perceptual
        self._discriminator = (
            discriminator,
        )  # in a tuple, not a submodule: parameters and state are the other phase's
        self.reconstructions: deque[Tensor] = deque()
        self._gradients: list[tuple[Tensor, Tensor]] = []  # (reconstruction, adversarial) of this step's micro-batches
        # buffers, so that a resumed run continues with the same adversarial loss
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("weight", torch.zeros(()))
        # `steps` when it was last read from the device, and an upper bound of it now; -1: not read yet
        self._steps_read, self._steps_bound = -1, -1
        self.register_load_state_dict_post_hook(lambda module, _: setattr(module, "_steps_read", -1))

    def forward(self, batch: dict[str, Tensor]) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Returns the loss and the scalars to log, for a batch with `images`, uint8 `(b, c, h, w)`, and `seeds`."""
        images = to_float(batch["images"])
        output = self.tokenizer(images, batch["seeds"] if self.training else None)
        reconstruction, terms = output.reconstruction, dict(output.losses)
        reconstruction_loss = terms["reconstruction"]
        if self._perceptual is not None:
            terms["perceptual"] = self.config.perceptual_weight * self._perceptual(reconstruction, images)
            reconstruction_loss = reconstruction_loss + terms["perceptual"]
        loss = torch.stack(list(terms.values())).sum()
        terms["mse"] = logged_mse(reconstruction, images)
        (discriminator,), ramp = self._discriminator, self._ramp() if self.training else 0.0
        if discriminator is not None and ramp:
            self.reconstructions.append(reconstruction.detach())
            adversarial = -discriminator.frozen(reconstruction).float().mean()
            terms["adversarial"], terms["adaptive_weight"] = adversarial, self.weight.clone()
            self._gradients.append(
                (self._last_layer_gradient(reconstruction_loss), self._last_layer_gradient(adversarial))
            )
            loss = loss + self.config.adversarial_weight * ramp * terms["adaptive_weight"] * adversarial
        return loss, {name: value.detach() for name, value in terms.items()}

    @torch.no_grad()
    def after_step(self, seeds: Int64[Tensor, " b"], bad: Bool[Tensor, ""]) -> None:
        """Counts the step and computes the next step's adaptive weight; the loop restores both after a bad step."""
        self.steps += 1
        self._steps_bound += 1  # after a bad step too: `bad` is not read from the device
        if self._gradients:
            reconstruction, adversarial = (
                mean(torch.stack(each).mean(0)) for each in zip(*self._gradients, strict=True)
            )
            self._gradients.clear()
            self.weight.copy_(adaptive_weight(reconstruction, adversarial))

    def _last_layer_gradient(self, loss: Tensor) -> Tensor:
        last = self.tokenizer.decoder[-1].get_parameter("weight")
        return torch.autograd.grad(loss, last, retain_graph=True)[0].float()

    def _ramp(self) -> float:
        """Returns the adversarial loss's factor at this step, from 0 before the discriminator starts to 1.

        `steps` is on the device. Reading it waits for the device, so it is read on the ramp only.
        """
        start, ramp = self.config.discriminator_start, self.config.discriminator_ramp
        if self._steps_read < 0 or (self._steps_bound >= start and self._steps_read < start + ramp):
            self._steps_read = self._steps_bound = int(self.steps)
        after = (self._steps_read if self._steps_bound >= start else self._steps_bound) - start
        return min(1.0, (after + 1) / max(1, ramp)) if after >= 0 else 0.0


def adaptive_weight(reconstruction: Float[Tensor, "*shape"], adversarial: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Returns the adaptive weight (Eq. 7): the ratio of two losses' gradient norms at the decoder's last layer.

    It is clamped to the range from 0 to 10 000.
    """
    return (reconstruction.norm() / (adversarial.norm() + 1e-4)).clamp(max=LARGEST_ADAPTIVE_WEIGHT)


class DiscriminatorLoss(nn.Module):
    """The discriminator's objective: the hinge loss on images and on the generator phase's reconstructions.

    Logs `real` and `fake`, the mean logits of both. Until the discriminator starts, the loss is 0.
    """

    def __init__(self, discriminator: Discriminator, reconstructions: deque[Tensor]) -> None:
        super().__init__()
        self.judge = discriminator  # training states contain this attribute name
        self._reconstructions = reconstructions

    def forward(self, batch: dict[str, Tensor]) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Returns the loss and the scalars to log, for the batch that the generator's phase has just used."""
        if not self._reconstructions:  # zero gradients for every parameter, since data-parallel wrappers require some
            return torch.stack([parameter.sum() for parameter in self.parameters()]).sum() * 0, {}
        real, fake = (self.judge(x).float() for x in (to_float(batch["images"]), self._reconstructions.popleft()))
        loss = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
        return loss, {"real": real.detach().mean(), "fake": fake.detach().mean()}
