"""Run a small training job in this process, and read what it leaves on the disk."""

import json
from pathlib import Path

from benchmarks.torture import TIMED
from tunix_torch import DataConfig, GRPOConfig, ModelConfig, train

SMALL = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "generation_max_length": 8,
    "max_prompt_length": 48,
    "per_device_eval_batch_size": 4,
    "system_message": "",
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "report_to": "none",
    "disable_tqdm": True,
}


def run(model, output_dir, judge=None, lora_rank=16, **settings):
    """Run a whole job in this process, and return its trainer."""
    args = GRPOConfig(output_dir=str(output_dir), **(SMALL | settings))
    data = DataConfig(num_train_rows=16, num_eval_rows=4, judge=judge)
    return train(ModelConfig(model, lora_rank=lora_rank), data, args)


def files(folder):
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes())
        for path in Path(folder).rglob("*")
        if path.is_file() and path.name != "run.lock"
    }


def left_by(folder):
    """What a run has left in its folder, as far as it does not depend on time."""
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return {
        "adapter": (Path(folder) / "adapter_model.safetensors").read_bytes(),
        "metrics": [{name: v for name, v in row.items() if not name.endswith(TIMED)} for row in rows],
        "files": sorted(path.name for path in Path(folder).iterdir() if path.name != "previous"),
    }
