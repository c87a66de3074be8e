"""The benchmark: variants do the same work, measurements count what they claim, and tables go to their markers."""

import json
import math
import re
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest
import torch
from helpers import toys

from smalti.benchmarks import ancestral, blending, head, latents, megapixel, priors, run, strips, training
from smalti.benchmarks.comparison import Comparison, Measured, Variant, in_mebibytes
from smalti.benchmarks.run import Benchmark, clock, insert, medians, table
from smalti.core.devices import best_device
from smalti.core.errors import UserError
from smalti.priors.networks.hourglass import Hourglass, HourglassConfig
from smalti.priors.networks.maskgit import MaskGIT
from smalti.priors.networks.pixelcnn import PixelCNN, PixelCNNConfig
from smalti.priors.networks.transformer import Transformer, TransformerConfig
from smalti.tokenizers.quantizers import search

TINY = HourglassConfig(height=4, width=4, radices=(3, 3), model_width=8, heads=1, depth=(1, 1, 1))
TINY_CAUSAL = PixelCNNConfig(radices=(3, 3), model_width=8, layers=2)
TINY_TRANSFORMER = TransformerConfig(radices=(3, 3), model_width=8, heads=2, layers=2)


def test_composing_is_measured_at_every_size():
    (comparison,) = blending.blending(sizes=((40, 30), (300, 260)))
    assert [tuple(variant.work().shape) for variant in comparison.variants] == [(1, 3, 40, 30), (1, 3, 300, 260)]


@pytest.mark.parametrize("tree", [(4, 4, 4), (4, 2, 6)])
def test_search_variants_find_the_same_codes(tree, monkeypatch):
    monkeypatch.setattr(search, "_fused", lambda: search._eager)  # compiled searches have tests of their own
    (comparison,) = training.search(vectors=5000, width=8, trees=[tree])
    ours, eager, flat, large_blocks, gathered, _, *peers = (variant.work() for variant in comparison.variants)
    assert [len(codes) for codes in peers] == [5000, 5000]
    assert eager.equal(ours)
    assert gathered.equal(ours)
    assert large_blocks.equal(flat)
    torch.manual_seed(0)
    vectors, leaves = torch.randn(100, 8), torch.randn(30, 8)
    assert training.flat_search(vectors, leaves, 64, 7).equal(torch.cdist(vectors, leaves).argmin(1))


def test_reading_variants_return_the_same_codes(tmp_path):
    comparison = latents.reading(tmp_path, rows=60, side=3, batch=20, batches=2)
    ours, resident, *others = (variant.work() for variant in comparison.variants)
    assert len(others) == 3
    assert {variant.units for variant in comparison.variants} == {2}
    for batch in range(2):
        assert ours[batch]["codes"].shape == (20, 3, 3)
        assert ours[batch]["codes"].equal(resident[batch]["codes"].cpu())
        assert all(other[batch].equal(ours[batch]["codes"]) for other in others)


def test_reading_variants_of_files_return_the_same_codes(tmp_path):
    comparison = latents.reading_files(tmp_path, files=3, rows=10, side=3, batch=20, batches=2)
    several, *others = (variant.work() for variant in comparison.variants)
    assert len(others) == 2
    assert all(other[batch].equal(several[batch]) for other in others for batch in range(2))


def test_build_and_bare_loop_encode_the_same_codes(tmp_path):
    comparison = latents.building(tmp_path, rows=300, config=latents.SMALL)
    built, bare = (variant.work() for variant in comparison.variants)
    assert built.batch(range(300))[0].equal(torch.cat([codes[0] for codes in bare]))


def test_peak_memory_is_measured_in_the_process_that_builds(tmp_path):
    _, limit = latents.memory(tmp_path, rows=(20, 40)).variants
    peak = limit.work() - 100 * 2**20
    assert 100 * 2**20 < peak < 2**30  # torch alone takes about 200 MiB


def test_strips_equal_the_whole_up_to_rounding(monkeypatch, capsys):
    """Both run in processes of their own; here only the strips do, as starting a process takes seconds."""
    run_in_process = strips._run_in_process

    def run(path, config, largest_whole):
        if largest_whole < sys.maxsize:
            return run_in_process(path, config, largest_whole)
        strips.work(str(path), json.dumps(asdict(config)), str(largest_whole))
        return json.loads(capsys.readouterr().out)

    monkeypatch.setattr(strips, "_run_in_process", run)
    monkeypatch.setitem(strips.LARGEST_WHOLE, best_device().type, 1)  # restored after `work` changed it
    seconds, memory = strips.strips(replace(toys.TINY["vqgan"], height=64, width=96), largest_whole=2**10)
    match = re.fullmatch("64×96, encoded and decoded in strips: 0 of 1536 codes .* pixels by up to (.+)", seconds.path)
    assert match is not None
    assert 0 < float(match[1]) < 1e-4  # rounding errors show that it was computed in strips
    assert all(taken > 0 for taken in medians(seconds, 1))
    ours, whole, limit = medians(memory, 1)
    assert 100 * 2**20 < min(ours, whole) < limit == 4 * 2**30


def test_megapixel_section_samples_decodes_and_trains():
    tiny = replace(toys.TINY["vqgan"], height=32, width=32)
    comparisons = list(
        megapixel.megapixel(config=tiny, prior=TINY, batches=(2, 3), steps=3, training_steps=2, compiled=False)
    )
    codes, decoding, *_, training, memory, larger, _ = comparisons
    assert "3 steps of 16×16" in codes.path
    ours, limit = codes.variants
    assert ours.work().shape == (2, 16, 16)
    assert limit.units == 2
    assert decoding.variants[0].work().shape == (2, 3, 32, 32)
    assert [variant.name for variant in training.variants] == ["smalti, --gradient-checkpointing", "smalti"]
    assert [variant.name for variant in larger.variants] == ["smalti, --gradient-checkpointing"]
    for comparison in comparisons:
        assert all(clock(variant) > 0 for variant in comparison.variants)
    assert memory.readable(memory.variants[0].work()).endswith("MiB")


def test_training_and_sampling_variants_run():
    *training, whole, steps = priors.prior(batch=2, config=TINY)
    assert [comparison.path.split(", ")[-1] for comparison in training] == ["fp32", "bf16"]
    assert [variant.target for variant in whole.variants] == [None, 1 / priors.MUON_STEP]
    sampling = list(priors.sampler(batch=2, config=TINY, large=[(1, TINY)], compiled=False))
    assert [comparison.variants[1].target is None for comparison in sampling] == [True, False]
    for comparison in [*training, whole, steps, *sampling]:
        assert all(clock(variant) > 0 for variant in comparison.variants)


def test_hourglass_size_is_between_those_of_the_flat_transformers():
    (comparison,) = priors.hourglass(batch=1, side=4, width=64, blocks=3)
    ours, smaller, larger = (float(variant.name.split(", ")[-1].split()[0]) for variant in comparison.variants)
    assert smaller < ours < larger
    assert all(seconds > 0 for seconds in medians(comparison, 1))


def test_memory_kept_by_a_head_is_counted():
    """A softmax over all leaves keeps the logits, of at least two bytes each."""
    times, kept, *_ = head.head(positions=16, width=8, radices=(16, 16, 16), side=4, config=TINY_CAUSAL)
    assert all(seconds > 0 for seconds in medians(times, 1))
    digits, leaves = (variant.work() for variant in kept.variants)
    assert leaves > 16 * 4096 * 2
    assert digits < leaves


def test_every_way_to_multiply_with_nodes_gives_the_same():
    ours, *plain = (variant.work() for variant in head.products(24, 8, nodes=5, radix=3).variants)
    for products in plain:
        torch.testing.assert_close(ours, products)


def test_both_heads_of_a_pixelcnn_learn():
    """Both start at the entropy of 9 codes, and training lowers both losses."""
    torch.manual_seed(0)
    config = replace(TINY_CAUSAL, height=4, width=4)
    for variant in head.head_of_pixelcnn(2, config).variants:
        losses = [variant.work() for _ in range(20)]
        assert losses[0] == pytest.approx(math.log(9), abs=0.1)
        assert losses[-1] < losses[0] - 0.05


def test_cached_and_naive_ancestral_sampling_draw_the_same_codes():
    causal = [(PixelCNN, TINY_CAUSAL, 1.0), (Transformer, TINY_TRANSFORMER, 1.0)]
    parallel = [(Hourglass, TINY), (MaskGIT, TINY)]
    *cached, samples = ancestral.ancestral(
        batches=(2, 1), side=4, sides=(4,), positions=5, causal=causal, parallel=parallel
    )
    assert len(cached) == 4
    for comparison in cached:
        ours, naive = (variant.work().flatten(1) for variant in comparison.variants)
        assert torch.equal(ours[:, :5], naive[:, :5])
        assert [variant.units for variant in comparison.variants] == [16, 5]
    assert [variant.name for variant in samples.variants] == ["transformer", "pixelcnn", "hourglass", "maskgit"]
    assert all(variant.work().shape == (variant.units, 4, 4) for variant in samples.variants)


def test_loop_time_excludes_start_and_saving():
    for comparison in training.training(batch=2, steps=3):
        start = time.perf_counter()
        seconds = [variant.work() for variant in comparison.variants]
        whole = time.perf_counter() - start
        assert all(isinstance(taken, Measured) and taken > 0 for taken in seconds)
        assert sum(seconds) * 2 < whole  # each has two intervals, without start and saving


def test_norms_have_equal_gradients():
    (comparison,) = training.group_norm(batch=2, side=8)
    ours, theirs, _ = (variant.work() for variant in comparison.variants)
    torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0.02)  # maps are bfloat16 on some CPUs


def test_warm_up_is_not_counted_and_times_are_per_unit():
    calls, slow_first = [], iter([9.0, 3.0, 1.0, 2.0])

    def work():
        calls.append("timed")
        time.sleep(0.02)

    variants = (
        Variant("ours", work, units=4),
        Variant("own clock", lambda: calls.append("own") or Measured(next(slow_first))),
    )
    timed, own = medians(Comparison("turns", variants), 3)
    assert calls == ["timed", "own"] * 4
    assert own == 2
    assert 0.005 <= timed < 0.02


def test_table_states_targets_and_whether_they_are_met():
    variants = (
        Variant("ours", list),
        Variant("naive", list, target=10.0),
        Variant("flat", list, target=3.0),
        Variant("limit", list),
    )
    text = table([(Comparison("a path", variants), [0.02, 0.1, 1.0, 1e-5])])
    assert "| ours | 20 ms | 1× |  |" in text
    assert "| naive | 100 ms | 5× | 10×: missed |" in text
    assert "| flat | 1 s | 50× | 3×: met |" in text
    assert "| limit | 10 µs | 0.0005× |  |" in text


def test_constant_results_are_measured_once():
    calls = []
    comparison = Comparison(
        "memory", (Variant("ours", lambda: calls.append(0) or Measured(3 * 2**20)),), in_mebibytes, varies=False
    )
    results = medians(comparison, 5)
    assert (results, len(calls)) == ([3 * 2**20], 1)
    assert "| ours | 3 MiB | 1× |  |" in table([(comparison, results)])


def test_tables_are_written_between_their_markers(tmp_path, monkeypatch, capsys):
    path = tmp_path / "benchmarks.md"
    path.write_text("# Speed\n<!-- measured: search -->\nold\n<!-- end: search -->\nafter\n")
    insert(path, "search", r"new \1")
    insert(path, "sampler", "more")
    marked = "<!-- measured: search -->\nnew \\1\n<!-- end: search -->\nafter\n"
    assert path.read_text() == f"# Speed\n{marked}\n<!-- measured: sampler -->\nmore\n<!-- end: sampler -->\n"
    comparison = Comparison("a path", (Variant("ours", lambda: Measured(1)),))
    monkeypatch.setitem(run.SECTIONS, "search", lambda: iter([comparison]))
    run.benchmark(Benchmark(only=("search",), repetitions=1, out=path))
    assert "| ours | 1 s | 1× |  |" in path.read_text()
    assert f"torch {torch.__version__}" in path.read_text()
    assert path.read_text().split("<!-- end: search -->")[0].split("-->\n")[1].strip() in capsys.readouterr().out


def test_medians_are_named_only_if_something_was_repeated(tmp_path, monkeypatch):
    for varies, named in ((True, True), (False, False)):
        comparison = Comparison("a path", (Variant("ours", lambda: Measured(1)),), varies=varies)
        monkeypatch.setitem(run.SECTIONS, "strips", lambda comparison=comparison: iter([comparison]))
        run.benchmark(Benchmark(only=("strips",), repetitions=2, out=tmp_path / "page.md"))
        assert ("; medians of 2." in (tmp_path / "page.md").read_text()) == named


WRITER = """
import sys
from pathlib import Path
from smalti.benchmarks.run import insert
for number in range(20):
    insert(Path(sys.argv[1]), f"{sys.argv[2]} {number}", "text")
"""


def test_processes_that_write_one_file_lose_no_section(tmp_path):
    path = tmp_path / "page.md"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, path, name]) for name in "ab"]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    expected = {f"{name} {number}" for name in "ab" for number in range(20)}
    assert set(re.findall("<!-- measured: (.+?) -->", path.read_text())) == expected
    assert [each.name for each in tmp_path.iterdir()] == ["page.md"]


def test_zero_repetitions_are_refused():
    with pytest.raises(UserError, match="--repetitions must be at least 1, not 0"):
        Benchmark(repetitions=0)
