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

def faults_of_a_tensor():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = [faults_of_a_tensor() for _ in range(3)]
assert keep_freed_memory()
print(json.dumps([before, [faults_of_a_tensor() for _ in range(3)]]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_pages_of_a_large_tensor_are_cleared_once():
    result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    before, after = json.loads(result.stdout)
    if min(before) < 1000:
        pytest.skip("this system clears huge pages at once")
    assert max(after[1:]) < min(before) / 10


def test_elsewhere_nothing_is_changed(monkeypatch):
    from tunix_torch.allocator import keep_freed_memory

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_freed_memory()
