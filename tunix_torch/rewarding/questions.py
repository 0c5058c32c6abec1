"""Holds the questions of a run: tokenised for the model, and checked for what reward functions and the judge take."""

import functools
from collections.abc import Sequence, Sized
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from ..batch import PromptBatch
from ..config.grpo import GRPOConfig
from ..config.settings import require
from ..data.batches import Collator, PromptStream
from ..data.prompts import prepare_rows
from ..data.rows import Row
from ..data.sources import check_stream, evaluation_rows, training_rows
from ..rollout.tokens import RowNumbers
from .columns import check_columns
from .dynamic import draw_rows
from .scoring import RewardFunc


class Questions:
    """The rows that a run trains on and those that it evaluates on. With SFT they have completions too, and with
    a preference loss two each.

    Args:
        train_dataset, eval_dataset: data that `training_rows` and `evaluation_rows` take, or None.
        args: give the widths, the system message, and what happens to prompts that are too long.

    Raises:
        ValueError: the data can't be used, or training rows are a stream and `max_steps` is not set.
    """

    def __init__(self, train_dataset: Any, eval_dataset: Any, args: GRPOConfig) -> None:
        self.train: list[Row] | datasets.Dataset | datasets.IterableDataset | PromptStream | None = None
        self.evaluation: list[Row] | datasets.Dataset | None = None
        if train_dataset is not None:
            self.train = training_rows(train_dataset)
        if eval_dataset is not None:
            self.evaluation = evaluation_rows(eval_dataset)
        check_stream(self.train, args.max_steps, args.dataloader_num_workers)
        hint = "draws further rows by their numbers, which a stream does not have; give a data set with a length"
        drawn = not args.dynamic_sampling or not isinstance(self.train, datasets.IterableDataset)
        require(drawn, "dynamic_sampling", True, hint)
        self._args = args

    @property
    def sizes(self) -> list[int | None]:
        """The numbers of training rows and of evaluation rows; None for a stream, and where there are no rows."""
        return [len(rows) if isinstance(rows, Sized) else None for rows in (self.train, self.evaluation)]

    def prepare(
        self,
        tokenizer: PreTrainedTokenizerBase,
        num_embeddings: int,
        reward_funcs: Sequence[RewardFunc],
        judge: RewardFunc | None,
    ) -> None:
        """Tokenise all rows, and check that they have the columns that reward functions and the judge take.

        Args:
            tokenizer: has a padding token.
            num_embeddings: how many embeddings the model has, one for each token that it knows.

        Raises:
            ValueError: see `prepare_rows` and `check_columns`.
        """
        args, self._judge = self._args, judge
        width = None if args.use_grpo else args.generation_max_length
        self.collator = Collator(tokenizer.pad_token_id, args.max_prompt_length, width)
        self._prepare = functools.partial(
            prepare_rows,
            tokenizer=tokenizer,
            max_prompt_length=args.max_prompt_length,
            max_completion_length=width,
            system_message=args.system_message,
            overlong=args.overlong_prompts,
            num_embeddings=num_embeddings,
            pairs=args.preference_loss is not None,
        )
        if self.train is not None:
            self.train = self._prepare(self.train)
            if args.use_grpo:
                check_columns(reward_funcs, self.train)
        if self.evaluation is not None:
            self.evaluation = self._judged(self.evaluation)

    def for_trainer(self) -> dict[str, Any]:
        """The arguments of `transformers.Trainer` that concern data."""
        return {"data_collator": self.collator, "train_dataset": self.train, "eval_dataset": self.evaluation}

    def draw(self, count: int, row_numbers: RowNumbers) -> PromptBatch:
        """The prompts of `count` training rows, drawn by random numbers that depend on nothing but the seed, the step,
        and how many rows the step has sampled so far."""
        rows, key = self.train, (self._args.seed, 1 + row_numbers.step, row_numbers.drawn)
        return PromptBatch(**self.collator([rows[i] for i in draw_rows(len(rows), count, key)]))

    def to_evaluate(self, eval_dataset: Any) -> list[Row]:
        """Evaluation rows that are tokenised and can be judged.

        Args:
            eval_dataset: the run's own rows, which are ready, or another data set.

        Raises:
            ValueError: there are no rows; see also `prepare_rows` and `check_columns`.
        """
        ready = eval_dataset is not None and eval_dataset is self.evaluation
        rows = eval_dataset if ready else [] if eval_dataset is None else evaluation_rows(eval_dataset)
        if not len(rows):
            raise ValueError("eval_dataset: there are no rows to evaluate on")
        return rows if ready else self._judged(rows)

    def _judged(self, rows: list[Row] | datasets.Dataset) -> list[Row]:
        """The rows with their tokens. They have the columns that the judge takes."""
        rows = list(self._prepare(rows))
        if self._judge is not None:
            check_columns([self._judge], rows, "judge")
        return rows
