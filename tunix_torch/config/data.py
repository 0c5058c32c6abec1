"""`DataConfig`: which questions are asked, and how answers to them are scored."""

from dataclasses import dataclass, field

from .settings import accept_aliases, check_types, require, setting

DATA_SOURCES = ("huggingface", "tfds", "kaggle", "file")
KNOWN_DATASETS = ("gsm8k", "math", "arc")


def default_rewards(dataset: str | None) -> list[str]:
    """The reward functions of a job that names none: one for right answers, and one for their layout."""
    return ["math_equal" if dataset == "math" else "correctness", "format"]


@accept_aliases
@dataclass
class DataConfig:
    """Settings that say which questions are asked, and how answers to them are scored."""

    data_path: str | None = setting(
        None,
        "training rows: a .json, .jsonl, .csv, .tsv, .parquet or .arrow file, a Hugging Face or TFDS data set or its "
        "folder, or a Kaggle handle (also dataset_name); none: those of `dataset`, or generated arithmetic",
    )
    val_data_path: str | None = setting(
        None,
        "evaluation rows, likewise; none: the test split of `dataset`, unless data_path is a local copy of it; "
        "generated ones with generated rows",
    )
    data_source: str | None = setting(
        None, "huggingface, tfds, kaggle or file; none: file where data_path is one, else huggingface"
    )
    dataset: str | None = setting(
        None, "a data set that is known by name, with its columns: " + ", ".join(KNOWN_DATASETS)
    )
    dataset_config: str | None = setting(None, "configuration of a Hugging Face data set, e.g. 'main' of openai/gsm8k")
    dataset_split: str = setting("train", "split of the data set to train on")
    val_dataset_split: str = setting("test", "split of the data set to evaluate on")
    question_column: str | None = setting(None, "column of the question; none: prompt, question, or as in MATH and ARC")
    answer_column: str | None = setting(
        None, "column of the answer; none: answer, answers, expected_answers, or as in MATH and ARC"
    )
    streaming: bool = setting(
        False, "read training rows as they are needed, for sets larger than memory; needs max_steps"
    )
    train_fraction: float = setting(
        1.0, "train on this part of the rows, chosen by seed, and evaluate on the rest (without val_data_path)"
    )
    num_train_rows: int | None = setting(
        None, "use at most so many training rows (also num_train_samples; generated: make so many, 4096)"
    )
    num_eval_rows: int = setting(256, "use at most so many evaluation rows (also num_test_samples)")
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "names from rewards/, functions by dotted path (my_module.my_reward), folders or hub ids of reward "
            "models; none: correctness (math_equal with dataset=math) and format"
        },
    )
    reward_preset: str | None = setting(
        None, "the rewards of another system, with its weights: agent_tunix, notebook, gemma2_grpo or composite"
    )
    judge: str | None = setting(
        None,
        "the reward function that decides at evaluation: an answer is right where it is at least 1, and not where it "
        "is None; none: correctness, or math_equal with dataset=math",
    )

    @property
    def right_answers(self) -> str:
        """The reward function that tells right answers from wrong ones. MATH needs its own, for answers in LaTeX."""
        return default_rewards(self.dataset)[0]

    @property
    def judge_in_force(self) -> str:
        """The reward function that decides at evaluation, here and in evaluate.py."""
        return self.judge or self.right_answers

    def __post_init__(self) -> None:
        check_types(self)
        rows = self.num_train_rows
        require(rows is None or rows >= 1, "num_train_rows", rows, "must be at least 1")
        require(self.num_eval_rows >= 1, "num_eval_rows", self.num_eval_rows, "must be at least 1")
        require(0 < self.train_fraction <= 1, "train_fraction", self.train_fraction, "must be in (0, 1]")
        require(self.reward_funcs != [], "reward_funcs", self.reward_funcs, "name at least one reward function")
        for name, choices in (("data_source", DATA_SOURCES), ("dataset", KNOWN_DATASETS)):
            value = getattr(self, name)
            require(value in (None, *choices), name, value, f"choose one of {', '.join(choices)}")
        both = self.reward_funcs and self.reward_preset
        require(not both, "reward_preset", self.reward_preset, "give either a preset or reward_funcs")
