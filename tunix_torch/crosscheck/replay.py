"""Replay the learning steps that a run recorded (`train.py --save_batches K`) through Tunix, and compare.

The run may have been made on another machine and device.
"""

import copy
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import snapshot_download
from torch import nn

from .. import GRPOConfig, ModelConfig, load_tokenizer
from ..config.files import load_config
from ..config.saved import config_file
from ..learn.record import FOLDER, StepRecord
from ..model.loading import base_model_name, eos_token_ids, load_base_model, resolve_model_name
from . import tunix_side
from .compare import LOGPS, Row, compare_step, count_of_steps, largest_difference, tunix_updates
from .differences import float64_logps, plain_logps
from .tunix_lora import TunixPolicy

# Tolerance of trained adapters: the root mean square of their difference, relative to that of their movement since the
# start. Single entries cannot be compared: AdamW divides a gradient by its own size, so that for a gradient of almost 0
# the rounding error decides in which direction the entry moves.
MOVEMENT = 0.02
# A trained model may be ill-conditioned at a token: the tiny one's plain Hugging Face forward is 1.5e-5 off its own
# float64 at one token of 3,800, and 3e-7 at most others. Two sides that round in different orders may then be as far
# apart as this many times the error of that forward.
ROUNDINGS = 4.0


def load_run(output_dir: Path) -> tuple[ModelConfig, GRPOConfig, dict[int, StepRecord]]:
    """Return a run's settings, and its recorded steps by number, oldest first.

    Raises:
        ValueError: the folder is not that of a run, it has no recorded steps, or they cannot be replayed exactly.
    """
    config, run = config_file(output_dir), f"from_run={str(output_dir)!r}"
    if not config.is_file():
        raise ValueError(f"{run}: no config.json there, so it is not an output_dir of train.py")
    settings = load_config(config) | {"device": "auto", "report_to": "none"}

    def pick(cls: type) -> dict[str, object]:
        return {field.name: settings[field.name] for field in dataclasses.fields(cls) if field.name in settings}

    model_config, args = ModelConfig(**pick(ModelConfig)), GRPOConfig(**pick(GRPOConfig))
    if model_config.trains_all:
        raise ValueError(f"{run}: it trained all weights, and only steps of a LoRA are replayed")
    files = sorted((output_dir / FOLDER).glob("step-*.safetensors"))
    if not files:
        raise ValueError(f"{run}: no recorded steps; run train.py with --save_batches 3")
    records = {int(file.stem.removeprefix("step-")): StepRecord.load(file) for file in files}
    dtype = records[min(records)].model_dtype
    if dtype != "float32":
        raise ValueError(f"{run}: it computed in {dtype}, too coarse to compare; run it with --model_dtype float32")
    if model_config.lora_dropout:
        raise ValueError(f"lora_dropout={model_config.lora_dropout}: its noise cannot be replayed; set it to 0")
    return model_config, args, records


def base_folder(model_name: str) -> Path:
    """Return the folder with the base model's weights. A hub id that is not in the cache is downloaded.

    Raises:
        ValueError: the download fails, or the model is an adapter with a kind of scaling that Tunix's LoRA lacks.
    """
    adapter = Path(model_name) / "adapter_config.json"
    if adapter.is_file():  # the run trained an adapter further, whose weights are in the records
        settings = json.loads(adapter.read_text())
        for name in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern"):
            if settings.get(name):
                raise ValueError(f"{name}={settings[name]!r} of {model_name}: Tunix's LoRA has no like of it")
    folder = resolve_model_name(base_model_name(model_name))
    if not Path(folder).is_dir():
        try:
            folder = snapshot_download(folder, allow_patterns=["*.safetensors", "*.json"])
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"model_name={model_name!r}: neither in the cache nor to be downloaded: {reason}"
            ) from error
    return Path(folder)


def replay(output_dir: Path) -> Iterator[Row]:
    """Compare what the run computed with what Tunix computes from the run's own weights, batches and settings.

    Raises:
        ValueError: see `load_run` and `base_folder`; also for a model that Tunix does not have.
    """
    model_config, args, records = load_run(output_dir)
    folder, first = base_folder(model_config.model_name), records[min(records)]
    base = load_base_model(str(folder))
    ends = eos_token_ids(base, load_tokenizer(model_config.model_name))
    shapes = {name: tuple(weights.shape) for name, weights in first.lora.items()}
    text = base.config.get_text_config()
    tunix = TunixPolicy(folder, text, shapes, model_config.lora_rank, model_config.lora_alpha)
    for number, record in records.items():
        case, ids = f"step {number}", record.batch.completion_ids.numpy()
        mask = tunix_side.completion_mask(np.where(np.isin(ids, ends), ends[0], ids), ends[0])
        yield Row(case, "completion mask", largest_difference(record.batch.completion_mask, mask), 0.0)
        learns = bool(record.batch.advantages.any())
        for row in compare_step(case, record, args, tunix, base, per_matrix=not learns):
            if learns or row.quantity != "LoRA gradients":  # without advantages these are only rounding errors
                scaling = model_config.lora_alpha / model_config.lora_rank
                yield judged_by_rounding(row, record, base, scaling, args.generation_temperature)
        if not learns:
            print(f"{case}: all rewards are equal, so there is no gradient to compare")
    yield from _compare_updates(records, args, tunix)


def judged_by_rounding(row: Row, record: StepRecord, base: nn.Module, scaling: float, temperature: float) -> Row:
    """Return a row of the table as it is, or with a larger tolerance where float32 itself can't keep the usual one.

    It is asked only for log-probabilities that are too far apart. The plain Hugging Face model then computes them in
    float32 and in float64, each row alone; how far apart these two are tells what float32 costs on this batch.

    Args:
        base: the model without any LoRA, float32.
        scaling: of the recorded LoRA.
    """
    if row.verdict == "pass" or not row.quantity.endswith("log-probabilities"):
        return row
    model = base if row.quantity.startswith(("base", "reference")) else with_lora(base, record.lora, scaling)
    exact = float64_logps(model, record.batch, temperature)
    rounding = largest_difference(plain_logps(model, record.batch, temperature), exact)
    note = f"a plain float32 forward is {rounding:.1e} off float64 here"
    return dataclasses.replace(row, tolerance=max(LOGPS, ROUNDINGS * rounding), note=note)


def with_lora(base: nn.Module, lora: dict[str, torch.Tensor], scaling: float) -> nn.Module:
    """Return a copy of the base model whose weights hold the LoRA: W + scaling * B A."""
    model = copy.deepcopy(base)
    weights = dict(model.named_parameters())
    for name, a in lora.items():
        if ".lora_A." in name:
            b = lora[name.replace(".lora_A.", ".lora_B.")]
            layer = name.removeprefix("base_model.model.").partition(".lora_A.")[0]
            weights[f"{layer}.weight"].data += (scaling * (b.double() @ a.double())).to(b.dtype)
    return model


def _compare_updates(records: dict[int, StepRecord], args: GRPOConfig, tunix: TunixPolicy) -> Iterator[Row]:
    numbers = list(records)
    for obstacle, reason in (
        (numbers != list(range(1, len(numbers) + 1)), "the first step of the run is not recorded"),
        (len(numbers) < 2, "only one step is recorded"),
        (args.num_iterations > 1, "num_iterations > 1 steps several times a batch"),
        (args.optim != "adamw_torch", f"optim={args.optim} is not AdamW"),
    ):
        if obstacle:
            print(f"parameters after optimizer steps are not compared: {reason}")
            return
    start = records[1].lora
    for number, theirs in enumerate(tunix_updates([records[n] for n in numbers[:-1]], args, tunix), start=1):
        ours = records[number + 1].lora
        gap = sum(np.square(ours[name].double().numpy() - theirs[name]).sum() for name in theirs)
        moved = sum((ours[name] - start[name]).double().square().sum().item() for name in theirs)
        if number in (1, len(numbers) - 1):
            note = "relative to how far they moved"
            share = np.sqrt(gap / moved) if moved else float("inf" if gap else 0)  # 0: no step had anything to learn
            yield Row("run", f"parameters after {count_of_steps(number)}", float(share), MOVEMENT, note)
