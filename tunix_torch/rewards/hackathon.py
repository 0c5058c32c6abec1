"""The three rewards of the hackathon trainer: correctness with partial credit, structure and conciseness.

They come from GauravKrv/tunix-hackathon, which gives them the weights 0.5, 0.3 and 0.2. Its `RewardComponent` and its
composite reward are in `composite_reward.py`, its scores of steps and trajectories in `trajectory.py`. Two things
differ: here words are whole words, and "0.15" does not end a sentence.

A policy can exploit that structure and conciseness look at the form only: it can earn half of the weighted sum without
the right answer, and up to PARTIAL_CREDIT of the other half by words that a wrong answer shares with the right one.
"""

import re
from collections.abc import Sequence

from .answers import (
    answers_match,
    extract_answer,
    extract_reasoning,
    extract_steps,
    final_answer,
    score_against_answers,
)
from .conversations import takes_conversations

PARTIAL_CREDIT = 0.4
MAX_STEPS = 10
MIN_STEP_CHARS = 10
MIN_CHARS, MAX_CHARS = 50, 1000
IDEAL_WORD_CHARS = 5
IDEAL_SENTENCE_WORDS = 15
TRANSITIONS = frozenset(
    "therefore thus hence consequently because since so then next first second finally "
    "however but although while given if when".split()
)
ORDER_WORDS = frozenset("first second third finally next then lastly".split())

_CLARITY = re.compile(r"\b(?:clearly|specifically|namely|for example|such as|in other words)\b")
_CONCLUSION = re.compile(
    r"\b(?:because|therefore|due to|as a result|this means|in conclusion|overall|in summary|consequently)\b"
)


@takes_conversations
def jaccard_correctness_reward(
    prompts: Sequence[str], completions: Sequence[str], answer: Sequence[object], **columns: object
) -> list[float | None]:
    """In [0, 1]: 1.0 for the expected answer, else PARTIAL_CREDIT times its Jaccard similarity; None where it is None.

    The similarity of two answers is the number of words that both have, divided by the number of words that at least
    one has. `answers_match` says which answers are equal to the expected one.

    Raises:
        ValueError: `answer` does not have one value for every completion.

    >>> completions = [f"<answer>{text}</answer>" for text in ("the New York area", "the Paris area", "Rome")]
    >>> jaccard_correctness_reward(["?"] * 3, completions, answer=["The New York area."] + ["the London area"] * 2)
    [1.0, 0.2, 0.0]
    """
    return score_against_answers(completions, answer, _score_correctness)


@takes_conversations
def structure_reward(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
    """In [0, 1]: whether the steps in the reasoning tags are connected, long enough and punctuated; 0.0 without steps.

    A step is a line or a sentence. The reward is the mean of two parts:

    - flow: the share of steps that have a word of TRANSITIONS; 1 for a single step;
    - quality: the mean over the steps of half the length in units of MIN_STEP_CHARS characters (at most 1), plus half
      of 1 with punctuation and of 0.5 without;

    multiplied by 1 for up to MAX_STEPS steps, and by 0.05 less for each further step.

    >>> texts = ["First, 48 / 2 = 24.\\nThen 48 + 24 = 72.", "48 / 2 = 24.\\n48 + 24 = 72.", "72", ""]
    >>> structure_reward(["?"] * 4, [f"<reasoning>{text}</reasoning>" for text in texts])
    [1.0, 0.5, 0.675, 0.0]
    """
    return [_score_structure(extract_steps(completion)) for completion in completions]


@takes_conversations
def conciseness_reward(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
    """In [0, 1]: whether the text in the reasoning tags is clear, complete and tidy; 0.0 without such text.

    The reward is 0.4 times clarity, 0.3 times completeness and 0.3 times tidiness, each of which is the mean of these
    values:

    - clarity: nearness of the mean word to IDEAL_WORD_CHARS characters; nearness of the mean sentence to
      IDEAL_SENTENCE_WORDS words; 1 with a phrase such as "for example", else 0.7;
    - completeness: 1 for MIN_CHARS to MAX_CHARS characters, falling to 0 below and to 0.5 above; a third for each
      different phrase such as "because", at most 1; 1 for two sentences or more, else 0.6;
    - tidiness: 1 for two lines or more, else 0.7; the share of sentences that do not begin with a small letter; 1 with
      a word of ORDER_WORDS, else 0.8; ten times the punctuation marks per word, at most 1.

    >>> good = "First, she sold half as many clips in May, because 48 / 2 = 24.\\nTherefore, the total is 48 + 24 = 72."
    >>> rewards = conciseness_reward(["?"] * 3, [f"<reasoning>{text}</reasoning>" for text in (good, "72", "")])
    >>> [round(reward, 2) for reward in rewards]
    [0.85, 0.41, 0.0]
    """
    return [_score_conciseness(extract_reasoning(completion), extract_steps(completion)) for completion in completions]


def _score_correctness(completion: str, expected: str) -> float:
    given = extract_answer(completion)
    if given is None:
        return 0.0
    if answers_match(given, expected):
        return 1.0
    given_words = set(given.casefold().split())
    expected_words = set(final_answer(expected).casefold().split())
    either = given_words | expected_words
    return PARTIAL_CREDIT * len(given_words & expected_words) / len(either) if either else 0.0


def _score_structure(steps: list[str]) -> float:
    if not steps:
        return 0.0
    flow = sum(not TRANSITIONS.isdisjoint(_words(step)) for step in steps) / len(steps) if len(steps) > 1 else 1.0
    quality = sum(_step_quality(step) for step in steps) / len(steps)
    excess = max(len(steps) - MAX_STEPS, 0)
    return (flow + quality) / 2 * max(1 - 0.05 * excess, 0.0)


def _step_quality(step: str) -> float:
    punctuation = 1.0 if re.search(r"[.,;!?]", step) else 0.5
    return (min(len(step) / MIN_STEP_CHARS, 1.0) + punctuation) / 2


def _score_conciseness(reasoning: str | None, sentences: list[str]) -> float:
    if not reasoning:
        return 0.0
    words, folded = reasoning.split(), reasoning.casefold()
    clarity = (
        _nearness(sum(map(len, words)) / len(words), IDEAL_WORD_CHARS)
        + _nearness(len(words) / len(sentences), IDEAL_SENTENCE_WORDS)
        + (1.0 if _CLARITY.search(folded) else 0.7)
    ) / 3
    completeness = (
        _length_factor(len(reasoning))
        + min(len(set(_CONCLUSION.findall(folded))) / 3, 1.0)
        + (1.0 if len(sentences) > 1 else 0.6)
    ) / 3
    tidiness = (
        (1.0 if "\n" in reasoning else 0.7)
        + sum(not sentence[0].islower() for sentence in sentences) / len(sentences)
        + (0.8 if ORDER_WORDS.isdisjoint(_words(reasoning)) else 1.0)
        + min(10 * len(re.findall(r"[.,;:!?]", reasoning)) / len(words), 1.0)
    ) / 4
    return min(0.4 * clarity + 0.3 * completeness + 0.3 * tidiness, 1.0)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _nearness(value: float, ideal: float) -> float:
    return 1.0 - min(abs(value - ideal) / ideal, 1.0)


def _length_factor(num_chars: int) -> float:
    return min(num_chars / MIN_CHARS, 1.0, max(0.5, 1.0 - (num_chars - MAX_CHARS) / MAX_CHARS))
