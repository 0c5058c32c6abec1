"""Merges an adapter into its base model, and proves that the plain Hugging Face model computes the same logits.

Of a run that trained all weights there is nothing to merge: its model is written in another type, and proved likewise.
"""

import contextlib
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import huggingface_hub
import torch
from huggingface_hub.utils import validate_repo_id
from peft import PeftConfig, PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..checkpoints.card import CARD_FILE, CURVES_FILE, CardFacts
from ..checkpoints.files import has_final_files, newest_checkpoint
from ..checkpoints.merged_card import card_of_merged
from ..config.files import write_whole
from ..config.model import STORED_DTYPES
from ..config.saved import is_folder_of_run
from ..model.forward import base_model, text_config
from ..model.loading import load_model, load_tokenizer, resolve_model_name
from ..model.whole import record_attention
from .folder import find_prompt_settings, find_system_message

TOLERANCE = 1e-4  # the largest difference of float32 logits, in units of their standard deviation
PROBE_SHAPE = (4, 32)  # rows and tokens of the prompt on which logits are compared
PROBE_VOCABULARY = 50_000  # its tokens lie below the placeholders for images and sound, which need an image


def export_merged(
    output_dir: str | Path, merged: str | Path, dtype: str | None = None, push_to_hub: str | None = None
) -> float:
    """Write base model + adapter, or a model that was trained whole, as a plain Hugging Face model with its tokenizer.

    The merge is done on the CPU in float32. The written folder is loaded again and must compute the same logits. The
    folder `merged` appears only when it is whole and proved, and its config.json has the run's `system_message`. The
    image processor of a model that also sees is not copied.

    Args:
        output_dir: a run's folder, one of its checkpoints, or any folder with a LoRA.
        merged: the folder to write. It must not exist or be empty. Missing parent folders are made.
        dtype: the type of the written weights, "float32" or "bfloat16". None means that of the stored base model, or of
            the model that was trained whole.
        push_to_hub: a hub repository (NAME/MODEL), to which the model and the tokenizer are then uploaded.

    Returns:
        the largest difference between the logits of the written model and those of what was trained, in units of the
        standard deviation of the latter. In float32 it is at most `TOLERANCE`; in bfloat16 rounding makes it larger.

    Raises:
        ValueError: there is no adapter, its base model can't be loaded, `merged` can't be written or is not empty, a
            name is unknown, or the upload failed. In the last case the written folder stays.
    """
    output_dir, merged = Path(output_dir), Path(merged).resolve()
    if dtype is not None and dtype not in STORED_DTYPES:
        raise ValueError(f"dtype={dtype!r}: choose one of {', '.join(STORED_DTYPES)}")
    if push_to_hub is not None:
        try:
            validate_repo_id(push_to_hub)
        except ValueError as error:
            raise ValueError(f"push_to_hub={push_to_hub!r}: expected NAME/MODEL: {error}") from error
    whole = _is_trained_whole(output_dir)
    base_name = str(output_dir) if whole else _find_base(output_dir)
    _check_target(merged, output_dir)
    tokenizer_source = str(output_dir) if (output_dir / "tokenizer_config.json").is_file() else base_name
    tokenizer = load_tokenizer(tokenizer_source)
    with _whole_or_nothing(merged) as unfinished:
        adapter = load_model(str(output_dir), torch.float32).eval()
        expected = probe_logits(adapter)
        model = adapter if whole else _merge(adapter, output_dir)
        difference = _largest_difference(probe_logits(model), expected)
        assert difference <= TOLERANCE, f"merging changed the logits by {difference:.1e} of their spread"

        written_dtype = getattr(torch, dtype) if dtype else _stored_dtype(base_name)
        record_attention(model.to(written_dtype))
        model.config.system_message = find_system_message(str(output_dir))  # for inference, which looks for it there
        for name, value in ({"wrap_prompts": True} | find_prompt_settings(str(output_dir))).items():
            setattr(model.config, name, value)
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        _write_card(output_dir, unfinished, merged, model, base_name, whole, push_to_hub)
        del adapter, model  # two models at once might not fit

        model, loading = AutoModelForCausalLM.from_pretrained(
            unfinished, dtype="auto", output_loading_info=True, trust_remote_code=False
        )
        assert not loading["missing_keys"] and not loading["unexpected_keys"], loading
        assert model.dtype == written_dtype, f"written as {written_dtype}, but loaded as {model.dtype}"
        difference = _largest_difference(probe_logits(model), expected)
        limit = TOLERANCE if written_dtype == torch.float32 else math.inf
        assert difference < limit, f"the written model's logits differ by {difference:.1e} of their spread"
    name = str(written_dtype).removeprefix("torch.")
    owner = "trained model's" if whole else "adapter's"
    print(f"Wrote {merged} ({name}); its logits differ from the {owner} by {difference:.1e} of their spread")
    if push_to_hub is not None:
        _push(push_to_hub, merged)
    return difference


def probe_logits(model: PreTrainedModel | PeftModel) -> Tensor:
    """The logits that a model computes on a fixed prompt of arbitrary tokens: (R, L, V) float32."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(text_config(model).vocab_size, PROBE_VOCABULARY), PROBE_SHAPE, generator=generator)
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.float()


def _largest_difference(logits: Tensor, expected: Tensor) -> float:
    return ((logits - expected).abs().max() / expected.std()).item()


def _is_trained_whole(output_dir: Path) -> bool:
    """Whether a folder is that of a run that trained all weights, or one of its checkpoints."""
    return has_final_files(output_dir) and not (output_dir / "adapter_config.json").is_file()


def _find_base(output_dir: Path) -> str:
    """The name of the base model in the config of this folder's LoRA."""
    given = f"output_dir={str(output_dir)!r}"
    if not output_dir.is_dir():
        raise ValueError(f"{given}: no such folder; expected a run's folder, or one of its checkpoints")
    if not (output_dir / "adapter_config.json").is_file():
        if newest := newest_checkpoint(output_dir):
            raise ValueError(f"{given}: the run has not ended; its newest checkpoint is {str(newest)!r}, give that")
        if is_folder_of_run(output_dir):
            raise ValueError(f"{given}: a run that has no checkpoint yet, so there is nothing to merge")
        if list(output_dir.glob("model*.safetensors")) or list(output_dir.glob("pytorch_model*.bin")):
            raise ValueError(f"{given}: a whole model already, not an adapter; there is nothing to merge")
        raise ValueError(f"{given}: not an adapter (no adapter_config.json); expected a run's folder or a checkpoint")
    try:
        config = PeftConfig.from_pretrained(output_dir)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{given}: its adapter_config.json can't be read: {error!r}") from error
    if config.peft_type != PeftType.LORA:
        raise ValueError(f"{given}: an adapter of type {config.peft_type!s}, expected a LoRA")
    if not config.base_model_name_or_path:
        raise ValueError(f"{given}: its adapter_config.json names no base model; set base_model_name_or_path there")
    try:
        resolve_model_name(config.base_model_name_or_path)
    except ValueError as error:
        hint = "put the base model there, or set base_model_name_or_path in adapter_config.json"
        raise ValueError(f"{given}: its base model is not to be found: {error}; {hint}") from error
    return config.base_model_name_or_path


def _check_target(merged: Path, output_dir: Path) -> None:
    """Refuse a folder that is in use, or that lies where training moves, deletes and uploads files."""
    given = f"merged={str(merged)!r}"
    if merged.exists() and not merged.is_dir():
        raise ValueError(f"{given}: is a file; give a new folder")
    if merged.is_relative_to(output_dir.resolve()):
        raise ValueError(f"{given}: lies in the adapter's own folder {str(output_dir)!r}; give a folder outside it")
    if merged.is_dir() and any(merged.iterdir()):
        raise ValueError(f"{given}: exists and is not empty; nothing is overwritten, give a new folder")


@contextlib.contextmanager
def _whole_or_nothing(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`. It takes that name when the block succeeds, and is removed otherwise."""
    unfinished = folder.with_name(f".{folder.name}.unfinished-{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished.mkdir()
        yield unfinished
        os.replace(unfinished, folder)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"merged={str(folder)!r}: can't be written: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _merge(adapter: PeftModel, output_dir: Path) -> PreTrainedModel:
    """The base model with the LoRA added to its weights."""
    inner = base_model(adapter)
    if text_config(adapter).tie_word_embeddings:
        for layer in (inner.get_input_embeddings(), inner.get_output_embeddings()):
            if isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper):
                raise ValueError(
                    f"output_dir={str(output_dir)!r}: the adapter changes the embeddings, which the model's head "
                    "shares; a plain model can't hold both, expected a LoRA on projections only"
                )
    model = adapter.merge_and_unload(safe_merge=True)  # complains of NaN
    if text_config(model).tie_word_embeddings:
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight, "embeddings came untied"
    return model


def _stored_dtype(name: str) -> torch.dtype:
    """The type that a model's config names. Without one it is float32, which loses nothing."""
    config = AutoConfig.from_pretrained(resolve_model_name(name), trust_remote_code=False)
    return config.dtype or config.get_text_config().dtype or torch.float32


def _write_card(
    output_dir: Path, unfinished: Path, merged: Path, model: PreTrainedModel, base: str, whole: bool, repo: str | None
) -> None:
    """Write the model card: the run's own one, where it has one, for the model that it now is."""
    if (output_dir / CURVES_FILE).is_file():
        shutil.copy(output_dir / CURVES_FILE, unfinished)
    facts = CardFacts(base, model.config.model_type, is_adapter=False, repo=repo or merged.name)
    write_whole(unfinished / CARD_FILE, f"{card_of_merged(output_dir, unfinished, facts, whole)}\n")


def _push(repo_id: str, merged: Path) -> None:
    """Upload the written folder, which stays, whatever happens."""
    given, stands = f"push_to_hub={repo_id!r}", f"the model in {str(merged)!r} is whole and stays"
    if huggingface_hub.get_token() is None:
        raise ValueError(f"{given}: no token, so nothing was uploaded; run `hf auth login` or set HF_TOKEN; {stands}")
    try:
        api = huggingface_hub.HfApi()
        repo_id = api.create_repo(repo_id, exist_ok=True).repo_id
        api.upload_folder(repo_id=repo_id, folder_path=merged, commit_message="Upload the merged model")
    except (OSError, ValueError, RuntimeError, httpx.HTTPError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{given}: the upload failed: {reason}; {stands}") from error
    print(f"Uploaded to {repo_id}")
