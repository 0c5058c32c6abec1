"""The teacher of on-policy distillation: a frozen model that says what it would write where the policy writes."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..runtime import fsdp, together
from .attention import use_own_attention
from .checks import check_head
from .decoding import fast_layers
from .forward import base_model, logits, reference_policy
from .loading import load_model, load_tokenizer, place

BASE = "base"  # the name of the teacher that is the policy's model without its adapter


@dataclass
class Teacher:
    """A model that is never changed; or the policy's own model, which is the teacher while its adapter is off."""

    model: nn.Module
    is_base: bool

    @contextlib.contextmanager
    def teaching(self) -> Iterator[nn.Module]:
        """Within this context `model` computes as the teacher, without gradient and without dropout."""
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), reference_policy(self.model) if self.is_base else fast_layers(self.model):
                yield self.model
        finally:
            self.model.train(was_training)

    def logits(self, hidden: Tensor) -> Tensor:
        """The teacher's logits for its hidden states: (..., D) -> (..., V) float32, without gradient."""
        adapted = self.is_base and isinstance(base_model(self.model).get_output_embeddings(), BaseTunerLayer)
        with self.teaching() if adapted else torch.no_grad():  # an adapter elsewhere has no part in this
            return logits(self.model, hidden)


def load_teacher(name: str | None, policy: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Teacher | None:
    """Load the teacher and move it to this process's device, spread over the mesh where there is one, or split over
    the processes where the policy is.

    Args:
        name: "base", or what `load_model` takes: the folder of a model or of an adapter, or a hub id; None: no teacher.
        policy: the model that learns. The teacher's weights are of its type.
        tokenizer: the policy's.

    Raises:
        ValueError: the model can't be loaded, its tokenizer has other tokens than the policy's, its head has another
            number of them, or the policy has no adapter that could be off.
    """
    if name is None:
        return None
    if name == BASE:
        if not isinstance(policy, PeftModel):
            raise ValueError("teacher='base': the model without its adapter, and this one has none; name a model")
        return Teacher(policy, is_base=True)
    _check_same_tokens(name, tokenizer)
    model = load_model(name, base_model(policy).dtype).requires_grad_(False).eval()
    ours, theirs = (base_model(m).get_output_embeddings().weight.shape[0] for m in (policy, model))
    if ours != theirs:
        raise ValueError(
            f"teacher={name!r}: its head has {theirs} tokens and the policy's {ours}; they must be the same"
        )
    use_own_attention(base_model(model))
    together.check_same(lambda: {"weights of the teacher": together.digest(model.parameters())})
    place(model, fsdp.splitting_of(base_model(policy)))
    check_head(model)
    return Teacher(model, is_base=False)


def _check_same_tokens(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError unless the teacher's tokenizer has the policy's tokens under the same numbers."""
    try:
        theirs = load_tokenizer(name).get_vocab()
    except ValueError as error:
        raise ValueError(f"teacher={name!r}: {error}") from error
    ours = tokenizer.get_vocab()
    other = min((word for word in {**ours, **theirs} if ours.get(word) != theirs.get(word)), default=None)
    if other is not None:
        numbers = f"{other!r} is {ours.get(other)} for the policy and {theirs.get(other)} for the teacher"
        raise ValueError(f"teacher={name!r}: its tokenizer has other tokens ({numbers}); give a model of the same one")
