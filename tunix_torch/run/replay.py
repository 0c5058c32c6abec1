"""Computes a bad batch of a run again, row by row, and says which row and which quantity is not finite first."""

import dataclasses
import json
import math
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoints.files import checkpoints_of, is_whole
from ..config.grpo import GRPOConfig
from ..data.prompts import token_lists
from ..learn.bad_batches import BadBatch, load_bad_batch
from ..learn.first_bad import Row, look_at_rows
from ..model.adapter import adapter_weights
from ..model.checks import remove_dropout
from ..model.loading import add_lora, load_base_model, load_tokenizer, place, torch_dtype
from ..model.teacher import load_teacher
from ..runtime import device

MAX_TEXT = 300  # characters of a prompt or a completion that are shown


def replay(file: str | Path, weights: str | Path | None = None) -> int | None:
    """Print what is not finite in a bad batch, with the adapter that the model had.

    Args:
        file: one of `bad_batches/` in a run's folder.
        weights: of a run that trained all weights, the checkpoint whose weights are taken. None: the newest one before
            the step, or the model with which the run began where there is none.

    Returns:
        the number of the first row, from 0, that has such a quantity; None: no row by itself has one.

    Raises:
        ValueError: the file is no bad batch, or its base model can't be loaded.
    """
    record = load_bad_batch(Path(file))
    args = _settings(record)
    batch, what = record.batch, "pair" if record.kind == "pairs" else "row"
    rows = len(batch.completion_ids) // (2 if what == "pair" else 1)
    print(
        f"Step {record.step}, {record.kind}: {rows} {what}s, loss {record.loss:.4g}, gradient's norm {record.norm:.4g}"
    )
    bad = [name for name, tensor in record.weights.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        print(f"The weights were not finite before the step: {bad[0]}, and {len(bad) - 1} others")
        return None
    model, tokenizer, origin = _load(record, Path(file), weights)
    print(f"Base model {record.base_model} in {record.model_dtype} on {device.KIND}, {origin}\n")
    teacher = load_teacher(args.teacher, model, tokenizer)
    print(f"{what:>5}{'loss':>12}{'gradient':>12}  first that is not finite")
    found = []
    for row in look_at_rows(model, record, args, teacher, device.torch_device()):
        print(f"{row.number:>5}{row.loss:>12.4g}{row.norm:>12.4g}  {row.first or '-'}", flush=True)
        found.append(row)
    first = next((row for row in found if row.first is not None), None)
    print(f"\n{_verdict(found, first, what)}")
    if first is not None:
        _show_texts(record, first, tokenizer)
    return None if first is None else first.number


def _settings(record: BadBatch) -> GRPOConfig:
    settings = json.loads(record.settings) | {"device": "auto", "report_to": "none"}
    names = [field.name for field in dataclasses.fields(GRPOConfig)]
    args = GRPOConfig(**{name: settings[name] for name in names if name in settings})
    args.top_entropy_quantile = 1.0  # it is about all tokens of a batch
    return args


def _load(
    record: BadBatch, file: Path, weights: str | Path | None
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase, str]:
    """The model as it was before the step, its tokenizer, and words that say where its weights come from."""
    tokenizer, dtype = load_tokenizer(record.base_model), torch_dtype(record.model_dtype)
    if record.adapter:
        if weights is not None:
            raise ValueError(f"weights={str(weights)!r}: the file holds the weights of the adapter; leave it out")
        model = add_lora(load_base_model(record.base_model, dtype), LoraConfig(**json.loads(record.adapter)))
        own = adapter_weights(model, model.active_adapter)
        with torch.no_grad():
            for name, value in record.weights.items():
                own[name].copy_(value)
        origin = "with the adapter that the file holds"
    else:
        origin = f"with the weights of {weights}, as asked for"
        if weights is None:
            earlier = [f for f in checkpoints_of(file.absolute().parent.parent) if _step_of(f) < record.step]
            weights = next((folder for folder in earlier if is_whole(folder)), record.base_model)
            kept = "the newest checkpoint before the step" if earlier else "with which the run began"
            origin = f"with the weights of {weights}, {kept}: those of the step itself are not kept"
        model = load_base_model(str(weights), dtype)
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
    remove_dropout(model)
    return place(model), tokenizer, origin


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _verdict(rows: list[Row], first: Row | None, what: str) -> str:
    if first is not None:
        return f"First in {what} {first.number}: {first.first} is not finite."
    largest = max(rows, key=lambda row: row.norm)
    if math.isinf(largest.norm) or sum(row.norm**2 for row in rows) > torch.finfo(torch.float32).max:
        return f"Every {what} is finite by itself, but their sum overflows; {what} {largest.number} has the most."
    return (
        "Everything is finite when it is computed again here. So it was the device, or something outside of the batch, "
        "such as a hook on the model, or weights that differ from those here."
    )


def _show_texts(record: BadBatch, row: Row, tokenizer: PreTrainedTokenizerBase) -> None:
    """Print the texts of a row, shortened, without control characters."""
    batch, each = record.batch, 2 if record.kind == "pairs" else 1
    group = len(batch.completion_ids) // len(batch.prompt_ids)
    for number in range(row.number * each, (row.number + 1) * each):
        prompt = slice(number // group, number // group + 1)
        texts = {
            "prompt": token_lists(batch.prompt_ids[prompt], batch.prompt_mask[prompt])[0],
            "completion": token_lists(batch.completion_ids[[number]], batch.completion_mask[[number]])[0],
        }
        for name, ids in texts.items():
            print(f"  {name}: {ascii(tokenizer.decode(ids))[:MAX_TEXT]}")
