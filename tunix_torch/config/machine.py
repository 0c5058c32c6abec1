"""The part of `GRPOConfig` that fits settings to this machine: its device, and the processes that train together."""

import math
from typing import Any

import torch
from transformers import TrainingArguments

from ..runtime import device as process_device
from ..runtime import mesh, together
from ..runtime.choice import KINDS
from .settings import require


class OnThisMachine(TrainingArguments):
    """`transformers.TrainingArguments` on the device of this process. The fields are those of `GRPOConfig`."""

    def check_device(self) -> None:
        """Take the device that this process has chosen, and join the chips that compute with it.

        Raises:
            ValueError: another device was asked for, or more than one core; or there are too few for all processes, or
                the device does not start.
        """
        chosen = process_device.KIND
        if isinstance(self.device, torch.device):  # this config is made from another one
            self.device = chosen
        self._requested_device = self.device
        require(self.device in KINDS, "device", self.device, f"choose one of {', '.join(KINDS)}")
        if self.device not in ("auto", chosen):
            raise ValueError(
                f"device={self.device!r}: this process has already chosen {chosen!r}; "
                f"set TUNIX_DEVICE={self.device} before tunix_torch is imported"
            )
        process_device.start()
        together.check_processes(chosen)
        if chosen == "tpu":
            together.join_chips()
        # Accelerate knows no processes on "tpu": it takes them for processes on the CPU, whose device is another one.
        self.use_cpu = chosen == "cpu" or (chosen == "tpu" and together.num_processes() > 1)
        self.dataloader_pin_memory = chosen == "cuda"
        cores = self.num_tpu_cores
        require(cores in (None, 1), "num_tpu_cores", cores, "one core is used; leave it out or set it to 1")

    def __post_init__(self) -> None:
        """Let `transformers.TrainingArguments` check and fill in its fields, then mend what would not fit here."""
        super().__post_init__()
        if self.accelerator_config.dispatch_batches is None:
            self.accelerator_config.dispatch_batches = False  # rows hold texts, which a process can't send to others
        self._n_gpu = min(1, self.n_gpu)  # one process, one GPU: Trainer would split batches over all that it sees
        # Trainer reads `device`, a property of TrainingArguments that our field replaces. With several processes
        # Accelerate calls the CPU "cpu:0", which torch.load doesn't know, so it is "cpu" here.
        self.device = torch.device("cpu") if self._setup_devices.type == "cpu" else self._setup_devices

    def to_dict(self) -> dict[str, Any]:
        """Return what `TrainingArguments.to_dict` does, but with the device as the word that was asked for."""
        return super().to_dict() | {"device": self._requested_device}

    @property
    def process_index(self) -> int:
        """The number of this process: Transformers lets 0 write files, and torch-xla would call every host 0."""
        return super().process_index if together.num_peers() == 1 else together.index() or int(not together.is_first())

    @property
    def world_size(self) -> int:
        """How many processes have prompts of their own."""
        return super().world_size if together.num_peers() == 1 else together.count()

    @property
    def rows_per_pass(self) -> int | None:
        """Rows in one learning pass where every completion may have its greatest length; None: the whole batch."""
        return self.rows_in_pass_of(self.num_completions_per_prompt * self.generation_max_length)

    def rows_in_pass_of(self, completion_tokens: float) -> int | None:
        """Rows in one learning pass where a group has `completion_tokens` tokens in all; None: the whole batch."""
        if self.micro_batch_size is not None or not self.use_grpo:
            return self.micro_batch_size or None
        budget = mesh.tokens_per_pass()
        if budget is None:
            groups = mesh.axis_size("fsdp")  # one group for each device
        else:  # as many groups as the budget holds, and at least one, in passes of about the same size
            tokens = self.max_prompt_length + completion_tokens
            passes = math.ceil(self.per_device_train_batch_size / max(1, budget // tokens))
            groups = math.ceil(self.per_device_train_batch_size / passes)
        return self.num_completions_per_prompt * groups
