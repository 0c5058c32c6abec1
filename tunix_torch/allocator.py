"""Where tensors lie in memory of the C library, as on the CPU: keep what one step frees for the next one."""

import ctypes
import os
import platform

# Parameters of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_IN_HEAP = 2**30  # bytes
_LARGEST_OF_OLD = 2**25  # where an older glibc refuses more


def keep_freed_memory() -> bool:
    """Have glibc's malloc put tensors of up to 1 GiB into its heap (older ones: 32 MiB), and keep 2 GiB that are free.

    By default it gives a heap's free end back to the system and maps large blocks anew. Then every page of them is
    cleared when it is first touched again, and whether a step pays for that depends on what lies where.

    Returns:
        False where nothing was changed: there is no glibc, or its settings come from the environment.
    """
    if platform.libc_ver()[0] != "glibc" or {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} & set(os.environ):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    largest = mallopt(_M_MMAP_THRESHOLD, _LARGEST_IN_HEAP) or mallopt(_M_MMAP_THRESHOLD, _LARGEST_OF_OLD)
    return bool(largest and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
