"""Tests that training and sampling with `--compile` give the same results as without. This file is also the program.

The program runs in its own process, without the tests' shape checks, which would break the compiler's graphs.
"""

import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import toys

from smalti.core import models
from smalti.core.randomness import row_seeds
from smalti.priors.methods.masked import MaskedSampling, sample_masked
from smalti.priors.methods.sundae import SundaeSampling, sample_sundae
from smalti.training import loop
from smalti.training.config import FitConfig, Phase
from smalti.training.signals import Interrupted

COMPILED = replace(toys.CONFIG, compile=True)
STOPPED_AT = 5  # batches


def program(folder):
    import torch._dynamo.utils

    def train(name, config, wrap=lambda rows: rows):
        toys.train(folder / name, toys.plain_toy, config, wrap=wrap)

    def graphs():
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    train("eager", toys.CONFIG)
    assert not graphs()
    with suppress(Interrupted):
        train("compiled", COMPILED, lambda rows: toys.Signalling(rows, STOPPED_AT))
    assert graphs()
    shutil.copytree(folder / "compiled", folder / "resumed eagerly")
    train("compiled", COMPILED)
    assert graphs() == 1, "the training step is compiled, and the held-out losses are not"
    train("resumed eagerly", toys.CONFIG)


def draws(folder):
    """Writes for each sampler whether its compiled draws are equal, and the number of graphs and graph breaks.

    Half a minute of building machine code is spent on one of them.
    """
    from torch._dynamo.utils import counters

    results, rows, compiler = {}, torch.arange(3), torch.compile
    for kind, sampler, sampling, backend in (
        ("hourglass", sample_sundae, SundaeSampling(steps=6, min_steps=2, top_p=0.9), "inductor"),
        ("maskgit", sample_masked, MaskedSampling(steps=4, temperature=(1.0, 0.5)), "eager"),  # the graph alone
    ):
        torch.manual_seed(0)
        torch.compile = partial(compiler, backend=backend)
        prior = models.class_of_kind("prior", kind)(replace(toys.TINY[kind], depth=(1,), shorten=())).eval()
        known = torch.arange(6).view(1, *prior.level.shape).repeat(3, 1, 1)
        condition = torch.tensor([torch.nan, 0.0, 1.0]).view(3, 1).repeat(1, 3) if prior.condition_width else rows - 1
        inputs = {"known": known, "known_mask": known == 1, "seeds": row_seeds(0, rows), "condition": condition}
        eager, compiled = (
            sampler(prior, **inputs, sampling=replace(sampling, compile=compiled)) for compiled in (False, True)
        )
        results[kind] = [torch.equal(eager, compiled), counters["stats"]["unique_graphs"], len(counters["graph_break"])]
        torch._dynamo.reset()
        counters.clear()
    (folder / "draws.json").write_text(json.dumps(results))


def run(folder, what):
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("no C++ compiler")
    finished = subprocess.run(
        [sys.executable, __file__, what, str(folder)], capture_output=True, text=True, check=False, timeout=600
    )
    assert finished.returncode == 0, finished.stderr
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return run(tmp_path_factory.mktemp("compile"), "program")


def test_compiled_sampling_is_equal_and_has_one_graph(tmp_path):
    """One graph serves all temperatures, without graph breaks."""
    results = json.loads((run(tmp_path, "draws") / "draws.json").read_text())
    assert results == {"hourglass": [True, 1, 0], "maskgit": [True, 1, 0]}


@pytest.mark.parametrize("name", ["compiled", "resumed eagerly"])
def test_compiled_run_trains_what_an_eager_one_does(folder, name):
    """The compiled run was stopped, and resumed with and without compiling."""
    lines, others = toys.measured(folder / name), toys.measured(folder / "eager")
    assert len(lines) == len(others) > toys.CONFIG.steps
    for line, other in zip(lines, others, strict=True):
        assert line == pytest.approx(other, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("asked", "changes", "device", "processes", "graph"),
    [
        (True, {}, "cuda", 1, True),
        (False, {}, "cuda", 1, False),
        (True, {"compile": False}, "cuda", 1, False),
        (True, {"accumulation": 2}, "cuda", 1, False),
        (True, {}, "cuda", 2, False),
        (True, {}, "cpu", 1, False),
    ],
)
def test_compiled_objectives_are_cuda_graphs_of_one_process_without_accumulation(
    asked, changes, device, processes, graph
):
    objective = torch.nn.Linear(1, 1)
    phase = Phase("x", objective, torch.optim.SGD(objective.parameters()), cuda_graph=asked)
    config = FitConfig(**{"compile": True, **changes})
    assert loop._is_graph(phase, config, torch.device(device), processes) == graph


if __name__ == "__main__":
    {"program": program, "draws": draws}[sys.argv[1]](Path(sys.argv[2]))
