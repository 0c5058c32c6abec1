"""Make a small `TunixTrainer`, reward what a random model writes, and read what a trainer has learned."""

from tunix_torch import GRPOConfig, TunixTrainer
from tunix_torch.batch import PromptBatch
from tunix_torch.model import tiny


def digits_reward(prompts, completions, **columns):
    """Reward the share of digits, which varies even when a random model writes."""
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]


def ends_early(prompts, completions, **columns):
    """Reward short completions."""
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
    reward_processing_classes=None,
    full=False,
    **settings,
):
    """Make a trainer of three steps on arithmetic; `settings` are fields of GRPOConfig, `rows` the training rows."""
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
    rest = (processing_class, peft_config, callbacks, judge, reward_processing_classes, full)
    return TunixTrainer(model, reward_funcs, args, train, evaluation, *rest)


def first_batch(trainer):
    """Collect the `TrainBatch` of the first step as `train()` would."""
    trainer.current_gradient_accumulation_steps = 1
    inputs = next(iter(trainer.get_train_dataloader()))
    return trainer.collect(PromptBatch(**inputs))


def lora_weights(trainer):
    """Return copies of the weights that learn, by their names in the model."""
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def gradients(trainer, batch):
    """Return the loss of one update and the gradient of every weight that learns; the optimizer does not step."""
    trainer.model.zero_grad()
    loss = trainer.update(batch)
    return loss, {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
