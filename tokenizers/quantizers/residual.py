"""Residual vector quantization: each stage quantizes what the stages before left over. One digit a stage.

Each codebook is a `LinkedQuantizer` of one layer, whose EMA updates, revival and k-means start it uses. In linked
codebooks (`linked.py`) the digits before choose the codebook of a stage; here all paths share one.

Legend: b batch, d code width, h w grid, m codewords a codebook, s stages.
"""

from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from smalti.core.codes import Digits, Level, chosen_digits
from smalti.core.errors import UserError
from smalti.core.randomness import derive
from smalti.tokenizers.quantizers.gradients import Gradient, with_gradient
from smalti.tokenizers.quantizers.linked import (
    DECAY,
    REVIVE_BELOW,
    CodebookLearning,
    LinkedQuantizer,
    QuantizerOutput,
)
from smalti.tokenizers.quantizers.tree import Branching, LayerWeights, RandomStart, radices_of, weights_of


class ResidualQuantizer(nn.Module):
    """Residual vector quantization (RVQ: SoundStream, arXiv 2107.03312, Alg. 1; RQ-VAE, arXiv 2203.01941, Sec. 3.1).

    Stage i takes the codeword nearest to the residual that the stages before left; z_q is the sum of all. The first
    stage is the most significant digit. Codebooks learn as in `LinkedQuantizer`, which has the arguments' meanings, and
    a shared codebook learns from the residuals of all stages. Search and losses are float32 under autocast.

    The commitment loss compares z_e with the sum after each stage (RQ-VAE), which is the residual with its codeword.
    Deviation: losses are means over positions and channels, summed over stages.

    Args:
        code_width: length of a codeword.
        stages: number of codewords that are added, which is the number of digits of a code.
        codebook_size: codewords of a codebook, which is the number of values of a digit: one number, or one a stage.
        shared: whether all stages search one codebook, as in RQ-VAE; otherwise each has its own, as in SoundStream.
        commitment_weight: weight of the commitment loss, beta: one for all stages, or one for each.
        learning: how codewords learn: by EMA or by gradients.
        decay: decay per step of the moving averages and counts.
        revive_below: a codeword chosen less often than this share of its codebook's mean is dead, and revived.
        start: range of the random numbers that codewords start as; see `start_bound`.
        gradient: how the gradient of z_q reaches z_e; see `with_gradient`.

    Raises:
        UserError: if `stages` is below 1, there are more than 2**31 - 1 codes, or a shared codebook is to have several
            sizes; or as `LinkedQuantizer` does.
    """

    def __init__(
        self,
        *,
        code_width: int,
        stages: int,
        codebook_size: Branching,
        shared: bool = False,
        commitment_weight: LayerWeights = 0.25,
        learning: CodebookLearning = "ema",
        decay: float = DECAY,
        revive_below: float = REVIVE_BELOW,
        start: RandomStart = "uniform",
        gradient: Gradient = "straight-through",
    ) -> None:
        super().__init__()
        if stages < 1:
            raise UserError(f"residual quantization needs at least 1 stage, not {stages}")
        radices = radices_of(codebook_size, stages)
        if len(radices) != stages:
            raise UserError(f"{stages} stages need as many codebook sizes, or one for all, not {len(radices)}")
        if shared and len(set(radices)) > 1:
            raise UserError(f"a shared codebook has one size for all stages, not {' '.join(map(str, radices))}")
        self.level, self.shared, self.learning = Level(1, 1, radices), shared, learning
        self.commitment_weights = weights_of(commitment_weight, len(radices))
        self.gradient: Gradient = gradient
        self.books = nn.ModuleList(
            LinkedQuantizer(
                code_width=code_width,
                branching=size,
                start=start,
                learning=learning,
                decay=decay,
                revive_below=revive_below,
            )
            for size in radices[: 1 if shared else None]
        )
        if start == "uniform":
            with torch.no_grad():
                for stage, book in enumerate(self._books):
                    book.codebooks[0].mul_(0.5**stage)  # residuals become smaller; as in linked codebooks

    @property
    def radices(self) -> tuple[int, ...]:
        """Radices of a code: the codebook size of each stage."""
        return self.level.radices

    @property
    def _books(self) -> list[LinkedQuantizer]:
        return [cast(LinkedQuantizer, book) for book in self.books]

    @property
    def _book_of_stage(self) -> list[LinkedQuantizer]:
        return self._books * (len(self.radices) // len(self.books))

    def _stages(self, vectors: Float[Tensor, "n d"]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yields the residual that reaches each stage, the digit and the codeword; gradients reach both."""
        residual = vectors
        for book in self._book_of_stage:
            digits = book.encode(rearrange(residual.detach(), "n d -> 1 d 1 n")).flatten()
            codeword = F.embedding(digits, book.codebooks[0][0])
            yield residual, digits, codeword
            residual = residual - codeword.detach()

    def forward(self, z_e: Float[Tensor, "b d h w"]) -> QuantizerOutput:
        """Quantizes a grid of any size and computes the losses `commitment` and, without EMA, `codebook`."""
        b, _, h, w = z_e.shape
        vectors = rearrange(z_e, "b d h w -> (b h w) d").float()
        residuals, digits, chosen = (torch.stack(each) for each in zip(*self._stages(vectors), strict=True))  # s n d
        self._observe(residuals, digits)
        stages = len(self.radices)
        losses = {"codebook": stages * F.mse_loss(chosen, residuals.detach())} if self.learning == "gradient" else {}
        betas = residuals.new_tensor(self.commitment_weights)
        losses["commitment"] = (betas * (residuals - chosen.detach()).square().mean((1, 2))).sum()
        z_q = with_gradient(vectors, chosen.sum(0), self.gradient)
        return QuantizerOutput(
            z_q=rearrange(z_q, "(b h w) d -> b d h w", b=b, h=h, w=w),
            codes=self.level.join(rearrange(digits, "s (b h w) -> b h w s", b=b, h=h, w=w)),
            losses=losses,
        )

    def _observe(self, residuals: Tensor, digits: Tensor) -> None:
        if self.shared:  # all stages of an image together, so that its vectors stay with its seed
            self._books[0].observe(rearrange(residuals, "s n d -> (n s) d"), rearrange(digits, "s n -> (n s)"))
        else:
            for book, residual, digit in zip(self._books, residuals, digits, strict=True):
                book.observe(residual, digit)

    @torch.no_grad()
    def after_step(self, seeds: Int64[Tensor, " b"] | None = None, bad: Bool[Tensor, ""] | None = None) -> None:
        """Runs EMA update and revival of every codebook, with random numbers of its own; see `LinkedQuantizer`."""
        for stage, book in enumerate(self._books):
            book.after_step(None if seeds is None else derive(seeds, stage), bad)

    @torch.no_grad()
    def init_from_data(self, z_e: Float[Tensor, "b d h w"], *, seed: int = 0, first: int = 0) -> None:
        """Sets codebooks, but for those before `first`, to k-means centres of the residuals that reach them.

        A shared codebook takes the centres of the vectors first, and then those of all residuals that these leave.
        """
        residual = rearrange(z_e, "b d h w -> 1 d 1 (b h w)").float()
        for stage, book in enumerate(self._books):
            if stage >= first:
                book.init_from_data(residual, seed=seed + stage)
            residual = residual - book.lookup(book.encode(residual))
        if self.shared and not first:
            vectors = rearrange(z_e, "b d h w -> (b h w) d").float()
            residuals = torch.stack([residual for residual, _, _ in self._stages(vectors)])
            self._books[0].init_from_data(rearrange(residuals, "s n d -> 1 d 1 (s n)"), seed=seed)

    def encode(self, z_e: Float[Tensor, "b d h w"]) -> Int64[Tensor, "b h w"]:
        """Returns the codes alone, without losses or gradients."""
        b, _, h, w = z_e.shape
        vectors = rearrange(z_e, "b d h w -> (b h w) d").detach().float()
        digits = torch.stack([digits for _, digits, _ in self._stages(vectors)])
        return self.level.join(rearrange(digits, "s (b h w) -> b h w s", b=b, h=h, w=w))

    def lookup(self, codes: Int64[Tensor, "b h w"], digits: Digits | None = None) -> Float[Tensor, "b d h w"]:
        """Returns the sum of the codewords of each code, or only of the stages of some digits.

        Raises:
            UserError: if there are no such codes, or they do not have these digits.
        """
        self.level.require(codes, "residual quantization")
        each, books = self.level.split(codes), self._book_of_stage
        chosen = chosen_digits(digits, len(self.radices))
        return torch.stack([books[stage].lookup(each[..., stage]) for stage in chosen]).sum(0)
