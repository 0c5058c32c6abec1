"""Recognizes an error of memory that has run out, and says in which part of a run it was and what takes less there."""

import contextlib
import re
from collections.abc import Iterator

# What the allocators say: of CUDA and of its driver, of XLA and of the CPU. The last one raises a plain RuntimeError.
SAID = re.compile(r"out.of.memory|RESOURCE_EXHAUSTED|can't allocate memory|STATUS_ALLOC_FAILED", re.IGNORECASE)
FEWER = "half of per_device_train_batch_size with twice the gradient_accumulation_steps"
PASS = f"try a smaller micro_batch_size, which changes no number, or {FEWER}"
TAKES_LESS = {
    "rollout": f"try {FEWER}, or a smaller generation_max_length",
    "reference": PASS,
    "old policy": PASS,
    "learning": f"try a smaller micro_batch_size, then gradient_checkpointing true, with equal numbers; or {FEWER}",
    "evaluating": "try a smaller per_device_eval_batch_size",
    "answering": "try a smaller batch_size or max_new_tokens",
}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out, on the device or on the host."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and SAID.search(str(error)) is not None)


@contextlib.contextmanager
def noting_what_takes_less(part: str) -> Iterator[None]:
    """An error of memory that leaves this context gets a note of the part of the run, and of what takes less in it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error) and part in TAKES_LESS:
            error.add_note(f"This was in {part}: {TAKES_LESS[part]}")
        raise


def in_one_line(error: BaseException) -> str:
    """What an error of memory says, without where in PyTorch's source it was raised."""
    said = re.sub(r"^\[enforce fail at [^\]]*\][^.]*\. ", "", str(error)).partition("\n")[0]
    return f"out of memory{': ' * bool(said)}{said}"
