"""Which source images are held out: the rule of image sets, whose outcome latent sets store, so that both agree."""

from jaxtyping import Bool, Int64
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.randomness import Stream, derive, uniform

HELD_OUT_PERCENT = 10


def held_out(source_ids: Int64[Tensor, " n"], percent: int = HELD_OUT_PERCENT) -> Bool[Tensor, " n"]:
    """Marks the rows that training never sees, by a hash of the source id alone.

    So all rows of one source fall on the same side whatever their order, number or machine, and a larger percentage
    only adds sources.

    Args:
        source_ids: one for each row; rows made from one image share it.
        percent: the expected share of the sources held out, from 0 (none) to 100 (all).

    Raises:
        UserError: if `percent` is outside [0, 100].
    """
    if not 0 <= percent <= 100:
        raise UserError(f"{percent} % cannot be held out; give a percentage from 0 to 100")
    return uniform(derive(source_ids, Stream.HELD_OUT_SPLIT)) * 100 < percent
