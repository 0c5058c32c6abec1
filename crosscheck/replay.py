"""Replay the steps that a run recorded (`train.py --save_batches K`) through Tunix, wherever the run took place."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import snapshot_download

from tunix_torch import GRPOConfig, ModelConfig
from tunix_torch.model import base_model, load_base_model, resolve_model_name
from tunix_torch.record import FOLDER, StepRecord

from .compare import Row, compare_step, compare_updates
from .tunix_side import TunixPolicy


def load_run(output_dir: Path) -> tuple[ModelConfig, GRPOConfig, list[StepRecord]]:
    """A run's settings and its recorded steps, oldest first.

    Raises:
        ValueError: not a run's folder, no recorded steps, or a run that cannot be replayed exactly.
    """
    config = output_dir / "config.json"
    if not config.is_file():
        raise ValueError(f"from_run={str(output_dir)!r}: no config.json there, so it is not a run's output_dir")
    settings = json.loads(config.read_text()) | {"device": "auto", "report_to": "none"}

    def pick(cls: type) -> dict[str, object]:
        return {field.name: settings[field.name] for field in dataclasses.fields(cls) if field.name in settings}

    model_config, args = ModelConfig(**pick(ModelConfig)), GRPOConfig(**pick(GRPOConfig))
    files = sorted((output_dir / FOLDER).glob("step-*.safetensors"))
    if not files:
        raise ValueError(f"from_run={str(output_dir)!r}: no recorded steps; run train.py with --save_batches 3")
    records = [StepRecord.load(file) for file in files]
    if records[0].model_dtype != "float32":
        raise ValueError(
            f"from_run={str(output_dir)!r}: it computed in {records[0].model_dtype}, too coarse to compare; "
            "run it with --model_dtype float32"
        )
    if model_config.lora_dropout:
        raise ValueError(f"lora_dropout={model_config.lora_dropout}: its noise cannot be replayed; set it to 0")
    return model_config, args, records


def replay(output_dir: Path) -> Iterator[Row]:
    """What the run computed against what Tunix computes from the run's own weights, batches and settings.

    Raises:
        ValueError: see `load_run`; or a model that Tunix has no like of.
    """
    model_config, args, records = load_run(output_dir)
    name = model_config.model_name
    adapter = Path(name) / "adapter_config.json"
    if adapter.is_file():  # an adapter that was trained further: the records hold its weights
        name = json.loads(adapter.read_text())["base_model_name_or_path"]
    folder = resolve_model_name(name)
    if not Path(folder).is_dir():
        folder = snapshot_download(folder, local_files_only=True)
    base = load_base_model(folder)
    shapes = {name: tuple(weights.shape) for name, weights in records[0].lora.items()}
    text = base_model(base).config.get_text_config()
    tunix = TunixPolicy(Path(folder), text, shapes, model_config.lora_rank, model_config.lora_alpha)
    for number, record in enumerate(records, start=1):
        yield from compare_step(f"step {number}", record, args, tunix, base)
    if len(records) > 1 and args.num_iterations == 1:
        after = sorted({1, len(records) - 1})
        yield from compare_updates("run", records[:-1], records[-1].lora, args, tunix, after, measure="rms")
