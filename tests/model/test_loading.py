"""Loading a model of several files takes little memory of the host."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

ROOT = Path(__file__).parent.parent.parent
MIB = 2**20

# The job measures RssAnon, which leaves out pages of the files: the kernel caches these, and frees them when needed.
LOAD = """
import sys, threading, time, torch
from tunix_torch.runtime import device, mesh
from tunix_torch.model.loading import load_base_model, place

on_mesh = len(sys.argv) > 3
if on_mesh:
    mesh.use_mesh(((1, 4), ("fsdp", "tp")))
    mesh.shard(torch.ones(4, 4).to(device.torch_device()), ("fsdp", "tp"))
    device.wait()

def own_memory():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

torch.ones(8) @ torch.ones(8)
before, peak, done = own_memory(), [0], threading.Event()

def watch():
    while not done.is_set():
        peak[0] = max(peak[0], own_memory())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
model = load_base_model(sys.argv[1], getattr(torch, sys.argv[2]))
if on_mesh:
    place(model)
    device.sync()
    device.wait()
done.set()
thread.join()
print(max(peak[0], own_memory()) - before)
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Save a model of 200 MiB, in bfloat16 as Gemma's are, and return its files of at most 50 MB."""
    folder = tmp_path_factory.mktemp("several-files")
    config = Gemma3TextConfig(
        vocab_size=16384,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=128,
    )
    with torch.random.fork_rng(devices=[]):
        model = Gemma3ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="50MB")
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) >= 4
    return files


def growth(files, dtype, *on_mesh, **variables):
    command = [sys.executable, "-c", LOAD, str(files[0].parent), dtype, *on_mesh]
    environment = {**os.environ, "TUNIX_DEVICE": "cpu", "PYTHONPATH": str(ROOT), **variables}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return int(result.stdout.split()[-1])


def test_weights_stay_in_their_files_until_they_are_moved_to_the_device(files):
    sizes = [file.stat().st_size for file in files]
    taken = growth(files, "bfloat16")
    print(f"{sum(sizes) / MIB:.0f} MiB in {len(sizes)} files, own memory +{taken / MIB:.1f} MiB")
    assert taken < 1.3 * max(sizes) < sum(sizes) / 2


@pytest.mark.thorough
def test_another_type_takes_its_own_size_and_no_more_than_a_file_besides(files):
    sizes = [file.stat().st_size for file in files]
    taken = growth(files, "float32")
    print(f"own memory +{taken / MIB:.1f} MiB")
    assert taken < 2 * sum(sizes) + 1.3 * max(sizes)


@pytest.mark.xla
def test_a_mesh_takes_its_shards_and_the_host_no_copy_besides(files):
    """These devices use the host's memory, so it holds all shards once; what is freed must be given back at once."""
    sizes = [file.stat().st_size for file in files]
    given_back = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "0"}
    taken = growth(files, "bfloat16", "mesh", TUNIX_DEVICE="xla", CPU_NUM_DEVICES="4", **given_back)
    print(f"{sum(sizes) / MIB:.0f} MiB of shards, own memory +{taken / MIB:.1f} MiB")
    assert sum(sizes) < taken < sum(sizes) + 1.3 * max(sizes)
