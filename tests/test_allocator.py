"""Memory that a step frees is there for the next one, without the kernel clearing its pages again."""

import json
import platform
import subprocess
import sys

import pytest

CODE = """
import json, resource, sys
import torch
from tunix_torch.allocator import keep_freed_memory

def usage():
    return resource.getrusage(resource.RUSAGE_SELF)

def faults_of_a_step():
    before = usage().ru_minflt
    tensors = [torch.ones(2**22) for _ in range(8)]  # of 16 MiB
    return usage().ru_minflt - before

before = [faults_of_a_step() for _ in range(4)]
assert keep_freed_memory()
after = [faults_of_a_step() for _ in range(9)]
peak, small = usage().ru_maxrss, []
for i in range(20):  # large tensors come and go, small ones stay
    large = torch.ones(2**25 + 2**20 * i)
    small.append(torch.ones(100))
    del large
print(json.dumps([before, after, (usage().ru_maxrss - peak) * 1024]))
"""
needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")


@pytest.fixture(scope="module")
def figures():
    result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@needs_glibc
def test_pages_of_tensors_are_cleared_once(figures):
    before, after, _ = figures
    if min(before[1:]) < 1000:
        pytest.skip("this system clears huge pages at once, or keeps them by itself")
    assert max(after[3:]) < min(before[1:]) / 10  # the heap has found its size


@needs_glibc
def test_large_tensors_leave_no_holes(figures):
    assert figures[2] < 3 * 4 * (2**25 + 2**20 * 20)


def test_elsewhere_and_beside_settings_of_the_user_nothing_is_changed(monkeypatch):
    from tunix_torch.allocator import keep_freed_memory

    with monkeypatch.context() as patch:
        patch.setattr(platform, "libc_ver", lambda: ("", ""))
        assert not keep_freed_memory()
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert not keep_freed_memory()
