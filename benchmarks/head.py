"""Benchmarks of the factorized head: against one softmax over all leaves, and its products with deep nodes."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from smalti.benchmarks.comparison import Comparison, Measured, Variant, in_mebibytes
from smalti.benchmarks.priors import DEMONSTRATION_PIXELCNN, random_codes
from smalti.core.devices import autocast, best_device
from smalti.priors.head import FactorizedHead, node_products
from smalti.priors.methods.autoregressive import Likelihood, LikelihoodConfig
from smalti.priors.networks.pixelcnn import PixelCNN, PixelCNNConfig
from smalti.training.config import FitConfig


def head(
    *,
    positions: int = 1024,
    width: int = 192,
    radices: tuple[int, ...] = (32, 32, 32),
    batch: int = 2,
    side: int = 32,
    config: PixelCNNConfig = DEMONSTRATION_PIXELCNN,
) -> Iterator[Comparison]:
    """Compares the factorized head with one softmax over all leaves.

    Measured are loss and gradients, the memory of the saved activations, and a training step of a PixelCNN with
    either head; then, for the hourglass of the demonstration, the products with the weights of deep nodes.
    """
    device = best_device()
    ours, flat = (FactorizedHead(tree, width).to(device) for tree in (radices, (math.prod(radices),)))
    codes = torch.randint(ours.codebook_size, (1, positions), device=device)
    features = torch.randn(1, positions, width, device=device, requires_grad=True)

    def loss(head: FactorizedHead) -> Tensor:
        with autocast(device, "auto"):
            return head.nll(features, codes).mean()

    def work(head: FactorizedHead) -> None:
        head.zero_grad()
        loss(head).backward()

    def saved(head: FactorizedHead) -> Measured:
        storages: dict[int, int] = {}
        known = {parameter.untyped_storage().data_ptr() for parameter in head.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss(head)
        return Measured(sum(storages.values()))

    title = f"head of {'·'.join(map(str, radices))} leaves, {positions} positions of width {width}"
    heads = {"smalti, digit by digit": ours, "one softmax over all": flat}
    yield Comparison(f"{title}, loss and gradients", [Variant(name, partial(work, one)) for name, one in heads.items()])
    yield Comparison(
        f"{title}, kept for the gradients",
        [Variant(name, partial(saved, one)) for name, one in heads.items()],
        readable=in_mebibytes,
        varies=False,
    )
    yield head_of_pixelcnn(batch, replace(config, height=side, width=side, radices=radices))
    yield products(2 * positions, width)


def head_of_pixelcnn(batch: int, config: PixelCNNConfig) -> Comparison:
    """Compares training steps of a PixelCNN, optimizer included, with the factorized head and with one softmax."""
    device = best_device()
    flat = replace(config, radices=(math.prod(config.radices),))

    def stepping(shape: PixelCNNConfig) -> Callable[[], float]:
        network = PixelCNN(shape).to(device)
        objective, codes = Likelihood(network, LikelihoodConfig()), random_codes(network, batch)
        optimizer = FitConfig(optimizer="muon").optimizer_of(objective)

        def step() -> float:
            with autocast(device, "auto"):
                loss, _ = objective({"codes": codes})
            objective.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.item()

        return step

    return Comparison(
        f"training step of a PixelCNN, {batch} grids of {config.height}×{config.width}, "
        f"{'·'.join(map(str, config.radices))} leaves",
        [Variant("smalti, digit by digit", stepping(config)), Variant("one softmax over all", stepping(flat))],
    )


def products(positions: int, width: int, *, nodes: int = 256, radix: int = 16) -> Comparison:
    """Compares the products of positions with their nodes' weights with the two plain ways, gradients included."""
    device = best_device()
    features, weights = torch.randn(positions, width), torch.randn(nodes, radix, width)
    features, weights = (each.to(device).requires_grad_() for each in (features, weights))
    node_of = torch.randint(nodes, (positions,), device=device)

    def gathered(features: Tensor, weights: Tensor, node_of: Tensor) -> Tensor:
        return (weights[node_of] @ features[..., None])[..., 0]

    def all_nodes(features: Tensor, weights: Tensor, node_of: Tensor) -> Tensor:
        logits = (features @ weights.flatten(0, 1).T).view(len(features), nodes, radix)
        return logits[torch.arange(len(features), device=device), node_of]

    def work(product: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        features.grad = weights.grad = None
        result = product(features, weights, node_of)
        result.sum().backward()
        return result

    ways = {"smalti": node_products, "a matrix gathered for every position": gathered, "all nodes": all_nodes}
    return Comparison(
        f"products with the weights of {nodes} nodes, {positions} positions of width {width}, with gradients",
        [Variant(name, partial(work, product)) for name, product in ways.items()],
    )
