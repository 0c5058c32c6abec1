"""What the tests with random input share: cases by number, a limit on the time of each, texts and values that hurt.

A case is made from the name of its surface and its number alone, so a failure is repeated by its number, or several by
theirs: `TUNIX_FUZZ_ONLY=123,456`. How many cases a surface has is `TUNIX_FUZZ_CASES`; `make fuzz` sets it to 10,000.
"""

import contextlib
import faulthandler
import os
import random
import signal
import traceback

from tunix_torch.data.visible import visible

CASES = int(os.environ.get("TUNIX_FUZZ_CASES", 500))
ONLY = os.environ.get("TUNIX_FUZZ_ONLY")
LIMIT = 10.0  # CPU seconds of one case, which takes milliseconds; so other work on the machine fails none
WALL = 300.0  # seconds after which the process itself ends, where Python can't be interrupted


class Hang(BaseException):
    """A case took longer than the limit."""


def _too_long(number, frame):
    raise Hang(f"more than {LIMIT} CPU seconds")


@contextlib.contextmanager
def limited():
    """End a case that hangs, by an exception or, where none can be raised, with the process."""
    faulthandler.dump_traceback_later(WALL, exit=True)
    before = signal.signal(signal.SIGPROF, _too_long)
    signal.setitimer(signal.ITIMER_PROF, LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        faulthandler.cancel_dump_traceback_later()


def fuzz(surface, check, kinds=1, share=1.0, at_most=10):
    """Call `check(random)` for each case, and report all that fail.

    `check` returns a word for what became of the case, such as "accepted" or "refused".

    Args:
        kinds: how many such words there are, all of which must come up, or the cases would test too little.
        share: of all cases, the part that this call does.
        at_most: stop after so many failures.
    """
    outcomes, failures = {}, []
    numbers = range(max(1, round(CASES * share))) if ONLY is None else list(map(int, ONLY.split(",")))
    for number in numbers:
        try:
            with limited():
                word = check(random.Random(f"{surface}/{number}"))
            outcomes[word] = outcomes.get(word, 0) + 1
        except (Exception, Hang) as error:
            where = traceback.format_exception(error)
            failures.append(f"TUNIX_FUZZ_ONLY={number} of {surface}: {''.join(where[-3:])[-700:]}")
            if len(failures) == at_most:
                break
    print(f"\n{surface}: {sum(outcomes.values())} of {len(numbers)} cases as they should be: {outcomes}")
    assert not failures, f"{len(failures)} cases failed\n" + "\n".join(failures)
    assert len(outcomes) == kinds or len(numbers) < 100, outcomes


def check_refusal(error, *words):
    """Check that an error is one line for a user: a ValueError that says something and has one of the words.

    The line is that of a command. Line ends within the message may come from the user's data only, not from a library.
    """
    assert type(error) is ValueError, f"a {type(error).__name__}: {error!r:.300}"
    text = visible(" ".join(str(error).split()))
    assert text and "\n" not in text and visible(text) == text, f"not one line: {text!r:.500}"
    assert "\n  " not in str(error), f"several lines: {error!r:.500}"
    assert not words or any(word in text for word in words), f"{text!r:.500} names none of {words!r:.300}"
    assert "Traceback" not in text


# ---- texts and values ----

WORDS = ("answer", "question", "72", "-1", "1,000", ".5", "1/2", "1e9", "null", "true", "no", "~", "NaN", "Infinity")
HOSTILE = (
    "\x00",
    "\ufeff",
    "\ud800",
    "\udfff",
    "\u202e",
    "\u2028",
    "\x85",
    "\x0b",
    "\x1b[31m",
    "\r",
    "\n",
    "\r\n",
    "\t",
    "\\",
    '"',
    "'",
    ",",
    ";",
    "e\u0301" * 3,
    "\U0001f469\u200d\U0001f4bb",
    "\u0663",
    "\u00bd",
    "\u00b2",
    "\uff11",
    "\u2212",
    "\u0130",
    "\u00df",
    "%s",
    "{}",
    "{0}",
    "${x}",
    "#",
    "####",
    "<answer>",
    "</answer>",
    "<reasoning>",
    "</reasoning>",
    "<bos>",
    "<end_of_turn>",
    "__proto__",
    "tunix/prompt",
)


def text(rng, pieces=(), longest=12):
    """A text of some pieces, of which few or many are hostile; seldom a very long one."""
    if rng.random() < 0.02:
        return rng.choice(["9", "(", "{", "[", " ", "\n", "a", "\\frac{", "-", "$", *pieces]) * rng.choice([300, 5000])
    known = [*WORDS, *pieces, *(HOSTILE if rng.random() < 0.5 else ()), "a", "b ", "x y", ""]
    return "".join(
        rng.choice(known) if rng.random() < 0.8 else chr(rng.choice([rng.randrange(128), rng.randrange(0x3000)]))
        for _ in range(rng.randrange(longest))
    )


def value(rng, depth=0):
    """A value of any type that JSON has, and numbers beyond what it should have."""
    kind = rng.randrange(12 if depth < 3 else 8)
    if kind < 3:
        return text(rng)
    if kind == 3:
        return rng.choice([0, -1, 72, 2**31, 2**63, -(2**64), 10**30, 10**400, 10**4000])
    if kind == 4:
        return rng.choice([0.0, -0.0, 0.1, 1e-7, 1e308, 5e-324, float("nan"), float("inf"), -float("inf")])
    if kind == 5:
        return rng.choice([None, True, False])
    if kind in (6, 7):
        return rng.choice(["72", "x", "", "A", "#### 72"])
    if kind in (8, 9):
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {text(rng, longest=3): value(rng, depth + 1) for _ in range(rng.randrange(4))}


def mutate(rng, content):
    """Change some bytes: flip, cut, repeat, insert, zero or swap them."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        at = rng.randrange(len(data) + 1)
        length = rng.choice([1, 1, 2, 8, 64])
        kind = rng.randrange(8)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at : at + length]
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            data[at:at] = data[at : at + length] * rng.choice([1, 2, 50])
        elif kind == 4:
            data[at:at] = bytes(rng.randrange(256) for _ in range(length))
        elif kind == 5:
            data[at : at + length] = bytes(len(data[at : at + length]))
        elif kind == 6:
            data[at:at] = rng.choice(HOSTILE).encode("utf-8", "surrogatepass")
        else:
            data[at:at] = rng.choice([b"[", b"{", b"}", b"]", b'"', b",", b":", b"\n", b"- ", b"\xff\xfe", b"1e999"])
    return bytes(data)
