"""Tests that two processes train what one does, for every quantizer. This file is also the program of the processes.

Not for `lfq` and `dot`, whose entropy is that of a process's micro-batch.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import toys
from safetensors.torch import load_file

from smalti.core.models import WEIGHTS_NAME
from smalti.training.accelerator import accelerator
from smalti.training.run_folder import Run

VQ, HR = toys.TINY["vqvae"], toys.TINY["hrvq"]
CASES = {
    "flat": replace(VQ, gradient="rotation"),
    "cosine": replace(VQ, quantizer="cosine"),
    "simvq": replace(VQ, quantizer="simvq", gradient="rotation"),
    "gumbel": replace(VQ, quantizer="gumbel", kl_weight=0.1),
    "fsq": replace(VQ, quantizer="fsq", levels=(3, 4)),
    "residual": replace(HR, quantizer="residual"),
    "shared": replace(HR, quantizer="residual", shared_codebooks=True),
}


def program(folder, process):
    """Trains every case."""
    for name, config in CASES.items():
        kind = "hrvq" if config in (CASES["residual"], CASES["shared"]) else "vqvae"
        with process.main_process_first():
            run = Run(folder / name, {}, main=process.is_main_process)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(toys.TINY, kind, config)
            toys.train(folder / name, lambda kind=kind: toys.make("tokenizer", kind), process=process, run=run)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantizers")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = {"env": environment, "capture_output": True, "text": True, "check": False, "timeout": 300}
    finished = subprocess.run([*command, str(folder / "two")], **arguments)
    assert finished.returncode == 0, finished.stderr
    program(folder / "one", accelerator("fp32"))
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_what_one_does(folder, name):
    losses, others = (toys.losses(toys.measured(folder / count / name)) for count in ("one", "two"))
    assert others == pytest.approx(losses, rel=1e-5)
    assert max(losses) - min(losses) > 1e-3  # it trains, so that equal losses mean something
    weights, others = (load_file(folder / count / name / WEIGHTS_NAME) for count in ("one", "two"))
    assert weights.keys() == others.keys()
    assert max((tensor - others[key]).abs().max().item() for key, tensor in weights.items()) < 1e-4


if __name__ == "__main__":
    program(Path(sys.argv[1]), accelerator("fp32"))
