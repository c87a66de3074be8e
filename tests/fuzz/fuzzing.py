"""Runs cases of random, damaged or hostile input in child processes, and reports those that fail.

A case is a number: its input is a function of the seed and the number alone. It fails if it raises anything but a
`UserError`, takes too long (a hang), takes too much memory, or ends the interpreter (a crash in a C library). A child
process that hangs or crashes is replaced, and the next case goes on in a new one.
"""

import argparse
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from smalti.core.errors import UserError

LONGEST_CASE_SECONDS = 20
"""CPU time after which a case hangs. The system ends the process, whatever code it is in."""
LONGEST_WAIT_SECONDS = 300
"""Time after which a case hangs without using the processor."""
MOST_MEMORY_MIB = 1024
FUNCTIONS_SHOWN = 2

Make = Callable[[random.Random, Path], Any]
"""Makes the input of a case from random numbers, in a folder that all cases share."""
Read = Callable[[Any], None]
"""Reads what `Make` returned. It may raise a `UserError` and nothing else."""


class Case(NamedTuple):
    """The two functions of a case."""

    make: Make
    read: Read


def main(make: Make, read: Read) -> None:
    """Runs cases for some CPU time and prints their number, the CPU seconds, the peak of memory and each failure once.

    The exit status is 1 if a case failed.
    """
    case = Case(make, read)
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="CPU seconds to run for")
    parser.add_argument("--seed", type=int, default=0, help="seed of all cases")
    parser.add_argument("--case", type=int, help="run this case only, in this process, and show its traceback")
    arguments = parser.parse_args()
    if arguments.case is not None:
        with tempfile.TemporaryDirectory() as folder:
            _run_case(case, arguments.seed, arguments.case, Path(folder))
        return
    failures: dict[str, list[int]] = {}
    peak = number = 0
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        while _cpu_seconds() < arguments.seconds:
            for done, failure, mib in _child(case, arguments.seed, number, Path(folder), arguments.seconds):
                peak, number = max(peak, mib), done + 1
                if failure:
                    failures.setdefault(failure, []).append(done)
                    print(f"case {done}: {failure}", flush=True)
    print(
        f"{number} cases, {_cpu_seconds():.0f} CPU seconds, {time.monotonic() - start:.0f} s, "
        f"peak {peak} MiB above the start, {len(failures)} distinct failures"
    )
    for failure, numbers in failures.items():
        print(f"{len(numbers)} times, first --seed {arguments.seed} --case {numbers[0]}: {failure}")
    sys.exit(bool(failures))


def _child(case: Case, seed: int, first: int, folder: Path, seconds: float) -> Iterator[tuple[int, str, int]]:
    """Yields (number, failure or nothing, peak MiB) of cases from `first` on, until a child ends."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    budget = seconds - _cpu_seconds()
    child = context.Process(target=_work, args=(theirs, case, seed, first, folder, budget))
    child.start()
    theirs.close()
    number = first
    try:
        while ours.poll(LONGEST_WAIT_SECONDS):
            number, failure, mib = ours.recv()
            yield number, failure, mib
            number += 1
        yield number, "waits forever", 0
    except EOFError:
        child.join()
        if child.exitcode == -signal.SIGPROF:
            yield number, f"hangs: more than {LONGEST_CASE_SECONDS} s of CPU time", 0
        elif child.exitcode:
            yield number, f"ends the interpreter with exit code {child.exitcode}", 0
    finally:
        child.kill()
        child.join()


def _work(pipe: Connection, case: Case, seed: int, number: int, folder: Path, seconds: float) -> None:
    """Runs cases and reports each, until the time is over or the memory that one took hides what others take."""
    baseline = _peak_mib()
    with _quiet():
        while time.process_time() < seconds:
            failure = ""
            signal.setitimer(signal.ITIMER_PROF, LONGEST_CASE_SECONDS)
            try:
                _run_case(case, seed, number, folder)
            except BaseException as error:
                failure = _describe(error)
            mib = _peak_mib() - baseline
            if mib > MOST_MEMORY_MIB:
                failure = failure or f"takes more than {MOST_MEMORY_MIB} MiB"
            pipe.send((number, failure, mib))
            number += 1
            if mib > MOST_MEMORY_MIB // 2:
                return


def _run_case(case: Case, seed: int, number: int, folder: Path) -> None:
    made = case.make(random.Random(f"{seed}/{number}"), folder)
    try:
        case.read(made)
    except UserError as error:
        if "\n" in str(error) or "\x1b" in str(error):
            raise AssertionError("an error is not one printable line") from error


def _describe(error: BaseException) -> str:
    """Returns the exception's type and the last functions in which it was raised, which identify a fault."""
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).parent.name != "fuzz"
    ]
    places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[:1] + frames[-FUNCTIONS_SHOWN:]]
    return f"{type(error).__name__} at {' > '.join(dict.fromkeys(places))}"


def _cpu_seconds() -> float:
    """Returns the CPU time of all children that ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _peak_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


@contextmanager
def _quiet() -> Iterator[None]:
    """Discards what commands and C libraries print."""
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
        yield


def mutate(content: bytes, rng: random.Random, most: int = 4) -> bytes:
    """Returns bytes with a few random changes: other values, inserted, removed or repeated pieces, a cut end."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, most)):
        position = rng.randrange(len(changed) or 1)
        end = position + rng.choice((1, 2, 4, 8, rng.randint(1, 64)))
        match rng.choice(("bit", "byte", "number", "insert", "remove", "repeat", "cut", "bit", "number")):
            case "bit" if changed:
                changed[position] ^= 1 << rng.randrange(8)
            case "byte" if changed:
                changed[position] = rng.randrange(256)
            case "number":
                size = rng.choice((1, 2, 4, 8))
                changed[position : position + size] = integer(rng, size).to_bytes(size, rng.choice(("little", "big")))
            case "insert":
                changed[position:position] = rng.randbytes(end - position)
            case "remove":
                del changed[position:end]
            case "repeat":
                changed[end:end] = changed[position:end] * rng.randint(1, 8)
            case "cut" if rng.random() < 0.3:
                del changed[position:]
    return bytes(changed)


def integer(rng: random.Random, size: int) -> int:
    """Returns an unsigned integer of `size` bytes, mostly one at which programs fail."""
    bits = 8 * size
    edges = (0, 1, 2, (1 << bits) - 1, (1 << bits) - 2, 1 << (bits - 1), (1 << (bits - 1)) - 1, 1 << (bits // 2))
    return rng.choice((*edges, rng.getrandbits(bits), rng.randrange(min(1 << bits, 1 << 16))))


def json_value(rng: random.Random, depth: int = 0) -> object:
    """Returns a random JSON value."""
    scalars = (None, True, 0, -1, 8, 2**31, 2**63, 10**30, 0.5, 1e308, float("nan"), "", "8", "\x1b[31m", "\ud800", "é")
    if depth > 3 or rng.random() < 0.6:
        return rng.choice(scalars)
    items = [json_value(rng, depth + 1) for _ in range(rng.randint(0, 4))]
    names = ("height", "width", "radices", "channels", "a")
    return items if rng.random() < 0.5 else dict(zip(rng.sample(names, len(items)), items, strict=True))


def edit_json(value: object, rng: random.Random) -> object:
    """Returns a JSON value with a change at a random place: another value, or one more, one less or a repeated one."""
    if isinstance(value, dict | list) and value and rng.random() < 0.8:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = rng.choice(list(keys))
        copy = value.copy()
        if rng.random() < 0.7:
            copy[key] = edit_json(value[key], rng)  # pyright: ignore[reportArgumentType, reportCallIssue]
        elif isinstance(copy, list):
            copy[key:key] = [copy[key]] * rng.choice((1, 1, 2, 1000))  # pyright: ignore
        else:
            del copy[key]  # pyright: ignore[reportArgumentType]
        return copy
    if isinstance(value, int) and rng.random() < 0.7:
        return rng.choice(
            (value + 1, value - 1, -value, value * 2, value * 10**6, 2**31 - 1, 2**63 - 1, 0, float(value))
        )
    return json_value(rng)
