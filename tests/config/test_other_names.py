"""Settings take the names, and have the defaults and forms, that the documents of other systems promise."""

import re

import pytest

from tunix_torch import GRPOConfig, ModelConfig
from tunix_torch.config.flags import parse_job


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


def test_a_value_that_cannot_be_is_refused_by_our_name_and_the_one_that_was_given(tmp_path):
    file = tmp_path / "job.json"
    file.write_text('{"clip_range": -1}')
    for make, words in (
        (lambda: GRPOConfig(beta=-1), "kl_penalty_coef (beta)=-1: "),
        (lambda: GRPOConfig(kl_penalty_coef=-1), "kl_penalty_coef=-1: "),
        (lambda: parse_job(["--use_grpo", "--beta=-1"]), "kl_penalty_coef (beta)=-1.0: "),
        (lambda: parse_job(["--use_grpo", "--config", str(file)]), "epsilon (clip_range)=-1.0: "),
    ):
        with pytest.raises(ValueError, match="^" + re.escape(words)):
            make()


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
