"""Keeps long runs safe: the NaN guard, agreement of processes, the stall watchdog, and errors with a remedy.

The NaN guard skips every step whose loss or gradient is not finite; `checkpoints_and_logs.py` does the rollback after
many of them. Only `SkippedSteps.read` synchronizes with the device.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from smalti.core.errors import OneProcessError
from smalti.training.accelerator import LONGEST_WAIT

ROLL_BACK_AFTER = 10
"""Skipped steps in a row after which the weights, not the batch, must be bad."""

STALLED_STATUS = 75  # EX_TEMPFAIL of sysexits.h: try again later


class SkippedSteps:
    """Counts, on the device, the steps that the NaN guard skipped."""

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)  # skipped in total, skipped in a row

    def count(self, bad: Tensor) -> None:
        """Counts one step; `bad` is whether it was skipped."""
        self.counts += bad  # adds to both
        self.counts[1] *= bad

    def read(self) -> tuple[int, int]:
        """Returns the number of steps skipped in total, and in a row until now."""
        total, in_a_row = self.counts.tolist()
        return total, in_a_row


def spread_nan(loss: Tensor) -> Tensor:
    """Multiplies a finite loss by one and any other by NaN, so that every gradient on every process becomes NaN."""
    return loss * (loss.detach() * 0 + 1)


class Buffers:
    """Keeps a copy of a module's saved buffers (such as running statistics) and restores it after a skipped step."""

    def __init__(self, module: nn.Module) -> None:
        self.buffers = [
            buffer
            for part in module.modules()
            for name, buffer in part.named_buffers(recurse=False)
            if name not in part._non_persistent_buffers_set  # buffers that are not saved are not learned
        ]
        self.kept: list[Tensor] = []

    def keep(self) -> None:
        """Copies the buffers."""
        self.kept = [buffer.clone() for buffer in self.buffers]

    def restore(self, bad: Tensor) -> None:
        """Restores the copied buffers if `bad` is true."""
        for buffer, old in zip(self.buffers, self.kept, strict=True):
            buffer.copy_(torch.where(bad, old, buffer))


class Agreement:
    """Makes all processes see the same flags after the same step, such as a signal that one of them received.

    With several processes, the flags are all-reduced on the CPU while the next step runs. Nothing waits, and the
    processes see the flags one step later than a single process would.
    """

    def __init__(self, processes: int) -> None:
        group = dist.new_group(backend="gloo", timeout=LONGEST_WAIT) if processes > 1 else None
        self.group = cast(dist.ProcessGroup | None, group)  # a number stands for groups without this process
        self.pending: tuple[dist.Work, Tensor] | None = None

    def __enter__(self) -> "Agreement":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.group is not None and kind is None:  # after an error the other processes may not get here
            dist.destroy_process_group(self.group)

    def after_step(self, stop: int, draw: bool, *, last: bool) -> tuple[int, bool]:
        """Returns the flags that hold on any process, the largest of each, the same on all processes.

        Args:
            stop: the number of the signal that this process received, which stops the run, or 0.
            draw: whether the first pictures are due.
            last: whether no step follows, so that this step's flags must be awaited.
        """
        if self.group is None:
            return stop, draw
        agreed = self._await_pending()
        flags = torch.tensor([stop, draw])
        work = dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.group, async_op=True)
        assert work is not None
        self.pending = work, flags
        if last or agreed[0]:
            agreed = agreed.maximum(self._await_pending())
        return int(agreed[0]), bool(agreed[1])

    def _await_pending(self) -> Tensor:
        if self.pending is None:
            return torch.zeros(2, dtype=torch.int64)
        work, flags = self.pending
        work.wait()
        self.pending = None
        return flags


class Watchdog:
    """The stall watchdog: a thread that ends the process if no step ends for too long.

    Otherwise a hung run would occupy its machines for ever.

    Args:
        seconds: longest time without progress; 0 disables the watchdog.
    """

    def __init__(self, seconds: int) -> None:
        self.seconds, self.step, self.last_progress = seconds, 0, time.monotonic()
        self.over = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self.seconds:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()

    def progressed(self, step: int) -> None:
        """Restarts the countdown after `step` steps."""
        self.step, self.last_progress = step, time.monotonic()

    def _watch(self) -> None:
        while not self.over.wait(max(0.01, self.last_progress + self.seconds - time.monotonic())):
            if time.monotonic() - self.last_progress > self.seconds:
                faulthandler.dump_traceback(all_threads=True)
                print(
                    f"error: no progress for {self.seconds} s after step {self.step}; the stacks of all threads are "
                    "above. The same command resumes from the last snapshot; --stall-seconds sets a longer limit",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(STALLED_STATUS)


@contextmanager
def explain_errors(device: torch.device, remedies: Sequence[str]) -> Iterator[None]:
    """Replaces errors about lack of memory and dead data loader workers by messages with a remedy.

    Raises:
        OneProcessError: the replacement; for lack of memory it lists the remedies.
    """
    grad_enabled = torch.is_grad_enabled()
    try:
        yield
    except (RuntimeError, MemoryError, ConnectionError) as error:
        try:
            if isinstance(error, ConnectionError):
                time.sleep(0.2)  # a worker died while sending a batch; torch's own error about it arrives next
            explanation = _explanation(error, device, remedies)
        except RuntimeError as next_error:
            explanation = _explanation(next_error, device, remedies)
        torch.set_grad_enabled(grad_enabled)  # a worker's death raises from a signal, perhaps at the end of a no_grad
        if explanation:
            raise OneProcessError(explanation) from error
        raise


def _explanation(error: Exception, device: torch.device, remedies: Sequence[str]) -> str | None:
    """Returns a message with a remedy; None for errors about neither memory nor workers."""
    message = str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in message:
        return f"out of memory on {device}; give {', or '.join(remedies)}"
    deaths = [message] if isinstance(error, ConnectionError) else []
    deaths += [line.strip() for line in message.splitlines() if "DataLoader worker" in line]
    if deaths:
        return (
            f"a data loader worker died ({deaths[0]}), often for lack of memory; the same command resumes from "
            "the last snapshot, perhaps with fewer --workers"
        )
    return None
