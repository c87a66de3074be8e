"""Two processes train what one does. This file is also the program that each of the two runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import toys
from safetensors.torch import load_file

from smalti.checkpoint import WEIGHTS_NAME
from smalti.devices import accelerator
from smalti.fit import fit
from smalti.runs import METRICS_NAME, Run

NETWORKS = {"hrvq": toys.tokenizer, "hourglass": toys.prior}


def train_both(folder):
    process = accelerator("fp32")
    for name, make in NETWORKS.items():
        model, objective, rows, held_out = make()
        with process.main_process_first():
            run = Run(folder / name, {}, main=process.is_main_process)
        fit(process, toys.one_phase(objective), rows, toys.CONFIG, model=model, run=run, held_out=held_out)


def measured(folder):
    lines = [json.loads(line) for line in (folder / METRICS_NAME).read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "rows_per_second"} for line in lines]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", __file__, str(folder / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    train_both(folder / "one")
    return folder


@pytest.mark.parametrize("name", NETWORKS)
def test_two_processes_measure_what_one_does(folders, name):
    one, two = measured(folders / "one" / name), measured(folders / "two" / name)
    assert len(one) == len(two) == toys.CONFIG.steps + 3
    for ours, theirs in zip(one, two, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    first, last = one[0]["loss"], one[-2]["loss"]
    assert abs(first - last) > 1e-3  # it trains: equal losses would say nothing otherwise


@pytest.mark.parametrize("name", NETWORKS)
def test_two_processes_save_what_one_does(folders, name):
    one, two = (load_file(folders / count / name / WEIGHTS_NAME) for count in ("one", "two"))
    assert one.keys() == two.keys()
    for weight, tensor in one.items():
        assert (tensor - two[weight]).abs().max() < 1e-4, weight


if __name__ == "__main__":
    train_both(Path(sys.argv[1]))
