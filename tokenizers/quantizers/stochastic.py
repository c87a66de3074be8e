"""Quantization by sampling: HQA's posterior over codewords, its loss, and the reset of codewords that nothing uses.

Vectors in, codes out: no image code here. The deterministic quantizer is in `linked.py`; the layers that are stacked on
either, in `hqa.py`.

Legend: b batch, d code width, h w grid, k codebook size.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from smalti.core.distributed import collected, total
from smalti.core.errors import UserError
from smalti.core.randomness import Stream, derive, gumbel, normal, uniform
from smalti.tokenizers.quantizers.drawing import drawing_keys
from smalti.tokenizers.quantizers.kmeans import linked_kmeans
from smalti.tokenizers.quantizers.linked import QuantizerOutput, codewords
from smalti.training.fsdp import full, split_like

LAST_TEMPERATURE = 1e-3  # in place of 0, by which logits cannot be divided
BETA = 0.25  # of the deterministic commitment (Eq. 2), VQ-VAE's
START_LENGTH = 3.0  # of codewords: the first posteriors are neither even nor certain (measured: 1 and 8 learn slower)
USE_DECAY = 0.9  # of the running use of codewords, a step
RESET_STEPS = 20
RESET_NOISE = 0.01


class StochasticQuantizer(nn.Module):
    """Samples codes from q(k|x), proportional to exp -||z_e - e_k||^2 (HQA, Eq. 3), relaxed while training (5.1).

    The relaxation is the Gumbel softmax, whose temperature falls linearly with the progress of the training. Codewords
    learn from gradients alone; those in little use move, every `RESET_STEPS` steps, to beside codewords in much use
    (Section 5.3), in `after_step`, as `LinkedQuantizer`'s do.

    The losses are per position the entropy and the probabilistic commitment of Eq. 4, -H[q] and E_q ||z_e - e_k||^2.
    Their sum is the KL divergence of q from a mixture prior but for what does not depend on q (Appendix B): with the
    unnormalised Gaussians g_k = exp -||z_e - e_k||^2 and Z the sum of all g_k, -H[q] + E_q ||z_e - e_k||^2 =
    KL(q || g/Z) - log Z, and as Eq. 3 makes q the posterior g/Z itself, the sum is -log Z: the negative log-density of
    z_e under an even mixture of Gaussians of variance 1/2 at the codewords, up to log k and d/2 log pi.

    Args:
        code_width: length of a codeword.
        codebook_size: codewords.
        probabilistic: the terms of Eq. 4, or in their place those of Eq. 2, of the nearest codeword.
        weight: of these terms.
        temperature: of the relaxation at the start of training.
        reset_below: codewords used less than this share of the most used one are reset; 0 resets none.

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
        if weight < 0 or not temperature > 0 or not 0 <= reset_below < 1:
            raise UserError(
                "the latent weight must not be negative, temperature must be above 0 and reset_below from 0 to below "
                f"1, not {weight}, {temperature} and {reset_below}"
            )
        self.probabilistic, self.weight = probabilistic, weight
        self.temperature, self.reset_below = temperature, reset_below
        self.codebook = nn.Parameter(torch.randn(codebook_size, code_width) * (START_LENGTH / code_width**0.5))
        self.register_buffer("use", torch.ones(codebook_size))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._used: list[Tensor] = []  # the probability mass of each codeword, of this step's slices

    def logits(self, z_e: Float[Tensor, "b d h w"]) -> Float[Tensor, "b h w k"]:
        """-||z_e - e_k||^2, the unnormalised log-posterior (Eq. 3); in float32 under autocast."""
        with torch.autocast(z_e.device.type, enabled=False):
            vectors, codebook = rearrange(z_e.float(), "b d h w -> b h w d"), self.codebook.float()
            products = F.linear(vectors, codebook)
            return 2 * products - vectors.square().sum(-1, keepdim=True) - codebook.square().sum(-1)

    def forward(
        self, z_e: Float[Tensor, "b d h w"], seeds: Int64[Tensor, " b"], progress: Float[Tensor, " b"]
    ) -> QuantizerOutput:
        """Samples, relaxed in training and the most probable codes otherwise; the losses are `entropy` and
        `commitment`, or `codebook` and `commitment` of Eq. 2.

        Args:
            z_e: any grid.
            seeds: of the images, which decide what is drawn.
            progress: of the training, from 0 to 1.
        """
        logits = self.logits(z_e)
        log_q = logits.log_softmax(-1)
        q = log_q.exp()
        if self.training:
            noisy = log_q + gumbel(derive(seeds, Stream.GUMBEL_NOISE), *logits.shape[1:])
            chosen = (noisy / rearrange(self._temperature(progress), "b -> b 1 1 1")).softmax(-1)
            codes = noisy.argmax(-1)
            if torch.is_grad_enabled():
                self._used.append(q.detach().sum((0, 1, 2)))
            with torch.autocast(z_e.device.type, enabled=False):
                z_q = rearrange(chosen @ self.codebook.float(), "b h w d -> b d h w")
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
        """Linear in the progress, from `temperature` to nearly 0 (Section 5.1)."""
        return self.temperature + (LAST_TEMPERATURE - self.temperature) * progress

    def encode(self, z_e: Float[Tensor, "b d h w"], seeds: Int64[Tensor, " b"] | None = None) -> Int64[Tensor, "b h w"]:
        """The most probable codes; with seeds, one for each image, samples from the posterior (Eq. 3)."""
        return draw(self.logits(z_e), seeds)

    def lookup(self, codes: Int64[Tensor, "b h w"], digits: int | None = None) -> Float[Tensor, "b d h w"]:
        """The codewords of codes.

        Raises:
            UserError: if more or less than the one digit of these codes is asked for.
        """
        return codewords(self.codebook, codes, digits)

    @torch.no_grad()
    def init_from_data(self, z_e: Float[Tensor, "b d h w"]) -> None:
        """Sets the codewords to the k-means centres of these vectors."""
        (centres,) = linked_kmeans(rearrange(z_e, "b d h w -> (b h w) d"), [self.codebook[None]], seed=0)
        self.codebook.copy_(centres[0])

    @torch.no_grad()
    def after_step(self, seeds: Int64[Tensor, " b"], bad: Bool[Tensor, ""] | None = None) -> None:
        """Counts the use of codewords in training since last time, and resets, when due, those in too little use.

        Every process of a run must call it; all end with the same codebook.

        Args:
            seeds: of the step's images, which decide to where codewords move.
            bad: whether the step is to leave no trace; buffers are then the caller's to put back.
        """
        if not self._used:
            return
        mass = total(torch.stack(self._used).sum(0))
        self._used.clear()
        codebook, use = full(self.codebook), USE_DECAY * self.use + (1 - USE_DECAY) * mass / mass.mean()
        self.steps += 1
        if self.reset_below:
            seed = derive(collected(seeds.min()[None]).min()[None], Stream.CODE_RESET)  # the same on all processes
            dead = (use < self.reset_below * use.max()) & (self.steps % RESET_STEPS == 0)
            # the r-th dead codeword moves to the r-th drawn, none twice, as often as it is used
            drawn = drawing_keys(use, uniform(seed, len(use))[0]).argsort(descending=True)
            sources = drawn[(dead.cumsum(0) - 1).clamp_min(0)]
            moves = dead & ~dead[sources]
            noise = RESET_NOISE * normal(derive(seed, Stream.CODE_RESET_NOISE), *codebook.shape)[0]
            moved = torch.where(moves[:, None], codebook[sources] + noise, codebook)
            use = torch.where(moves, use[sources], use)
            self.codebook.copy_(split_like(moved if bad is None else torch.where(bad, codebook, moved), self.codebook))
        self.use.copy_(use)


def draw(logits: Float[Tensor, "b h w k"], seeds: Int64[Tensor, " b"] | None) -> Int64[Tensor, "b h w"]:
    """The most probable code at each position; with seeds, one for each image, a sample, by the inverse of the CDF."""
    if seeds is None:
        return logits.argmax(-1)
    below = logits.float().softmax(-1).cumsum(-1)
    noise = uniform(seeds, *logits.shape[1:3])[..., None] * below[..., -1:]  # the last is 1 but for rounding
    return torch.searchsorted(below, noise, right=True).squeeze(-1).clamp_max(logits.shape[-1] - 1)
