"""What is cross-checked: small random models of each Gemma family, batches with every awkward row, and settings."""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    PreTrainedModel,
)

from ..batch import PromptBatch, Rollout

VOCABULARY = 110
PAD, EOS = 0, 1
NUM_PROMPTS, GROUP = 3, 4
PROMPT_WIDTH, COMPLETION_WIDTH = 14, 12
WINDOW = 8  # of sliding attention; shorter than a prompt with its completion

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": WINDOW,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": 2,
}
FIVE_TO_ONE = ["sliding_attention"] * 5 + ["full_attention"]  # the pattern of Gemma 3, a constant in Tunix
SHORTER = ["sliding_attention"] * 2 + ["full_attention"]


def make_model(family: str, **overrides: Any) -> PreTrainedModel:
    """Return a float32 model on the CPU with random weights that are the same in every call.

    Args:
        family: gemma3-1, gemma3-2 or gemma3-4 (the number is that of KV heads), gemma2 or gemma4.
        overrides: settings of the model's config.

    Raises:
        ValueError: there is no such family.
    """
    name, _, kv_heads = family.partition("-")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "gemma3":
            model = _make_gemma3(int(kv_heads), overrides)
        elif name == "gemma2":
            model = _make_gemma2(overrides)
        elif name == "gemma4":
            model = _make_gemma4(overrides)
        else:
            raise ValueError(f"no such family: {family!r}")
    return model.eval()


def _make_gemma3(num_kv_heads: int, overrides: dict[str, Any]) -> PreTrainedModel:
    layers = FIVE_TO_ONE if num_kv_heads == 1 else SHORTER
    config = Gemma3TextConfig(
        **(COMMON | {"initializer_range": 0.2} | overrides),
        num_key_value_heads=num_kv_heads,
        num_hidden_layers=len(layers),
        layer_types=layers,
    )
    model = Gemma3ForCausalLM(config)
    for layer in model.model.layers:  # queries are scaled by (1 + weight); soft attention keeps rounding errors small
        torch.nn.init.constant_(layer.self_attn.q_norm.weight, -0.5)
    return model


def _make_gemma2(overrides: dict[str, Any]) -> PreTrainedModel:
    # Tunix's Gemma 2 takes positions for slots, so that a shorter window is wrong beside left padding: differences.py
    # has that case.
    window = {"sliding_window": PROMPT_WIDTH + COMPLETION_WIDTH}
    config = Gemma2Config(
        **(COMMON | window | overrides),
        num_key_value_heads=2,
        num_hidden_layers=4,
        attn_implementation="eager",
    )
    return Gemma2ForCausalLM(config)


def _make_gemma4(overrides: dict[str, Any]) -> PreTrainedModel:
    settings = {name: value for name, value in (COMMON | overrides).items() if name != "query_pre_attn_scalar"}
    config = Gemma4TextConfig(
        **settings,
        num_key_value_heads=2,
        num_hidden_layers=len(SHORTER),
        layer_types=SHORTER,
        final_logit_softcapping=30.0,
        num_kv_shared_layers=0,  # Tunix's loader takes no other value: see tunix_models.py
        global_head_dim=32,
        hidden_size_per_layer_input=32,  # these inputs are normalised; narrow ones would magnify rounding errors
        vocab_size_per_layer_input=VOCABULARY,
        use_double_wide_mlp=False,
    )
    model = Gemma4ForCausalLM(config)
    for layer in model.model.layers:  # Gemma 4 does not divide scores by sqrt(head_dim); this keeps attention soft
        torch.nn.init.constant_(layer.self_attn.q_norm.weight, 0.25)
    return model


def make_rollout(number: int, empty: bool = True) -> tuple[PromptBatch, Rollout, torch.Tensor]:
    """Return batch `number` of a fixed sequence of batches: 3 prompts with 4 completions each, and their rewards.

    Prompts are padded on the left, and completions have different lengths. The rewards of the first group are all
    equal; those of the second differ by millionths, so that the epsilon beside the standard deviation matters.

    Args:
        empty: whether one completion has no token at all.

    Returns:
        the prompts (N = 3), the completions (B = 12), and the rewards (B,) float64.
    """
    random = torch.Generator().manual_seed(1000 + number)

    def ragged(lengths: list[int], width: int) -> tuple[torch.Tensor, torch.Tensor]:
        mask = torch.arange(width) < torch.tensor(lengths)[:, None]
        ids = torch.randint(3, VOCABULARY - 1, mask.shape, generator=random)  # one id stays unused, to mark padding
        return ids, mask

    def draw(low: int, high: int, count: int) -> list[int]:
        return torch.randint(low, high + 1, (count,), generator=random).tolist()

    prompt_ids, prompt_mask = ragged([PROMPT_WIDTH, *draw(2, PROMPT_WIDTH - 2, NUM_PROMPTS - 1)], PROMPT_WIDTH)
    prompt_mask = prompt_mask.flip(-1)
    lengths = [COMPLETION_WIDTH, *draw(1, COMPLETION_WIDTH - 1, NUM_PROMPTS * GROUP - 1)]
    if empty:
        lengths[6] = 0
    ids, mask = ragged(lengths, COMPLETION_WIDTH)
    last = mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1))
    last[0] = False  # the first completion is cut off at the limit, so it has no end token
    ids = ids.masked_fill(last, EOS).masked_fill(~mask, PAD)
    rewards = torch.randint(0, 5, (NUM_PROMPTS, GROUP), generator=random).double() / 2
    rewards[2, 0] += 0.25  # the third group's rewards are never all equal
    rewards[0] = 1.0
    rewards[1] = 0.5 + torch.tensor([0.0, 1e-6, 2e-6, 4e-6], dtype=torch.float64)
    prompts = PromptBatch(prompt_ids.masked_fill(~prompt_mask, PAD), prompt_mask, [{}] * NUM_PROMPTS)
    return prompts, Rollout(ids, mask, torch.zeros(mask.shape)), rewards.flatten()


@dataclass(frozen=True)
class Case:
    """One case of the cross-check: settings of `GRPOConfig`, and what of a batch is made by the case."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    given_old: bool = False  # whether it makes old log-probabilities, so that ratios differ from 1
    given_sampler: bool = False  # whether it makes the sampler's, which differ from both
    in_tunix: bool = True  # whether Tunix has the settings; else only TRL does


AGGREGATIONS = {
    "token-mean": "token-mean",
    "row-mean": "sequence-mean-token-mean",
    "row-scale": "sequence-mean-token-scale",
    "row-sum": "seq-mean-token-sum",
    "sum-norm": "sequence-mean-token-sum-norm",
}
CASES = [
    Case("defaults", {"micro_batch_size": None}),
    Case("old", given_old=True),
    Case("k1", {"kl_estimator": "k1"}),
    Case("k2", {"kl_estimator": "k2"}),
    Case("k3 clamped", {"kl_estimator": "k3", "kl_clamp_value": 0.05}, given_old=True),
    *(Case(name, {"loss_aggregation": mode}, given_old=True) for name, mode in AGGREGATIONS.items()),
    Case("temperature 0.9", {"generation_temperature": 0.9}),
    Case("two passes", {"num_iterations": 2}),
    Case("gspo", {"algorithm": "gspo"}, given_old=True),
    Case("dual clip", {"epsilon_high": 0.28, "epsilon_c": 1.5}, given_old=True),
    Case("dapo", {"algorithm": "dapo"}, given_old=True),
    Case("dr_grpo", {"algorithm": "dr_grpo"}, given_old=True),
    Case("rloo", {"algorithm": "rloo"}, given_old=True),
    Case("micro-batches of 2", {"micro_batch_size": 2}, given_old=True),
    Case("clipping and decay", {"max_grad_norm": 0.05, "weight_decay": 0.1}, given_old=True),
]

LOSSES = {
    "bnpo": {"loss_type": "bnpo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.1},
    "cispo of sequences": {"loss_type": "cispo", "epsilon_high": 1.1, "importance_sampling_level": "sequence"},
    "sapo": {"loss_type": "sapo", "sapo_temperature_neg": 1.3},
    "sapo of sequences": {"loss_type": "sapo", "importance_sampling_level": "sequence"},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "vespo": {"loss_type": "vespo", "vespo_k_pos": 1.5},
    "delta": {"delta": 1.3},
    "bias-corrected KL": {"use_bias_correction_kl": True, "beta": 0.1},
    "masked truncation": {"mask_truncated_completions": True},
    "masked truncation, dapo": {"mask_truncated_completions": True, "loss_type": "dapo"},
    "off-policy mask": {"off_policy_mask_threshold": 0.05},
    "high entropy": {"top_entropy_quantile": 0.3},
    "entropy bonus": {"entropy_coef": 0.05},
    "entropy bonus of high entropy": {"entropy_coef": 0.05, "top_entropy_quantile": 0.3, "loss_type": "dapo"},
}
# With TRL's own k and lambda the weight is steep for large ratios: even in float64, the gradient moves by more than its
# tolerance where log-probabilities move by a fifth of theirs.
MILD = {"vespo_k_pos": 1.0, "vespo_lambda_pos": 1.0, "vespo_k_neg": 1.5, "vespo_lambda_neg": 0.8}
CORRECTED = {
    "token_truncate": {"sampler_correction_max": 1.2, "sampler_correction_min": 0.9},
    "token_mask": {"sampler_correction_max": 1.3},
    "sequence_truncate": {"sampler_correction_max": 1.1},
    "sequence_mask": {"sampler_correction_max": 1.5, "sampler_correction_min": 0.7},
    "vespo, token_truncate": {"sampler_correction_max": 1.2, "loss_type": "vespo"} | MILD,
    "vespo, token_mask": {"sampler_correction_max": 1.2, "loss_type": "vespo"} | MILD,
    "off-policy mask, token_mask": {"sampler_correction_max": 1.3, "off_policy_mask_threshold": 0.05},
}
CASES += [Case(name, settings, given_old=True, in_tunix=False) for name, settings in LOSSES.items()]
CASES += [
    Case(name, {"sampler_correction": name.split(", ")[-1]} | settings, True, given_sampler=True, in_tunix=False)
    for name, settings in CORRECTED.items()
]
FAMILIES = ["gemma3-1", "gemma3-2", "gemma3-4", "gemma2", "gemma4"]
