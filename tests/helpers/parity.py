"""Compares an imported tokenizer with the network that its weights are from."""

import torch
import torch.nn.functional as F


def random_weights(model):
    """Makes every weight random, since weights of zero or one would hide mistakes."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.normal_(std=(parameter.numel() / len(parameter)) ** -0.5)
            else:  # norm weights around one, and small codewords of which none is nearest to all vectors
                parameter.normal_(mean=float("norm" in name and "weight" in name), std=0.3)
    return model.eval()


def images_of(h, w):
    coarse = torch.rand(4, 3, h // 8, w // 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return F.interpolate(coarse, (h, w))  # coarse noise: codes of pixel noise would hardly differ


@torch.no_grad()
def agree(ours, theirs, size=None):
    """Asserts equal codes and equal images before clamping, at the network's own size and at a rectangle."""
    size, factor = size or ours.config.height, ours.downsampling
    for images in (images_of(size, size), images_of(size, size + 8 * factor)):
        codes, expected = theirs(images)
        assert codes.unique().numel() > 5
        assert torch.equal(ours.encode(images)[0], codes)
        decoded = ours.decoder(ours.quantizer.lookup(codes))
        torch.testing.assert_close(decoded, expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(ours(images).reconstruction, expected, atol=1e-4, rtol=0)
