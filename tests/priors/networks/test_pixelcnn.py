"""The PixelCNN has no blind spots; what it shares with other causal priors is in `test_causal.py`."""

import pytest
import torch
from helpers.causal import OPTIONS, prior_of, random_conditioning, receptive_field

from smalti.core.errors import UserError

PIXELCNNS = {name: options for name, options in OPTIONS.items() if "kind" not in options}


@pytest.mark.parametrize("options", PIXELCNNS.values(), ids=PIXELCNNS)
def test_there_is_no_blind_spot(options):
    """The receptive field has all rows above, on both sides, and the row on the left, as far as the layers reach."""
    prior = prior_of(height=8, width=8, **options)
    side, layers = prior.config.kernel // 2, prior.config.layers
    seen = receptive_field(prior, 6 * 8 + 3, **random_conditioning(prior, 1, 8, 8))
    rows, columns = torch.arange(8)[:, None], torch.arange(8)
    before = (rows < 6) | ((rows == 6) & (columns < 3))
    # the codes are shifted by one before the first layer
    near = ((rows == 6) & (columns >= 2 - side * layers)) | (
        (rows < 6) & (rows >= 5 - side * layers) & ((columns - 3).abs() <= 2 * side * layers)
    )
    near[5, 7] |= 3 - side * layers <= 0  # the code before the row's first
    unlimited = prior.config.attention_every > 0
    assert torch.equal(seen, before if unlimited else before & near)


@pytest.mark.parametrize("options", [OPTIONS["attention"], OPTIONS["everything"]], ids=["attention", "everything"])
@torch.no_grad()
def test_attention_reads_larger_canvases_through_windows(options):
    """The canvas's last position does not depend on its first, which no window of it covers."""
    prior = prior_of(height=4, width=4, **options)
    conditioning = random_conditioning(prior, 1, 12, 12)
    codes = torch.zeros(1, 12, 12, dtype=torch.int64)
    changed = codes.index_put((torch.tensor(0), torch.tensor(0), torch.tensor(0)), torch.tensor(5))
    features, others = (prior.features(each, **conditioning).view(12, 12, -1) for each in (codes, changed))
    assert features[11, 11].equal(others[11, 11])
    assert not features[0, 1].equal(others[0, 1])
    steps, received = prior.decode_stepwise(1, 12, 12, **conditioning), []
    for position in range(12 * 12):
        received.append(steps.send(changed.flatten(1)[:, position - 1 : position]) if position else next(steps))
    torch.testing.assert_close(torch.cat(received, 1)[0].view(12, 12, -1), others, atol=1e-4, rtol=1e-4)


def test_receptive_field_of_a_single_layer():
    """With one layer of kernel 3 it is these eight codes; so the test above can fail."""
    seen = receptive_field(prior_of(height=5, width=7, layers=1), 3 * 7 + 3)
    assert seen.nonzero().tolist() == [[1, 2], [1, 3], [1, 4], [2, 2], [2, 3], [2, 4], [3, 1], [3, 2]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel": 4}, "kernel must be odd and at least 3, got 4"),
        ({"kernel": 1}, "kernel must be odd"),
        ({"layers": 0}, "layers must be at least 1"),
        ({"model_width": 0}, "model[-_]width must be at least 1, not 0"),
        ({"classes": -1}, "classes and condition_width must not be negative"),
        ({"attention_every": 5}, r"from 0 to layers \(4\), got 5"),
        ({"attention_every": 1, "heads": 3}, "multiple of 4 x heads"),
        ({"upper_radices": ((2,),)}, "each coarser level needs radices and a factor"),
        ({"upper_radices": ((2,),), "upper_factors": (0,)}, "factor of at least 1"),
    ],
)
def test_configs_that_make_no_network_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        prior_of(**changes)
