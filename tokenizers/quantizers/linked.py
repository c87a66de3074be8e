"""Vector quantization through linked codebooks, the bottleneck of HR-VQVAE; with one layer it is VQ-VAE's.

Maps vectors to codes and back; images are not handled here. The search is in `search.py`, the codebook updates without
gradients (EMA, revival of dead codewords) in `codebook_updates.py`, the k-means initialization in `kmeans.py`, settings
of single layers in `tree.py`.

Legend: b batch, d code width, h w grid, m branching, n layers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from smalti.core.codes import Digits, chosen_digits
from smalti.core.config import require_choice
from smalti.core.distributed import total
from smalti.core.errors import UserError
from smalti.core.randomness import derive, uniform
from smalti.tokenizers.quantizers.codebook_updates import dead_codeword_revivals, ema_update, scatter_rows
from smalti.tokenizers.quantizers.gradients import Gradient, with_gradient
from smalti.tokenizers.quantizers.kmeans import linked_kmeans
from smalti.tokenizers.quantizers.search import nearest_paths
from smalti.tokenizers.quantizers.tree import RandomStart, depth_of, radices_of, start_bound, weights_of
from smalti.training.fsdp import full, split_like

CodebookLearning: TypeAlias = Literal["gradient", "ema"]

DECAY, REVIVE_BELOW = 0.95, 0.05
"""Defaults for trainings of hundreds or thousands of steps. A codeword that is no longer chosen is revived after
log(REVIVE_BELOW) / log(DECAY) = 58 steps. With 0.99, VQ-VAE-2's decay, and 0.01 that takes 458 steps: suited to large
codebooks and long trainings, where averages over many steps are more precise."""


@dataclass(frozen=True)
class QuantizerOutput:
    """Result of quantizing a batch.

    Attributes:
        z_q: quantized vectors, e_C (HR-VQVAE, Eq. 4). The straight-through estimator copies its gradient to `z_e`.
        codes: codes below m_1 * ... * m_n: the paths through the tree of codebooks.
        losses: scalar terms by name, already weighted; their sum is the quantizer's part of the objective (HR-VQVAE,
            Eqs. 5 and 6).
    """

    z_q: Float[Tensor, "b d h w"]
    codes: Int64[Tensor, "b h w"]
    losses: dict[str, Float[Tensor, ""]]


def codewords(
    codebook: Float[Tensor, "k d"], codes: Int64[Tensor, "b h w"], digits: Digits | None
) -> Float[Tensor, "b d h w"]:
    """Looks codes up in a flat codebook; for quantizers without linked codebooks.

    Raises:
        UserError: if `digits` are others than the one digit of these codes.
    """
    chosen_digits(digits, 1)
    return rearrange(F.embedding(codes, codebook), "b h w d -> b d h w")


class LinkedQuantizer(nn.Module):
    """Residual quantization through linked codebooks (HR-VQVAE, Eqs. 3-6); with `depth=1` it is VQ-VAE's (Eqs. 1-2).

    Layer i holds a codebook of m_i codewords for each codeword of layer i-1, and the first layer a single one; the
    codeword chosen in layer i-1 decides which one layer i searches. A path from the first layer to the last is one code
    in [0, m_1 * ... * m_n), whose digits have the radices m_1, ..., m_n. In the paper's Sec. 3 all layers have the same
    m.

    Codewords learn either from the codebook terms of the loss, or as exponential moving averages (EMA) of the vectors
    that choose them (VQ-VAE, App. A.1). With EMA there are no codebook terms. Against codebook collapse, dead codewords
    are revived: they move to vectors that other codewords fit badly. Both need a call of `after_step` after every
    optimizer step. smalti's training loop makes that call; your own loop must:

        quantizer = LinkedQuantizer(code_width=64, depth=3, branching=8)
        quantizer.init_from_data(encoder(first_batch))
        for images in batches:
            output = quantizer(encoder(images))
            ...  # a loss of decoder(output.z_q), plus sum(output.losses.values()); backward; optimizer.step()
            quantizer.after_step()

    The paper gives no values for the betas; all are 0.25 by default as in VQ-VAE. Search, losses, sums and moving
    averages are float32 under autocast: half precision swaps near neighbours.

    Deviations: the paper trains by Eqs. 5 and 6 alone, which is `learning="gradient"` with `revive_below=0` and no call
    of `init_from_data`; the defaults leave the codebook terms to EMA. The squared norms of Eqs. 2, 5 and 6 are means
    over positions and channels, so that the weights do not depend on the sizes. With one layer, Eq. 5's terms over the
    whole equal Eq. 6's over the layer; they count once, as in Eq. 2, with that layer's weight. In the commitment term
    of Eq. 6, the residual xi^(i-1) = xi^0 - e^1 - ... - e^(i-1) is detached from the codewords of the lower layers: the
    term reaches the encoder alone, as its purpose and Eq. 2 have it. Eq. 6 as written would also move lower codewords,
    towards what upper layers leave over; docs/notebook/tokenizers.md compares the two.

    Args:
        code_width: length of a codeword.
        depth: number of layers, which is the number of digits of a code; with several branchings, their number.
        branching: codewords per codebook, which is the number of values of a digit: one number for all layers, or a
            number for each, from the first to the last.
        commitment_weight: weights beta_1, ..., beta_n of the layers' commitment losses (Eq. 6): one for all, or one for
            each.
        combined_commitment_weight: weight beta_0 of the commitment loss over the sum of all layers (Eq. 5); by default
            that of the first layer, whose term is about the same vectors.
        start: the range of the uniform random numbers that codewords start as; see `start_bound`. `init_from_data`
            replaces them.
        learning: how codewords learn: by EMA or by gradients.
        decay: decay per step of the moving averages and counts.
        revive_below: a codeword is dead, and revived after the step, if it is chosen less often than this share of its
            codebook's mean; 0 revives none.
        cosine: whether codewords are found by cosine similarity (ViT-VQGAN, arXiv 2110.04627, Sec. 3.2). Vectors and
            codewords are then scaled to length 1 first, EMA averages the scaled vectors, and a codeword is the
            direction of its average.
        gradient: how the gradient of z_q reaches z_e; see `with_gradient`.

    Attributes:
        radices: the branching of each layer, which are the radices of a code.
        frozen: whether codewords stay as they are in training: neither moving averages nor revival. Codewords that
            learn by gradients need `requires_grad_(False)` as well.

    Raises:
        UserError: if `code_width` or `depth` is below 1, a branching below 2, a weight negative, the number of
            branchings or weights another than that of layers, `decay` or `revive_below` not from 0 to below 1, there
            are more than 2**31 - 1 leaves, `start`, `learning` or `gradient` is none of its choices, or `cosine` is
            used with several layers: residuals of directions are not directions.
    """

    def __init__(
        self,
        *,
        code_width: int,
        depth: int = 1,
        branching: int | Sequence[int],
        commitment_weight: float | Sequence[float] = 0.25,
        combined_commitment_weight: float | None = None,
        start: RandomStart = "uniform",
        learning: CodebookLearning = "ema",
        decay: float = DECAY,
        revive_below: float = REVIVE_BELOW,
        cosine: bool = False,
        gradient: Gradient = "straight-through",
    ) -> None:
        super().__init__()
        require_choice("start", start, RandomStart)
        require_choice("learning", learning, CodebookLearning)
        require_choice("gradient", gradient, Gradient)
        if code_width < 1:
            raise UserError(f"code_width must be at least 1, not {code_width}")
        self.radices = radices_of(branching, depth_of(branching, depth, default=1))
        self.depth = len(self.radices)
        self.commitment_weights = weights_of(commitment_weight, self.depth)
        combined = self.commitment_weights[0] if combined_commitment_weight is None else combined_commitment_weight
        if not combined >= 0:
            raise UserError(f"combined_commitment_weight must not be negative, got {combined}; 0.25 is usual")
        for name, share in {"decay": decay, "revive_below": revive_below}.items():
            if not 0 <= share < 1:
                raise UserError(f"a codebook's {name} must be from 0 to below 1, not {share}")
        if cosine and self.depth > 1:
            raise UserError(
                f"cosine similarity needs codes of one layer; use depth 1 and one branching, not {self.depth} layers"
            )
        self.combined_weight, self.learning, self.decay = combined, learning, decay
        self.revive_below, self.cosine = revive_below, cosine
        self.gradient: Gradient = gradient
        for layer, m in enumerate(self.radices):
            nodes = math.prod(self.radices[:layer])
            bound = start_bound(start, layer=layer, branching=m, code_width=code_width)
            codebook = torch.zeros(nodes, m, code_width).uniform_(-bound, bound)
            if learning == "gradient":
                self.register_parameter(f"codebook_{layer}", nn.Parameter(codebook))
            else:
                self.register_buffer(f"codebook_{layer}", codebook)
            if self._counts_choices:
                self.register_buffer(f"counts_{layer}", torch.ones(nodes, m))
        self.frozen = False
        self._quantized: list[tuple[Tensor, Tensor]] = []  # vectors and paths of this step's micro-batches

    @property
    def codebooks(self) -> list[Float[Tensor, "_nodes _m d"]]:
        """Codebooks of each layer, (nodes, m, d), as the search uses them: scaled to length 1 with `cosine`."""
        return [self._scaled(codebook) for codebook in self._stored]

    @property
    def _stored(self) -> list[Tensor]:
        """Codebooks of each layer as parameters or buffers, before any scaling."""
        return [getattr(self, f"codebook_{layer}") for layer in range(self.depth)]

    def _scaled(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1) if self.cosine else vectors

    def _vectors(self, z_e: Tensor) -> Tensor:
        """Returns the vectors to quantize, (b h w, d), in float32."""
        return self._scaled(rearrange(z_e, "b d h w -> (b h w) d").float())

    @property
    def _counts_choices(self) -> bool:
        """True if training counts how often each codeword is chosen."""
        return self.learning == "ema" or self.revive_below > 0

    def forward(self, z_e: Float[Tensor, "b d h w"]) -> QuantizerOutput:
        """Quantizes a grid of any size and computes the losses of codebooks and encoder."""
        b, _, h, w = z_e.shape
        vectors = self._vectors(z_e)
        paths = nearest_paths(vectors, self.codebooks)
        self.observe(vectors, paths)
        codebook_loss = commitment_loss = torch.zeros((), device=z_e.device)
        combined, residual = torch.zeros_like(vectors), vectors
        for layer, beta in enumerate(self.commitment_weights):
            codeword = self._codewords(layer, paths)
            codebook_loss = codebook_loss + F.mse_loss(codeword, residual.detach())  # HR-VQVAE, Eq. 6
            commitment_loss = commitment_loss + beta * F.mse_loss(residual, codeword.detach())  # Eq. 6
            combined = combined + codeword  # Eq. 4
            residual = residual - codeword.detach()  # not in place: every layer's commitment must reach the encoder
        if self.depth > 1:
            codebook_loss = codebook_loss + F.mse_loss(combined, vectors.detach())  # Eq. 5
            commitment_loss = commitment_loss + self.combined_weight * F.mse_loss(vectors, combined.detach())  # Eq. 5
        losses = {"codebook": codebook_loss} if self.learning == "gradient" else {}
        z_q = with_gradient(vectors, combined, self.gradient)
        return QuantizerOutput(
            z_q=rearrange(z_q, "(b h w) d -> b d h w", b=b, h=h, w=w),
            codes=rearrange(paths, "(b h w) -> b h w", b=b, h=h, w=w),
            losses={**losses, "commitment": commitment_loss},
        )

    def observe(self, vectors: Float[Tensor, "n d"], paths: Int64[Tensor, " n"]) -> None:
        """Keeps quantized vectors for `after_step`, as many for each image; does nothing outside of training."""
        if self._counts_choices and not self.frozen and self.training and torch.is_grad_enabled():
            self._quantized.append((vectors.detach(), paths))

    @torch.no_grad()
    def after_step(self, seeds: Int64[Tensor, " b"] | None = None, bad: Bool[Tensor, ""] | None = None) -> None:
        """Runs the EMA codebook update and the revival of dead codewords.

        Both use the vectors that were quantized in training since the last call, over all micro-batches. Every process
        of a run must call it; all compute the same codebooks.

        Args:
            seeds: one per quantized image, for the random choice of new codewords; without seeds every call uses the
                same random numbers.
            bad: whether the step must not count. Parameters then stay as they are; the caller restores the buffers.
        """
        if not self._quantized:
            return
        vectors, paths = (torch.cat(parts) for parts in zip(*self._quantized, strict=True))
        self._quantized.clear()
        if seeds is None:
            seeds = torch.zeros(1, dtype=torch.long, device=vectors.device)
        positions = torch.arange(len(vectors) // len(seeds), device=vectors.device)
        seeds, residual = derive(seeds[:, None], positions).flatten(), vectors
        nodes = torch.zeros_like(paths)
        for layer, stored in enumerate(self._stored):
            codebook, children = full(stored), self._prefixes(layer, paths)
            # taken before the update: the search computed the residual with it
            codeword = F.embedding(children, self._scaled(codebook).flatten(0, 1))
            updated, counts = self._updated(layer, codebook, residual, children)
            if self.revive_below:
                errors = (residual - codeword).square().sum(1)
                noise = uniform(derive(seeds, layer))
                indices, revived, new_counts = dead_codeword_revivals(
                    counts, below=self.revive_below, vectors=residual, nodes=nodes, errors=errors, noise=noise
                )
                updated = scatter_rows(indices, revived, updated.flatten(0, 1)).view_as(updated)
                counts = scatter_rows(indices, new_counts, counts.flatten()).view_as(counts)
            stored.copy_(split_like(updated if bad is None else torch.where(bad, codebook, updated), stored))
            getattr(self, f"counts_{layer}").copy_(counts)
            residual, nodes = residual - codeword, children

    def _updated(self, layer: int, codebook: Tensor, residual: Tensor, children: Tensor) -> tuple[Tensor, Tensor]:
        """Returns a layer's codebooks and counts after the step, computed over all processes; codebooks by EMA."""
        counts = getattr(self, f"counts_{layer}")
        chosen = total(torch.zeros_like(counts).view(-1).index_add(0, children, torch.ones_like(residual[:, 0])))
        chosen = chosen.view_as(counts)
        if self.learning == "gradient":
            return codebook, self.decay * counts + (1 - self.decay) * chosen
        sums = total(torch.zeros_like(codebook).flatten(0, 1).index_add(0, children, residual)).view_as(codebook)
        return ema_update(codebook, counts, chosen=chosen, sums=sums, decay=self.decay)

    @torch.no_grad()
    def init_from_data(self, z_e: Float[Tensor, "b d h w"], *, seed: int = 0, first: int = 0) -> None:
        """Sets every codebook to the k-means centres of the vectors that reach it, so that no subtree starts dead.

        Layers before `first`, counted from 0, stay as they are.
        """
        initialized = linked_kmeans(self._vectors(z_e), self.codebooks, seed=seed, first=first)
        for codebook, centres in zip(self._stored[first:], initialized[first:], strict=True):
            codebook.copy_(centres)

    def encode(self, z_e: Float[Tensor, "b d h w"]) -> Int64[Tensor, "b h w"]:
        """Returns the codes alone, without losses or gradients."""
        b, _, h, w = z_e.shape
        paths = nearest_paths(self._vectors(z_e), self.codebooks)
        return rearrange(paths, "(b h w) -> b h w", b=b, h=h, w=w)

    def lookup(self, codes: Int64[Tensor, "b h w"], digits: Digits | None = None) -> Float[Tensor, "b d h w"]:
        """Returns the sum of the codewords on each code's path, e_C (Eq. 4), or only of the layers of some digits.

        Args:
            codes: codes on a grid.
            digits: a number i for the first i layers, or a slice of layers counted from 0: the sum over `slice(1, 3)`
                is e^2 + e^3. None is all layers.

        Raises:
            UserError: if the codes do not have these digits.
        """
        combined = torch.stack([self._codewords(layer, codes) for layer in chosen_digits(digits, self.depth)]).sum(0)
        return rearrange(combined, "b h w d -> b d h w")

    def _prefixes(self, layer: int, paths: Tensor) -> Tensor:
        """Returns the index, among all codewords of the layer, of the one on each path."""
        return paths // math.prod(self.radices[layer + 1 :])

    def _codewords(self, layer: int, paths: Tensor) -> Tensor:
        return F.embedding(self._prefixes(layer, paths), self.codebooks[layer].flatten(0, 1))
