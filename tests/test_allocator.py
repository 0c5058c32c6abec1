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
    torch.ones(2**24)  # 64 MiB, which glibc by itself never keeps
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = [faults_of_a_tensor() for _ in range(3)]
assert keep_freed_memory()
print(json.dumps([before, [faults_of_a_tensor() for _ in range(9)]]))
"""


@pytest.mark.skipif(
    platform.libc_ver() < ("glibc", "2.35"), reason="needs a glibc that takes tensors of 64 MiB into its heap"
)
def test_pages_of_a_large_tensor_are_cleared_once():
    result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    before, after = json.loads(result.stdout)
    if min(before) < 1000:
        pytest.skip("this system clears huge pages at once")
    assert max(after[3:]) < min(before) / 10  # the heap has found its size


def test_elsewhere_and_beside_settings_of_the_user_nothing_is_changed(monkeypatch):
    from tunix_torch.allocator import keep_freed_memory

    with monkeypatch.context() as patch:
        patch.setattr(platform, "libc_ver", lambda: ("", ""))
        assert not keep_freed_memory()
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert not keep_freed_memory()
