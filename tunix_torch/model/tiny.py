"""The embedded default: a Gemma 3 of about one million parameters, its tokenizer, and arithmetic questions for it.

Everything is made here, offline, on first use: random weights from a fixed seed, then a short supervised warm start
on worked examples, stopped early, so that reinforcement learning has something to do. The result is an ordinary
Hugging Face folder under the cache folder.
"""

import ast
import contextlib
import fcntl
import hashlib
import inspect
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

from ..config.model import TINY_NAME
from ..runtime.choice import cache_folder

NAME = TINY_NAME
FOLDER_PREFIX = "tunix-torch-tiny-"
FILES = "files.json"  # in its folder: the checksum of every other file
UNFINISHED = "unfinished-"  # what the names of folders begin with in which it is written

CHARACTERS = "\n !\"#$%&'()*+,-./0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[\\]^_`abcdefghijklmnopqrstuvwxyz{|}~"
SPECIAL_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
ROLES = ["user", "model"]  # single tokens, as in Gemma's own vocabulary
TAGS = ["<reasoning>", "</reasoning>", "<answer>", "</answer>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{{ message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
TEMPLATES = {
    "+": ["What is {a} + {b}?", "Add {a} and {b}.", "{a} plus {b}?"],
    "-": ["What is {a} - {b}?", "Take {b} from {a}.", "{a} minus {b}?"],
    "x": ["What is {a} x {b}?", "Multiply {a} by {b}.", "{a} times {b}?"],
}
NUM_HELD_OUT = {"+": 400, "-": 400, "x": 120}  # problems that no training row ever shows

WARM_START = {"seed": 0, "steps": 243, "planned_steps": 300, "batch_size": 32, "learning_rate": 4e-3, "threads": 2}

Problem = tuple[int, str, int]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Every character is a token, so numbers are read digit by digit. Tags and Gemma's turn markers are tokens too."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *TAGS, *ROLES, *CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(SPECIAL_TOKENS)
    backend.add_tokens(TAGS + ROLES)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<end_of_turn>",
        bos_token="<bos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Gemma3ForCausalLM:
    """A Gemma 3 text model with random weights: 4 layers, 128 wide, sliding and full attention."""
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        query_pre_attn_scalar=32,
        max_position_embeddings=1024,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"] * 2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
        initializer_range=0.05,
        rope_parameters={  # short wavelengths, for short texts: it learns in half the steps
            "full_attention": {"rope_type": "default", "rope_theta": 1000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Gemma3ForCausalLM(config).eval()


def _problems() -> tuple[list[Problem], list[Problem]]:
    """All problems, shuffled once and for all: those for training, and those held out (a + b goes with b + a)."""
    two_digits = range(10, 100)
    everything = {
        "+": [(a, "+", b) for a in two_digits for b in two_digits if a <= b],
        "-": [(a, "-", b) for a in two_digits for b in two_digits if a >= b],
        "x": [(a, "x", b) for a in two_digits for b in range(2, 10)],
    }
    train, held_out = [], []
    for operation, problems in everything.items():
        random.Random(operation).shuffle(problems)
        held_out += problems[: NUM_HELD_OUT[operation]]
        train += problems[NUM_HELD_OUT[operation] :]
    return train, held_out


def work_out(problem: Problem) -> tuple[list[str], int]:
    """The written steps of a calculation, each of them small, and its answer.

    (47, "x", 8) -> ["40x8=320", "7x8=56", "320+50=370", "370+6=376"], 376;
    (62, "-", 35) -> ["60-30=30", "2-5=-3", "30-3=27"], 27. No step needs to look ahead, as borrowing does: what is not
    found by trying at random, GRPO can't learn.
    """
    a, operation, b = problem
    a_ones, b_ones = a % 10, b % 10
    a_tens, b_tens = a - a_ones, b - b_ones
    if operation == "+":
        high, low = a_tens + b_tens, a_ones + b_ones
        return [f"{a_tens}+{b_tens}={high}", f"{a_ones}+{b_ones}={low}", f"{high}+{low}={a + b}"], a + b
    if operation == "-":
        high, low = a_tens - b_tens, a_ones - b_ones
        return [f"{a_tens}-{b_tens}={high}", f"{a_ones}-{b_ones}={low}", f"{high}{low:+d}={a - b}"], a - b
    high, low = a_tens * b, a_ones * b
    between = high + low - low % 10
    steps = [f"{a_tens}x{b}={high}", f"{a_ones}x{b}={low}"]
    return [*steps, f"{high}+{low - low % 10}={between}", f"{between}+{low % 10}={a * b}"], a * b


def arithmetic_rows(split: str, count: int, seed: int = 0) -> list[dict[str, str]]:
    """Generated questions about two-digit numbers, with a worked solution each.

    Args:
        split: "train" or "test"; no problem is in both (nor the same sum with its terms swapped).
        count: rows; "test" rows differ from each other in their problem, as far as there are enough.
        seed: same seed, same rows.

    Returns:
        rows of "question", "answer" and "completion" (the worked solution in tags).
    """
    problems = _problems()[0 if split == "train" else 1]
    rng = random.Random(f"{split} {seed}")
    by_operation = {operation: [p for p in problems if p[1] == operation] for operation in TEMPLATES}
    for group in by_operation.values():
        rng.shuffle(group)
    rows = []
    for i in range(count):
        group = by_operation["+-x"[i % 3]]
        a, operation, b = group[i // 3 % len(group)]
        steps, answer = work_out((a, operation, b))
        if operation == "+" and rng.random() < 0.5:
            a, b = b, a
            steps, answer = work_out((a, operation, b))
        rows.append(
            {
                "question": rng.choice(TEMPLATES[operation]).format(a=a, b=b),
                "answer": str(answer),
                "completion": "<reasoning>" + "\n".join(steps) + f"</reasoning><answer>{answer}</answer>",
            }
        )
    rng.shuffle(rows)
    return rows


def _encode_demonstrations(
    tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, str]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, labels), both (rows, width) int64; labels are -100 outside the completion."""
    turns = [[{"role": "user", "content": row["question"]}] for row in rows]
    prompts = [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
    texts = [f"{prompt}{row['completion']}<end_of_turn>" for prompt, row in zip(prompts, rows, strict=True)]
    encoded = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt")
    labels = encoded.input_ids.masked_fill(encoded.attention_mask == 0, -100)
    for label, prompt in zip(labels, tokenizer(prompts, add_special_tokens=False).input_ids, strict=True):
        label[: len(prompt)] = -100
    return encoded.input_ids, labels


def _warm_start(model: Gemma3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Supervised training on worked examples, stopped when the model reasons but often calculates wrongly.

    So the model starts with the form of an answer and half of the skill; GRPO's work is the other half. AdamW, linear
    warm-up, linear decay to a third, which is stopped before its end: from there GRPO learns faster than from weights
    that have come to rest.
    """
    steps, size = WARM_START["planned_steps"], WARM_START["batch_size"]
    threads = torch.get_num_threads()
    torch.set_num_threads(WARM_START["threads"])  # sums are rounded by it, so that others would be other weights
    rows = arithmetic_rows("train", size * steps, WARM_START["seed"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=WARM_START["learning_rate"], weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / 50, 1 - s / steps * 0.667))
    model.train()
    between = 0.1 if sys.stderr.isatty() else 10  # seconds; a file keeps every line
    for step in tqdm(
        range(WARM_START["steps"]), "Making the tiny Gemma, once", unit="step", file=sys.stderr, mininterval=between
    ):
        ids, labels = _encode_demonstrations(tokenizer, rows[step * size :][:size])
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        targets = labels[:, 1:]
        scores = model.lm_head(hidden[targets != -100])
        torch.nn.functional.cross_entropy(scores, targets[targets != -100]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    torch.set_num_threads(threads)
    model.eval()


# What the model is made of: all that, if it changed, would make other weights or another tokenizer.
MADE_BY = (
    make_tokenizer,
    make_model,
    _problems,
    work_out,
    arithmetic_rows,
    _encode_demonstrations,
    _warm_start,
)
MADE_FROM = (CHARACTERS, SPECIAL_TOKENS, ROLES, TAGS, CHAT_TEMPLATE, TEMPLATES, NUM_HELD_OUT, WARM_START)


def folder_name() -> str:
    """Its name in the cache folder, which changes with the code and the constants that it is made of.

    Comments, docstrings and layout of the code do not count.
    """
    parts = [_code_of(function) for function in MADE_BY] + [json.dumps(MADE_FROM)]
    return FOLDER_PREFIX + hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def _code_of(function: Callable) -> str:
    """The statements of a function, in Python's own layout, without its docstring."""
    tree = ast.parse(inspect.getsource(function))
    body = tree.body[0].body
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        del body[0]
    return ast.unparse(tree)


def folder_in_cache(*parts: str) -> Path:
    """A folder below the cache folder, which is made if it is not there.

    Raises:
        ValueError: it can't be made.
    """
    folder = cache_folder().joinpath(*parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(error) from error
    return folder


def _unwritable(error: Exception) -> ValueError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    hint = "set the environment variable TUNIX_CACHE to a folder that can, with 20 MB to spare"
    return ValueError(f"the cache folder {str(cache_folder())!r} can't be written: {reason}; {hint}")


def ensure_tiny_model() -> Path:
    """The folder of the tiny model, which is made first if it is not there. An interrupted making leaves nothing.

    Raises:
        ValueError: the cache folder can't be written, or the model in it is damaged.
    """
    folder = cache_folder() / folder_name()
    _remove_unfinished()
    if folder.is_dir():
        _check_files(folder)
        return folder
    folder_in_cache()
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed=WARM_START["seed"])
    try:
        with _unfinished_folder() as unfinished:  # before the work, so that a folder that can't be written is found now
            _warm_start(model, tokenizer)
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
            list_files(unfinished)
            try:
                os.replace(unfinished, folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster
                    raise
    except (OSError, SafetensorError) as error:
        raise _unwritable(error) from error
    return folder


def list_files(folder: Path) -> None:
    """Write the checksums of a folder's files into it, so that damage is found before the model is loaded."""
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
    (folder / FILES).write_text(json.dumps(sums, indent=1) + "\n")


def _check_files(folder: Path) -> None:
    """Compare a folder's files with their checksums. Early versions wrote none."""
    if not (folder / FILES).is_file():
        return
    name = FILES
    try:
        for name, known in json.loads((folder / FILES).read_text(encoding="utf-8")).items():
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != known:
                raise ValueError("it has changed since it was written")
    except (OSError, ValueError, AttributeError) as error:
        hint = f"the folder {str(folder)!r} is damaged; delete it, and it is made again"
        raise ValueError(f"model_name={NAME!r}: {name}: {error}; {hint}") from error


@contextlib.contextmanager
def _unfinished_folder() -> Iterator[Path]:
    """A folder in the cache that is locked as long as this process writes there, and removed in the end."""
    with _cache_locked(fcntl.LOCK_SH):  # so that nobody sees it before it is locked
        folder = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=cache_folder()))
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        yield folder
    finally:
        os.close(descriptor)
        shutil.rmtree(folder, ignore_errors=True)


def _remove_unfinished() -> None:
    """Remove the folders of processes that died while they wrote there: those that nobody has locked."""
    left = list(cache_folder().glob(f"{UNFINISHED}*"))
    with _cache_locked(fcntl.LOCK_EX) if left else contextlib.nullcontext():
        for folder in left:
            with contextlib.suppress(OSError):  # it is locked, or gone, or may not be removed
                descriptor = os.open(folder, os.O_RDONLY)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder)
                finally:
                    os.close(descriptor)


@contextlib.contextmanager
def _cache_locked(how: int) -> Iterator[None]:
    """Within this context the cache folder is locked, shared or for this process alone. It takes no time."""
    descriptor = os.open(cache_folder(), os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, how)
        yield
    finally:
        os.close(descriptor)
