"""Reward models: a sequence classifier with one output scores the text of a prompt and its completion, as in TRL."""

import logging
import os
from collections.abc import Iterator, Sequence
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .. import rewards
from ..config.hub import require_hub_for_model
from ..model.loading import check_folder, default_dtype
from ..runtime import device, mesh, together

logger = logging.getLogger(__name__)

SHORTEST = 128  # tokens: the narrowest shape where shapes are fixed
ONE_OUTPUT = "a reward model is an AutoModelForSequenceClassification with num_labels=1"
LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")  # how the names of their classes end
TOKENS_PER_PASS = 8192  # where the machine has no number of its own, as on a TPU


class RewardModel:
    """A reward function that is a model. It runs on this process's device, without dropout and without a gradient.

    The text is the prompt and the completion; where the prompt is a list of messages, the chat template of the reward
    model's tokenizer renders them with the completion's message. The score is the model's one output.

    Args:
        model: a model for sequence classification with one output. It is moved to the device.
        tokenizer: its tokenizer. A missing padding token becomes the EOS token.
        what: what the user gave, for error messages: "reward_funcs='org/model'".
        num_rows: how many completions are scored at a time.
        num_tokens: how long prompt and completion are together, at most, by the policy's tokenizer.
        chat_template_kwargs: further arguments of the chat template.

    Raises:
        ValueError: the model does not give one number for a text, or the tokenizer has no token to pad with.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        what: str = "reward_funcs",
        num_rows: int = 32,
        num_tokens: int = 512,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        config = model.config
        self.__name__ = name_of_model(model)
        self.model, self.tokenizer, self.num_rows = model, tokenizer, num_rows
        self.chat_template_kwargs = chat_template_kwargs or {}
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if tokenizer.pad_token_id is None:
            raise ValueError(
                f"{what}: its tokenizer has neither a padding nor an EOS token; set the pad_token of the one in "
                "reward_processing_classes"
            )
        text_config = config.get_text_config()
        text_config.pad_token_id = tokenizer.pad_token_id  # the model scores the last token that is no padding
        longest = getattr(text_config, "max_position_embeddings", None)
        self.limit = min(tokenizer.model_max_length, longest if isinstance(longest, int) and longest > 0 else 2**31)
        self._told_of_cut = False
        if device.static_shapes() and hasattr(model, "set_attn_implementation"):
            model.set_attn_implementation("eager")  # sdpa's masks are made by looking at the padding
        together.check_same(lambda: {f"weights of {self.__name__}": together.digest(model.parameters())})
        model.requires_grad_(False)
        model.to(device.torch_device())
        self._rehearse(what, num_tokens)

    def __call__(
        self, prompts: Sequence[str | list[dict[str, Any]]], completions: Sequence[str | list[dict[str, Any]]]
    ) -> list[float]:
        """The score of each of B completions.

        Raises:
            ValueError: prompts are lists of messages, and the tokenizer has no chat template; or the tokenizer gives a
            token that the model does not know.
        """
        texts = [self._text(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        ids = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        largest, known = max(max(row, default=0) for row in ids), self.model.get_input_embeddings().weight.shape[0]
        if largest >= known:
            raise ValueError(
                f"reward model {self.__name__!r}: it has {known} embeddings, and its tokenizer gives the token "
                f"{largest}; give the model's own in reward_processing_classes"
            )
        return self.scores([self._cut(row) for row in ids])

    def _text(self, prompt: str | list[dict[str, Any]], completion: str | list[dict[str, Any]]) -> str:
        if isinstance(prompt, str):
            return prompt + completion
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"reward model {self.__name__!r}: prompts are lists of messages, and its tokenizer has no chat "
                "template; give one that has in reward_processing_classes"
            )
        return self.tokenizer.apply_chat_template([*prompt, *completion], tokenize=False, **self.chat_template_kwargs)

    def _cut(self, ids: list[int]) -> list[int]:
        """The tokens that the model can take. A text without any gets one, since a model needs a token to look at."""
        if len(ids) > self.limit and not self._told_of_cut:
            self._told_of_cut = True
            logger.warning(
                "Reward model %r: a text of %d tokens is cut at its end to the %d that the model takes, and so are "
                "later ones",
                self.__name__,
                len(ids),
                self.limit,
            )
        return ids[: self.limit] or [self.tokenizer.pad_token_id]

    @torch.no_grad()
    def scores(self, ids: Sequence[list[int]]) -> list[float]:
        """The score of each of B texts, given as lists of tokens of any lengths.

        Texts of similar length are scored together. Which other texts are in a batch changes a score by rounding only.
        """
        self.model.eval()
        waiting = []
        for numbers, width, height in self._batches([len(row) for row in ids]):
            logits = self._forward([ids[number] for number in numbers], width, height)
            waiting.append((numbers, logits[:, 0].float()))
            device.sync()
        scores = [0.0] * len(ids)
        for numbers, some in waiting:  # here Python waits for the device
            for number, score in zip(numbers, some.tolist()[: len(numbers)], strict=True):
                scores[number] = score
        return scores

    def _batches(self, lengths: Sequence[int]) -> Iterator[tuple[list[int], int, int]]:
        """Share out texts to batches of bounded size: the numbers of a batch's texts, its width, and its height.

        Where shapes are fixed, a width is one of a short ladder, and each width has one height.
        """
        left = sorted(range(len(lengths)), key=lambda number: -lengths[number])
        while left:
            width = self._width(lengths[left[0]])
            height = self._height(width)
            numbers, left = left[:height], left[height:]
            yield numbers, width, height if device.static_shapes() else len(numbers)

    def _width(self, length: int) -> int:
        """The width of a batch whose longest text has this many tokens."""
        if not device.static_shapes():
            return length
        width = SHORTEST
        while width < min(length, self.limit):
            width *= 2
        return min(width, self.limit)

    def _height(self, width: int) -> int:
        """How many texts a batch of this width has at most."""
        fits = max(1, (mesh.tokens_per_pass() or TOKENS_PER_PASS) // width)
        each = mesh.axis_size("fsdp")  # every device has as many rows as the others
        return -(-min(fits, self.num_rows) // each) * each

    def _forward(self, ids: Sequence[list[int]], width: int, height: int) -> Tensor:
        """The logits of texts, padded on the right, (height, 1). Rows after the texts repeat the last of them."""
        pad = self.tokenizer.pad_token_id
        rows = [*ids, *[ids[-1]] * (height - len(ids))]
        padded = torch.tensor([row + [pad] * (width - len(row)) for row in rows])  # (height, width)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        place = device.torch_device()
        padded, mask = padded.to(place), mask.to(place)
        for tensor in (padded, mask):
            mesh.shard(tensor, ("fsdp", None))
        return self.model(input_ids=padded, attention_mask=mask).logits

    @torch.no_grad()
    def _rehearse(self, what: str, num_tokens: int) -> None:
        """Score made-up texts, to see that the model gives one number a text, and to compile what a run will need."""
        self.model.eval()
        widths = [min(8, self.limit)]
        if device.static_shapes():
            widths = [self._width(1)]
            while widths[-1] < min(num_tokens, self.limit):
                widths.append(self._width(widths[-1] + 1))
        for width in widths:
            height = self._height(width) if device.static_shapes() else 1
            logits = self._forward([[self.tokenizer.pad_token_id]], width, height)
            if logits.ndim != 2 or logits.shape[1] != 1:
                got = f"{logits.shape[1]} outputs" if logits.ndim == 2 else "logits for every token"
                raise ValueError(f"{what}: it gives {got}; {ONE_OUTPUT}")
            logits = logits[:, 0].float()
            device.sync()
            logits.cpu()


def name_of_model(model: nn.Module) -> str:
    """The name under which a reward model is logged: the last part of where it was loaded from, as in TRL."""
    place = getattr(model.config, "_name_or_path", "") or ""
    return place.rstrip("/").rpartition("/")[2] or type(model).__name__


def looks_like_model(name: str) -> bool:
    """Whether a name has a slash, as paths and hub ids have and names of functions have not, or is that of a folder.

    Where a folder has the name of one of this library's reward functions, the name is the function's; "./format" is the
    folder's.
    """
    return "/" in name or (os.path.isdir(name) and name not in rewards.REWARDS | rewards.PRESET_REWARDS)


def is_model_name(name: str) -> bool:
    """Whether a text in the argument `reward_funcs` names a reward model: it looks like one, or is no name of a
    function that `find_reward` knows, since some old hub ids have no slash."""
    if looks_like_model(name):
        return True
    try:
        rewards.find_reward(name)
    except ValueError:
        return True
    return False


def make_reward_model(
    given: str | nn.Module, tokenizer: PreTrainedTokenizerBase | None, what: str, **settings: Any
) -> RewardModel:
    """Make a reward function of what a user gave as a reward model.

    Args:
        given: a hub id, a folder, or a model.
        tokenizer: None: the one that lies where the model was loaded from.
        what, settings: see `RewardModel`.

    Raises:
        ValueError: the model or its tokenizer can't be loaded, or the model is no reward model.
    """
    model = _load(given, what) if isinstance(given, str) else given
    config = getattr(model, "config", None)
    if not isinstance(config, PretrainedConfig):
        hint = "give a model of Transformers, or a function (prompts, completions, **columns) -> list[float]"
        raise ValueError(f"{what}: a {type(model).__name__} without a config is no reward model; {hint}")
    _check_outputs(config, what, type(model).__name__)
    return RewardModel(model, tokenizer or _tokenizer_of(model, what), what, **settings)


def _check_outputs(config: PretrainedConfig, what: str, architecture: str | None) -> None:
    """Raise ValueError where the config or the architecture tells that this is no reward model."""
    if architecture is not None and architecture.endswith(LANGUAGE_MODELS):
        raise ValueError(f"{what}: a {architecture} predicts tokens; {ONE_OUTPUT}")
    if config.num_labels != 1:
        raise ValueError(f"{what}: its head has {config.num_labels} outputs; {ONE_OUTPUT}")


def _load(name: str, what: str) -> PreTrainedModel:
    """Load a reward model with all of its weights, on the CPU."""
    check_folder(name, what)
    try:
        require_hub_for_model(name)
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        _check_outputs(config, what, next(iter(config.architectures or []), None))
        # sdpa has no soft-cap on attention scores, so Gemma 2 would be silently wrong with it
        attention = "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else None
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            name,
            config=config,
            dtype=default_dtype(),
            attn_implementation=attention,
            output_loading_info=True,
            trust_remote_code=False,
        )
    except UnpicklingError as error:
        reason = "its weights are a pickle with more than tensors in it, which could run code; give it as safetensors"
        raise ValueError(f"{what} could not be loaded: {reason}") from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if str(error).startswith(what):
            raise
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        hint = "a text is the folder or the hub id of a reward model; for a function, give the function itself"
        raise ValueError(f"{what} could not be loaded: {reason} ({hint})") from error
    missing = loading["missing_keys"]
    if missing:
        raise ValueError(f"{what}: {len(missing)} weights are missing, such as {min(missing)}; {ONE_OUTPUT}")
    return model


def _tokenizer_of(model: PreTrainedModel, what: str) -> PreTrainedTokenizerBase:
    place = getattr(model.config, "_name_or_path", "")
    try:
        if not place:
            raise OSError("the model was not loaded from anywhere")
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{what}: no tokenizer ({reason}); give it in reward_processing_classes") from error
