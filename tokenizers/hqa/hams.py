"""HAMs: HQA's stack with nearest codewords and layers that predict codes. Only settings differ, so little is here."""

from dataclasses import dataclass
from typing import ClassVar

from smalti.core.models import register
from smalti.tokenizers.hqa.hqa import HQA
from smalti.tokenizers.hqa.layer import HQAConfig, Posterior, Target


@dataclass(frozen=True)
class HAMsConfig(HQAConfig):
    """Settings of HAMs: those of HQA, with the defaults of what HQA is compared with."""

    posterior: Posterior = "nearest"
    target: Target = "codes"
    probabilistic: bool = False
    reset_below: float = 0.0


@register
class HAMs(HQA):
    """Hierarchical autoregressive image models' hierarchy of codes (arXiv 1903.04933), as HQA's paper compares with it.

    Each layer is a VQ-VAE, and those above the first predict the codes of the layer below; its autoregressive decoders
    are left out there, and here. Their encoders see the features of the layer below, as HQA's do.

    Raises:
        UserError: as `HQA` does.
    """

    kind: ClassVar[str] = "hams"
    config_class: ClassVar[type] = HAMsConfig
