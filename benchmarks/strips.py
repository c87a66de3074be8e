"""What the benchmark compares of large images: their networks in strips, and whole, each in a process of its own."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file

from smalti.benchmarks.comparison import Comparison, Measured, Variant, in_mebibytes, synchronize
from smalti.commands.presets import f32_megapixel
from smalti.core.config import config_from_json
from smalti.core.devices import best_device, peak_memory_bytes
from smalti.core.randomness import generator_for
from smalti.tokenizers.layers.strips import LARGEST_WHOLE
from smalti.tokenizers.vqgan.vqgan import VQGAN, VQGANConfig

ALLOWED_BYTES = 4 * 2**30
"""What encoding and decoding 1024x1024 pixels may take, with all that a Python process takes."""
IN_A_PROCESS = "import sys; from smalti.benchmarks.strips import work; work(*sys.argv[1:])"


def strips(config: VQGANConfig | None = None, largest_whole: int | None = None) -> Iterator[Comparison]:
    """One image encoded, then decoded, by an untrained network: of `f32-megapixel`, if no other is given.

    `largest_whole`: numbers of the largest map that is not made in strips; the product's bound, if none is given.
    """
    config = config or cast(VQGANConfig, f32_megapixel("vqgan").model)
    bound = largest_whole or LARGEST_WHOLE.get(best_device().type, LARGEST_WHOLE["cpu"])
    with tempfile.TemporaryDirectory() as folder:
        bounds = {Path(folder) / "strips": bound, Path(folder) / "whole": sys.maxsize}
        told = [_told(place, config, largest) for place, largest in bounds.items()]
        ours, theirs = (load_file(place) for place in bounds)
    codes, farthest = ours["codes"], float((ours["decoded"] - theirs["decoded"]).abs().max())
    wrong = int((codes != theirs["codes"]).sum())
    of = f"{config.height}×{config.width}, encoded and decoded in strips"
    yield Comparison(
        f"{of}: {wrong} of {codes.numel()} codes differ from the whole's, pixels by up to {farthest:.1g}",
        _ways([each["seconds"] for each in told]),
        varies=False,
    )
    limit = Variant("limit: 4 GiB", lambda: Measured(ALLOWED_BYTES), target=1.0)
    yield Comparison(
        f"{of}: peak memory",
        [*_ways([each["bytes"] for each in told]), limit],
        readable=in_mebibytes,
        varies=False,
    )


def work(place: str, config: str, largest_whole: str) -> None:
    """Does it, and writes codes and pixels to a file; its last line is JSON of seconds, and bytes at the peak."""
    LARGEST_WHOLE[best_device().type] = int(largest_whole)
    torch.manual_seed(0)
    tokenizer = VQGAN(config_from_json(VQGANConfig, json.loads(config), "the benchmark")).to(best_device()).eval()
    height, width = tokenizer.config.height, tokenizer.config.width
    rough = torch.rand(1, 3, height // 8, width // 8, generator=generator_for(0)) * 2 - 1
    images = torch.nn.functional.interpolate(rough, (height, width), mode="bicubic").clamp(-1, 1).to(best_device())
    with torch.no_grad():
        start = time.perf_counter()
        (codes,) = tokenizer.encode(images)
        decoded = tokenizer.decode((codes,))
        synchronize()
        seconds = time.perf_counter() - start
    save_file({"codes": codes.cpu().contiguous(), "decoded": decoded.cpu().contiguous()}, place)
    print(json.dumps({"seconds": seconds, "bytes": float(peak_memory_bytes(best_device()))}))


def _told(place: Path, config: VQGANConfig, largest_whole: int) -> dict[str, Any]:
    command = [sys.executable, "-c", IN_A_PROCESS, str(place), json.dumps(asdict(config)), str(largest_whole)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


def _ways(results: Sequence[float]) -> list[Variant]:
    """Of what was measured before."""
    names = ("smalti, in strips", "whole")
    return [Variant(name, partial(Measured, result)) for name, result in zip(names, results, strict=True)]
