"""What the README and other systems' documents promise by name is there."""

import re
import subprocess
from pathlib import Path

import pytest

from tunix_torch import GRPOConfig, ModelConfig

ROOT = Path(__file__).parent.parent


def test_every_test_that_the_readme_names_exists():
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", (ROOT / "README.md").read_text())
    assert len(named) > 40
    missing = [
        f"{file}::{name}"
        for file, name in named
        if not re.search(rf"^def {name}\(", next((ROOT / "tests").rglob(file)).read_text(), re.MULTILINE)
    ]
    assert not missing


def test_every_file_that_the_readme_lists_exists_and_the_other_way_round():
    text = (ROOT / "README.md").read_text().partition("## Files, in reading order")[2].partition("\n## ")[0]
    names = set(re.findall(r"`([\w./]+)`", text))
    listed = {
        name if (ROOT / name).exists() else f"tunix_torch/{name}" for name in names if re.search(r"\.\w+$|/$", name)
    }
    assert not [name for name in listed if not (ROOT / name).exists()]
    files = {f"tunix_torch/{path.name}" for path in (ROOT / "tunix_torch").glob("*.py")} - {"tunix_torch/__init__.py"}
    files |= {path.name for path in ROOT.glob("*.py")}
    assert not files - listed


@pytest.mark.parametrize(
    "target, command",
    [
        ("train", "train.py --use_grpo"),
        ("train-quick", "run_training.py +experiment=quick_test"),
        ("train-show-config", "run_training.py --cfg job"),
        ("train-sweep", "run_training.py --multirun"),
        ("evaluate", "evaluate.py"),
        ("tensorboard", "tensorboard --logdir"),
        ("check-device", "verify_tpu_setup"),
        ("crosscheck", "-m crosscheck"),
    ],
)
def test_make_has_the_documented_targets(target, command):
    result = subprocess.run(
        ["make", "--dry-run", "--old-file", ".venv/.installed", target], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0 and command in result.stdout, result.stdout + result.stderr


def test_names_of_the_notebook_are_names_here(tmp_path):
    args = GRPOConfig(
        output_dir=str(tmp_path),
        num_generations=4,
        max_prompt_length=256,
        max_response_length=512,
        learning_rate=1e-6,
        num_training_steps=500,
        batch_size=4,
        kl_coef=0.1,
        clip_range=0.2,
        temperature=0.9,
    )
    assert (args.num_completions_per_prompt, args.generation_max_length, args.max_steps) == (4, 512, 500)
    assert (args.per_device_train_batch_size, args.beta, args.epsilon) == (4, 0.1, 0.2)
    assert args.generation_temperature == 0.9


def test_defaults_of_the_hackathon_trainer_are_defaults_here(tmp_path):
    documented = {
        "num_completions_per_prompt": 4,
        "generation_max_length": 256,
        "generation_temperature": 0.8,
        "generation_top_p": 0.9,
        "generation_top_k": 50,
        "normalize_advantages": True,
        "advantage_epsilon": 1e-8,
        "use_kl_penalty": True,
        "kl_penalty_coef": 0.01,
    }
    args = GRPOConfig(output_dir=str(tmp_path))
    assert {name: getattr(args, name) for name in documented} == documented


@pytest.mark.parametrize("shape", ["2,4", ((2, 4), ("fsdp", "tp")), [[2, 4], ["fsdp", "tp"]]])
def test_a_mesh_may_be_given_either_way(shape):
    config = ModelConfig(mesh_shape=shape)
    assert config.mesh == ((2, 4), ("fsdp", "tp"))
    assert ModelConfig(mesh_shape=config.mesh_shape, mesh_axes=config.mesh_axes) == config
    for wrong in ("2,x", "2", "0,4", [[2, 4]], ((2, 4), ("rows", "tp")), 8):
        with pytest.raises(ValueError, match="mesh_"):
            ModelConfig(mesh_shape=wrong)
