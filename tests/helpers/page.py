"""Helpers of the page's tests: a picture, and waiting for a condition."""

import time

import torch


def picture():
    generator = torch.Generator().manual_seed(3)
    return torch.randint(256, (3, 16, 16), dtype=torch.uint8, generator=generator)


def until(condition, seconds=60):
    """Waits until a condition holds, and returns its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "the condition did not hold in time"
        time.sleep(0.1)
    return value
