"""Say what is being done and how long it took."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def step(what: str) -> Iterator[None]:
    """Print what begins, and its duration once it ended, however it ended."""
    print(f"== {what}", flush=True)
    start = time.monotonic()
    outcome = "stopped"
    try:
        yield
        outcome = "done"
    finally:
        print(f"== {what}: {outcome} after {time.monotonic() - start:.1f} s\n", flush=True)
