"""Which metrics an evaluation gives, and whether the setting `metric_for_best_model` names one of them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .settings import require

if TYPE_CHECKING:
    from .grpo import GRPOConfig


def evaluation_metrics(args: "GRPOConfig", judged: bool = True, rewards: Sequence[str] = ()) -> list[str]:
    """The metrics that `TunixTrainer.evaluate` gives, without `eval_`.

    Args:
        judged: False in SFT without a judge, which samples no answers.
        rewards: the names of the reward functions.
    """
    shares = ["accuracy", *([f"mean@{args.num_eval_completions}"] if args.num_eval_completions else [])]
    intervals = [f"interval/{name}_{end}" for name in shares for end in ("low", "high")]
    metrics = [shares[0], "mean_length", *shares[1:], *intervals] if judged else []
    of_answers = [f"completions/{name}_length" for name in ("mean", "min", "max")]
    if rewards:
        of_answers += ["reward", "reward_std"]
        of_answers += [f"rewards/{name}/{number}" for name in rewards for number in ("mean", "std")]
    for prefix in ("", *(["sampled/"] if args.num_eval_completions else [])):
        metrics += [prefix + name for name in of_answers if judged]
    given = [] if args.use_grpo else ["loss"]
    if args.preference_loss is not None:
        given += [f"rewards/{name}" for name in ("accuracies", "margins", "chosen", "rejected")]
    return [*metrics, *given, "runtime"]


def check_best_metric(
    args: "GRPOConfig", judged: bool = True, rewards: Sequence[str] | None = None, prefixes: Sequence[str] | None = None
) -> None:
    """Raise ValueError when `metric_for_best_model` is a metric that no evaluation gives.

    Args:
        rewards: the names of the reward functions; None: not known yet.
        prefixes: what stands before the metrics of each data set, `""` or its name and "_"; None: not known yet.
    """
    if args.metric_for_best_model is None:
        return
    metric = args.metric_for_best_model.removeprefix("eval_")
    named = metric.split("rewards/")[-1].rpartition("/")[0] if rewards is None and "rewards/" in metric else "reward"
    metrics = evaluation_metrics(args, judged, [named] if rewards is None else rewards)
    known = [prefix + name for prefix in prefixes or [""] for name in metrics]
    good = metric in known or (prefixes is None and metric.endswith(tuple(f"_{name}" for name in metrics)))
    shown = [name for name in known if rewards is not None or "rewards/" not in name]
    hint = f"an evaluation gives {', '.join(shown)}"
    require(good, "metric_for_best_model", args.metric_for_best_model, hint)
