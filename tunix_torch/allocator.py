"""Where tensors lie in memory of the C library, as on the CPU: keep what one step frees for the next one."""

import ctypes
import platform

# Parameters of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_IN_HEAP = 2**30  # bytes
_LARGEST_OF_OLD = 2**25  # where glibc refuses more


def keep_freed_memory() -> bool:
    """Have glibc's malloc put tensors of up to 1 GiB into its heap, and keep up to 2 GiB of it that are free.

    By default it gives a heap's free end back to the system and maps large blocks anew. Then every page of them is
    cleared when it is first touched again, and whether a step pays for that depends on what lies where.

    Returns:
        False where there is no glibc, and nothing was changed.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    largest = mallopt(_M_MMAP_THRESHOLD, _LARGEST_IN_HEAP) or mallopt(_M_MMAP_THRESHOLD, _LARGEST_OF_OLD)
    return bool(largest and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
