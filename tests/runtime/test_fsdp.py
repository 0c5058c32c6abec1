"""Two processes that split the weights by FSDP2 give what one process gives that holds all of them.

They talk through gloo on the CPU, as processes of several GPUs under `accelerate launch` talk through NCCL.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent.parent
STEPS, PROMPTS = 4, 4  # of each case; the prompts of all processes together

JOB = """
import gc, sys, torch
from transformers import TrainerCallback
from tunix_torch import GRPOConfig, TunixTrainer
from tunix_torch.model import tiny
from tunix_torch.runtime import fsdp, together

folder, root, steps, prompts, others, only = *sys.argv[1:3], *map(int, sys.argv[3:5]), *sys.argv[5:]

def digits_reward(prompts, completions, **columns):
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]

def trained(trainer):
    return {n: fsdp.whole(p).detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}

class Recorder(TrainerCallback):
    def on_pre_optimizer_step(self, *args, **kwargs):
        learning = [(n, p) for n, p in trainer.model.named_parameters() if p.requires_grad]
        gradients.append({n: fsdp.whole(p.grad).clone() for n, p in learning})

    def on_step_end(self, *args, **kwargs):
        gc.collect()
        tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor)]
        memory = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in map(fsdp.own_part, tensors)}
        held.append(sum(memory.values()))

half, saved = {"save_strategy": "steps", "save_steps": 2}, {"eval_strategy": "steps", "eval_steps": 2}
whole = {"adam_epsilon": 1e-2, "learning_rate": 1e-3}
others_half = {"allow_changes": ["processes", "per_device_train_batch_size"]}
CASES = {
    "lora": half | saved | {"num_eval_completions": 2, "eval_on_start": True},
    "whole": half | saved | whole | {"sync_ref_model": True, "ref_model_sync_steps": 2, "gather_for_rollout": False},
    "lora resumed": {}, "whole resumed": whole | {"sync_ref_model": True, "ref_model_sync_steps": 2},
    "lora of others": others_half,
    "whole of others": others_half | whole | {"sync_ref_model": True, "ref_model_sync_steps": 2},
}
GRPOConfig(output_dir=root)  # joins the processes
for case, settings in CASES.items():
    if only != "all" and case not in only.split(","):
        continue
    settings = {
        "output_dir": f"{root}/{case}" if together.index() == 0 else f"{root}/not-the-first/{case}",
        "per_device_train_batch_size": prompts // together.count(), "max_steps": steps, "learning_rate": 1e-2,
        "adam_epsilon": 1e-3,  # else where a gradient is nearly 0, its rounding decides where the weight goes
        "num_completions_per_prompt": 2, "generation_max_length": 12, "max_prompt_length": 40, "system_message": "",
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "per_device_eval_batch_size": 4,
    } | settings | ({"fsdp": "full_shard"} if together.count() > 1 else {})
    if together.count() == 1:
        settings.pop("gather_for_rollout", None)
    args = GRPOConfig(**settings)
    name, _, which = case.partition(" ")
    rows, eval_rows = tiny.arithmetic_rows("train", 64), tiny.arithmetic_rows("test", 7)
    gradients, completions, held = [], [], []
    trainer = TunixTrainer(folder, digits_reward, args, rows, eval_rows, callbacks=[Recorder()], full=name == "whole")
    parameters = list(trainer.model.parameters())
    bytes_of = lambda x: x.numel() * x.element_size()
    sizes = sum(map(bytes_of, parameters)), sum(bytes_of(fsdp.own_part(p)) for p in parameters)
    sample = trainer.sample_completions_for_prompts
    def recording_sample(prompts):
        rollout = sample(prompts)
        completions.append(together.gather_rows(rollout.completion_ids))
        return rollout
    trainer.sample_completions_for_prompts = recording_sample
    earlier = {"resumed": f"{root}/{name}/checkpoint-2", "of others": f"{others}/{name}/checkpoint-2"}.get(which)
    trainer.train(resume_from_checkpoint=earlier)
    trainer.save_model()
    weights = trained(trainer)
    result = {"gradients": gradients, "completions": completions, "weights": weights, "held": held, "sizes": sizes,
              "answers": trainer.last_answers and trainer.last_answers.completions, "log": trainer.state.log_history}
    everyones = together.gather(weights)
    assert all(torch.equal(everyones[0][name], other[name]) for other in everyones for name in other)
    if together.index() == 0:
        torch.save(result, f"{root}/{case}.pt")
    del trainer, parameters, weights, everyones
"""
