"""The questions of a run, ready for the model, and with the columns that its reward functions and its judge take."""

import functools
from collections.abc import Sequence, Sized
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from ..config.grpo import GRPOConfig
from ..data.prompts import Collator, PromptStream, prepare_rows
from ..data.rows import Row
from ..data.sources import check_stream, evaluation_rows, training_rows
from .columns import check_columns
from .scoring import RewardFunc


class Questions:
    """Rows with a prompt or question to train on and to evaluate on. With SFT they have completions too.

    Args:
        train_dataset, eval_dataset: what `training_rows` and `evaluation_rows` take, or None.
        tokenizer: renders and tokenises prompts.
        args: widths, the system message, what happens to prompts that are too long.

    Raises:
        ValueError: rows that can't be used, or a stream without `max_steps`.
    """

    def __init__(
        self, train_dataset: Any, eval_dataset: Any, tokenizer: PreTrainedTokenizerBase, args: GRPOConfig
    ) -> None:
        self.train: list[Row] | datasets.Dataset | datasets.IterableDataset | PromptStream | None = None
        self.evaluation: list[Row] | datasets.Dataset | None = None
        if train_dataset is not None:
            self.train = training_rows(train_dataset)
        if eval_dataset is not None:
            self.evaluation = evaluation_rows(eval_dataset)
        check_stream(self.train, args.max_steps, args.dataloader_num_workers)
        self._for_grpo = args.use_grpo
        width = None if args.use_grpo else args.generation_max_length
        self.collator = Collator(tokenizer.pad_token_id, args.max_prompt_length, width)
        self._prepare = functools.partial(
            prepare_rows,
            tokenizer=tokenizer,
            max_prompt_length=args.max_prompt_length,
            max_completion_length=width,
            system_message=args.system_message,
            overlong=args.overlong_prompts,
        )

    @property
    def sizes(self) -> list[int | None]:
        """How many rows there are to train on and to evaluate on; None where that is not known, or there are none."""
        return [len(rows) if isinstance(rows, Sized) else None for rows in (self.train, self.evaluation)]

    def prepare(self, num_embeddings: int, reward_funcs: Sequence[RewardFunc], judge: RewardFunc | None) -> None:
        """Tokenise all rows, and see that they have what reward functions and the judge take.

        Args:
            num_embeddings: of the model, which must have one for each token.

        Raises:
            ValueError: see `prepare_rows` and `check_columns`.
        """
        self._prepare = functools.partial(self._prepare, num_embeddings=num_embeddings)
        self._judge = judge
        if self.train is not None:
            self.train = self._prepare(self.train)
            if self._for_grpo:
                check_columns(reward_funcs, self.train)
        if self.evaluation is not None:
            self.evaluation = self.to_evaluate(self.evaluation)

    def for_trainer(self) -> dict[str, Any]:
        """The arguments of `transformers.Trainer` about data."""
        return {"data_collator": self.collator, "train_dataset": self.train, "eval_dataset": self.evaluation}

    def to_evaluate(self, eval_dataset: Any = None) -> list[Row]:
        """Rows that are tokenised and can be judged: of another data set, or of the run's own, which are already.

        Raises:
            ValueError: there are none; see also `prepare_rows` and `check_columns`.
        """
        rows = self.evaluation or [] if eval_dataset is None else evaluation_rows(eval_dataset)
        if not rows:
            raise ValueError("eval_dataset: there are no rows to evaluate on")
        rows = list(self._prepare(rows))
        if self._judge is not None and eval_dataset is not None:
            check_columns([self._judge], rows, "judge")
        return rows
