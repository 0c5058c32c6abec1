"""Where tensors lie in memory of the C library, as on the CPU: keep what one step frees for the next one."""

import ctypes
import os
import platform

# Parameters of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# What glibc itself comes to. With more its heap falls to pieces: learning with 262,144 words once took 21 GB.
_LARGEST_IN_HEAP = 2**25  # bytes


def keep_freed_memory() -> bool:
    """Have glibc's malloc keep up to 2 GiB of its heap that are free, in which tensors of up to 32 MiB lie.

    By default it gives a heap's free end back to the system. Then every page of it is cleared when it is touched
    again, and whether a step pays for that depends on what lies where.

    Returns:
        False where nothing was changed: there is no glibc, or its settings come from the environment.
    """
    if platform.libc_ver()[0] != "glibc" or {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} & set(os.environ):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_IN_HEAP) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
