"""Short runs, and passes of every family of models, that a mesh of processes does and one process does alone.

Both call `main`: the processes from `JOB`, which a test starts, the one process from the test itself.
"""

JOB = "import sys; from processes_of_mesh import main; main(*sys.argv[1:])"

PROMPTS = 4  # of an optimizer step, over all processes
WHOLE = {"adam_epsilon": 1e-2, "learning_rate": 1e-3, "sync_ref_model": True, "ref_model_sync_steps": 1}
SAVED = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 2}
CHANGED = {"allow_changes": ["processes", "per_device_train_batch_size"], "fsdp": None}
CASES = {  # the KV heads of a Gemma 3 with four heads, whether all weights learn, settings
    "lora": (2, False, SAVED),
    "whole": (1, True, WHOLE | {"gradient_checkpointing": True}),
    "saved whole": (1, True, SAVED | WHOLE),
    "short": (2, False, {"generation_max_length": 6}),
    "sft": (2, True, {"adam_epsilon": 1e-2, "learning_rate": 1e-3, "use_grpo": False, "generation_max_length": 64}),
    "lora of others": (2, False, CHANGED),
    "saved whole of others": (1, True, CHANGED | WHOLE),
    "fsdp lora": (2, False, SAVED | {"fsdp": "full_shard"}),
    "fsdp saved whole": (1, True, SAVED | WHOLE | {"fsdp": "full_shard"}),
}


def main(shape, root, others, *cases):
    """Run cases on a mesh, such as "2,2", or with "1" in this process alone; the first one writes `root/CASE.pt`.

    Args:
        others: the folder of those who ran the cases before, whose checkpoints cases "of others" go on from.
    """
    from tunix_torch.runtime import mesh

    if shape != "1":
        mesh.use_mesh((tuple(map(int, shape.split(","))), ("fsdp", "tp")))
    import torch

    from tunix_torch import GRPOConfig
    from tunix_torch.runtime import together

    GRPOConfig(output_dir=root)  # joins the processes
    for case in cases:
        result = passes_of_families() if case == "families" else run(case, root, others)
        if together.is_first():
            torch.save(result, f"{root}/{case}.pt")


def run(case, root, others):
    """Train for two steps, and return what was learned and logged."""
    import torch
    from models import make_model
    from trainers import make_trainer

    from tunix_torch.model import tiny
    from tunix_torch.runtime import fsdp, together

    kv_heads, full, settings = CASES[case]
    tokenizer = tiny.make_tokenizer()
    tokens = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("pad", "bos", "eos")}
    model = make_model(
        "gemma3",
        **tokens,
        vocab_size=-(-len(tokenizer) // 8) * 8,
        num_key_value_heads=kv_heads,
        initializer_range=0.1,
    )
    common = {"max_steps": 2, "generation_max_length": 8, "num_completions_per_prompt": 2, "micro_batch_size": None}
    prompts = {"adam_epsilon": 1e-3, "per_device_train_batch_size": PROMPTS // together.count()}
    place = f"{root}/{case}"
    trainer = make_trainer(model, place, processing_class=tokenizer, full=full, **common | prompts | settings)
    trainer.train(
        resume_from_checkpoint=f"{others}/{case.removesuffix(' of others')}/checkpoint-1" if "others" in case else None
    )
    parts = {name: (p.numel(), fsdp.own_part(p).numel()) for name, p in trainer.model.named_parameters()}
    weights = {
        name: fsdp.whole(p).detach().cpu().clone() for name, p in trainer.model.named_parameters() if p.requires_grad
    }
    everyones = together.gather(weights)
    assert all(torch.equal(everyones[0][name], theirs[name]) for theirs in everyones for name in weights)
    head, embeddings = trainer.model.get_output_embeddings(), trainer.model.get_input_embeddings()
    return {
        "weights": weights,
        "log": trainer.state.log_history,
        "parts": parts,
        "tied": head.weight is embeddings.weight,
        "compared": together.count() * together.num_peers(),
    }


def passes_of_families():
    """Log-probabilities, gradients and completions of every family, with LoRA; of Gemma 3 also with all weights.

    All processes have the same rows, so gradients are those of one process times the processes that have rows.
    """
    import torch
    from models import FAMILIES, add_nontrivial_lora, make_batch, make_model, weighted

    from tunix_torch.learn.logprobs import token_logps
    from tunix_torch.learn.passes import shared_prompts
    from tunix_torch.model.attention import use_own_attention
    from tunix_torch.model.forward import base_model
    from tunix_torch.model.loading import place
    from tunix_torch.rollout.sampler import Sampler
    from tunix_torch.rollout.tokens import SamplingParams, draw_uniforms
    from tunix_torch.runtime import fsdp, together

    results, vocabulary = {}, 96
    batch = make_batch(vocabulary=vocabulary)
    params = SamplingParams(
        max_new_tokens=6
    )  # of all tokens: where two tie for the last place among some, rounding decides
    uniforms = draw_uniforms((0, 1), range(6), 6)
    cases = [(family, kv, {}, {}) for family in FAMILIES for kv in (1, 2)]
    cases += [
        ("gemma3", 2, {"tie_word_embeddings": False}, {}),
        ("gemma3", 2, {}, {"modules_to_save": ["embed_tokens"]}),
    ]
    cases += [(family, 1, {}, None) for family in ("gemma3", "qwen3")]
    for family, kv, overrides, lora in cases:
        more = {"vocab_size_per_layer_input": vocabulary} if family == "gemma4" else {}
        model = make_model(family, vocab_size=vocabulary, num_key_value_heads=kv, **more, **overrides)
        model = model if lora is None else add_nontrivial_lora(model, **lora)
        use_own_attention(base_model(model))
        place(model)
        logps, _ = token_logps(model, shared_prompts(batch))
        weighted(logps, batch).backward()
        together.sum_gradients(model.parameters())
        gradients = {
            n: fsdp.whole(p.grad) / together.count() for n, p in model.named_parameters() if p.grad is not None
        }
        rollout = Sampler(model, [1], 0).sample(batch.prompt_ids[:3], batch.prompt_mask[:3], 2, params, uniforms)
        results[str((family, kv, overrides, lora))] = logps.detach(), gradients, rollout.completion_ids
    assert all(isinstance(g, torch.Tensor) for _, gradients, _ in results.values() for g in gradients.values())
    return results
