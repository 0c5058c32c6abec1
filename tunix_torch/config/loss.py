"""What the settings of advantages and loss mean together: which loss is in force, what can't be combined, warnings."""

import logging
from typing import TYPE_CHECKING, Any

from .settings import require

if TYPE_CHECKING:
    from .grpo import GRPOConfig

logger = logging.getLogger(__name__)

REWARD_SCALES = ("group", "batch", "none")
OBJECTIVES = ("sum_then_normalize", "normalize_then_sum")
CORRECTIONS = ("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
OWN_LOSSES = {"dapo": "dapo", "dr_grpo": "dr_grpo"}  # the loss type of these algorithms; that of the others is grpo
SUMMED = ("bnpo", "dr_grpo", "dapo", "cispo")  # these sum over tokens, so that a long row counts more than a short one


def loss_type_of(args: "GRPOConfig") -> str:
    """The loss type in force."""
    return args.loss_type or OWN_LOSSES.get(args.algorithm, "grpo")


def loss_settings(args: "GRPOConfig") -> dict[str, Any]:
    """The settings of `grpo_loss`, as its keyword arguments."""
    return {
        "loss_type": loss_type_of(args),
        "epsilon": args.epsilon,
        "epsilon_high": args.clip_high,
        "epsilon_c": args.epsilon_c,
        "delta": args.delta,
        "beta": args.beta,
        "kl_estimator": args.kl_estimator,
        "kl_clamp": args.kl_clamp_value,
        "use_bias_correction_kl": args.use_bias_correction_kl,
        "sequence_level": args.sequence_level,
        "sapo_temperatures": (args.sapo_temperature_neg, args.sapo_temperature_pos),
        "vespo_pos": (args.vespo_k_pos, args.vespo_lambda_pos),
        "vespo_neg": (args.vespo_k_neg, args.vespo_lambda_neg),
    }


def check_loss(args: "GRPOConfig") -> None:
    """Refuse settings of advantages and loss that can't both be given.

    Raises:
        ValueError: two settings contradict each other. The message names one of them and what would be right.
    """
    _check_advantages(args)
    low, high = args.entropy_coef_min, args.entropy_coef_max
    require(low <= high, "entropy_coef_min", low, f"must not be above entropy_coef_max={high}")
    mode, low, high = args.sampler_correction, args.sampler_correction_min, args.sampler_correction_max
    hint = f"must be below sampler_correction_max={high}"
    require(low is None or high is None or low < high, "sampler_correction_min", low, hint)
    bounded = low is not None or high is not None
    hint = "needs sampler_correction_max or sampler_correction_min"
    require(bounded or not mode.endswith("_truncate"), "sampler_correction", mode, hint)
    hint = "vespo has a ratio of whole sequences already: choose token_truncate or token_mask"
    require(args.loss_type != "vespo" or not mode.startswith("sequence"), "sampler_correction", mode, hint)


def _check_advantages(args: "GRPOConfig") -> None:
    scale, objective = args.scale_rewards, args.multi_objective_aggregation
    if scale in ("group", "batch"):
        hint = "normalize_advantages=False divides by nothing: leave one of the two out"
        require(args.normalize_advantages, "scale_rewards", scale, hint)
        hint = f"algorithm={args.algorithm!r} never divides: leave it out, or choose another algorithm with a loss_type"
        require(args.algorithm not in ("dr_grpo", "rloo"), "scale_rewards", scale, hint)
    if objective == "normalize_then_sum":
        plain = args.normalize_advantages and args.algorithm not in ("dr_grpo", "rloo")
        hint = "divides by standard deviations, which algorithm dr_grpo or rloo and normalize_advantages=False exclude"
        require(plain, "multi_objective_aggregation", objective, hint)
        hint = "scales by its own standard deviations: leave scale_rewards out"
        require(scale is None, "multi_objective_aggregation", objective, hint)
        hint = "takes reward functions one by one, so make the penalty one of them and leave overlong_buffer_length out"
        require(args.overlong_buffer_length == 0, "multi_objective_aggregation", objective, hint)
    buffer, longest = args.overlong_buffer_length, args.generation_max_length
    require(buffer <= longest, "overlong_buffer_length", buffer, f"must not be above generation_max_length={longest}")


def warn_of_loss(args: "GRPOConfig") -> None:
    """Say what may not be meant: a loss type beside the other level of ratios, and a policy that samples otherwise."""
    loss_type = loss_type_of(args)
    if args.sequence_level and loss_type in SUMMED:
        logger.warning(
            "importance_sampling_level='sequence' with loss_type=%r: the sum over tokens weights each sequence by "
            "its completion length. GSPO has loss_type='grpo'.",
            loss_type,
        )
    elif loss_type == "luspo" and not args.sequence_level:
        logger.warning("loss_type='luspo': its paper has importance_sampling_level='sequence'.")
    elif loss_type == "vespo" and args.sequence_level:
        logger.warning("loss_type='vespo' has ratios of sequences by itself: leave importance_sampling_level out.")
    if loss_type == "cispo" and args.epsilon_high is None:
        logger.warning(
            "loss_type='cispo' caps ratios at epsilon_high, here at %g, so that all near 1 are capped. Its papers set "
            "epsilon_high=5.",
            args.clip_high,
        )
    off = {"generation_top_k": 0, "generation_top_p": 1.0, "min_p": None, "repetition_penalty": 1.0}
    changing = [name for name in off if getattr(args, name) not in (off[name], None, 0)]
    if args.sampler_correction == "none" and changing:
        logger.warning(
            "%s: completions are sampled from other probabilities than those of the policy, which the loss takes. "
            "sampler_correction='token_truncate' weighs the difference; without it samples %s.",
            ", ".join(f"{name}={getattr(args, name):g}" for name in changing),
            ", ".join(f"{name}={off[name]}" for name in changing),
        )
