"""Builds a latent set with Ray Data: a pool of actors encodes the images, one GPU each if there are GPUs.

The set is the one that `build_latents` writes, to the digest. Run the program again to resume. An actor that dies is
replaced. Ray runs on this machine alone; on a cluster, pass its address to `ray.init` (docs/scale.md).

$ pip install -e '.[ray]'
$ python examples/build_with_ray.py --tokenizer hrvq --images my/photos --out runs/latents/photos --actors 8 --gpus 1
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from smalti.commands.build_latents import BuildLatents, build_latents
from smalti.core.errors import UserError
from smalti.encoding.build import Engine
from smalti.encoding.encoder import EncodeBatches, Encoder

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported: it reports to nobody

BLOCKS_AT_ONCE = 4  # in a task; they are encoded again if their actor dies


@dataclass(frozen=True)
class BuildWithRay:
    """Settings."""

    tokenizer: str = "hrvq"
    images: str | None = None
    out: Path | None = None
    shard_rows: int | None = None
    batch_size: int = 256
    actors: int = 2
    gpus: float = 0  # of each actor; 0.5 lets one decode while the other encodes


def ray_engine(actors: int, gpus: float) -> Engine:
    """Returns an engine for `build_latents` that encodes in a pool of actors."""
    try:
        import ray
        import ray.data
        from ray._private import services
    except ImportError as error:
        raise UserError("this program needs Ray; install it with: pip install -e '.[ray]'") from error
    if not ray.is_initialized():
        # Ray replaces 127.0.0.1 by the address that other machines reach, and would listen there.
        services.resolve_ip_for_localhost = lambda host: host
        ray.init(address="local", num_cpus=actors, include_dashboard=False, _node_ip_address="127.0.0.1")

    def engine(encoder: Encoder, blocks: list[int]) -> Iterator[dict[str, Any]]:
        tasks = -(-len(blocks) // BLOCKS_AT_ONCE)
        rows = ray.data.from_items([{"block": block} for block in blocks], override_num_blocks=tasks)
        encoded = rows.map_batches(
            EncodeBatches,
            fn_constructor_args=(encoder,),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=actors),
            num_gpus=gpus or None,
        )
        yield from encoded.iter_batches(batch_size=None)

    return engine


def main(config: BuildWithRay) -> Path:
    """Builds the set and returns its file or folder."""
    given = {name: getattr(config, name) for name in ("tokenizer", "images", "out", "shard_rows", "batch_size")}
    settings = BuildLatents(**given, device="cuda" if config.gpus else "cpu")
    return build_latents(settings, ray_engine(config.actors, config.gpus))


if __name__ == "__main__":
    main(tyro.cli(BuildWithRay))
