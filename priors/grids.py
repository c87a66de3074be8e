"""Fields of a prior's config that describe its grid, as functions of a latent set's levels."""

from collections.abc import Sequence
from typing import Any

from smalti.core.codes import Level
from smalti.core.errors import UserError


def grids(levels: Sequence[Level], number: int) -> dict[str, Any]:
    """Returns the fields of a prior's config that describe its level and the coarser levels.

    Raises:
        UserError: if there is no such level, if it or a coarser one has no codes, or if a grid is
            not a whole multiple of a coarser one.
    """
    if not 0 <= number < len(levels):
        raise UserError(f"the latent set has levels 0 to {len(levels) - 1}; --level {number} is not one of them")
    *upper, level = levels[: number + 1]
    if not all(one.radices for one in (*upper, level)):
        raise UserError(
            f"level {number} or a coarser one holds real-valued latents, not codes; only --prior realnvp learns these"
        )
    for one in upper:
        if (level.height % one.height, level.width % one.width) != (0, 0) or (
            level.height * one.width != level.width * one.height
        ):
            sizes = f"{one.height}x{one.width} and {level.height}x{level.width}"
            raise UserError(
                f"the grids of the levels, {sizes}, are not one a whole multiple of the other; give a lower --level, "
                "or the codes of another tokenizer"
            )
    return {
        "height": level.height,
        "width": level.width,
        "radices": level.radices,
        "upper_radices": tuple(one.radices for one in upper),
        "upper_factors": tuple(level.height // one.height for one in upper),
    }


def continuous_grid(levels: Sequence[Level], number: int) -> dict[str, Any]:
    """Returns the fields of a prior's config that describe its real-valued latents.

    Raises:
        UserError: if the level holds codes, or is not the only one.
    """
    if len(levels) > 1 or number or not levels[0].channels:
        raise UserError(
            "--prior realnvp learns latent sets with one level of real-valued latents, such as selfvae's; this one "
            "holds codes, which --prior hourglass, maskgit, pixelcnn and transformer learn"
        )
    return {"height": levels[0].height, "width": levels[0].width, "channels": levels[0].channels}
