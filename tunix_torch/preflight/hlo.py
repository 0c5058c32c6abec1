"""Read the text of a program that XLA compiled: its arrays' sizes, its collectives, and how often each part runs."""

import math
import re
from dataclasses import dataclass

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "s4": 4, "u4": 4}
ARRAY = re.compile(r"\b(pred|bf16|f8\w+|[fsuc]\d+)\[([\d,]*)\](\{[^}]*\})?")  # (dtype, sizes, layout)
_COLLECTIVE = re.compile(
    rf"%(?P<name>[\w.-]+) = (?P<shape>\(.*?\)|\S+) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\("
)
_NAMED = re.compile(r"%([\w.-]+) = (\(.*?\)|\S+) ")  # (name, shape) of each result


@dataclass
class Collective:
    """One communication between chips in one run of a program."""

    kind: str  # one of KINDS
    shape: str  # of the result on each chip, such as "bf16[2304,9216]"
    bytes: float  # that each chip sends
    group_size: int  # number of chips that exchange data with each other


def shape_bytes(shape: str) -> int:
    """Return the bytes of an array, or of all arrays of a tuple, from text such as "bf16[8,128]{1,0}"."""
    return sum(array_bytes(dtype, sizes) for dtype, sizes, _ in ARRAY.findall(shape))


def array_bytes(dtype: str, sizes: str) -> int:
    """Return the bytes of one array, such as ("bf16", "8,128"). A dtype that `BITS` lacks has its bits in its name."""
    bits = BITS.get(dtype) or int(re.search(r"\d+", dtype)[0])
    return math.prod(int(size) for size in sizes.split(",") if size) * bits // 8


def sent_bytes(kind: str, result_bytes: int, group_size: int) -> float:
    """Return the least number of bytes that each chip must send in a collective with a result of `result_bytes`.

    The result of an all-gather is the whole array, and that of a reduce-scatter is one chip's part of it. An
    all-reduce is a reduce-scatter followed by an all-gather.
    """
    others = (group_size - 1) / group_size
    if kind == "all-reduce":
        return 2 * result_bytes * others
    if kind == "reduce-scatter":
        return result_bytes * (group_size - 1)
    if kind == "collective-permute":
        return float(result_bytes)
    return result_bytes * others  # an all-gather or an all-to-all


def collectives_of(text: str) -> list[Collective]:
    """Return every collective of a compiled program, once for each time that it runs in one run of the program.

    The compiler spreads some collectives over several fusions, to overlap them with computation. All parts of such a
    collective have one channel, and it counts once.

    Raises:
        ValueError: the text does not tell how often a collective runs.
    """
    num_partitions = int(found[1]) if (found := re.search(r"num_partitions=(\d+)", text)) else 1
    by_channel: dict[str, list[Collective]] = {}
    runs, computations = runs_by_computation(text), lines_by_computation(text)
    shapes = {name: dict(_NAMED.findall("\n".join(body))) for name, body in computations.items()}
    for computation, line in [(name, line) for name, body in computations.items() for line in body]:
        match = _COLLECTIVE.search(line)
        if match is None:
            continue
        channel = re.search(r"channel_id=(\d+)", line)
        shape = match["shape"]
        if match["start"] and match["kind"] == "collective-permute":
            shape = shape.split(", ")[0]  # the shape is (operand, result, contexts)
        elif match["start"]:  # the shape is (operands, results)
            parts = ARRAY.findall(shape)
            shape = ", ".join(f"{dtype}[{sizes}]" for dtype, sizes, _ in parts[len(parts) // 2 :])
        plain = ", ".join(f"{dtype}[{sizes}]" for dtype, sizes, _ in ARRAY.findall(shape))
        kind = match["kind"]
        size = _group_size(line, num_partitions)
        if kind == "all-gather" and "replica_groups={}" in line:
            size = _parts_gathered(match, line, shapes[computation]) or size
        collective = Collective(kind, plain, sent_bytes(kind, shape_bytes(plain), size), size)
        if size > 1:
            each = [collective] * round(runs[computation])
            by_channel.setdefault(channel[1] if channel else match["name"], each)
    return [collective for each in by_channel.values() for collective in each]


def _group_size(line: str, num_partitions: int) -> int:
    """Return the number of chips that exchange data with each other in a collective, from its line of text."""
    if "source_target_pairs=" in line:
        return 2
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]<=", line)
    if iota is not None:
        return int(iota[1])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    if listed is not None:
        return listed[1].count(",") + 1
    return num_partitions


def _parts_gathered(match: re.Match[str], line: str, shapes: dict[str, str]) -> int | None:
    """Return how many parts an all-gather joins, by the sizes of its result and its operand; None: not known.

    That is needed where the text names no groups: not all of them are then one group, since the compiler has a short
    form of groups that jaxlib does not read.

    Args:
        shapes: of each result in the same computation, by name.
    """
    operand = re.search(r"all-gather(?:-start)?\(%([\w.-]+)\)", line)
    if operand is None or operand[1] not in shapes:
        return None
    of_operand = shape_bytes(shapes[operand[1]])
    result = shape_bytes(match["shape"]) - (of_operand if match["start"] else 0)
    return result // of_operand if of_operand and result % of_operand == 0 else None


def runs_by_computation(text: str) -> dict[str, float]:
    """Return how often each computation of a program runs in one run of the program, by the computation's name.

    A loop's condition compares a counter, which starts at 0, with a constant: that is the number of its iterations. The
    loop that is the program of a decode step compares it with another value that it is handed, the number of tokens,
    and one iteration is counted, so that figures are those of one token.

    XLA's partitioner turns multiplications into such loops, to send one part while another is computed. In the last
    iteration nothing is sent, so the branch that sends runs one time less.

    Raises:
        ValueError: the program has a loop or a branch of another kind.
    """
    lines = lines_by_computation(text)
    entry = next((name for name in lines if f"ENTRY %{name} " in text), None)
    callers: dict[str, list[tuple[str, float]]] = {}  # of each computation: (caller, calls in one run of the caller)
    iterations: dict[str, int] = {}
    for name, body in lines.items():
        for line in body:
            for called in re.findall(r"(?:calls|to_apply)=%([\w.-]+)", line):
                callers.setdefault(called, []).append((name, 1))
            loop = re.search(r"%([\w.-]+) = .* while\(.*condition=%([\w.-]+), body=%([\w.-]+)", line)
            if loop is not None:
                iterations[loop[3]] = _num_iterations(loop[1], lines.get(loop[2], []), is_whole=name == entry)
                callers.setdefault(loop[3], []).append((name, iterations[loop[3]]))
    for name, body in lines.items():
        for line in body:
            branch = re.search(r"%([\w.-]+) = .* conditional\(", line)
            if branch is not None:
                taken = re.search(r"true_computation=%([\w.-]+), false_computation=%last_iteration_noop", line)
                if taken is None or name not in iterations:
                    raise ValueError(f"{branch[1]} is a branch, which may be taken or not")
                callers.setdefault(taken[1], []).append((name, 1 - 1 / iterations[name]))

    def runs(name: str) -> float:
        return 1 if name == entry or name not in callers else sum(n * runs(caller) for caller, n in callers[name])

    return {name: runs(name) for name in lines}


def lines_by_computation(text: str) -> dict[str, list[str]]:
    """Return the lines of each computation of a program, by its name. The first one is the line that opens it."""
    found: dict[str, list[str]] = {}
    computation = ""
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            computation = line.split()[1 if line.startswith("ENTRY") else 0].lstrip("%")
        found.setdefault(computation, []).append(line)
    return found


def _num_iterations(loop: str, condition: list[str], is_whole: bool) -> int:
    """Return the number of a loop's iterations, from the lines of its condition. `loop` is its name, for the error.

    Where the program is this loop, `is_whole`, 1 stands for a number that it is handed.
    """
    constants = dict(re.findall(r"%([\w.-]+) = [su]32\[\]\S* constant\((\d+)\)", "\n".join(condition)))
    compared = [re.search(r"ROOT .* compare\(%[\w.-]+, %([\w.-]+)\), direction=LT", line) for line in condition]
    of_loop = {m for line in condition for m in re.findall(r"%([\w.-]+) = s32\[\]\S* get-tuple-element\(", line)}
    limit = next((1 if is_whole and m[1] in of_loop else constants.get(m[1]) for m in compared if m is not None), None)
    if limit is None:
        raise ValueError(f"{loop} is a loop, and how often it turns is not known")
    return int(limit)
