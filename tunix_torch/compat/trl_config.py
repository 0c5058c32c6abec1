"""TRL's `GRPOConfig`: every field of TRL 1.16 with what becomes of it here, and the translation of its values.

The tables of `docs/from_trl.md` are written from `FIELDS` and `REMOVED`.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments

from ..config.files import parse_json
from ..config.grpo import GRPOConfig as OurConfig
from ..config.services import blamed_on
from ..config.settings import name_nearest, require, said_as
from ..runtime import together


@dataclass(frozen=True)
class Field:
    """A field of TRL's `GRPOConfig` and what becomes of it here.

    A field has a name here (`ours`), or is translated by `translate` together with others, or has no effect, or other
    values than its default are refused. `note` says what differs, why the field is refused, and what to use instead.
    """

    type: Any
    default: Any
    ours: str | None = None
    refused: bool = False
    note: str = ""

    def what_becomes_of_it(self) -> str:
        """A few words for the table of the documentation."""
        if self.refused:
            return "refused"
        return f"`{self.ours}`" if self.ours else "translated" if self.note.startswith("With ") else "no effect"


def _vllm(kind: Any, default: Any) -> Field:
    return Field(kind, default, note="It belongs to `use_vllm`, which is refused.")


SHOWN_FIRST = "TRL prints so many at random; here those of the first prompts are printed, whole groups side by side."

# The 77 fields that TRL's config has beside those of `transformers.TrainingArguments`, and the five of the latter whose
# defaults it changes, in TRL's order.
FIELDS: dict[str, Field] = {
    "learning_rate": Field(float, 1e-6, "learning_rate"),
    "bf16": Field(
        bool | None,
        None,
        note="With True, a model that is given by name and gets a LoRA is loaded in bfloat16. Otherwise the type of "
        "the weights decides, so None has no effect, while TRL then computes in bfloat16.",
    ),
    "gradient_checkpointing": Field(
        bool,
        False,
        "gradient_checkpointing",
        note="TRL's default is True. It saves memory, costs time, and changes no number.",
    ),
    "logging_steps": Field(float, 10, "logging_steps"),
    "remove_unused_columns": Field(bool | None, False, "remove_unused_columns"),
    "model_init_kwargs": Field(
        dict[str, Any] | str | None, None, note="With a model that is given by name, what `from_pretrained` takes."
    ),
    "trust_remote_code": Field(bool, False, refused=True, note="Code of the hub is not run; load the model yourself."),
    "router_aux_loss_coef": Field(
        float | None, None, refused=True, note="Mixtures of experts have no auxiliary loss here; leave it out."
    ),
    "disable_dropout": Field(bool, False, "disable_dropout"),
    "cast_lm_head_to_fp32": Field(
        bool,
        False,
        note="With True a model that is given by name is loaded in float32: the head has no type of its own.",
    ),
    "num_generations": Field(int, 8, "num_completions_per_prompt"),
    "num_generations_eval": Field(
        int | None, None, "num_eval_completions", note="Evaluation answers each question greedily too."
    ),
    "max_completion_length": Field(int, 512, "generation_max_length"),
    "ds3_gather_for_generation": Field(bool, True, note="It belongs to DeepSpeed, which is refused."),
    "shuffle_dataset": Field(bool, True, "train_sampling_strategy", note="False: rows are taken in their order."),
    "pad_to_multiple_of": Field(
        int | str | None, "auto", note="Widths are chosen by this library, and padding changes no number."
    ),
    "generation_batch_size": Field(
        int | None, None, note="With `steps_per_generation`: see how batches are counted, above."
    ),
    "steps_per_generation": Field(
        int | None, None, note="With `generation_batch_size`: see how batches are counted, above."
    ),
    "temperature": Field(float, 1.0, "generation_temperature"),
    "top_p": Field(float, 1.0, "generation_top_p"),
    "top_k": Field(int, 0, "generation_top_k"),
    "min_p": Field(float | None, None, "min_p"),
    "generation_kwargs": Field(dict[str, Any] | str | None, None, "generation_kwargs"),
    "chat_template_kwargs": Field(dict[str, Any] | str | None, None, "chat_template_kwargs"),
    "repetition_penalty": Field(float, 1.0, "repetition_penalty"),
    "cache_implementation": Field(
        str | None, None, refused=True, note="The KV cache is this library's own; leave it out."
    ),
    "use_vllm": Field(bool, False, refused=True, note="Completions are sampled by this library; leave it out."),
    "vllm_mode": _vllm(str, "colocate"),
    "vllm_model_impl": _vllm(str, "vllm"),
    "vllm_enable_sleep_mode": _vllm(bool, False),
    "vllm_structured_outputs_regex": _vllm(str | None, None),
    "vllm_server_base_url": _vllm(str | None, None),
    "vllm_server_host": _vllm(str, "0.0.0.0"),
    "vllm_server_port": _vllm(int, 8000),
    "vllm_server_timeout": _vllm(float, 240.0),
    "vllm_group_port": _vllm(int, 51216),
    "vllm_gpu_memory_utilization": _vllm(float, 0.3),
    "vllm_max_model_length": _vllm(int | None, None),
    "vllm_tensor_parallel_size": _vllm(int, 1),
    "beta": Field(float, 0.0, "kl_penalty_coef"),
    "num_iterations": Field(int, 1, "num_iterations", note="See how batches are counted, above."),
    "epsilon": Field(float, 0.2, "epsilon"),
    "delta": Field(float | None, None, "delta"),
    "epsilon_high": Field(float | None, None, "epsilon_high"),
    "sapo_temperature_neg": Field(float, 1.05, "sapo_temperature_neg"),
    "sapo_temperature_pos": Field(float, 1.0, "sapo_temperature_pos"),
    "vespo_k_pos": Field(float, 2.0, "vespo_k_pos"),
    "vespo_lambda_pos": Field(float, 3.0, "vespo_lambda_pos"),
    "vespo_k_neg": Field(float, 3.0, "vespo_k_neg"),
    "vespo_lambda_neg": Field(float, 2.0, "vespo_lambda_neg"),
    "importance_sampling_level": Field(str, "token", "importance_sampling_level"),
    "reward_weights": Field(list[float] | None, None, "reward_weights"),
    "multi_objective_aggregation": Field(str, "sum_then_normalize", "multi_objective_aggregation"),
    "scale_rewards": Field(str, "group", "scale_rewards"),
    "loss_type": Field(str, "dapo", "loss_type"),
    "mask_truncated_completions": Field(bool, False, "mask_truncated_completions"),
    "sync_ref_model": Field(bool, False, "sync_ref_model"),
    "ref_model_mixup_alpha": Field(float, 0.6, "ref_model_mixup_alpha"),
    "ref_model_sync_steps": Field(int, 512, "ref_model_sync_steps"),
    "top_entropy_quantile": Field(float, 1.0, "top_entropy_quantile"),
    "entropy_coef": Field(float, 0.0, "entropy_coef"),
    "use_adaptive_entropy": Field(bool, False, "use_adaptive_entropy"),
    "entropy_coef_min": Field(float, 0.0, "entropy_coef_min"),
    "entropy_coef_max": Field(float, 1.0, "entropy_coef_max"),
    "entropy_coef_delta": Field(float, 0.005, "entropy_coef_delta"),
    "entropy_target": Field(float, 0.2, "entropy_target"),
    "max_tool_calling_iterations": Field(
        int | None, None, refused=True, note="Tools are not called here; leave it out."
    ),
    "vllm_importance_sampling_correction": _vllm(bool, True),
    "vllm_importance_sampling_mode": _vllm(str, "sequence_mask"),
    "vllm_importance_sampling_clip_max": _vllm(float | None, 3.0),
    "vllm_importance_sampling_clip_min": _vllm(float | None, None),
    "off_policy_mask_threshold": Field(float | None, None, "off_policy_mask_threshold"),
    "use_bias_correction_kl": Field(bool, True, "use_bias_correction_kl"),
    "log_completions": Field(
        bool,
        False,
        "log_completions",
        note="The Parquet files are those of `completions_max_mb`; False: there are none.",
    ),
    "log_multimodal": Field(bool, True, note="There are no images."),
    "num_completions_to_print": Field(int | None, None, "num_completions_to_print", note=SHOWN_FIRST),
    "log_unique_prompts": Field(bool, False, "log_unique_prompts"),
    "log_completions_hub_repo": Field(
        str | None,
        None,
        refused=True,
        note="Nothing is uploaded while a run trains; upload its folder `completions` later.",
    ),
    "use_transformers_continuous_batching": Field(
        bool, False, refused=True, note="Completions are sampled by this library; leave it out."
    ),
    "transformers_continuous_batching_config": Field(
        dict[str, Any] | str | None, None, refused=True, note="Completions are sampled by this library; leave it out."
    ),
    "use_transformers_paged": Field(
        bool, False, refused=True, note="Completions are sampled by this library; leave it out."
    ),
    "vllm_importance_sampling_cap": _vllm(float | None, None),
}

# Names that older scripts have: TRL's config, or `transformers.TrainingArguments`, had them once. Each has what to do
# instead, since the nearest name of today would mislead.
_NO_VLLM = "leave it out: it belonged to use_vllm, and completions are sampled by this library"
REMOVED = {
    "max_prompt_length": "TRL has removed it; leave it out: prompts are not cut, and the longest one decides the room "
    "for all. Of a streamed data set, prompts of more than 1024 tokens are left out with a warning",
    "token_entropy_percentile_threshold": "TRL has removed it; give top_entropy_quantile, which is 1 minus its value",
    "use_liger_loss": "TRL has removed it; leave it out: the loss is this library's own",
    "vllm_device": f"TRL has removed it; {_NO_VLLM}",
    "vllm_dtype": f"TRL has removed it; {_NO_VLLM}",
    "vllm_enable_prefix_caching": f"TRL has removed it; {_NO_VLLM}",
    "vllm_guided_decoding_regex": f"TRL has removed it; {_NO_VLLM}",
    "vllm_max_model_len": f"TRL has removed it; {_NO_VLLM}",
    "wandb_log_unique_prompts": "TRL has removed it; give log_unique_prompts",
    "evaluation_strategy": "Transformers has removed it; give eval_strategy",
    "include_tokens_per_second": "Transformers has removed it; leave it out: tokens a second are logged",
    "no_cuda": "Transformers has removed it; give use_cpu",
    "overwrite_output_dir": "Transformers has removed it; leave it out",
    "push_to_hub_token": "Transformers has removed it; give hub_token",
    "save_safetensors": "Transformers has removed it; leave it out: weights are always saved as safetensors",
}


def table_of_removed() -> str:
    """The table of `docs/from_trl.md`, in Markdown: names that older scripts have, and what to do instead."""
    return "| name | |\n|---|---|\n" + "".join(f"| `{name}` | {hint}. |\n" for name, hint in REMOVED.items())


def table_of_fields() -> str:
    """The table of `docs/from_trl.md`, in Markdown: every field of TRL's config and what becomes of it."""
    lines = ["| field | default | here | |", "|---|---|---|---|"]
    lines += [f"| `{name}` | `{f.default!r}` | {f.what_becomes_of_it()} | {f.note} |" for name, f in FIELDS.items()]
    return "\n".join(lines) + "\n"


# Settings of `tunix_torch.GRPOConfig` that have another default than what TRL does.
AS_IN_TRL = {"advantage_epsilon": 1e-4, "system_message": "", "wrap_prompts": False, "max_prompt_length": 1024}
# Fields of `transformers.TrainingArguments` that `to_ours` translates, or that mean something else there.
TRANSLATED = ("per_device_train_batch_size", "gradient_accumulation_steps", "per_device_eval_batch_size", "bf16")
COUNTED_IN_STEPS = ("max_steps", "logging_steps", "save_steps", "eval_steps", "warmup_steps")  # of the optimizer
MAPPINGS = ("model_init_kwargs", "generation_kwargs", "chat_template_kwargs", "transformers_continuous_batching_config")


class _TRLArguments(TrainingArguments):
    """What TRL's config checks, by the checks of the config that it becomes."""

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, *MAPPINGS]

    def __post_init__(self) -> None:
        for name in MAPPINGS:
            value = getattr(self, name)
            if isinstance(value, str):
                with blamed_on(name, value, "; expected names and values as JSON"):
                    setattr(self, name, parse_json(value))
        self.use_cpu, bf16 = to_ours(self).use_cpu, self.bf16
        self.bf16 = False  # no autocast: the type of the weights decides
        super().__post_init__()
        self.bf16 = bf16


GRPOConfig = dataclasses.make_dataclass(
    "GRPOConfig",
    [
        (name, field.type, dataclasses.field(default=field.default, metadata={"help": field.note or "as in TRL"}))
        for name, field in FIELDS.items()
    ],
    bases=(_TRLArguments,),
)
GRPOConfig.__module__ = __name__
GRPOConfig.__doc__ = """TRL's settings of GRPO, by TRL's names, with TRL's defaults and meanings: see `FIELDS`.

Raises:
    ValueError: a value is out of range, or belongs to something that this library does not have.
    TypeError: there is no such setting; the message has the nearest one, or of a name in `REMOVED` what to do instead.
"""
name_nearest(GRPOConfig, REMOVED)


def to_ours(args: "GRPOConfig") -> OurConfig:
    """The config of this library that means what TRL's config means.

    Raises:
        ValueError: a field is refused, or has no possible value.
    """
    for name, field in FIELDS.items():
        value = getattr(args, name)
        require(not field.refused or value == field.default, name, value, field.note)
    settings: dict[str, Any] = {}
    for field in dataclasses.fields(TrainingArguments):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        value = getattr(args, field.name, default)
        if field.init and field.name not in TRANSLATED and value != default:
            settings[field.name] = value
    settings |= {"output_dir": args.output_dir or "trainer_output", "report_to": args.report_to}
    settings |= {field.ours: getattr(args, name) for name, field in FIELDS.items() if field.ours}
    if args.multi_objective_aggregation == "normalize_then_sum":
        settings["scale_rewards"] = None  # it has scales of its own
    if not args.log_completions:
        settings["completions_max_mb"] = 0
    settings["train_sampling_strategy"] = "random" if args.shuffle_dataset else "sequential"
    settings["num_eval_completions"] = args.num_generations_eval or args.num_generations
    settings["eval_temperature"] = args.temperature
    settings["per_device_eval_batch_size"] = max(1, args.per_device_eval_batch_size // settings["num_eval_completions"])
    if args.load_best_model_at_end and args.metric_for_best_model in (None, "loss"):
        settings |= {"metric_for_best_model": "reward", "greater_is_better": True}
    require(not args.fp16, "fp16", True, "float16 is not trained in here; leave it out, or set bf16")
    settings |= _batches(args)
    with said_as({f"{field.ours}=": f"{name}=" for name, field in FIELDS.items() if field.ours}):
        return OurConfig(**AS_IN_TRL | settings)


def _batches(args: "GRPOConfig") -> dict[str, Any]:
    """Prompts a step, and what else says how rollouts are cut, from numbers of completions.

    TRL samples `generation_batch_size` completions at once, cuts them into `steps_per_generation` parts of
    `per_device_train_batch_size` for each process, and steps the optimizer after `gradient_accumulation_steps` parts.
    """
    part, accumulated, processes = args.per_device_train_batch_size, args.gradient_accumulation_steps, together.count()
    group, parts, whole = args.num_generations, args.steps_per_generation, args.generation_batch_size
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "num_iterations"):
        require(getattr(args, name) >= 1, name, getattr(args, name), "must be at least 1")
    for name in ("steps_per_generation", "generation_batch_size"):
        require(
            getattr(args, name) is None or getattr(args, name) >= 1, name, getattr(args, name), "must be at least 1"
        )
    if whole is not None:
        require(parts is None, "generation_batch_size", whole, f"steps_per_generation={parts} says it too; give one")
        hint = f"must be a multiple of per_device_train_batch_size={part} times {processes} process(es)"
        require(whole % (part * processes) == 0, "generation_batch_size", whole, hint)
        parts = whole // (part * processes)
    parts = accumulated if parts is None else parts
    hint = f"per_device_train_batch_size={part} times steps_per_generation={parts} must be a multiple of it"
    require(group >= 1 and part * parts % group == 0, "num_generations", group, hint)
    hint = f"it or gradient_accumulation_steps={accumulated} must be a multiple of the other one"
    require(parts % accumulated == 0 or accumulated % parts == 0, "steps_per_generation", parts, hint)
    of_a_step = part * min(parts, accumulated)  # completions that are learned from between two moments of the loop
    hint = f"an optimizer step has {of_a_step} completions, which must be a multiple of it: groups are not cut here"
    require(of_a_step % group == 0, "num_generations", group, hint)
    fits = group % part == 0 or part % group == 0
    return {
        "per_device_train_batch_size": of_a_step // group,
        "gradient_accumulation_steps": max(1, accumulated // parts),
        "steps_per_generation": max(1, parts // accumulated),
        "micro_batch_size": part if fits and part < of_a_step else None,
    } | {name: _in_rollouts(getattr(args, name), args.num_iterations) for name in COUNTED_IN_STEPS}


def _in_rollouts(steps: float | None, num_iterations: int) -> float | None:
    """So many optimizer steps as a number of rollouts, on each of which the optimizer steps `num_iterations` times."""
    return math.ceil(steps / num_iterations) if steps is not None and steps >= 1 and num_iterations > 1 else steps
