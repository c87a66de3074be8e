"""Benchmark of large images: encoding and decoding strip by strip and whole, each in its own process."""

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
"""Target for the memory of a whole Python process that encodes and decodes 1024x1024 pixels."""
IN_A_PROCESS = "import sys; from smalti.benchmarks.strips import work; work(*sys.argv[1:])"


def strips(config: VQGANConfig | None = None, largest_whole: int | None = None) -> Iterator[Comparison]:
    """Compares encoding and decoding one image in strips and whole, by an untrained network.

    Args:
        config: The network; by default that of the preset `f32-megapixel`.
        largest_whole: The most values of a feature map that is computed whole; by default the product's bound.
    """
    config = config or cast(VQGANConfig, f32_megapixel("vqgan").model)
    bound = largest_whole or LARGEST_WHOLE.get(best_device().type, LARGEST_WHOLE["cpu"])
    with tempfile.TemporaryDirectory() as folder:
        bounds = {Path(folder) / "strips": bound, Path(folder) / "whole": sys.maxsize}
        results = [_run_in_process(path, config, largest) for path, largest in bounds.items()]
        in_strips, whole = (load_file(path) for path in bounds)
    codes, largest_difference = in_strips["codes"], float((in_strips["decoded"] - whole["decoded"]).abs().max())
    differing = int((codes != whole["codes"]).sum())
    name = f"{config.height}×{config.width}, encoded and decoded in strips"
    yield Comparison(
        f"{name}: {differing} of {codes.numel()} codes differ from the whole's, pixels by up to "
        f"{largest_difference:.1g}",
        _variants([result["seconds"] for result in results]),
        varies=False,
    )
    limit = Variant("limit: 4 GiB", lambda: Measured(ALLOWED_BYTES), target=1.0)
    yield Comparison(
        f"{name}: peak memory",
        [*_variants([result["bytes"] for result in results]), limit],
        readable=in_mebibytes,
        varies=False,
    )


def work(path: str, config: str, largest_whole: str) -> None:
    """Encodes and decodes an image in this process; writes codes and pixels to a file.

    The last line that it prints is JSON: the seconds, and the peak memory in bytes.
    """
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
    save_file({"codes": codes.cpu().contiguous(), "decoded": decoded.cpu().contiguous()}, path)
    print(json.dumps({"seconds": seconds, "bytes": float(peak_memory_bytes(best_device()))}))


def _run_in_process(path: Path, config: VQGANConfig, largest_whole: int) -> dict[str, Any]:
    command = [sys.executable, "-c", IN_A_PROCESS, str(path), json.dumps(asdict(config)), str(largest_whole)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


def _variants(results: Sequence[float]) -> list[Variant]:
    """Returns variants that return results measured before."""
    names = ("smalti, in strips", "whole")
    return [Variant(name, partial(Measured, result)) for name, result in zip(names, results, strict=True)]
