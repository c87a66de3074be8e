"""Images and tiny tokenizers to build latent sets from, and builders in processes of their own that can be killed."""

import importlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from helpers import command_toys
from PIL import Image

from smalti.images.decoding import to_float
from smalti.scripts import build_latents, train_tokenizer
from smalti.tokenizers.vq.hrvq import HRVQ, HRVQConfig

IMAGES = 200
CONFIG = HRVQConfig(8, 8, widths=(6, 8), residual_blocks=1, code_width=6, depth=2, branching=4)
FLAGS = ("--tokenizer", "tokenizer", "--images", "img", "--batch-size", "8", "--workers", "0", "--device", "cpu")

# One server imports everything once; each builder is forked from it. Its imports are not the tests': no shapes checked.
BUILDERS = multiprocessing.get_context("forkserver")
BUILDERS.set_forkserver_preload(["smalti.scripts.build_latents", "smalti.tokenizers.vq.hrvq"])


def write_images(folder: Path, count: int = IMAGES, seed: int = 0) -> None:
    """Images of two plain halves; every tenth repeats the one before it."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    colours = random.integers(0, 256, (count, 2, 1, 3))
    for index in range(count):
        halves = colours[index - (index % 10 == 9)].repeat(4, 0).repeat(8, 1)
        Image.fromarray(halves.astype(np.uint8)).save(folder / f"{index:04}.png")


def save_tokenizer(folder: Path, seed: int = 0) -> None:
    torch.manual_seed(seed)
    tokenizer = HRVQ(CONFIG)
    tokenizer.init_from_data(to_float(torch.randint(256, (64, 3, 8, 8), dtype=torch.uint8)))
    tokenizer.save(folder)


@contextmanager
def trained_in(folder: Path, train: list[str], images: int) -> Iterator[Path]:
    """The folder, which is the current one meanwhile, with so many images and what train_tokenizer makes of them."""
    write_images(folder / "img", count=images)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["train_tokenizer.py", *train])
        AcceleratorState._reset_state(reset_partial_state=True)
        train_tokenizer.main()
        yield folder


def run(capfd, *arguments: str) -> tuple[int, str, str]:
    """Builds in this process: (exit status, standard output, standard error)."""
    return command_toys.run(capfd, build_latents.main, *arguments)


class Builders:
    """Processes that build one set together, in a folder; all they say goes to `log` in it.

    `dies_at` is (module, name within it, n): the main process is killed as it calls that for the nth time.
    """

    def __init__(self, folder: Path, *flags: str, processes: int = 1, dies_at: tuple[str, str, int] | None = None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes = []
        for rank in range(processes):
            environment = {"OMP_NUM_THREADS": "1"}
            if processes > 1:
                together = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "RANK": rank, "LOCAL_RANK": rank}
                address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                environment |= {name: str(value) for name, value in (together | address).items()}
            arguments = (folder, flags, environment, dies_at if rank == 0 else None)
            self.processes.append(BUILDERS.Process(target=_build, args=arguments))
        for process in self.processes:
            process.start()

    def signal(self, number: int) -> None:
        for process in self.processes:
            os.kill(process.pid, number)

    def join(self) -> list[int]:
        """Their exit statuses."""
        for process in self.processes:
            process.join(60)
        return [process.exitcode for process in self.processes]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        self.join()


def _build(folder, flags, environment, dies_at):
    os.environ.update(environment)
    os.chdir(folder)
    with open("log", "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    if dies_at:
        module, name, count = dies_at
        *owners, name = name.split(".")
        owner = importlib.import_module(module)
        for part in owners:
            owner = getattr(owner, part)
        whole, calls = getattr(owner, name), iter(range(1, count + 1))

        def dying(*args, **options):
            if next(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(*args, **options)

        setattr(owner, name, dying)
    sys.argv = ["build_latents.py", *flags]
    build_latents.main()


def wait_for(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)
