"""The plain variational autoencoder (VAE) that selfVAE is compared with: a hierarchy without transformations."""

from typing import ClassVar

from smalti.core.models import register
from smalti.tokenizers.selfvae.hierarchical_vae import Hierarchy, VAEConfig
from smalti.tokenizers.selfvae.transformations import Form


@register
class VAE(Hierarchy[VAEConfig]):
    """VAE with a RealNVP prior (selfVAE, Eqs. 1-5), built from selfVAE's blocks and likelihood.

    Raises:
        UserError: as `Hierarchy` does.
    """

    kind: ClassVar[str] = "vae"
    config_class: ClassVar[type] = VAEConfig

    def __init__(self, config: VAEConfig) -> None:
        super().__init__(config, [Form(config.image_channels)])
