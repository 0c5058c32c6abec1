"""The work that `grpo_step.py` measures: the shapes of model and batch, the prompts, the lengths and the reward.

Every peer gets a `Spec` as JSON, and reads the model, its tokenizer and the prompts from the same folder, which
`make_inputs` writes. `python -m benchmarks.workload SPEC.json FOLDER` does that in a process of its own, since the peak
memory of a peer's process starts at what its parent process held. Importing this file does not import torch.
"""

import json
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

EOS, PAD, BOS, UNKNOWN = range(4)  # EOS must be the first: see peer_ours.py
NUM_SPECIAL = 4
SHORTEST = 2  # tokens of a completion with its end token, which Tunix removes, so that one is left


@dataclass(frozen=True)
class Spec:
    """One job, the same for every peer."""

    preset: str = "small"
    device: str = "cpu"  # or "cuda"
    dtype: str = "float32"  # of the base weights, or "bfloat16"; the LoRA is float32 in this library and in TRL
    # the model, a Gemma 3
    num_layers: int = 6
    hidden_size: int = 256
    intermediate_size: int = 1024
    num_heads: int = 4
    num_kv_heads: int = 1
    head_dim: int = 64
    sliding_window: int = 512
    vocabulary_size: int = 512
    # the batch
    num_prompts: int = 8  # N
    num_completions: int = 4  # G, for each prompt
    prompt_length: int = 64  # tokens of every prompt, with BOS
    completion_length: int = 64  # tokens of a completion at most
    spread: bool = False  # whether lengths are drawn from a geometric distribution; else all reach the limit
    # learning
    lora_rank: int = 8
    lora_alpha: float = 16.0
    beta: float = 0.04  # weight of the KL penalty
    learning_rate: float = 1e-4
    max_grad_norm: float = 1.0
    tokens_per_pass: int | None = None  # see `rows_per_pass`
    seed: int = 0
    # the measurement
    warmup: int = 2  # steps before those that count
    steps: int = 3  # steps that count
    threads: int = 2

    @property
    def num_rows(self) -> int:
        """B = N * G."""
        return self.num_prompts * self.num_completions


_LONG = replace(Spec(), preset="long", num_completions=16, prompt_length=256, completion_length=256, spread=True)
_270M = replace(
    Spec(),
    preset="270m",
    device="cuda",
    dtype="bfloat16",
    num_layers=18,
    hidden_size=640,
    intermediate_size=2048,
    head_dim=256,
    vocabulary_size=262_144,
    num_prompts=16,
    num_completions=8,
    prompt_length=256,
    completion_length=512,
)
_1B = replace(_270M, preset="1b", num_layers=26, hidden_size=1152, intermediate_size=6912)
PRESETS = {spec.preset: spec for spec in (Spec(), _LONG, _270M, _1B)}


def check_spec(spec: Spec) -> None:
    """Raise ValueError when a number that the user can give is out of range."""
    least = {
        "num_prompts": 1,
        "num_completions": 2,
        "prompt_length": 2,
        "completion_length": SHORTEST,
        "steps": 1,
        "warmup": 0,
        "threads": 1,
        "tokens_per_pass": 1,
    }
    for name, smallest in least.items():
        value = getattr(spec, name)
        if value is not None and value < smallest:
            raise ValueError(f"{name}={value}: must be at least {smallest}")


def lengths(spec: Spec) -> list[int]:
    """Return the tokens of each of the B completions, with the end token. They are the same in every step.

    With `spread`, the lengths are geometrically distributed. Their mean is about a quarter of the limit, so that 2% of
    completions would be longer than the limit and are cut off.
    """
    if not spec.spread:
        return [spec.completion_length] * spec.num_rows
    draw = random.Random(spec.seed)
    mean = spec.completion_length / 4
    drawn = [SHORTEST + int(draw.expovariate(1 / max(mean - SHORTEST, 0.5))) for _ in range(spec.num_rows)]
    return [min(length, spec.completion_length) for length in drawn]


def ends_itself(spec: Spec) -> list[bool]:
    """Return for each row whether it ends with EOS; the others are cut off at the limit."""
    return [spec.spread and length < spec.completion_length for length in lengths(spec)]


def rows_per_pass(spec: Spec, tokens: int, multiple: int = 1) -> int:
    """Return the rows of one learning pass of a peer, which is a divisor of B.

    Args:
        tokens: the most tokens of a pass, prompts and completions together. The peer gives the number with which it
            was fastest; `spec.tokens_per_pass` replaces it.
        multiple: the peer can take only multiples of so many rows.
    """
    limit = (spec.tokens_per_pass or tokens) // (spec.prompt_length + spec.completion_length)
    candidates = [n for n in range(multiple, spec.num_rows + 1, multiple) if spec.num_rows % n == 0]
    return max([n for n in candidates if n <= limit], default=candidates[0])


def word(token: int) -> str:
    """Return the text of a token that is not special."""
    return f"w{token}"


def make_prompts(spec: Spec) -> list[str]:
    """Return the text of each prompt of all steps, in order. Each has exactly P tokens, with BOS."""
    draw = random.Random(spec.seed + 1)
    words = range(NUM_SPECIAL, spec.vocabulary_size)
    count = (spec.warmup + spec.steps) * spec.num_prompts
    return [" ".join(word(token) for token in draw.choices(words, k=spec.prompt_length - 1)) for _ in range(count)]


def share_of_even_words(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
    """The reward function of all peers: it is cheap, reads the text, and is hardly ever equal within a group."""
    texts = [completion.split() for completion in completions]
    return [sum(text[-1] in "02468" for text in words) / max(1, len(words)) for words in texts]


def write_spec(spec: Spec, file: Path) -> None:
    file.write_text(json.dumps(asdict(spec), indent=1) + "\n")


def read_spec(file: Path) -> Spec:
    return Spec(**json.loads(file.read_text()))


def make_inputs(spec: Spec, folder: Path) -> None:
    """Write the model, the tokenizer and `prompts.json` into the folder, all from the spec's seed."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

    special = {"<eos>": EOS, "<pad>": PAD, "<bos>": BOS, "<unk>": UNKNOWN}
    vocabulary = special | {word(token): token for token in range(NUM_SPECIAL, spec.vocabulary_size)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", BOS)])
    backend.add_special_tokens(list(special))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", bos_token="<bos>", unk_token="<unk>"
    )
    config = Gemma3TextConfig(
        vocab_size=spec.vocabulary_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_layers,  # five sliding layers, then a full one, and so on
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        query_pre_attn_scalar=spec.head_dim,
        sliding_window=spec.sliding_window,
        max_position_embeddings=max(1024, spec.prompt_length + spec.completion_length),
        eos_token_id=EOS,
        pad_token_id=PAD,
        bos_token_id=BOS,
    )
    torch.manual_seed(spec.seed)
    model = Gemma3ForCausalLM(config).to(getattr(torch, spec.dtype))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "prompts.json").write_text(json.dumps(make_prompts(spec)))


def read_prompts(folder: Path) -> list[str]:
    return json.loads((folder / "prompts.json").read_text())


def check_measured(spec: Spec, completion_lengths: Sequence[Sequence[int]], losses: Sequence[float]) -> None:
    """Raise AssertionError unless every step of a peer had completions of the spec's lengths and a finite loss."""
    expected, num_steps = lengths(spec), spec.warmup + spec.steps
    assert len(completion_lengths) == num_steps, f"{len(completion_lengths)} rollouts in {num_steps} steps"
    for step, found in enumerate(completion_lengths):
        assert len(found) == spec.num_rows, f"step {step}: {len(found)} completions, not {spec.num_rows}"
        off = [f"row {row}: {a}, not {b}" for row, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b]
        assert not off, f"step {step}: completions of the wrong length: {'; '.join(off[:3])}"
    assert len(losses) == num_steps, f"{len(losses)} losses in {num_steps} steps"
    assert all(math.isfinite(loss) for loss in losses), f"losses that are not finite: {losses}"


def main() -> None:
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    make_inputs(read_spec(Path(sys.argv[1])), Path(sys.argv[2]))


if __name__ == "__main__":
    main()
