"""Make tiny random models of every family and batches for them, and compute what Hugging Face itself gives."""

from dataclasses import replace

import torch
from peft import LoraConfig
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
)

from tunix_torch.batch import TrainBatch
from tunix_torch.batch import completion_lengths as lengths_of
from tunix_torch.learn import logprobs
from tunix_torch.learn.passes import shared_prompts
from tunix_torch.learn.weights import aggregation_weights
from tunix_torch.model import tiny
from tunix_torch.model.forward import base_model
from tunix_torch.model.loading import LORA_TARGETS, add_lora

VOCABULARY = 97
WINDOW = 8
PAD = 0
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # this is far above the usual 0.02, so that attention, caps and windows matter
    "pad_token_id": PAD,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
ALTERNATING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = {
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config,
        ALTERNATING
        | {
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "attn_implementation": "eager",  # sdpa leaves out the cap on attention scores
        },
    ),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, ALTERNATING | {"query_pre_attn_scalar": 8}),
    "gemma4": (  # layers 2 and 3 use the keys and values of layers 0 and 1
        Gemma4ForCausalLM,
        Gemma4TextConfig,
        {
            "sliding_window": WINDOW,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "global_head_dim": 16,
            "final_logit_softcapping": 3.0,
            "initializer_range": 0.2,
            "rms_norm_eps": 1e-2,  # with a smaller one, its many norms would inflate rounding errors of gradients
        },
    ),
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, ALTERNATING | {"use_sliding_window": True}),
}


def make_model(family, seed=0, **overrides):
    """Make a float32 model with random weights; `overrides` are settings of its config."""
    model_class, config_class, settings = FAMILIES[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config_class(**(COMMON | settings | overrides))).eval()


def random_reward_model(tokenizer, num_labels=1, family="qwen3"):
    """Make a float32 model with random weights that gives a text `num_labels` scores."""
    model_class, config_class, settings = {
        "bert": (BertForSequenceClassification, BertConfig, {}),
        "qwen3": (Qwen3ForSequenceClassification, Qwen3Config, {"num_key_value_heads": 1, "head_dim": 16}),
    }[family]
    settings |= {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings |= {"vocab_size": len(tokenizer), "max_position_embeddings": 256}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = config_class(**settings, pad_token_id=tokenizer.pad_token_id, num_labels=num_labels)
        return model_class(config).eval()


def save_reward_model(folder, num_labels=1):
    """Save a reward model with the tiny model's tokenizer; return the folder."""
    tokenizer = tiny.make_tokenizer()
    random_reward_model(tokenizer, num_labels).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def add_nontrivial_lora(model, seed=1, **settings):
    """Add a LoRA whose B matrices are random, so that it changes what the model computes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=LORA_TARGETS, task_type="CAUSAL_LM", **settings)
        model = add_lora(model, config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def make_policy(family, **overrides):
    """Make a model with a LoRA that changes what it computes."""
    return add_nontrivial_lora(make_model(family, **overrides))


def make_batch(
    prompt_lengths=(19, 11, 3),
    completion_lengths=(1, 12, 5, 7, 12, 3, 2, 9, 4),
    seed=2,
    vocabulary=VOCABULARY,
    aggregation="sequence-mean-token-mean",
    place="cpu",
):
    """Make random prompts, padded on the left to the longest, with an equal number of ragged completions each."""
    random = torch.Generator().manual_seed(seed)

    def ragged(lengths, left):
        width = max(lengths)
        mask = torch.arange(width) < torch.tensor(lengths)[:, None]
        mask = mask.flip(-1) if left else mask
        ids = torch.randint(3, vocabulary, mask.shape, generator=random)
        return ids.masked_fill(~mask, PAD), mask

    prompt_ids, prompt_mask = ragged(prompt_lengths, left=True)
    completion_ids, completion_mask = ragged(completion_lengths, left=False)
    return TrainBatch(
        prompt_ids=prompt_ids.to(place),
        prompt_mask=prompt_mask.to(place),
        completion_ids=completion_ids.to(place),
        completion_mask=completion_mask.to(place),
        advantages=torch.randn(len(completion_lengths), generator=random).to(place),
        token_weights=aggregation_weights(completion_mask, aggregation, completion_mask.shape[1]).to(place),
        lengths=lengths_of(completion_mask),
    )


def token_logps(model, batch, temperature=1.0, layout=shared_prompts):
    """Compute the library's log-probabilities and entropies of a batch, in the pass that `layout` makes of it."""
    return logprobs.token_logps(model, layout(batch), temperature)


def with_completions(batch, ids, mask):
    """Return the batch with other completions; ids and mask are (B, C)."""
    return replace(batch, completion_ids=ids, completion_mask=mask, lengths=lengths_of(mask))


def single_row(batch, row):
    """Return the batch of one completion and its prompt, without padding."""
    prompt = row // (len(batch.completion_ids) // len(batch.prompt_ids))
    kept, filled = batch.prompt_mask[prompt], batch.completion_mask[row]
    return replace(
        batch,
        prompt_ids=batch.prompt_ids[prompt, kept][None],
        prompt_mask=kept[kept][None],
        completion_ids=batch.completion_ids[row, filled][None],
        completion_mask=filled[filled][None],
        advantages=batch.advantages[row][None],
        token_weights=batch.token_weights[row, filled][None],
        lengths=batch.lengths[row][None],
    )


def hugging_face_logits(model, ids):
    """Return scores of one unpadded row by the model's own forward and masks, without a cache: (L,) -> (L, V)."""
    model, ids = base_model(model), ids[None]
    positions = torch.arange(ids.shape[1])[None]
    mask = torch.ones_like(ids)
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[0]


def hugging_face_logps(model, batch, temperature=1.0):
    """Compute from `hugging_face_logits`, row by row, what `token_logps` must return: (B, C) logps and entropies."""
    columns = []
    for i in range(len(batch.completion_ids)):
        row = single_row(batch, i)
        prompt, completion = row.prompt_ids[0], row.completion_ids[0]
        scores = hugging_face_logits(model, torch.cat((prompt, completion)))[len(prompt) - 1 : -1]
        distribution = torch.distributions.Categorical(logits=scores / temperature)
        values = torch.stack((distribution.log_prob(completion), distribution.entropy()))  # (2, length)
        columns.append(torch.nn.functional.pad(values, (0, batch.completion_ids.shape[1] - len(completion))))
    return torch.stack(columns, dim=1).unbind()


def lora_gradients(model, loss):
    """Return all LoRA gradients of a scalar loss as one vector."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, parameters)])


def weighted(logps, batch):
    """Return a scalar in which every token counts differently."""
    return (logps * torch.linspace(-1, 2, logps.numel()).view(logps.shape) * batch.completion_mask).sum()


def assert_close(actual, expected, tolerance):
    """Check the largest difference relative to the largest entry of what is expected."""
    scale = expected.detach().abs().max()
    assert scale > 1e-3, "nothing to compare with"
    torch.testing.assert_close(actual, expected, rtol=0, atol=float(tolerance * scale))
