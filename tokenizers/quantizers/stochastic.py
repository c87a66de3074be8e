"""HQA's stochastic quantizer: a posterior over codewords, its losses, and the reset of dead codewords.

Maps vectors to codes and back; images are not handled here. The deterministic quantizer is in `linked.py`; the stack of
layers that uses either is in `smalti.tokenizers.hqa`.

Legend: b batch, d code width, h w grid, k codebook size.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from smalti.core.codes import Digits
from smalti.core.distributed import collected, total
from smalti.core.errors import UserError
from smalti.core.randomness import Stream, derive, gumbel, normal, uniform
from smalti.tokenizers.quantizers.codebook_updates import sampling_keys
from smalti.tokenizers.quantizers.kmeans import linked_kmeans
from smalti.tokenizers.quantizers.linked import QuantizerOutput, codewords
from smalti.training.fsdp import full, split_like

LAST_TEMPERATURE = 1e-3  # temperature at the end of training; at 0 the division of the logits would fail
BETA = 0.25  # weight of the deterministic commitment loss (Eq. 2), as in VQ-VAE
START_LENGTH = 3.0  # initial length of codewords: first posteriors are neither uniform nor certain (1, 8 learn slower)
USE_DECAY = 0.9  # decay per step of the moving average of codeword use
RESET_STEPS = 20
RESET_NOISE = 0.01


class StochasticQuantizer(nn.Module):
    """Samples codes from the posterior q(k|x), proportional to exp -||z_e - e_k||^2 (HQA, Eq. 3).

    Training relaxes the samples by the Gumbel-softmax, whose temperature falls linearly with training progress
    (Section 5.1). Codewords learn by gradients alone. Against codebook collapse, every `RESET_STEPS` steps `after_step`
    moves dead codewords next to codewords in use (Section 5.3).

    The losses are, per position, the negative entropy and the probabilistic commitment of Eq. 4: -H[q] and
    E_q ||z_e - e_k||^2. The paper derives them from a mixture prior (Appendix B): with the unnormalized Gaussians
    g_k = exp -||z_e - e_k||^2 and Z the sum of all g_k, -H[q] + E_q ||z_e - e_k||^2 = KL(q || g/Z) - log Z. Since Eq. 3
    makes q the posterior g/Z itself, the sum is -log Z: the negative log-density of z_e under a uniform mixture of
    Gaussians of variance 1/2 at the codewords, up to log k and d/2 log pi.

    Args:
        code_width: length of a codeword.
        codebook_size: number of codewords.
        probabilistic: whether the losses are those of Eq. 4; otherwise those of Eq. 2, for the nearest codeword.
        weight: weight of these losses.
        temperature: temperature of the relaxation at the start of training.
        reset_below: a codeword used less than this share of the most used one is dead, and is reset; 0 resets none.

    Raises:
        UserError: if `code_width` is below 1, `codebook_size` below 2, `weight` negative, `temperature` not above 0, or
            `reset_below` not from 0 to below 1.
    """

    use: Tensor
    steps: Tensor

    def __init__(
        self,
        *,
        code_width: int,
        codebook_size: int,
        probabilistic: bool = True,
        weight: float = 1.0,
        temperature: float = 0.667,
        reset_below: float = 0.03,
    ) -> None:
        super().__init__()
        if code_width < 1 or codebook_size < 2:
            raise UserError(
                f"code_width must be at least 1 and codebook_size at least 2, not {code_width} and {codebook_size}"
            )
        if not weight >= 0 or not temperature > 0 or not 0 <= reset_below < 1:
            raise UserError(
                "the latent weight must not be negative, temperature must be above 0 and reset_below from 0 to below "
                f"1, not {weight}, {temperature} and {reset_below}"
            )
        self.probabilistic, self.weight = probabilistic, weight
        self.temperature, self.reset_below = temperature, reset_below
        self.codebook = nn.Parameter(torch.randn(codebook_size, code_width) * (START_LENGTH / code_width**0.5))
        self.register_buffer("use", torch.ones(codebook_size))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._used: list[Tensor] = []  # probability mass of each codeword, one tensor per micro-batch of this step

    def logits(self, z_e: Float[Tensor, "b d h w"]) -> Float[Tensor, "b h w k"]:
        """Returns the unnormalized log-posterior -||z_e - e_k||^2 (Eq. 3), in float32 under autocast."""
        with torch.autocast(z_e.device.type, enabled=False):
            vectors, codebook = rearrange(z_e.float(), "b d h w -> b h w d"), self.codebook.float()
            products = F.linear(vectors, codebook)
            return 2 * products - vectors.square().sum(-1, keepdim=True) - codebook.square().sum(-1)

    def forward(
        self, z_e: Float[Tensor, "b d h w"], seeds: Int64[Tensor, " b"], progress: Float[Tensor, " b"]
    ) -> QuantizerOutput:
        """Quantizes: relaxed samples in training, the most probable codes in evaluation.

        The losses are named `entropy` and `commitment` (Eq. 4), or `codebook` and `commitment` (Eq. 2).

        Args:
            z_e: encoder output, a grid of any size.
            seeds: one per image, for the samples.
            progress: training progress from 0 to 1, which sets the temperature.
        """
        logits = self.logits(z_e)
        log_q = logits.log_softmax(-1)
        q = log_q.exp()
        if self.training:
            noisy = log_q + gumbel(derive(seeds, Stream.GUMBEL_NOISE), *logits.shape[1:])
            relaxed = (noisy / rearrange(self._temperature(progress), "b -> b 1 1 1")).softmax(-1)
            codes = noisy.argmax(-1)
            if torch.is_grad_enabled():
                self._used.append(q.detach().sum((0, 1, 2)))
            with torch.autocast(z_e.device.type, enabled=False):
                z_q = rearrange(relaxed @ self.codebook.float(), "b h w d -> b d h w")
        else:
            codes = logits.argmax(-1)
            z_q = self.lookup(codes)
        if self.probabilistic:
            terms = {"entropy": (q * log_q).sum(-1), "commitment": -(q * logits).sum(-1)}
        else:
            nearest = self.lookup(logits.argmax(-1))
            terms = {
                "codebook": (nearest - z_e.float().detach()).square().sum(1),
                "commitment": BETA * (z_e.float() - nearest.detach()).square().sum(1),
            }
        return QuantizerOutput(z_q, codes, {name: self.weight * term.mean() for name, term in terms.items()})

    def _temperature(self, progress: Tensor) -> Tensor:
        """Returns the temperature, linear in training progress from `temperature` to nearly 0 (Section 5.1)."""
        return self.temperature + (LAST_TEMPERATURE - self.temperature) * progress

    def encode(self, z_e: Float[Tensor, "b d h w"], seeds: Int64[Tensor, " b"] | None = None) -> Int64[Tensor, "b h w"]:
        """Returns the most probable codes, or samples from the posterior (Eq. 3) if seeds, one per image, are given."""
        return sample_codes(self.logits(z_e), seeds)

    def lookup(self, codes: Int64[Tensor, "b h w"], digits: Digits | None = None) -> Float[Tensor, "b d h w"]:
        """Returns the codewords of codes.

        Raises:
            UserError: if `digits` are others than the one digit of these codes.
        """
        return codewords(self.codebook, codes, digits)

    @torch.no_grad()
    def init_from_data(self, z_e: Float[Tensor, "b d h w"]) -> None:
        """Sets the codewords to the k-means centres of encoder outputs."""
        (centres,) = linked_kmeans(rearrange(z_e, "b d h w -> (b h w) d"), [self.codebook[None]], seed=0)
        self.codebook.copy_(centres[0])

    @torch.no_grad()
    def after_step(self, seeds: Int64[Tensor, " b"], bad: Bool[Tensor, ""] | None = None) -> None:
        """Updates the moving average of codeword use and, every `RESET_STEPS` steps, revives dead codewords.

        Every process of a run must call it; all compute the same codebook.

        Args:
            seeds: one per image of the step, for the choice of the codewords that dead ones move to.
            bad: whether the step must not count. Parameters then stay as they are; the caller restores the buffers.
        """
        if not self._used:
            return
        mass = total(torch.stack(self._used).sum(0))
        self._used.clear()
        codebook, use = full(self.codebook), USE_DECAY * self.use + (1 - USE_DECAY) * mass / mass.mean()
        self.steps += 1
        if self.reset_below:
            seed = derive(collected(seeds.min()[None]).min()[None], Stream.CODE_RESET)  # equal on all processes
            dead = (use < self.reset_below * use.max()) & (self.steps % RESET_STEPS == 0)
            # the r-th dead codeword moves to the r-th sampled one; sampled by use, without replacement
            sampled = sampling_keys(use, uniform(seed, len(use))[0]).argsort(descending=True)
            sources = sampled[(dead.cumsum(0) - 1).clamp_min(0)]
            moves = dead & ~dead[sources]
            noise = RESET_NOISE * normal(derive(seed, Stream.CODE_RESET_NOISE), *codebook.shape)[0]
            moved = torch.where(moves[:, None], codebook[sources] + noise, codebook)
            use = torch.where(moves, use[sources], use)
            self.codebook.copy_(split_like(moved if bad is None else torch.where(bad, codebook, moved), self.codebook))
        self.use.copy_(use)


def sample_codes(logits: Float[Tensor, "b h w k"], seeds: Int64[Tensor, " b"] | None) -> Int64[Tensor, "b h w"]:
    """Returns the most probable code per position; with seeds, one per image, a sample by the inverse CDF."""
    if seeds is None:
        return logits.argmax(-1)
    cdf = logits.float().softmax(-1).cumsum(-1)
    noise = uniform(seeds, *logits.shape[1:3])[..., None] * cdf[..., -1:]  # the last value is 1 up to rounding
    return torch.searchsorted(cdf, noise, right=True).squeeze(-1).clamp_max(logits.shape[-1] - 1)
