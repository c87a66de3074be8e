"""Uses only the quantizer of smalti, linked codebooks (HR-VQVAE), in a model and a training loop of your own.

$ python examples/quantizer_in_your_model.py
"""

import torch
import torch.nn.functional as F
from torch import nn

from smalti import LinkedQuantizer


def main(steps: int = 200) -> float:
    """Trains an autoencoder of synthetic images; returns the last reconstruction error."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(3, 32, 4, 4), nn.ReLU(), nn.Conv2d(32, 16, 1))
    decoder = nn.Sequential(nn.Conv2d(16, 32, 1), nn.ReLU(), nn.ConvTranspose2d(32, 3, 4, 4))
    quantizer = LinkedQuantizer(code_width=16, depth=3, branching=4)  # codes below 4 * 4 * 4
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters(), *quantizer.parameters()], 3e-3)

    quantizer.init_from_data(encoder(blobs(64)).detach())  # k-means in every node of the tree
    error = torch.tensor(0.0)
    for _ in range(steps):
        images = blobs(32)
        quantized = quantizer(encoder(images))  # .z_q (straight-through), .codes, .losses
        error = F.mse_loss(decoder(quantized.z_q), images)
        optimizer.zero_grad()
        (error + sum(quantized.losses.values())).backward()
        optimizer.step()
        quantizer.after_step()  # codewords follow the encoder; dead ones are revived

    codes = quantizer.encode(encoder(images))  # (b, h, w) integers
    coarse = decoder(quantizer.lookup(codes, digits=1))  # decoded from the first digit of each code alone
    print(f"error {error.item():.4f}, from the first digit {F.mse_loss(coarse, images).item():.4f}")
    print(f"{codes.unique().numel()} of 64 codes in use")
    return error.item()


def blobs(count: int) -> torch.Tensor:
    """Returns images of one soft, coloured spot each, `(count, 3, 16, 16)` in [-1, 1]."""
    grid = torch.linspace(-1, 1, 16)
    y, x = torch.rand(2, count, 1, 1) * 2 - 1
    spots = torch.exp(-4 * ((grid[:, None] - y) ** 2 + (grid - x) ** 2))
    return spots[:, None] * torch.rand(count, 3, 1, 1) * 2 - 1


if __name__ == "__main__":
    main()
