"""Several chips through torch_tpu, each with a process of its own, learn what one chip learns.

torch_tpu's collectives need the links between chips, so here `host_group.py` stands for them.
"""

import processes_of_mesh
import pytest
import torch
from graphs import KIND
from several_processes import launch

pytestmark = [pytest.mark.xla, pytest.mark.thorough, pytest.mark.skipif(KIND != "tpu", reason="about torch_tpu")]

PROMPTS = 4
JOB = """
import sys
from trainers import make_trainer  # before torch, as tunix_torch wants it
import torch
from tunix_torch import GRPOConfig
from tunix_torch.runtime import together

folder, output_dir, prompts = sys.argv[1], sys.argv[2], int(sys.argv[3])
GRPOConfig(output_dir=output_dir)  # joins the processes
mine = output_dir if together.is_first() else f"{output_dir}/process-{together.index()}"
trainer = make_trainer(folder, mine, per_device_train_batch_size=prompts // together.count(), micro_batch_size=None,
                       num_completions_per_prompt=2, adam_epsilon=1e-3)
trainer.train()
weights = {name: p.detach().cpu() for name, p in trainer.model.named_parameters() if p.requires_grad}
if together.is_first():
    result = {"weights": weights, "log": trainer.state.log_history, "processes": together.count()}
    torch.save(result, f"{output_dir}/result.pt")
"""


def check_same(found, expected, steps):
    """Check that two runs, of so many steps each, have logged the same numbers and learned the same weights."""
    for name in ("loss", "grad_norm", "reward", "kl"):
        logs = [[row[name] for row in result["log"] if name in row] for result in (found, expected)]
        assert logs[0] == pytest.approx(logs[1], abs=1e-5) and len(logs[0]) == steps, name
    for name, weight in expected["weights"].items():
        assert (found["weights"][name] - weight).abs().max() <= 1e-5, name


def test_four_chips_learn_what_one_learns(model_folder, tmp_path):
    results = {}
    for number in (1, PROMPTS):
        folder = tmp_path / str(number)
        folder.mkdir()
        launch(JOB, number, folder, model_folder, folder, PROMPTS, kind="tpu")
        results[number] = torch.load(folder / "result.pt")
        assert results[number]["processes"] == number
    check_same(results[PROMPTS], results[1], steps=3)


def test_a_mesh_of_four_chips_learns_what_one_learns(tmp_path):
    """Of two by two: weights lie along tp as DTensors, prompts along fsdp. A step decodes without being compiled."""
    one, four = (tmp_path / number for number in ("1", "4"))
    for shape, number, folder in (("1", 1, one), ("2,2", PROMPTS, four)):
        folder.mkdir()
        launch(processes_of_mesh.JOB, number, folder, shape, folder, "", "short", kind="tpu")
    expected, found = (torch.load(folder / "short.pt") for folder in (one, four))
    assert (expected["compared"], found["compared"]) == (1, PROMPTS)
    check_same(found, expected, steps=2)
    assert any(part < size for size, part in found["parts"].values())
