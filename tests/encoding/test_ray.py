"""The example for Ray Data: the set of one process though an actor dies, and nothing that other machines can reach."""

import importlib.util
import os
import sys
from pathlib import Path

import psutil
import pytest
from helpers.build_toys import one_thread, save_tokenizer, write_images

from smalti.commands.build_latents import BuildLatents, build_latents
from smalti.encoding.encoder import EncodeBatches
from smalti.latentsets.reader import LatentSet

if importlib.util.find_spec("ray") is None:  # it is imported in the test: its import takes seconds
    pytest.skip("ray is not installed", allow_module_level=True)

EXAMPLE = Path(__file__).parents[2] / "examples" / "build_with_ray.py"
LOCAL = {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


def test_ray_builds_the_set_of_one_process_though_an_actor_dies(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(Path("img"), 24)
    save_tokenizer(Path("tokenizer"))
    spec = importlib.util.spec_from_file_location("build_with_ray", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "build_with_ray", module)  # for its dataclass
    spec.loader.exec_module(module)
    died = tmp_path / "died"

    class Dying(EncodeBatches):  # a local class, which Ray pickles with its code
        def __call__(self, batch):
            if 4 in batch["block"] and not died.exists():
                died.touch()
                os._exit(1)
            return super().__call__(batch)

    monkeypatch.setattr(module, "EncodeBatches", Dying)
    settings = {"images": "img", "batch_size": 8}
    engine, listening = module.ray_engine(1, 0), set()
    import ray

    def watched(encoder, blocks):
        for result in engine(encoder, blocks):
            yield result
            if not listening:
                for process in psutil.Process().children(recursive=True):
                    sockets = process.net_connections() if process.is_running() else []
                    listening.update(each.laddr.ip for each in sockets if each.status == psutil.CONN_LISTEN)

    config = BuildLatents("tokenizer", **settings, workers=0, device="cpu", out=Path("set"), shard_rows=16)
    with one_thread():
        try:
            found = LatentSet(build_latents(config, watched))
        finally:
            ray.shutdown()
        one = LatentSet(build_latents(BuildLatents("tokenizer", **settings, workers=0, out=Path("one.h5"))))
    assert died.exists()
    assert found.content_digest == one.content_digest
    found.verify()
    assert set() < listening <= LOCAL
