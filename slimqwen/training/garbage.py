"""Python's garbage collection, at the same places of a training on every rank."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def collect_between_steps() -> Iterator[Callable[[], object]]:
    """Turn automatic garbage collection off while open, and yield a function that collects, for between two steps.

    Automatic collection begins in the middle of a step, on each rank in another one, and the others wait for that rank. What
    exists at the beginning is not looked through again, which makes a collection cheap: measured on a CPU with tiny models, 0.05 ms
    alone and up to 8 ms with two ranks. No tensor of a step was left to it in either: reference counts free them.
    """
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield gc.collect
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
