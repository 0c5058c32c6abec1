"""Hugging Face TRL as a third opinion: its own `_compute_loss` on the same batch. The only importer of trl here."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from datasets import Dataset
from trl import GRPOConfig as TRLConfig
from trl import GRPOTrainer

from .. import GRPOConfig, ModelConfig
from ..learn.record import StepRecord
from ..model import tiny
from ..model.loading import add_lora, load_base_model, lora_config
from .compare import LOGPS, Row, gradient_row, largest_difference, scalar_tolerance
from .ours import ALPHA, RANK, no_reward

# Our loss aggregation -> TRL's loss_type. TRL's means over rows count empty rows too, ours and Tunix's don't.
LOSS_TYPES = {
    "sequence-mean-token-mean": "grpo",
    "token-mean": "bnpo",  # "dapo" is the same over a whole batch; the algorithm of that name gets it
    "sequence-mean-token-scale": "dr_grpo",
    "seq-mean-token-sum": "luspo",
    "sequence-mean-token-sum-norm": "luspo",
}


def compare_with_trl(case: str, folder: Path, record: StepRecord, args: GRPOConfig) -> Iterator[Row]:
    """Policy log-probabilities, loss and LoRA gradients of a recorded step, by TRL. `folder` holds the base model."""
    model = add_lora(load_base_model(str(folder)), lora_config(ModelConfig(lora_rank=RANK, lora_alpha=ALPHA)))
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in record.lora.items():
            parameters[name].copy_(value)
    batch = record.batch
    group = args.num_completions_per_prompt
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = GRPOTrainer(
            model,
            no_reward,
            TRLConfig(
                output_dir=output_dir,
                use_cpu=True,
                bf16=False,
                report_to="none",
                gradient_checkpointing=False,
                per_device_train_batch_size=len(batch.completion_ids),
                num_generations=group,
                max_completion_length=args.generation_max_length,
                temperature=args.generation_temperature,
                beta=args.beta,
                use_bias_correction_kl=False,  # TRL's default multiplies the KL estimate by the ratio
                epsilon=args.epsilon,
                epsilon_high=args.clip_high,
                delta=args.epsilon_c,
                loss_type="dapo" if args.algorithm == "dapo" else LOSS_TYPES[args.aggregation],
                importance_sampling_level="sequence" if args.algorithm == "gspo" else "token",
            ),
            Dataset.from_list([{"prompt": "?"}]),
            processing_class=tiny.make_tokenizer(),
        )
    trainer.current_gradient_accumulation_steps = 1
    inputs = {
        "prompt_ids": batch.prompt_ids.repeat_interleave(group, dim=0),
        "prompt_mask": batch.prompt_mask.repeat_interleave(group, dim=0).long(),
        "completion_ids": batch.completion_ids,
        "completion_mask": batch.completion_mask.long(),
        "advantages": batch.advantages,
        "ref_per_token_logps": batch.ref_per_token_logps,
        "old_per_token_logps": batch.old_per_token_logps,
        "num_items_in_batch": batch.completion_mask.sum(),
    }
    model.train()
    ids = torch.cat((inputs["prompt_ids"], inputs["completion_ids"]), dim=1)
    mask = torch.cat((inputs["prompt_mask"], inputs["completion_mask"]), dim=1)
    with torch.no_grad():
        logps = trainer._get_per_token_logps_and_entropies(model, ids, mask, batch.completion_ids.shape[1])[0]
    difference = largest_difference(record.logps, logps.masked_fill(~batch.completion_mask, 0.0))
    yield Row(case, "policy log-probabilities", difference, LOGPS)
    loss = trainer._compute_loss(model, inputs)
    yield Row(case, "loss", abs(float(loss.detach()) - float(record.loss)), scalar_tolerance(args))
    loss.backward()
    yield gradient_row(case, record.gradients, {name: parameters[name].grad for name in record.gradients}, True)
