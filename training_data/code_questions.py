"""Templates of code: what does a small Python function return?

The source that the question shows is the source that runs here, and its trace is the reasoning. Only sources that a
template of this file has put together from fixed lines and drawn numbers are run, with the few builtins that they use.
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


class _Tracer:
    """Watches calls of the function `f` of a source, and describes each step that it takes in a sentence.

    A step is one round of a loop (or one line outside of loops) with the variables that it sets, a recursive call of
    `f` or its return, and the line that returns in the end.
    """

    def __init__(self, source: str) -> None:
        self.lines = source.splitlines()
        self.steps: list[str] = []
        self.known: dict[FrameType, dict[str, str]] = {}  # the variables of each call at its last event
        self.last_line: dict[FrameType, int] = {}
        self.pending: dict[str, str] = {}  # variables that were set and are not yet told

    def __call__(self, frame: FrameType, event: str, value: object) -> object:
        """The function for `sys.settrace`."""
        if frame.f_code.co_name != "f" or frame.f_code.co_filename != FILE_NAME:
            return None
        now = {name: repr(local) for name, local in frame.f_locals.items()}
        call = f"f({', '.join(now[name] for name in frame.f_code.co_varnames[: frame.f_code.co_argcount])})"
        if event == "call":
            self._tell_call(call, now)
            self.known[frame], self.last_line[frame] = now, frame.f_lineno
            return self
        before = self.lines[self.last_line[frame] - 1].split()
        entered = {before[1]} if before[0] == "for" and frame.f_lineno == self.last_line[frame] + 1 else set()
        changed = {name: x for name, x in now.items() if self.known[frame].get(name) != x or name in entered}
        if changed.keys() & self.pending.keys():
            self._tell_pending()
        self.pending.update(changed)
        self.known[frame], self.last_line[frame] = now, frame.f_lineno
        line = self.lines[frame.f_lineno - 1].strip()
        if event == "return":
            self._tell_pending()
            is_first_call = frame is next(iter(self.known))
            self.steps.append(f"Finally `{line}` returns {value!r}." if is_first_call else f"{call} returns {value!r}.")
        elif line.startswith(("for ", "while ")):
            self._tell_pending()
        return self

    def _tell_call(self, call: str, arguments: dict[str, str]) -> None:
        if self.known:
            self.steps.append(f"This needs {call}.")
        else:
            given = ", ".join(f"{name} = {local}" for name, local in arguments.items())
            self.steps.append(f"First, the call is {call}, so {given}.")

    def _tell_pending(self) -> None:
        if self.pending:
            self.steps.append(f"Then {', '.join(f'{name} = {value}' for name, value in self.pending.items())}.")
            self.pending.clear()


def run(source: str, args: tuple[object, ...]) -> tuple[object, list[str]]:
    """Run the function `f` of a source.

    Returns:
        the value that `f` returns, and a sentence for each step that it takes, see `_Tracer`.
    """
    scope: dict[str, object] = {"__builtins__": BUILTINS}
    exec(compile(source, FILE_NAME, "exec"), scope)
    tracer, outer_trace = _Tracer(source), sys.gettrace()
    sys.settrace(tracer)
    try:
        result = scope["f"](*args)
    finally:
        sys.settrace(outer_trace)
    return result, tracer.steps


def _returns(*lines: str, args: tuple[object, ...]) -> Question:
    """The question for the value that the function of these lines returns."""
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
