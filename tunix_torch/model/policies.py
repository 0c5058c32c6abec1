"""What a run trains of a model: an adapter, or all weights. What learns, what is saved, and what the reference is."""

import logging
from abc import ABC, abstractmethod
from pathlib import Path

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..runtime import fsdp, mesh, together
from .adapter import (
    acts_as_base,
    adapter_weights,
    check_same_lora,
    choose_adapter,
    copied_embeddings,
    embedding_weights,
    has_new_embeddings,
    make_trainable,
    save_adapter,
)
from .checks import KEEPS_BASE, check_directions, check_modules_to_save, check_peft_config
from .forward import base_model
from .whole import learning_weights, load_whole, make_float32, save_whole

logger = logging.getLogger(__name__)


class Policy(ABC):
    """The part of a model that learns. The trainer asks it what differs between an adapter and a whole model."""

    what: str  # what is saved, as a word for messages
    learns: str  # what may change, as words for messages
    # Whether the model without what learns is a policy too, which the reference can be without any copy.
    has_base: bool
    model: nn.Module
    base_weights: str | None = None  # see `fingerprint.py`; None: checkpoints hold all weights

    @abstractmethod
    def weights(self) -> dict[str, nn.Parameter]:
        """The weights that make this policy, by parameter name. Those that the user froze are among them.

        A copy of their values is all that a reference policy needs.
        """

    @abstractmethod
    def is_base(self) -> bool:
        """Whether the policy computes, as it is now, what the model computes without it."""

    @abstractmethod
    def to_save(self) -> dict[str, Tensor]:
        """All tensors that `save` writes, by their names in the model's state. They lie on the device."""

    @abstractmethod
    def save(self, weights: dict[str, Tensor], folder: str | Path) -> None:
        """Write what `to_save` gave, as CPU tensors, into a folder that `load_model` loads."""

    @abstractmethod
    def load(self, folder: str | Path) -> None:
        """Give the weights the values that `save` wrote. The weights stay the same tensors.

        Raises:
            ValueError: the folder holds another model or another kind of adapter.
        """

    @abstractmethod
    def check_reference(self, reference: str) -> None:
        """See that the reference policy can be what the setting says.

        Raises:
            ValueError: it can't.
        """

    @property
    def num_embeddings(self) -> int:
        """How many tokens the model has an embedding for."""
        return base_model(self.model).get_input_embeddings().weight.shape[0]

    def frozen(self) -> dict[str, nn.Parameter]:
        """The parameters that must not change during a run, by name."""
        return {name: p for name, p in self.model.named_parameters() if not p.requires_grad}

    def copy(self) -> dict[str, Tensor]:
        """A copy of the values of `weights`. On a mesh it is split as they are."""
        return {name: like(weight.detach().clone(), weight) for name, weight in self.weights().items()}

    def check_trainable(self) -> None:
        """Raises ValueError where something else would learn, or nothing at all."""
        own = self.weights()
        trainable = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        other = [name for name in trainable if name not in own]
        if other or not trainable:
            raise ValueError(f"model: only {self.learns} can be trained, but {other[:1] or 'nothing'} is trainable")


class AdapterPolicy(Policy):
    """A model with a LoRA that learns: its matrices, DoRA's magnitudes, and the copies in `modules_to_save`."""

    what, learns, has_base = "Adapter", "the LoRA", True

    def __init__(self, model: PeftModel) -> None:
        """Choose the adapter that learns, and bring its weights into float32.

        Raises:
            ValueError: it can't learn, or could not be loaded again.
        """
        self.model = model
        self.adapter = choose_adapter(model)
        check_peft_config(self.config)
        make_trainable(self.weights())
        check_directions(self.weights())
        new = together.decided_by_first(lambda: has_new_embeddings(model))  # while they are not on the device
        check_modules_to_save(model, self.config, new)
        # The embeddings are not those in the base model's folder, and are not saved as copies that learn.
        self.new_embeddings = new and not all(copied_embeddings(model))

    @property
    def config(self) -> LoraConfig:
        """The config of the LoRA that learns."""
        return self.model.peft_config[self.adapter]

    def weights(self) -> dict[str, nn.Parameter]:
        return adapter_weights(self.model, self.adapter)

    def is_base(self) -> bool:
        return acts_as_base(self.model, self.adapter)

    def to_save(self) -> dict[str, Tensor]:
        return self.weights() | (embedding_weights(self.model) if self.new_embeddings else {})

    def save(self, weights: dict[str, Tensor], folder: str | Path) -> None:
        save_adapter(self.model, self.adapter, weights, folder, self.new_embeddings)

    def load(self, folder: str | Path) -> None:
        check_same_lora(self.config, folder)
        saved = load_peft_weights(str(folder), device="cpu")
        own = get_peft_model_state_dict(self.model, adapter_name=self.adapter, save_embedding_layers=False)
        if missing := own.keys() - saved.keys():
            raise ValueError(f"model: the adapter in {folder} lacks {min(missing)}; give the model that it was made of")
        split = own | {n: p for n, p in self.model.named_parameters(remove_duplicate=False) if fsdp.is_part(p)}
        saved |= {name: fsdp.like(saved[name], split[name]) for name in saved.keys() & split.keys()}
        set_peft_model_state_dict(self.model, saved, self.adapter)

    def check_reference(self, reference: str) -> None:
        init = self.config.init_lora_weights
        if reference == "base" and init not in KEEPS_BASE:
            raise ValueError(
                f"reference='base': init_lora_weights={init!r} has changed the base weights, so the model without its "
                "adapter is not the base model; leave reference out"
            )


class WholePolicy(Policy):
    """A model of which all weights of the text model learn, in float32. What sees or hears stays as it is."""

    what, learns, has_base = "Model", "the weights of the text model", False

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        if make_float32(model):
            logger.warning("All weights are trained, so they are float32 from here on, not the type that was loaded")
        self._names = learning_weights(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in self._names)

    def weights(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if name in self._names}

    def is_base(self) -> bool:
        return False

    def to_save(self) -> dict[str, Tensor]:
        return self.model.state_dict(keep_vars=True)

    def save(self, weights: dict[str, Tensor], folder: str | Path) -> None:
        save_whole(self.model, weights, folder)

    def load(self, folder: str | Path) -> None:
        load_whole(self.model, folder)

    def check_reference(self, reference: str) -> None:
        if reference == "base":
            raise ValueError(
                "reference='base': where all weights learn there is no base model besides the start; leave it out"
            )


def like(tensor: Tensor, weight: Tensor) -> Tensor:
    """Split a tensor over the mesh or the processes as a weight of the same shape is split. Where it isn't split,
    nothing happens."""
    tensor = fsdp.like(tensor, weight)
    if mesh.has_mesh() and (sharding := mesh.sharding_of(weight)) is not None:
        mesh.lay(tensor, sharding)
    return tensor


@torch.no_grad()
def mix(reference: dict[str, Tensor], policy: Policy, share: float) -> dict[str, Tensor]:
    """The reference policy moved towards the policy: share * policy + (1 - share) * reference, for every weight."""
    weights = policy.weights()

    def mixed(old: Tensor, weight: Tensor) -> Tensor:
        values = share * fsdp.own_part(weight) + (1 - share) * fsdp.own_part(old)
        if not fsdp.is_part(old):
            return like(values, weight)
        new = old.clone()  # of what is split along two axes, a new DTensor would forget how
        fsdp.own_part(new).copy_(values)
        return new

    return {name: mixed(old, weights[name]) for name, old in reference.items()}
