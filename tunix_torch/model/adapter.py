"""Finds the LoRA that learns, its matrices, and writes and reads its files in PEFT's layout."""

import json
import shutil
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.utils.other import ModulesToSaveWrapper
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from ..runtime import fsdp
from .forward import adapters_in_use, base_model, own_layer
from .origin import public_name

ADAPTER_CONFIG = "adapter_config.json"
REFERENCE_FILE = "reference.safetensors"  # in a checkpoint: the adapter of the reference policy, if it has one
ROWS_AT_ONCE = 2**14  # of embeddings that are compared at a time


# ---- which one, and its matrices ----


def choose_adapter(model: PeftModel) -> str:
    """The name of the adapter that is switched on, which is the one that learns.

    Raises:
        ValueError: it is no LoRA, or not exactly one adapter is switched on.
    """
    for name, config in model.peft_config.items():
        if not isinstance(config, LoraConfig):
            raise ValueError(
                f"model: its adapter {name!r} has a {type(config).__name__}, and only a LoRA can be trained"
            )
    active = adapters_in_use(model)
    if not active:
        hint = "call model.unmerge_adapter() or model.enable_adapter_layers(), or give the base model"
        raise ValueError(f"model: its adapter is merged into the weights or disabled, so it can't learn; {hint}")
    if len(active) > 1:
        raise ValueError(f"model: the adapters {', '.join(active)} act together; choose one by model.set_adapter(NAME)")
    return active[0]


def adapter_weights(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """The weights of an adapter by their parameter names. Frozen ones are among them.

    They are its matrices, the magnitudes of DoRA, and the copies of the layers that `modules_to_save` names.
    """

    # "...q_proj.lora_A.default.weight", "...lora_embedding_B.default", "...lm_head.modules_to_save.default.weight"
    def belongs(name: str) -> bool:
        parts = name.split(".")
        pairs = zip(parts, parts[1:], strict=False)
        return any(part.startswith(("lora_", "modules_to_save")) and after == adapter for part, after in pairs)

    return {name: parameter for name, parameter in model.named_parameters() if belongs(name)}


def make_trainable(weights: dict[str, nn.Parameter]) -> None:
    """Bring an adapter's matrices into float32, and let all of them learn if all are frozen, as after loading.

    Where some matrices learn and the user froze others, those stay frozen.
    """
    all_frozen = not any(weight.requires_grad for weight in weights.values())
    for weight in weights.values():
        weight.data = weight.data.float()  # an adapter is loaded in the type of the base weights
        weight.requires_grad_(weight.requires_grad or all_frozen)


def changes_nothing(weights: dict[str, nn.Parameter]) -> bool:
    """Whether a LoRA's matrices add nothing to the weights of the model: in every layer B is 0, or A is.

    Absolute values are summed, since the hosts of a mesh can't reduce booleans together on the CPU.
    """
    matrices = {n: w for n, w in weights.items() if ".lora_" in n and ".lora_magnitude_vector" not in n}
    if not matrices:
        return True
    sums = fsdp.whole(torch.stack([weight.detach().abs().sum() for weight in matrices.values()])).tolist()
    of_layer: dict[str, list[float]] = {}  # the sums of a layer's two matrices
    for name, total in zip(matrices, sums, strict=True):
        of_layer.setdefault(name.partition(".lora_")[0], []).append(total)
    return all(0 in totals for totals in of_layer.values())


def acts_as_base(model: nn.Module, adapter: str) -> bool:
    """Whether the model computes the same with an adapter as without it, up to rounding.

    Its matrices add nothing, its copies of layers equal these layers, and with DoRA the magnitudes are the norms of the
    weights.
    """
    if not changes_nothing(adapter_weights(model, adapter)):
        return False
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
            pairs = zip(module.original_module.parameters(), module.modules_to_save[adapter].parameters(), strict=True)
            if any(_distance(old, new) > 0 for old, new in pairs):
                return False
        elif adapter in getattr(module, "lora_magnitude_vector", {}):
            magnitude, weight = module.lora_magnitude_vector[adapter].weight, module.get_base_layer().weight
            if not isinstance(module.get_base_layer(), nn.Linear):
                return False  # then a copy of the adapter is the reference, which is right too
            norms = torch.linalg.norm(fsdp.whole(weight).detach().float(), dim=1)
            if _distance(norms, magnitude) > 1e-5 * float(norms.sum()):
                return False
    return True


def _distance(one: Tensor, other: Tensor) -> float:
    """The sum of absolute differences."""
    return float((fsdp.whole(one).detach().float() - fsdp.whole(other).detach().float()).abs().sum())


# ---- files ----


def check_same_lora(adapter: LoraConfig, folder: str | Path) -> None:
    """See that the weights of a checkpoint's LoRA mean the same in a model with this LoRA.

    Raises:
        ValueError: they would be scaled by another factor, or belong to another kind of LoRA.
    """
    if not (Path(folder) / ADAPTER_CONFIG).is_file():
        return
    saved = read_lora(folder)
    for name in ("r", "lora_alpha", "use_rslora", "use_dora"):
        given, there = getattr(adapter, name), getattr(saved, name, None)
        if given != there:
            raise ValueError(f"{name}={given!r}: the LoRA in {folder} has {there!r}; give that")


def read_lora(folder: str | Path) -> LoraConfig:
    """The LoRA that the adapter_config.json of a folder describes.

    Raises:
        ValueError: it can't be read, or describes no LoRA.
    """
    path = Path(folder) / ADAPTER_CONFIG
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # PEFT takes what the file holds as arguments, unchecked
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} can't be read: {reason}") from error
    if not isinstance(config, LoraConfig) or not isinstance(config.base_model_name_or_path, str | None):
        raise ValueError(f"{path} describes no LoRA")
    return config


def embedding_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of the embeddings by parameter name, and those of the head where it is not tied to them."""
    base = base_model(model)
    layers = (own_layer(base.get_input_embeddings()), own_layer(base.get_output_embeddings()))
    places = {id(layer.weight) for layer in layers}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in places}


def copied_embeddings(model: nn.Module) -> tuple[bool, bool]:
    """Whether the embeddings and the head are among `modules_to_save`, so that copies of them learn."""
    base = base_model(model)
    layers = base.get_input_embeddings(), base.get_output_embeddings()
    return tuple(isinstance(layer, ModulesToSaveWrapper) for layer in layers)


def has_new_embeddings(model: nn.Module) -> bool:
    """Whether the embeddings differ from those in the base model's folder, since they were resized or set.

    Where neither the folder nor a copy in the hub's cache is on this machine, they count as unchanged.
    """
    base = base_model(model)
    embeddings = own_layer(base.get_input_embeddings()).weight.detach()
    place = next(name for name, layer in base.named_modules() if layer is base.get_input_embeddings())
    for file in _weight_files(base.name_or_path):
        with safe_open(file, framework="pt") as weights:
            # a model that also sees has the text model's weights under a longer name than the text model itself
            names = [name for name in weights.keys() if name.endswith(f"{place.rpartition('.')[2]}.weight")]
            if len(names) != 1:
                continue
            stored = weights.get_slice(names[0])
            if stored.get_shape() != list(embeddings.shape):
                return True
            parts = range(0, len(embeddings), ROWS_AT_ONCE)
            return not all(
                torch.equal(stored[i : i + ROWS_AT_ONCE].to(embeddings.dtype), embeddings[i : i + ROWS_AT_ONCE].cpu())
                for i in parts
            )
    return False


def _weight_files(name: str) -> list[str]:
    """The safetensors files in a model's folder or in its copy in the hub's cache. There may be neither."""
    for file in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
        try:
            found = cached_file(name, file, local_files_only=True, _raise_exceptions_for_missing_entries=False)
        except (OSError, ValueError):  # such as an empty name, of a model that was made from a config
            found = None
        if found is not None and file == SAFE_WEIGHTS_NAME:
            return [found]
        if found is not None:
            names = json.loads(Path(found).read_text())["weight_map"].values()
            return [str(path) for name in sorted(set(names)) if (path := Path(found).parent / name).is_file()]
    return []


def save_adapter(
    model: PeftModel, adapter: str, weights: dict[str, Tensor], folder: str | Path, embeddings: bool
) -> None:
    """Write the matrices and the config of an adapter into a folder in PEFT's layout.

    Args:
        weights: CPU tensors by parameter name: the adapter's, and with `embeddings` also those of the embeddings.
    """
    folder, config = Path(folder), model.peft_config[adapter]
    if config.base_model_name_or_path:
        config.base_model_name_or_path = public_name(config.base_model_name_or_path)
    model.save_pretrained(
        str(folder), state_dict=weights, selected_adapters=[adapter], save_embedding_layers=embeddings
    )
    if adapter != "default":  # PEFT writes it into a folder of its name, where neither Transformers nor we would look
        for file in (folder / adapter).iterdir():
            shutil.move(file, folder / file.name)
        (folder / adapter).rmdir()


def save_reference(weights: dict[str, Tensor], checkpoint: str | Path) -> None:
    """Write the reference policy's matrices, CPU tensors by parameter name, into a checkpoint."""
    save_file({name: weight.contiguous() for name, weight in weights.items()}, Path(checkpoint) / REFERENCE_FILE)


def load_reference(checkpoint: str | Path, device: torch.device) -> dict[str, Tensor] | None:
    """The matrices that `save_reference` wrote; None where it wrote none.

    Raises:
        ValueError: the file is damaged.
    """
    file = Path(checkpoint) / REFERENCE_FILE
    if not file.is_file():
        return None
    try:
        return {name: weight.to(device) for name, weight in load_file(file).items()}
    except SafetensorError as error:
        raise ValueError(f"{file} can't be read: {error}") from error
