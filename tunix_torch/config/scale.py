"""Settings that must fit the number of processes, hosts and devices that train together."""

from ..runtime import mesh, together
from .grpo import GRPOConfig
from .settings import require


def rows_per_generation(args: GRPOConfig) -> int:
    """How many training rows one rollout takes, over all processes: those of the optimizer steps that share it."""
    steps = args.steps_per_generation * args.gradient_accumulation_steps
    return args.per_device_train_batch_size * together.count() * steps


def check_scale(args: GRPOConfig, num_rows: int | None) -> None:
    """Check the settings that depend on how many processes, hosts and devices take part in a run.

    Args:
        num_rows: the number of training rows; None: they are a stream, or there are none.

    Raises:
        ValueError: there are fewer rows than one step needs, prompts can't be spread over a mesh, or a setting works
            in one process or on one host only.
    """
    prompts, processes = args.per_device_train_batch_size, together.count()
    if num_rows is not None and num_rows < prompts * processes:
        rows = "packed rows" if args.packing else "training rows"
        shared = f" for {processes} processes" if processes > 1 else ""
        there = f"there are only {num_rows} {rows}{shared}; give at most {num_rows // processes}"
        raise ValueError(f"per_device_train_batch_size={prompts}: {there}")
    steps = args.steps_per_generation
    enough = steps == 1 or num_rows is None or num_rows >= rows_per_generation(args)
    hint = f"a rollout takes {rows_per_generation(args)} training rows, and there are only {num_rows}"
    require(enough, "steps_per_generation", steps, hint)
    fsdp = mesh.axis_size("fsdp")
    hint = f"prompts are spread over fsdp={fsdp}; give a multiple of that"
    require(prompts % fsdp == 0, "per_device_train_batch_size", prompts, hint)
    alone = not args.save_batches or processes * mesh.along_tp() == 1
    require(alone, "save_batches", args.save_batches, "a record is of one process; leave it at 0 with several")
    alone = not args.load_best_model_at_end or together.num_hosts() == 1
    require(alone, "load_best_model_at_end", True, "with several hosts the last model stays; leave it out")
