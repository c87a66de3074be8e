"""Quantization through linked codebooks, the bottleneck of HR-VQVAE; with one layer it is VQ-VAE's.

Vectors in, codes out: no image code here. The search is in `search.py`, what moves codewords besides gradients in
`learning.py`, their start in `kmeans.py`.

Legend: b batch, d code width, h w grid, m branching, n layers.
"""

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from smalti.core.codes import LARGEST_CODEBOOK_SIZE
from smalti.core.distributed import total
from smalti.core.errors import UserError
from smalti.core.randomness import derive, uniform
from smalti.tokenizers.quantizers.codebook_updates import put_at, revival, running_means
from smalti.tokenizers.quantizers.kmeans import linked_kmeans
from smalti.tokenizers.quantizers.search import nearest_paths
from smalti.training.fsdp import full, split_like

CodebookLearning: TypeAlias = Literal["gradient", "ema"]

DECAY, REVIVE_BELOW = 0.95, 0.05
"""What suits some hundreds or thousands of steps: a codeword that is no longer chosen is moved after 58, the quotient
of their logarithms. With 0.99, the papers' decay, and 0.01 it takes 458: for the large codebooks of long trainings,
whose means need many steps to be precise."""


@dataclass(frozen=True)
class QuantizerOutput:
    """What quantizing a batch gives.

    Attributes:
        z_q: the combined representation e_C (Eq. 4); its gradient passes straight through to `z_e`.
        codes: paths, 0 to m**n - 1.
        losses: scalar terms of Eqs. 5 and 6, by name, already weighted: their sum is the bottleneck's share of the
            objective.
    """

    z_q: Float[Tensor, "b d h w"]
    codes: Int64[Tensor, "b h w"]
    losses: dict[str, Float[Tensor, ""]]


def codewords(
    codebook: Float[Tensor, "k d"], codes: Int64[Tensor, "b h w"], digits: int | None
) -> Float[Tensor, "b d h w"]:
    """The codewords of a flat codebook's codes, for quantizers that search in none.

    Raises:
        UserError: if more or less than the one digit of these codes is asked for.
    """
    if digits not in (None, 1):
        raise UserError(f"these codes have 1 digit; cannot decode {digits} of them")
    return rearrange(F.embedding(codes, codebook), "b h w d -> b d h w")


class LinkedQuantizer(nn.Module):
    """Residual quantization through linked codebooks (HR-VQVAE, Eqs. 3-6); with `depth=1` it is VQ-VAE's (Eqs. 1-2).

    Layer i holds `branching**(i-1)` codebooks of `branching` codewords; the codeword chosen in layer i-1 decides which
    one layer i searches. A path from the first layer to the last is one code in [0, branching**depth).

    Codewords learn from the codebook terms of the losses, or as running means of what chooses them (VQ-VAE, App. A.1);
    then there are no such terms, and after each step of the optimizer `after_step` must be called. It also revives
    codewords. smalti's training loop calls it; in a loop of one's own:

        quantizer = LinkedQuantizer(code_width=64, depth=3, branching=8)
        quantizer.start_from(encoder(first_batch))
        for images in batches:
            output = quantizer(encoder(images))
            ...  # a loss of decoder(output.z_q), plus sum(output.losses.values()); backward; optimizer.step()
            quantizer.after_step()

    The paper gives no values for beta; here it is one for all layers, and 0.25 is VQ-VAE's. Search, losses, sums and
    running means are float32 under autocast: half precision swaps near neighbours.

    Deviations: the squared norms of Eqs. 2, 5 and 6 are means over positions and channels, so that the weights do not
    depend on the sizes; with one layer, where Eq. 5's terms over the whole and Eq. 6's over the layer are the same,
    they count once, as in Eq. 2.

    Args:
        code_width: length of a codeword.
        depth: layers, the digits of a code.
        branching: codewords of each codebook, the values of a digit.
        commitment_weight: beta.
        learning: how codewords learn.
        decay: of the running means and counts, a step.
        revive_below: after a step, a codeword chosen less often than this share of its codebook's mean moves to where
            vectors are; 0 revives none.
        cosine: whether directions are compared (ViT-VQGAN, arXiv 2110.04627, Sec. 3.2): vectors and codewords are
            scaled to length 1 before anything else, so that the nearest codeword is that of the largest cosine. Running
            means then are of vectors of length 1, and a codeword is the direction of its mean.

    Raises:
        UserError: if `code_width` or `depth` is below 1, `branching` below 2, `commitment_weight` negative, `decay` or
            `revive_below` not from 0 to below 1, there are more than 2**31 - 1 leaves, or several layers with `cosine`:
            what is left after the first is no direction.
    """

    def __init__(
        self,
        *,
        code_width: int,
        depth: int = 1,
        branching: int,
        commitment_weight: float = 0.25,
        learning: CodebookLearning = "ema",
        decay: float = DECAY,
        revive_below: float = REVIVE_BELOW,
        cosine: bool = False,
    ) -> None:
        super().__init__()
        if min(depth, code_width) < 1 or branching < 2:
            given = f"{depth}, {code_width} and {branching}"
            raise UserError(f"depth and code_width must be at least 1 and branching at least 2, not {given}")
        if commitment_weight < 0:
            raise UserError(f"commitment_weight must not be negative, got {commitment_weight}; 0.25 is usual")
        for name, share in {"decay": decay, "revive_below": revive_below}.items():
            if not 0 <= share < 1:
                raise UserError(f"a codebook's {name} must be from 0 to below 1, not {share}")
        if depth * math.log2(branching) >= 31:  # before the power, which might never end
            leaves = f"{branching}**{depth} leaves are more than {LARGEST_CODEBOOK_SIZE}"
            raise UserError(f"{leaves}; take a smaller depth or branching")
        if cosine and depth > 1:
            raise UserError(f"codes that compare directions have one layer; give depth 1, not {depth}")
        self.depth, self.branching, self.commitment_weight = depth, branching, commitment_weight
        self.learning, self.decay, self.revive_below, self.cosine = learning, decay, revive_below, cosine
        for layer in range(depth):
            codebook = torch.zeros(branching**layer, branching, code_width).uniform_(-(0.5**layer), 0.5**layer)
            if learning == "gradient":
                self.register_parameter(f"codebook_{layer}", nn.Parameter(codebook))
            else:
                self.register_buffer(f"codebook_{layer}", codebook)
            if self._counting:
                self.register_buffer(f"counts_{layer}", torch.ones(branching**layer, branching))
        self._quantized: list[tuple[Tensor, Tensor]] = []  # vectors and their paths, of this step's slices

    @property
    def codebooks(self) -> list[Float[Tensor, "_nodes m d"]]:
        """Each layer's, (m**(i-1), m, d), as vectors are compared with them."""
        return [self._scaled(codebook) for codebook in self._stored]

    @property
    def _stored(self) -> list[Tensor]:
        """The same, as they learn."""
        return [getattr(self, f"codebook_{layer}") for layer in range(self.depth)]

    def _scaled(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1) if self.cosine else vectors

    def _vectors(self, z_e: Tensor) -> Tensor:
        """What is quantized, (b h w, d), in float32."""
        return self._scaled(rearrange(z_e, "b d h w -> (b h w) d").float())

    @property
    def _counting(self) -> bool:
        """Whether anything needs to be known of how often codewords are chosen."""
        return self.learning == "ema" or self.revive_below > 0

    def forward(self, z_e: Float[Tensor, "b d h w"]) -> QuantizerOutput:
        """Quantizes, with the losses that train codebooks and encoder; any grid will do."""
        b, _, h, w = z_e.shape
        vectors = self._vectors(z_e)
        paths = nearest_paths(vectors, self.codebooks)
        if self._counting and self.training and torch.is_grad_enabled():
            self._quantized.append((vectors.detach(), paths))
        codebook_loss = commitment_loss = torch.zeros((), device=z_e.device)
        combined, residual = torch.zeros_like(vectors), vectors
        for layer in range(self.depth):
            codeword = self._codewords(layer, paths)
            codebook_loss = codebook_loss + F.mse_loss(codeword, residual.detach())  # Eq. 6
            commitment_loss = commitment_loss + F.mse_loss(residual, codeword.detach())
            combined = combined + codeword  # Eq. 4
            residual = residual - codeword.detach()  # not in place: every layer's commitment must reach the encoder
        if self.depth > 1:
            codebook_loss = codebook_loss + F.mse_loss(combined, vectors.detach())  # Eq. 5
            commitment_loss = commitment_loss + F.mse_loss(vectors, combined.detach())
        losses = {"codebook": codebook_loss} if self.learning == "gradient" else {}
        z_q = vectors + (combined - vectors).detach()  # straight through
        return QuantizerOutput(
            z_q=rearrange(z_q, "(b h w) d -> b d h w", b=b, h=h, w=w),
            codes=rearrange(paths, "(b h w) -> b h w", b=b, h=h, w=w),
            losses={**losses, "commitment": self.commitment_weight * commitment_loss},
        )

    @torch.no_grad()
    def after_step(self, seeds: Int64[Tensor, " b"] | None = None, bad: Bool[Tensor, ""] | None = None) -> None:
        """Moves codewords as running means, and revives dead ones, by what was quantized in training since last time.

        Every process of a run must call it; all end with the same codebooks.

        Args:
            seeds: one for each image quantized, which decide what revived codewords draw; without, they draw the same
                each time.
            bad: whether the step is to leave no trace; buffers are then the caller's to put back.
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
        for layer, parts in enumerate(self._stored):
            codebook, children = full(parts), self._prefixes(layer, paths)
            # before it moves: the search's residual is of this
            codeword = F.embedding(children, self._scaled(codebook).flatten(0, 1))
            moved, counts = self._learned(layer, codebook, residual, children)
            if self.revive_below:
                errors = (residual - codeword).square().sum(1)
                noise = uniform(derive(seeds, layer))
                places, found, restart = revival(
                    counts, below=self.revive_below, vectors=residual, nodes=nodes, errors=errors, noise=noise
                )
                moved = put_at(places, found, moved.flatten(0, 1)).view_as(moved)
                counts = put_at(places, restart, counts.flatten()).view_as(counts)
            parts.copy_(split_like(moved if bad is None else torch.where(bad, codebook, moved), parts))
            getattr(self, f"counts_{layer}").copy_(counts)
            residual, nodes = residual - codeword, children

    def _learned(self, layer: int, codebook: Tensor, residual: Tensor, children: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's codebooks and counts, of all processes, after a step."""
        counts = getattr(self, f"counts_{layer}")
        chosen = total(torch.zeros_like(counts).view(-1).index_add(0, children, torch.ones_like(residual[:, 0])))
        chosen = chosen.view_as(counts)
        if self.learning == "gradient":
            return codebook, self.decay * counts + (1 - self.decay) * chosen
        sums = total(torch.zeros_like(codebook).flatten(0, 1).index_add(0, children, residual)).view_as(codebook)
        return running_means(codebook, counts, chosen=chosen, sums=sums, decay=self.decay)

    @torch.no_grad()
    def init_from_data(self, z_e: Float[Tensor, "b d h w"], *, seed: int = 0) -> None:
        """Sets every codebook to the k-means centres of what reaches it, so that no subtree dies unused."""
        started = linked_kmeans(self._vectors(z_e), self.codebooks, seed=seed)
        for codebook, centres in zip(self._stored, started, strict=True):
            codebook.copy_(centres)

    def encode(self, z_e: Float[Tensor, "b d h w"]) -> Int64[Tensor, "b h w"]:
        """Codes only, without losses or gradients."""
        b, _, h, w = z_e.shape
        paths = nearest_paths(self._vectors(z_e), self.codebooks)
        return rearrange(paths, "(b h w) -> b h w", b=b, h=h, w=w)

    def lookup(self, codes: Int64[Tensor, "b h w"], digits: int | None = None) -> Float[Tensor, "b d h w"]:
        """The combined representation of codes, e_C (Eq. 4), or what their first `digits` layers say of it.

        Raises:
            UserError: if the codes do not have that many digits.
        """
        digits = self.depth if digits is None else digits
        if not 1 <= digits <= self.depth:
            raise UserError(f"these codes have {self.depth} digits; cannot decode {digits} of them")
        combined = torch.stack([self._codewords(layer, codes) for layer in range(digits)]).sum(0)
        return rearrange(combined, "b h w d -> b d h w")

    def _prefixes(self, layer: int, paths: Tensor) -> Tensor:
        """Which of all the layer's codewords each path goes through."""
        return paths // self.branching ** (self.depth - 1 - layer)

    def _codewords(self, layer: int, paths: Tensor) -> Tensor:
        return F.embedding(self._prefixes(layer, paths), self.codebooks[layer].flatten(0, 1))
