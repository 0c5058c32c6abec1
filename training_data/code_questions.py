"""Code: what a small Python function returns. The text that is shown is the text that runs; its trace is the reasoning.

Only sources that a template of this file has put together from its fixed lines and drawn numbers are run, with the
few builtins that they use.
"""

import sys
from random import Random
from types import FrameType

from training_data.question import Question

BUILTINS = {"range": range, "len": len, "sorted": sorted, "max": max, "min": min, "str": str, "abs": abs}
FILE_NAME = "<generated question>"
WORDS = (
    "banana planet kitten orange summer letter pepper coffee tomato puzzle button castle dinner guitar winter yellow "
    "rabbit silver tunnel velvet cherry doctor eleven freezer harvest journey kitchen lantern mustard network"
).split()


def run(source: str, args: tuple[object, ...]) -> tuple[object, list[str]]:
    """Run the function `f` of a source; returns what it returns, and a sentence for each step that it takes.

    A step is a round of a loop (or a line outside of loops) with the variables that it sets, a call or a return of `f`
    by itself, and the line that returns in the end.
    """
    lines = source.splitlines()
    scope: dict[str, object] = {"__builtins__": BUILTINS}
    exec(compile(source, FILE_NAME, "exec"), scope)
    steps: list[str] = []
    known: dict[FrameType, dict[str, str]] = {}  # the variables as they were at the last event
    last_line: dict[FrameType, int] = {}
    pending: dict[str, str] = {}

    def flush() -> None:
        if pending:
            steps.append(f"Then {', '.join(f'{name} = {value}' for name, value in pending.items())}.")
            pending.clear()

    def trace(frame: FrameType, event: str, value: object) -> object:
        if frame.f_code.co_name != "f" or frame.f_code.co_filename != FILE_NAME:
            return None
        now = {name: repr(local) for name, local in frame.f_locals.items()}
        call = f"f({', '.join(now[name] for name in frame.f_code.co_varnames[: frame.f_code.co_argcount])})"
        if event == "call":
            if known:
                steps.append(f"This needs {call}.")
            else:
                given = ", ".join(f"{name} = {local}" for name, local in now.items())
                steps.append(f"First, the call is {call}, so {given}.")
            known[frame], last_line[frame] = now, frame.f_lineno
            return trace
        before = lines[last_line[frame] - 1].split()
        entered = {before[1]} if before[0] == "for" and frame.f_lineno == last_line[frame] + 1 else set()
        changed = {name: x for name, x in now.items() if known[frame].get(name) != x or name in entered}
        if changed.keys() & pending.keys():
            flush()
        pending.update(changed)
        known[frame], last_line[frame] = now, frame.f_lineno
        line = lines[frame.f_lineno - 1].strip()
        if event == "return":
            flush()
            if frame is next(iter(known)):
                steps.append(f"Finally `{line}` returns {value!r}.")
            else:
                steps.append(f"{call} returns {value!r}.")
        elif line.startswith(("for ", "while ")):
            flush()
        return trace

    outer_trace = sys.gettrace()
    sys.settrace(trace)
    try:
        result = scope["f"](*args)
    finally:
        sys.settrace(outer_trace)
    return result, steps


def _returns(*lines: str, args: tuple[object, ...]) -> Question:
    source = "\n".join(lines)
    result, steps = run(source, args)
    note = ", without quotes" if isinstance(result, str) else ""
    call = f"f({', '.join(map(repr, args))})"
    text = f"What does `{call}` return{note}?\n\n```python\n{source}\n```"
    return Question(text, str(result), steps)


# ---- easy ----


def running_total(rng: Random) -> Question:
    return _returns(
        "def f(n):",
        f"    total = {rng.randint(0, 40)}",
        "    for i in range(n):",
        f"        total += {rng.randint(2, 15)} * i",
        "    return total",
        args=(rng.randint(3, 7),),
    )


def two_branches(rng: Random) -> Question:
    return _returns(
        "def f(x):",
        f"    y = x * {rng.randint(2, 9)}",
        f"    if y > {rng.randint(20, 120)}:",
        f"        return y - {rng.randint(2, 30)}",
        f"    return y + {rng.randint(2, 30)}",
        args=(rng.randint(2, 25),),
    )


def list_ends(rng: Random) -> Question:
    values = [rng.randint(1, 50) for _ in range(rng.randint(4, 6))]
    return _returns(
        "def f(values):",
        f"    a = values[{rng.randint(0, 3)}]",
        f"    b = values[-{rng.randint(1, 3)}]",
        f"    return a {rng.choice('+-*')} b",
        args=(values,),
    )


def slice_of_word(rng: Random) -> Question:
    start = rng.randint(0, 2)
    return _returns(
        "def f(word):",
        f"    part = word[{start}:{start + rng.randint(2, 4)}]",
        f"    part = part {rng.choice(('[::-1]', '* 2', '+ word[0]', '+ word[-1]'))}".replace(" [", "["),
        f"    return part + {rng.choice('abcxyz')!r}",
        args=(rng.choice(WORDS),),
    )


# ---- medium ----


def sum_of_some(rng: Random) -> Question:
    modulus = rng.randint(2, 5)
    return _returns(
        "def f(n):",
        f"    total = {rng.randint(0, 9)}",
        "    for i in range(1, n + 1):",
        f"        if i % {modulus} == {rng.randrange(modulus)}:",
        f"            total += i * {rng.randint(2, 7)}",
        "        else:",
        f"            total -= {rng.randint(1, 6)}",
        "    return total",
        args=(rng.randint(5, 9),),
    )


def digits(rng: Random) -> Question:
    return _returns(
        "def f(n):",
        f"    result = {rng.randint(0, 9)}",
        "    while n > 0:",
        f"        result {rng.choice(('+=', '-='))} n % 10 * {rng.randint(1, 5)}",
        "        n //= 10",
        "    return result",
        args=(rng.randint(1000, 99999),),
    )


def filtered_list(rng: Random) -> Question:
    values = [rng.randint(1, 40) for _ in range(rng.randint(5, 7))]
    return _returns(
        "def f(values):",
        "    result = []",
        "    for v in values:",
        f"        if v {rng.choice(('>', '<', '>=', '<='))} {rng.randint(10, 30)}:",
        f"            result.append(v {rng.choice('+-*')} {rng.randint(2, 9)})",
        f"    return {rng.choice(('result', 'result[::-1]', 'sorted(result)', 'len(result)'))}",
        args=(values,),
    )


def letters(rng: Random) -> Question:
    group = "".join(sorted(rng.sample("aeioulnrst", 3)))
    return _returns(
        "def f(word):",
        f"    score = {rng.randint(0, 20)}",
        "    for letter in word:",
        f"        if letter in {group!r}:",
        f"            score += {rng.randint(2, 9)}",
        "        else:",
        f"            score -= {rng.randint(1, 4)}",
        "    return score",
        args=(rng.choice(WORDS),),
    )


# ---- hard ----


def recursion(rng: Random) -> Question:
    return _returns(
        "def f(n):",
        f"    if n <= {rng.randint(0, 2)}:",
        f"        return n + {rng.randint(1, 9)}",
        f"    return {rng.randint(2, 5)} * f(n - {rng.randint(1, 2)}) {rng.choice('+-')} {rng.choice(('n', '1', '3'))}",
        args=(rng.randint(4, 7),),
    )


def halve_or_grow(rng: Random) -> Question:
    return _returns(
        "def f(n):",
        "    steps = 0",
        f"    while n > 1 and steps < {rng.randint(6, 9)}:",
        "        if n % 2 == 0:",
        "            n //= 2",
        "        else:",
        f"            n = {rng.choice((3, 5))} * n + {rng.choice((1, 3, 5, 7))}",
        "        steps += 1",
        f"    return n + steps * {rng.randint(2, 9)}",
        args=(rng.randint(5, 90),),
    )


def nested_loops(rng: Random) -> Question:
    inner = rng.choice(("range(i)", "range(i, n)", "range(i + 1)"))
    return _returns(
        "def f(n):",
        f"    total = {rng.randint(0, 12)}",
        "    for i in range(n):",
        f"        for j in {inner}:",
        f"            total += {rng.choice(('i * j', 'i + j', 'i - j'))} + {rng.randint(1, 9)}",
        "    return total",
        args=(rng.choice((3, 4)),),
    )


def rewrite_list(rng: Random) -> Question:
    values = [rng.randint(1, 20) for _ in range(rng.randint(4, 6))]
    return _returns(
        "def f(values):",
        "    stack = []",
        "    for v in values:",
        f"        if stack and (stack[-1] + v) % {rng.randint(2, 4)} == 0:",
        f"            v = v {rng.choice('+-*')} stack.pop()",
        "        stack.append(v)",
        f"    return {rng.choice(('stack', 'stack[::-1]', 'max(stack)', 'stack[0] - stack[-1]'))}",
        args=(values,),
    )


def two_variables(rng: Random) -> Question:
    return _returns(
        "def f(a, b):",
        f"    for i in range({rng.randint(4, 6)}):",
        f"        a, b = b, (a {rng.choice('+-')} {rng.randint(1, 4)} * b) % {rng.randint(7, 31)}",
        f"    return {rng.choice(('a + b', 'a * b', 'b - a'))}",
        args=(rng.randint(1, 12), rng.randint(1, 12)),
    )


TEMPLATES = {
    "easy": (running_total, two_branches, list_ends, slice_of_word),
    "medium": (sum_of_some, digits, filtered_list, letters),
    "hard": (recursion, halve_or_grow, nested_loops, rewrite_list, two_variables),
}
