"""What a long run needs to stay well: steps that must not count, a run that hangs, errors with a remedy.

Nothing here waits for a device but `Health.read`, which is called where the loop waits anyway.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from smalti.core.errors import OneProcessError

ROLL_BACK_AFTER = 10
"""Skipped steps in a row after which it is not the batch that is bad, but the weights."""

STALLED_STATUS = 75  # EX_TEMPFAIL of sysexits.h: try again later


class Health:
    """Counts the steps that were skipped because their loss or gradient was not finite; on the device."""

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)  # skipped in all, skipped in a row

    def count(self, bad: Tensor) -> None:
        """Takes in whether a step was skipped."""
        self.counts += bad  # both by one
        self.counts[1] *= bad

    def read(self) -> tuple[int, int]:
        """Steps skipped in all, and in a row until now."""
        skipped, in_a_row = self.counts.tolist()
        return skipped, in_a_row


def poisoned(loss: Tensor) -> Tensor:
    """The loss, times one; where it is not finite, times NaN, so that every gradient of every process shows it."""
    return loss * (loss.detach() * 0 + 1)


class Buffers:
    """A module's saved buffers (running statistics, ...): kept before a step, put back if it turns out bad."""

    def __init__(self, module: nn.Module) -> None:
        self.buffers = [
            buffer
            for part in module.modules()
            for name, buffer in part.named_buffers(recurse=False)
            if name not in part._non_persistent_buffers_set  # what is not saved is not learned
        ]
        self.kept: list[Tensor] = []

    def keep(self) -> None:
        """Remembers the buffers as they are."""
        self.kept = [buffer.clone() for buffer in self.buffers]

    def restore(self, bad: Tensor) -> None:
        """Undoes what changed since, if `bad` is true."""
        for buffer, old in zip(self.buffers, self.kept, strict=True):
            buffer.copy_(torch.where(bad, old, buffer))


class StopAgreement:
    """Whether any process was asked to stop, known to all after the same step.

    With several processes, flags travel while the next step runs, between processors and not devices: nothing waits,
    and a run stops one step after the one in hand.
    """

    def __init__(self, processes: int) -> None:
        self.group = dist.new_group(backend="gloo") if processes > 1 else None
        self.pending: tuple[dist.Work, Tensor] | None = None

    def after_step(self, mine: int, *, last: bool) -> int:
        """The number of the signal that stops the run after this step; 0 if none.

        Args:
            mine: the signal that this process received, or 0.
            last: whether no step follows, so that this one's flags must be waited for.
        """
        if self.group is None:
            return mine
        stop = self._arrived()
        flag = torch.tensor([mine])
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group, async_op=True)
        assert work is not None
        self.pending = work, flag
        return max(stop, self._arrived()) if last or stop else stop

    def _arrived(self) -> int:
        if self.pending is None:
            return 0
        work, flag = self.pending
        work.wait()
        self.pending = None
        return int(flag)


class Watchdog:
    """A thread that ends the process if it does not hear from it for too long: a hung run holds its machines for ever.

    Args:
        seconds: how long is too long; 0 for no watch at all.
    """

    def __init__(self, seconds: int) -> None:
        self.seconds, self.step, self.heard = seconds, 0, time.monotonic()
        self.over = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self.seconds:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()

    def hear(self, step: int) -> None:
        """Says that `step` steps are done, or that something between steps is."""
        self.step, self.heard = step, time.monotonic()

    def _watch(self) -> None:
        while not self.over.wait(max(0.01, self.heard + self.seconds - time.monotonic())):
            if time.monotonic() - self.heard > self.seconds:
                faulthandler.dump_traceback(all_threads=True)
                print(
                    f"error: nothing has happened for {self.seconds} s after step {self.step}; above is where every "
                    "thread is. The same command goes on from the last saved state; --stall-seconds waits longer",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(STALLED_STATUS)


@contextmanager
def explained(device: torch.device, remedies: Sequence[str]) -> Iterator[None]:
    """Turns what a machine says when its memory is full, or when a worker died, into what a person can do.

    Raises:
        OneProcessError: in place of these errors; of the remedies, those that are still to be had.
    """
    graded = torch.is_grad_enabled()
    try:
        yield
    except (RuntimeError, MemoryError, ConnectionError) as error:
        try:
            if isinstance(error, ConnectionError):
                time.sleep(0.2)  # one that died while a batch was fetched from it: torch's own news of it comes next
            explanation = _explanation(error, device, remedies)
        except RuntimeError as news:
            explanation = _explanation(news, device, remedies)
        torch.set_grad_enabled(graded)  # a signal says that a worker died: it may come amid the end of a no_grad
        if explanation:
            raise OneProcessError(explanation) from error
        raise


def _explanation(error: Exception, device: torch.device, remedies: Sequence[str]) -> str | None:
    """What a person can do about an error; None of one that memory and workers have no part in."""
    said = str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in said:
        return f"the memory of {device} is full; give {', or '.join(remedies)}"
    died = [said] if isinstance(error, ConnectionError) else []
    died += [line.strip() for line in said.splitlines() if "DataLoader worker" in line]
    if died:
        return (
            f"a process that prepares batches died ({died[0]}), often for want of memory; the same "
            "command goes on from the last saved state, perhaps with fewer --workers"
        )
    return None
