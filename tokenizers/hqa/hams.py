"""HAMs: HQA's stack with nearest-codeword quantizers and layers that predict codes. Only the settings differ."""

from dataclasses import dataclass
from typing import ClassVar

from smalti.core.models import register
from smalti.tokenizers.hqa.hqa import HQA
from smalti.tokenizers.hqa.layer import HQAConfig, Posterior, Target


@dataclass(frozen=True)
class HAMsConfig(HQAConfig):
    """Settings of HAMs: those of HQA with other defaults."""

    posterior: Posterior = "nearest"
    target: Target = "codes"
    probabilistic: bool = False
    reset_below: float = 0.0


@register
class HAMs(HQA):
    """Hierarchical autoregressive image models (HAMs, arXiv 1903.04933), in the form that HQA is compared with.

    Each layer is a VQ-VAE. Layers above the first encode the features of the layer below, as in HQA, but their decoders
    predict its codes. Deviation, as in HQA's paper: no autoregressive decoders.

    Raises:
        UserError: as `HQA` does.
    """

    kind: ClassVar[str] = "hams"
    config_class: ClassVar[type] = HAMsConfig
