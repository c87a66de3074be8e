"""Weight-normalized convolutions: their data-dependent initialization."""

import torch
from torch import nn

from smalti.tokenizers.layers.dense import DenseBlock, WeightNormConv, init_weight_norm_from_data


def test_data_dependent_initialization_standardizes_every_convolution():
    torch.manual_seed(0)
    net = nn.Sequential(
        WeightNormConv(3, 8, resize=-1), DenseBlock(8, growth=4, layers=2), WeightNormConv(8, 5, resize=1)
    )
    statistics = []

    def record(conv, _inputs, output):
        statistics.append((conv.gain, *torch.std_mean(output, (0, 2, 3))))

    inputs = torch.rand(32, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 6 - 2
    init_weight_norm_from_data(net, lambda: net(inputs))
    for module in net.modules():
        if isinstance(module, WeightNormConv):
            module.register_forward_hook(record)
    net(inputs)
    assert len(statistics) == 5
    for gain, deviation, mean in statistics:
        torch.testing.assert_close(deviation, torch.full_like(deviation, gain), rtol=1e-3, atol=0)
        assert mean.abs().max() < 1e-4
