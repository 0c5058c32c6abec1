"""Load models, adapters and tokenizers by name, put a LoRA on a model, and place it on the device."""

import contextlib
import dataclasses
import logging
import os
import re
from collections.abc import Collection, Container, Iterator, Sequence
from pathlib import Path
from pickle import UnpicklingError

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from peft.utils.other import ModulesToSaveWrapper
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import get_last_checkpoint

from ..config.files import load_config
from ..config.hub import require_hub_for_model
from ..config.model import ModelConfig
from ..config.saved import BASE_WEIGHTS, RUN_FILE, is_folder_of_run
from ..runtime import device, fsdp, mesh, tensor_parallel, together
from ..runtime.fsdp import Splitting
from ..runtime.sharding import shard_model
from . import tiny
from .adapter import ADAPTER_CONFIG, read_lora
from .fingerprint import fingerprint_of
from .forward import base_model, own_layer

logger = logging.getLogger(__name__)

TESTED_MODEL_TYPES = ("gemma2", "gemma3_text", "gemma3", "gemma4_text", "gemma4", "llama", "qwen3")
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# The parts of models that also see or hear, which do not run on text.
NOT_TEXT = r".*(vision_tower|audio_tower|multi_modal_projector).*"


def default_dtype() -> torch.dtype:
    """bfloat16 on a TPU and on CUDA. float32 where a CPU computes, be it through XLA or not."""
    return torch.bfloat16 if device.is_accelerator() else torch.float32


def torch_dtype(name: str) -> torch.dtype:
    """The type that `ModelConfig.model_dtype` names."""
    return default_dtype() if name == "auto" else getattr(torch, name)


def resolve_model_name(name: str) -> str:
    """The folder or hub id that `from_pretrained` takes. The model "tiny" is made when it is first used.

    Raises:
        ValueError: the name is a folder that holds no model.
    """
    if name == tiny.NAME or (not os.path.exists(name) and Path(name).name.startswith(tiny.FOLDER_PREFIX)):
        return str(_tiny_folder(Path(name).name))
    check_folder(name, f"model_name={name!r}", ("config.json", ADAPTER_CONFIG))
    return name


def check_folder(name: str, what: str, configs: Collection[str] = ("config.json",)) -> None:
    """Make sure that what is a folder by its name has a config and weights. Any other name is taken for a hub id.

    Args:
        name: a folder or a hub id.
        what: what the user gave, for error messages: "model_name='x'".
        configs: the files of which it must have one.

    Raises:
        ValueError: there is no such folder, or it holds no model.
    """
    if os.path.isdir(name):
        files = os.listdir(name)
        if not any(config in files for config in configs):
            newest = get_last_checkpoint(name)
            hint = f"; it has {newest}: give that, or let the trainer call save_model()" if newest else ""
            raise ValueError(f"{what}: the folder has no config.json, so it is not a Hugging Face model{hint}")
        if not any(file.endswith((".safetensors", ".bin", ".safetensors.index.json")) for file in files):
            raise ValueError(f"{what}: {_why_no_weights(name)}")
    elif name.startswith((".", "/", "~")):
        raise ValueError(f"{what}: no such folder")


def _why_no_weights(folder: str) -> str:
    """Why a folder that has a config has no weights, and what to give instead."""
    if newest := get_last_checkpoint(folder):
        return f"the run has not ended; its newest checkpoint is {newest!r}, give that"
    if is_folder_of_run(folder):
        return "a run that has no checkpoint yet, so there is no model; wait until it has saved one (save_steps)"
    return "the folder has no weights (expected model.safetensors)"


def _tiny_folder(name: str) -> Path:
    """The folder of the tiny model that an adapter names, wherever it was made. The present version is made here."""
    folder = tiny.cache_folder() / name
    if name in (tiny.NAME, tiny.folder_name()) or not (folder / "config.json").is_file():
        if name not in (tiny.NAME, tiny.folder_name()):
            logger.warning(
                "The adapter was trained on %s; this version makes %s, which may differ", name, tiny.folder_name()
            )
        return tiny.ensure_tiny_model()
    return folder  # of another version, which has made it on this machine


@contextlib.contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """Turn whatever goes wrong when a model is loaded into a ValueError of one line."""
    try:
        yield
    except UnpicklingError as error:
        reason = "its weights are a pickle with more than tensors in it, which could run code; give it as safetensors"
        raise ValueError(f"model_name={name!r} could not be loaded: {reason}") from error
    except (
        Exception
    ) as error:  # what a damaged config or tokenizer makes Transformers and PEFT do is not foreseen there
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"model_name={name!r} could not be loaded: {reason} ({_what_to_do(name)})") from error


def _what_to_do(name: str) -> str:
    """What may help where a model can't be loaded."""
    if name == tiny.NAME or Path(name).name.startswith(tiny.FOLDER_PREFIX):
        folder = tiny.cache_folder() / tiny.folder_name()
        return f"the folder {str(folder if name == tiny.NAME else name)!r} is damaged; delete it, and it is made again"
    if Path(name).is_dir():
        return "the folder is damaged, or holds no model; write it again"
    return "check the name, accept the licence on huggingface.co and run `hf auth login`, or give a local folder"


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, an adapter folder or a hub id. A missing padding token becomes the EOS token.

    Raises:
        ValueError: the tokenizer can't be found or read.
    """
    path = resolve_model_name(name)
    with _hub_errors(name):
        require_hub_for_model(path)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base_model(name: str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A causal language model with its weights, on the CPU.

    Args:
        name: "tiny", a folder or a hub id.
        dtype: the type of the weights; None means `default_dtype()`.

    Raises:
        ValueError: the name is unknown, weights are missing or cut short, or the hub can't be reached.
    """
    path = resolve_model_name(name)
    with _hub_errors(name):
        require_hub_for_model(path)
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        # sdpa has no soft-cap on attention scores, so Gemma 2 would be silently wrong with it
        attention = "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else "sdpa"
        model, loading = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype or default_dtype(),
            attn_implementation=attention,
            output_loading_info=True,
            trust_remote_code=False,
        )
    _require_all(name, loading["missing_keys"])  # Transformers would fill them in at random
    if model.config.model_type not in TESTED_MODEL_TYPES:
        logger.warning("Model type %r is not among the tested ones: %s", model.config.model_type, TESTED_MODEL_TYPES)
    return model


def _require_all(name: str, missing: Collection[str]) -> None:
    if missing:
        lost = f"{len(missing)} weights are missing, such as {min(missing)}"
        raise ValueError(f"model_name={name!r}: {lost} ({_what_to_do(name)})")


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that the chat template writes after an answer (Gemma: <end_of_turn>), or the EOS token."""
    if tokenizer.chat_template is None:
        return tokenizer.eos_token_id
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "@answer@"}]
    after = tokenizer.apply_chat_template(messages, tokenize=False).partition("@answer@")[2]
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    return ids[0] if ids and ids[0] in tokenizer.all_special_ids else tokenizer.eos_token_id


def eos_token_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer, by the tokenizer, the chat template or the model's generation config."""
    configured = base_model(model).generation_config.eos_token_id
    configured = configured if isinstance(configured, list | tuple) else [configured]
    return sorted({*configured, tokenizer.eos_token_id, end_of_turn_id(tokenizer)} - {None})


def lora_config(config: ModelConfig) -> LoraConfig:
    """The LoRA that a `ModelConfig` describes. It is on every projection of attention and MLP, not on embeddings."""
    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=LORA_TARGETS,
        task_type="CAUSAL_LM",
    )


def base_model_name(name: str) -> str:
    """The base model that an adapter's folder names. Any other name is returned as it is.

    Raises:
        ValueError: the adapter's config can't be read, or names no base model, or a folder that is not there.
    """
    if not (Path(name) / ADAPTER_CONFIG).is_file():
        return name
    base = read_lora(name).base_model_name_or_path
    if not base:
        raise ValueError(f"model_name={name!r}: its {ADAPTER_CONFIG} does not name the base model")
    if not Path(base).name.startswith(tiny.FOLDER_PREFIX):  # which is made where it is not there
        try:
            check_folder(base, repr(base))
        except ValueError as error:
            hint = (
                f"put it there, start where the path leads to it, or change base_model_name_or_path in {ADAPTER_CONFIG}"
            )
            raise ValueError(f"model_name={name!r}: its base model is not to be found: {error}; {hint}") from error
    return base


def load_model(name: str, dtype: torch.dtype | None = None) -> PreTrainedModel | PeftModel:
    """A base model, or where `name` is an adapter's folder, its base model with the adapter. It is ready to answer."""
    base_name = base_model_name(name)
    if base_name == name:
        return load_base_model(name, dtype)
    resolve_model_name(name)  # complains when the folder has no weights
    base, weights = load_base_model(base_name, dtype), Path(name) / "adapter_model.safetensors"
    saved: dict[str, int] = {}  # rows of each saved matrix
    with _hub_errors(name):
        if weights.is_file():
            with safe_open(weights, framework="pt") as file:
                saved = {key: file.get_slice(key).get_shape()[0] for key in file.keys()}
        resized = _resize_embeddings(base, saved)
        model = PeftModel.from_pretrained(base, name)
        if saved:
            _require_all(name, set(get_peft_model_state_dict(model, save_embedding_layers=False)) - set(saved))
    if not resized and together.is_first():  # the rows that were added have other numbers in each process
        _warn_of_another_base(model, Path(name) / RUN_FILE, saved)
    return model


def _warn_of_another_base(model: PeftModel, of_run: Path, saved: Container[str]) -> None:
    """Say so where the base model is not the one that an adapter was trained on, as far as its run has noted that."""
    trained_on = load_config(of_run).get(BASE_WEIGHTS) if of_run.is_file() else None
    if trained_on is None:
        return
    own = [tensor for name, tensor in model.state_dict(keep_vars=True).items() if name in saved]
    found = fingerprint_of(model, own)
    if found != trained_on:
        what = f"the base model in {base_model_name(str(of_run.parent))} is not the one that it was trained on"
        logger.warning("%s: %s (%s, and it was %s)", of_run.parent, what, found, trained_on)


def _resize_embeddings(base: PreTrainedModel, saved: dict[str, int]) -> bool:
    """Resize the embeddings to those that were saved with an adapter, since its run may have added tokens.

    Returns:
        whether they had another size.
    """
    embeddings = base.get_input_embeddings()
    place = next(module for module, found in base.named_modules() if found is embeddings)
    rows = saved.get(f"base_model.model.{place}.weight", embeddings.weight.shape[0])
    if rows == embeddings.weight.shape[0]:
        return False
    base.resize_token_embeddings(rows, mean_resizing=False)
    return True


def add_lora(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """Put a new LoRA on a model. It is float32 whatever the base weights are, and at first changes nothing (B = 0)."""
    if config.exclude_modules is None and any(re.fullmatch(NOT_TEXT, name) for name, _ in model.named_modules()):
        config = dataclasses.replace(config, exclude_modules=NOT_TEXT)
    return get_peft_model(model, config, autocast_adapter_dtype=True)


def place(model: nn.Module, splitting: Splitting | None = None, whole: Sequence[nn.Parameter] = ()) -> nn.Module:
    """Move a model to this process's device. Tied embeddings come untied on XLA, so they are tied again.

    Its weights are spread over the mesh, or over the processes of one, where there is one.

    A model in float32 computes with float32's precision: with less, a TPU would round the effect of a young LoRA away.
    Its layers stay of the classes that they are, see `decoding.fast_layers`. The form of attention is up to the
    `Sampler`.

    Args:
        splitting: split the weights over the processes; None: each process has all.
        whole: the weights that each process has all of even then.
    """
    base = base_model(model)
    if base.dtype == torch.float32:
        device.multiply_exactly()
    if tensor_parallel.is_split_along_tp():
        new = tensor_parallel.split(model, NOT_TEXT)
        whole = [new.get(parameter, parameter) for parameter in whole]
    if splitting is None:
        model.to(device.torch_device())
    else:
        fsdp.split(base, *_units(base), whole, splitting)
    if base.config.get_text_config().tie_word_embeddings:
        _tie_embeddings(base)
    _share_constants(model)
    if mesh.has_mesh():
        shard_model(model, base.config.get_text_config().num_key_value_heads)
    return model


def _units(base: PreTrainedModel) -> tuple[list[nn.Module], list[nn.Module]]:
    """The parts of a model whose weights are gathered when they run, its layers and then the text model with all else
    but the head; and those that do not run on text."""
    decoder = base.get_decoder()
    unused = {name: module for name, module in base.named_modules() if re.fullmatch(NOT_TEXT, name)}
    outermost = [module for name, module in unused.items() if name.rpartition(".")[0] not in unused]
    return [*decoder.layers, decoder], outermost


def _share_constants(model: nn.Module) -> None:
    """Let layers that `modules_to_save` has copied use the constants of the originals, such as Gemma's embedding scale.

    XLA gives equal scalars one place in its memory, and a compiled step must be able to tell its inputs apart.
    """
    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            for copied in wrapper.modules_to_save.values():
                for own, other in zip(wrapper.original_module.modules(), copied.modules(), strict=True):
                    constants = own._buffers.keys() & own._non_persistent_buffers_set
                    other._buffers.update({name: own._buffers[name] for name in constants})


def _tie_embeddings(base: PreTrainedModel) -> None:
    head, embeddings = own_layer(base.get_output_embeddings()), own_layer(base.get_input_embeddings())
    if head is base.get_output_embeddings() and embeddings is base.get_input_embeddings():
        base.tie_weights()
    else:  # Transformers can't tie what PEFT has wrapped
        head.weight = embeddings.weight
    assert head.weight is embeddings.weight, "embeddings came untied"
