"""Holds the questions of a run: tokenised for the model, and checked for what reward functions and the judge take."""

import functools
from collections.abc import Sequence, Sized
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..batch import PromptBatch
from ..config.grpo import GRPOConfig
from ..config.settings import require
from ..data.batches import Collator
from ..data.packs import PackCollator, packed
from ..data.prompts import prepare_rows
from ..data.rows import Row
from ..data.sources import EvaluationRows, check_stream, evaluation_rows, training_rows
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
        self.train: Any = None  # rows, a stream of them, or packs of either
        self.evaluation: EvaluationRows | dict[str, EvaluationRows] | None = None
        if train_dataset is not None:
            self.train = training_rows(train_dataset)
        if eval_dataset is not None:
            self.evaluation = evaluation_rows(eval_dataset)
        check_stream(self.train, args.max_steps, args.dataloader_num_workers)
        hint = "draws further rows by their numbers, which a stream does not have; give a data set with a length"
        drawn = not args.dynamic_sampling or isinstance(self.train, Sized) or self.train is None
        require(drawn, "dynamic_sampling", True, hint)
        self._args, self._given = args, eval_dataset

    @property
    def sizes(self) -> list[int | None]:
        """The numbers of training rows (or packs) and of evaluation rows, of all data sets together.

        None for a stream, and where there are no rows.
        """
        train = len(self.train) if isinstance(self.train, Sized) else None
        sets = self.evaluation if isinstance(self.evaluation, dict) else {"": self.evaluation}
        return [train, None if self.evaluation is None else sum(map(len, sets.values()))]

    @property
    def evaluation_names(self) -> list[str]:
        """What the names of metrics begin with after `eval_`: a data set's name and "_" for each of several."""
        return [f"{name}_" for name in self.evaluation] if isinstance(self.evaluation, dict) else [""]

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
            chat_template_kwargs=args.chat_template_kwargs,
            wrap_prompts=args.wrap_prompts,
        )
        if self.train is not None:
            self.train = self._prepare(self.train)
            if args.use_grpo:
                check_columns(reward_funcs, self.train)
            if args.packing:
                self.train = packed(self.train, args.max_prompt_length + args.generation_max_length)
        if isinstance(self.evaluation, dict):
            self.evaluation = {name: self._judged(rows) for name, rows in self.evaluation.items()}
        elif self.evaluation is not None:
            self.evaluation = self._judged(self.evaluation)

    def for_trainer(self) -> dict[str, Any]:
        """The arguments of `transformers.Trainer` that concern data."""
        collator = self.collator
        if self._args.packing:
            widths = self._args.max_prompt_length + self._args.generation_max_length
            collator = PackCollator(collator.pad_token_id, widths)
        return {"data_collator": collator, "train_dataset": self.train, "eval_dataset": self._given}

    def draw(self, count: int, row_numbers: RowNumbers) -> PromptBatch:
        """The prompts of `count` training rows, drawn by random numbers that depend on nothing but the seed, the step,
        and how many rows the step has sampled so far."""
        rows, key = self.train, (self._args.seed, 1 + row_numbers.step, row_numbers.drawn)
        return PromptBatch(**self.collator([rows[i] for i in draw_rows(len(rows), count, key)]))

    def to_evaluate(self, eval_dataset: Any) -> list[Row] | dict[str, list[Row]]:
        """Evaluation rows that are tokenised and can be judged; of several data sets, those of each by its name.

        Args:
            eval_dataset: what the run was given, whose rows are ready, or the name of one of its data sets; or other
                data.

        Raises:
            ValueError: there are no rows; see also `evaluation_rows`, `prepare_rows` and `check_columns`.
        """
        own = self.evaluation if isinstance(self.evaluation, dict) else {}
        if isinstance(eval_dataset, str) and eval_dataset in own:
            eval_dataset = own[eval_dataset]
        elif eval_dataset is not None and eval_dataset is self._given:
            eval_dataset = self.evaluation
        ready = any(eval_dataset is rows for rows in (self.evaluation, *own.values()) if rows is not None)
        rows = eval_dataset if ready else [] if eval_dataset is None else evaluation_rows(eval_dataset)
        if not len(rows) or (isinstance(rows, dict) and not all(map(len, rows.values()))):
            raise ValueError("eval_dataset: there are no rows to evaluate on")
        if isinstance(rows, dict):
            return rows if ready else {name: self._judged(part) for name, part in rows.items()}
        return rows if ready else self._judged(rows)

    def _judged(self, rows: EvaluationRows) -> list[Row]:
        """The rows with their tokens. They have the columns that the judge takes."""
        rows = list(self._prepare(rows))
        if self._judge is not None:
            check_columns([self._judge], rows, "judge")
        return rows
