"""The held-out split, by source id. Latent sets store its result, so that they agree with image sets."""

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.randomness import Stream, derive, uniform

HELD_OUT_PERCENT = 10


def held_out(source_ids: Int64[Tensor, " n"], percent: int | float = HELD_OUT_PERCENT) -> Bool[Tensor, " n"]:
    """Marks the held-out rows, which training never uses, by a hash of the source id alone.

    All rows of one source are therefore in the same split, in any order and number and on any
    machine, and a larger percentage only adds sources.

    Args:
        source_ids: one for each row; rows made from one image share one.
        percent: the expected share of held-out sources, from 0 (none) to 100 (all).

    Raises:
        UserError: if `percent` is outside [0, 100].
    """
    if not 0 <= percent <= 100:
        raise UserError(f"{percent} % cannot be held out; give a percentage from 0 to 100")
    return uniform(derive(source_ids, Stream.HELD_OUT_SPLIT)) * 100 < percent


def also_held_out(
    ids: Int64[Tensor, " n"],
    contents: Int64[Tensor, " n"],
    other_ids: Int64[Tensor, " m"],
    other_contents: Int64[Tensor, " m"],
    *,
    comparable: bool,
) -> Bool[Tensor, " n"]:
    """Marks the images that cannot be trained on if all `m` images of another source are held out.

    They are the images with a content of the other source and, if its ids are comparable, those with one of its ids. So
    are all images that have the id or the content of a marked one, so that no source and no content is in both splits.

    Args:
        ids: the source id of each image.
        contents: a hash of each image's content.
        other_ids: those of the other source.
        other_contents: those of the other source.
        comparable: whether an id means the same in both.
    """
    marked = torch.isin(contents, other_contents)
    if comparable:
        marked |= torch.isin(ids, other_ids)
    while True:
        grown = marked | torch.isin(ids, ids[marked]) | torch.isin(contents, contents[marked])
        if grown.equal(marked):
            return marked
        marked = grown
