"""Skip this on first reading: a setting of the C library that makes training on a CPU faster. No number depends on it.

A training step allocates the same large tensors again and again. glibc's malloc returns a freed block to the kernel, and the
kernel fills the next one with zeros page by page. With these settings malloc keeps freed blocks of up to 32 MB and uses them
again: a BERT step became about a fifth faster (benchmarks/bert_training.py). Used by: training/distributed.py, sharding.py.
"""

from __future__ import annotations

import ctypes
import sys

# (parameter's number in malloc.h, bytes): M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD
KEEP = ((-3, 2**25), (-1, 2**31 - 1), (-2, 2**26))
RETURN = ((-3, 2**16), (-1, 2**17), (-2, 0))


def keep_freed_memory() -> None:
    """Change malloc's settings for this process; without glibc (macOS, Windows) nothing happens."""
    for parameter, num_bytes in KEEP:
        _call("mallopt", parameter, num_bytes)


def return_freed_memory() -> None:
    """The opposite, for --shard: weights that were gathered and dropped would else leave holes, as many as the whole model.

    What is free by now is returned, too.
    """
    for parameter, num_bytes in RETURN:
        _call("mallopt", parameter, num_bytes)
    _call("malloc_trim", 0)


def _call(name: str, *arguments: int) -> None:
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function is not None:
        function(*arguments)
