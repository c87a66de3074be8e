"""Shared by the fuzz drivers of checkpoints: mutations of values and bytes, and the loop that counts failures.

Every case follows from the seed and its number, so that `--only NUMBER` repeats one.
"""

import argparse
import copy
import resource
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch

from smalti.core.errors import UserError

CASE_SECONDS = 20
MOST_MIB = 1024
DEEP: Any = []
for _ in range(40):
    DEEP = [DEEP]
VALUES = (
    *(0, -1, 1, 2, 3, 7, 16, 255, 256, 4096, 65535, 10**6, 2**31 - 1, 2**31, 2**40, 2**63 - 1, 2**64, 10**400),
    *(0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf"), True, False, None),
    *("", "x", "\x1b[2J", "a" * 5000, "\x00", "../../x", "tokenizer", "F32", "F64", "meta", "gumbel"),
    *([], {}, [1], [0], [-1], [2**31] * 2, [1] * 3000, {"a": 1}, DEEP),
)


def mutated_value(value: Any, random: Random) -> Any:
    """Returns a copy of a JSON value with one part replaced, removed, repeated or renamed."""
    value = copy.deepcopy(value)
    parents = _containers(value)
    if not parents or random.random() < 0.02:
        return random.choice(VALUES)
    parent = random.choice(parents)
    key = random.choice(list(parent)) if isinstance(parent, dict) else random.randrange(len(parent))
    match random.randrange(8):
        case 0:
            del parent[key]
        case 1 if isinstance(parent, dict):
            parent[random.choice(("x", "", "loss.a", "__metadata__", f"{key}.0", "é" * 100))] = parent[key]
        case 1:
            parent.insert(key, copy.deepcopy(parent[key]))
        case 2:
            parent[key] = copy.deepcopy(random.choice(parents))
        case 3 if type(parent[key]) is int:
            parent[key] += random.choice((-1, 1, parent[key], -2 * parent[key]))
        case _:
            parent[key] = copy.deepcopy(random.choice(VALUES))
    return value


def _containers(value: Any) -> list[Any]:
    found, pending = [], [value]
    while pending:
        each = pending.pop()
        if isinstance(each, dict | list) and each:
            found.append(each)
            pending += each.values() if isinstance(each, dict) else each
    return [each for each in found if isinstance(each, list) or all(isinstance(key, str) for key in each)]


def mutated_bytes(content: bytes, random: Random) -> bytes:
    """Returns bytes with some of them flipped, overwritten, removed, repeated or cut off."""
    changed = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 8))):
        if not changed:
            break
        start = random.randrange(len(changed))
        length = random.choice((1, 1, 2, 4, 8, 64))
        match random.randrange(7):
            case 0 | 1:
                changed[start] ^= 1 << random.randrange(8)
            case 2:
                changed[start : start + length] = random.randbytes(length)
            case 3:
                changed[start : start + length] = random.choice((b"\0", b"\xff", b"\x7f", b"9", b"[")) * length
            case 4:
                del changed[start : start + length]
            case 5:
                changed[start:start] = changed[start : start + length]
            case 6:
                del changed[start:]
    return bytes(changed)


def fuzz(case: Callable[[Random, Path], None], argv: list[str] | None = None) -> list[str]:
    """Runs cases until `--seconds` of CPU time are used. Prints the counts; returns the distinct failures.

    A failure is an exception other than `UserError`, a message of several lines, more than `CASE_SECONDS` of CPU time,
    or a peak of memory of more than `MOST_MIB` above what the process had before the first case.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings(action="ignore"):
        folder = Path(name) / "case"
        _run(case, options.seed, 0, folder)  # imports
        first_peak, start, number, accepted = _peak_mib(), time.process_time(), 0, 0
        peak, failures = first_peak, {}
        numbers = iter([options.only]) if options.only is not None else iter(range(1, 1 << 62))
        for number in numbers:
            failure = _run(case, options.seed, number, folder)
            accepted += failure is None
            if _peak_mib() - max(first_peak, peak) > 64:
                print(f"case {number}: peak {_peak_mib()} MiB", flush=True)
            if _peak_mib() - first_peak > MOST_MIB >= peak - first_peak:
                failure = f"{_peak_mib()} MiB"
            peak = _peak_mib()
            if failure and failure not in failures:
                failures[failure] = number
                print(f"case {number}: {failure}", flush=True)
            if time.process_time() - start > options.seconds:
                break
    print(
        f"{number} cases ({accepted} accepted), {time.process_time() - start:.0f} CPU seconds, peak {peak} MiB "
        f"({first_peak} before), {len(failures)} distinct failures"
    )
    return list(failures)


def _run(case: Callable[[Random, Path], None], seed: int, number: int, folder: Path) -> str | None:
    """Returns a failure, an empty text for a refusal, None for a case that was accepted."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    before = signal.signal(signal.SIGPROF, _too_slow)
    signal.setitimer(signal.ITIMER_PROF, CASE_SECONDS)
    try:
        case(Random(f"{seed}:{number}"), folder)
    except UserError as error:
        return "" if str(error).isprintable() else f"unprintable: {error!r}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "smalti" in frame.filename]
        return f"{type(error).__name__} in {frames[-1].name if frames else '?'}: {str(error)[:150]!r}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    return None


def _too_slow(_number: int, _frame: Any) -> None:
    raise TimeoutError(f"more than {CASE_SECONDS} seconds")


def _peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
