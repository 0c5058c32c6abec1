"""A small `TunixTrainer` for tests, rewards that vary when a random model writes, and what a trainer has learned."""

from tunix_torch import GRPOConfig, TunixTrainer
from tunix_torch.batch import PromptBatch
from tunix_torch.model import tiny


def digits_reward(prompts, completions, **columns):
    """Varies even when a random model writes: the share of digits."""
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]


def ends_early(prompts, completions, **columns):
    """Prefers short completions."""
    return [1 / (1 + len(text)) for text in completions]


def make_trainer(
    model,
    output_dir,
    reward_funcs=digits_reward,
    callbacks=None,
    peft_config=None,
    rows=64,
    judge=None,
    processing_class=None,
    **settings,
):
    """A trainer of three small steps on arithmetic; `settings` are fields of GRPOConfig, `rows` the training rows."""
    settings = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "generation_max_length": 12,
        "max_prompt_length": 40,
        "system_message": "",
        "learning_rate": 1e-2,
        "micro_batch_size": 0,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    } | settings
    args = GRPOConfig(output_dir=str(output_dir), **settings)
    train, evaluation = tiny.arithmetic_rows("train", rows), tiny.arithmetic_rows("test", 8)
    return TunixTrainer(model, reward_funcs, args, train, evaluation, processing_class, peft_config, callbacks, judge)


def first_batch(trainer):
    """The `TrainBatch` of the first step, collected as `train()` would."""
    trainer.current_gradient_accumulation_steps = 1
    inputs = next(iter(trainer.get_train_dataloader()))
    return trainer.collect(PromptBatch(**inputs))


def lora_weights(trainer):
    """Copies of the weights that learn, by their names in the model."""
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def gradients(trainer, batch):
    """The loss of one update and the gradient of every weight that learns, without a step of the optimizer."""
    trainer.model.zero_grad()
    loss = trainer.update(batch)
    return loss, {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
