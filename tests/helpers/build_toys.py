"""Images and tiny tokenizers for building latent sets, and builders in separate processes that tests can kill."""

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
from helpers import command_toys
from PIL import Image

from smalti.images.decoding import to_float
from smalti.scripts import build_latents, train_tokenizer
from smalti.tokenizers.vq.hrvq import HRVQ, HRVQConfig

IMAGES = 200
CONFIG = HRVQConfig(8, 8, widths=(6, 8), residual_blocks=1, code_width=6, depth=2, branching=4)
FLAGS = ("--tokenizer", "tokenizer", "--images", "img", "--batch-size", "8", "--workers", "0", "--device", "cpu")
CONDITIONS = ("--conditions", "encoder_of_tests:means")

# One server imports everything once, and each builder is forked from it. It does not check shapes, unlike the tests.
BUILDERS = multiprocessing.get_context("forkserver")
BUILDERS.set_forkserver_preload(["smalti.scripts.build_latents", "smalti.tokenizers.vq.hrvq"])


def write_images(folder: Path, count: int = IMAGES, seed: int = 0) -> None:
    """Writes images of two plain halves; every tenth repeats the one before it."""
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


def write_inputs(folder: Path, count: int = IMAGES) -> None:
    """Writes images, a tokenizer, and the module of `CONDITIONS`, which computes the mean of each channel."""
    write_images(folder / "img", count)
    save_tokenizer(folder / "tokenizer")
    (folder / "encoder_of_tests.py").write_text("def means(images):\n    return images.float().mean((2, 3)) / 255\n")


@contextmanager
def one_thread() -> Iterator[None]:
    """Computes on one thread within the block, as codes of tests are compared exactly."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextmanager
def trained_in(folder: Path, train: list[str], images: int) -> Iterator[Path]:
    """Writes images into a folder, trains a tokenizer there, and yields the folder as the current one."""
    write_images(folder / "img", count=images)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["train_tokenizer.py", *train])
        train_tokenizer.main()
        yield folder


def run(capfd, *arguments: str) -> tuple[int, str, str]:
    """Runs build_latents in this process. Returns (exit status, standard output, standard error)."""
    return command_toys.run(capfd, build_latents.main, *arguments)


class Builders:
    """Processes that build one latent set together in a folder; their output goes to the file `log` in it.

    `dies_at` is (module, name within it, n): the main process is killed at its nth call of that function.
    """

    def __init__(self, folder: Path, *flags: str, processes: int = 1, dies_at: tuple[str, str, int] | None = None):
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            port = unused.getsockname()[1]
        self.processes = []
        for rank in range(processes):
            environment = {"OMP_NUM_THREADS": "1"}
            if processes > 1:
                ranks = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "RANK": rank, "LOCAL_RANK": rank}
                address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                environment |= {name: str(value) for name, value in (ranks | address).items()}
            arguments = (folder, flags, environment, dies_at if rank == 0 else None)
            self.processes.append(BUILDERS.Process(target=_build, args=arguments))
        for process in self.processes:
            process.start()

    def signal(self, number: int) -> None:
        for process in self.processes:
            os.kill(process.pid, number)

    def join(self) -> list[int]:
        """Waits for the processes and returns their exit statuses."""
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
        original, calls = getattr(owner, name), iter(range(1, count + 1))

        def dying(*args, **options):
            if next(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **options)

        setattr(owner, name, dying)
    sys.argv = ["build_latents.py", *flags]
    build_latents.main()


def wait_for(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.002)
