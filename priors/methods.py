"""The ways in which priors are trained and drawn from, each by what belongs to it. A kind of prior names its own."""

from smalti.priors.ancestral import AncestralFilling, AncestralSampling, sample_ancestral
from smalti.priors.likelihood import Likelihood, LikelihoodConfig
from smalti.priors.masked import MaskedCodes, MaskedConfig, MaskedFilling, MaskedSampling, sample_masked
from smalti.priors.prior import Method
from smalti.priors.samplers import SundaeFilling, SundaeSampling, sample_sundae
from smalti.priors.sundae import Sundae, SundaeConfig

REPAIRS = Method(
    objective=Sundae,
    objective_config=SundaeConfig,
    sampler=sample_sundae,
    sampling=SundaeSampling,
    filling=SundaeFilling,
)
"""Learns to repair corrupted codes, and draws by a chain of repairs: for bodies that see the whole grid."""

ONE_BY_ONE = Method(
    objective=Likelihood,
    objective_config=LikelihoodConfig,
    sampler=sample_ancestral,
    sampling=AncestralSampling,
    filling=AncestralFilling,
)
"""Learns each code from those before it, and draws them in that order: for causal bodies."""

ROUNDS = Method(
    objective=MaskedCodes,
    objective_config=MaskedConfig,
    sampler=sample_masked,
    sampling=MaskedSampling,
    filling=MaskedFilling,
)
"""Learns to name hidden codes, and shows more of them round by round: for bodies that see the whole grid."""
