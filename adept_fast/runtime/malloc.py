"""Settings of glibc's allocator for work that allocates and frees the same large blocks repeatedly, and the return of freed memory.

By default glibc returns freed memory at the top of its heap to the system, and gets it back page by page with a fault each. That took up to
a tenth of the time of a scoring sweep, and a fifth of that of the backward of a short sequence.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST = 32 * 2**20  # glibc's largest own mmap threshold; its trim threshold is twice the mmap threshold
_NEVER = 2**31 - 1


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Reuse freed memory inside, and return it to the system at the end. Does nothing without glibc."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt") or not hasattr(library, "malloc_trim"):
        yield
        return
    library.mallopt(_MMAP_THRESHOLD, _LARGEST)
    library.mallopt(_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        library.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST)
        library.malloc_trim(0)


def garbage_returned() -> None:
    """Delete objects that only refer to each other, such as a Trainer and its callbacks, and return what was freed to the system."""
    gc.collect()
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
