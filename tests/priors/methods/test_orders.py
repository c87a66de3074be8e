"""Orders in which codes are drawn: their functions do not need the compiler until a network is compiled."""

import subprocess
import sys

import torch

from smalti.priors.methods.orders import halton_ranks


def test_choosing_a_prior_does_not_import_the_compiler():
    program = "import smalti.priors.networks.hourglass, sys; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_ranks_are_constant_to_the_compiler():
    marked = torch.compiler.assume_constant_result(lambda: None)
    assert vars(halton_ranks).items() >= vars(marked).items()
