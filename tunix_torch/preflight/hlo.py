"""Read a compiled program's text: which collectives it has, over which chips, with how many bytes."""

import math
import re
from dataclasses import dataclass

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "s4": 4, "u4": 4}
_SHAPE = re.compile(r"\b(pred|bf16|f8\w+|[fsuc]\d+)\[([\d,]*)\]")
_COLLECTIVE = re.compile(
    rf"%(?P<name>[\w.-]+) = (?P<shape>\(.*?\)|\S+) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\("
)


@dataclass
class Collective:
    """One communication between chips."""

    kind: str  # one of KINDS
    shape: str  # of what a chip has in the end, such as "bf16[2304,9216]"
    bytes: float  # that each chip sends
    group_size: int  # chips that take part together


def shape_bytes(shape: str) -> int:
    """Bytes of an array, or of all arrays of a tuple, from text such as "bf16[8,128]{1,0}"."""
    total = 0
    for dtype, sizes in _SHAPE.findall(shape):
        bits = BITS.get(dtype) or int(re.search(r"\d+", dtype)[0])
        total += math.prod(int(size) for size in sizes.split(",") if size) * bits // 8
    return total


def sent_bytes(kind: str, result_bytes: int, group_size: int) -> float:
    """What each of the chips must send at least, when all of them together hold the operands.

    An all-gather's result is everything, a reduce-scatter's one part; an all-reduce is the one after the other.
    """
    others = (group_size - 1) / group_size
    if kind == "all-reduce":
        return 2 * result_bytes * others
    if kind == "reduce-scatter":
        return result_bytes * (group_size - 1)
    if kind == "collective-permute":
        return float(result_bytes)
    return result_bytes * others  # all-gather, all-to-all


def collectives_of(text: str) -> list[Collective]:
    """Every collective of a compiled program, once for each time it runs in one run of the program.

    A collective that the compiler spreads over several fusions, to overlap it with computation, has one channel
    throughout and counts once.

    Raises:
        ValueError: how often it runs is not known.
    """
    num_partitions = int(found[1]) if (found := re.search(r"num_partitions=(\d+)", text)) else 1
    by_channel: dict[str, list[Collective]] = {}
    runs = runs_of(text)
    lines = [(name, line) for name, body in _lines_by_computation(text).items() for line in body]
    for computation, line in lines:
        match = _COLLECTIVE.search(line)
        if match is None:
            continue
        channel = re.search(r"channel_id=(\d+)", line)
        shape = match["shape"]
        if match["start"] and match["kind"] == "collective-permute":
            shape = shape.split(", ")[0]  # (operand, result, contexts)
        elif match["start"]:  # (operands, results)
            parts = _SHAPE.findall(shape)
            shape = ", ".join(f"{dtype}[{sizes}]" for dtype, sizes in parts[len(parts) // 2 :])
        size = _group_size(line, num_partitions)
        plain = ", ".join(f"{dtype}[{sizes}]" for dtype, sizes in _SHAPE.findall(shape))
        kind = match["kind"]
        collective = Collective(kind, plain, sent_bytes(kind, shape_bytes(plain), size), size)
        if size > 1:
            each = [collective] * round(runs[computation])
            by_channel.setdefault(channel[1] if channel else match["name"], each)
    return [collective for each in by_channel.values() for collective in each]


def _group_size(line: str, num_partitions: int) -> int:
    """How many chips communicate with each other."""
    if "source_target_pairs=" in line:
        return 2
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]<=", line)
    if iota is not None:
        return int(iota[1])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    if listed is not None:
        return listed[1].count(",") + 1
    return num_partitions


def runs_of(text: str) -> dict[str, float]:
    """How often each computation of a program runs in one run of the program.

    A loop's turns are known from its condition, which compares a counter from 0 with a constant. The partitioner makes
    loops of multiplications, to send one part while another is computed; in their last turn nothing is sent.

    Raises:
        ValueError: a loop or a branch of another kind.
    """
    lines = _lines_by_computation(text)
    entry = next((name for name in lines if f"ENTRY %{name} " in text), None)
    callers: dict[str, list[tuple[str, float]]] = {}
    turns: dict[str, int] = {}
    for name, body in lines.items():
        for line in body:
            for called in re.findall(r"(?:calls|to_apply)=%([\w.-]+)", line):
                callers.setdefault(called, []).append((name, 1))
            loop = re.search(r"%([\w.-]+) = .* while\(.*condition=%([\w.-]+), body=%([\w.-]+)", line)
            if loop is not None:
                turns[loop[3]] = _turns(loop[1], lines.get(loop[2], []))
                callers.setdefault(loop[3], []).append((name, turns[loop[3]]))
    for name, body in lines.items():
        for line in body:
            branch = re.search(r"%([\w.-]+) = .* conditional\(", line)
            if branch is not None:
                taken = re.search(r"true_computation=%([\w.-]+), false_computation=%last_iteration_noop", line)
                if taken is None or name not in turns:
                    raise ValueError(f"{branch[1]} is a branch, which may be taken or not")
                callers.setdefault(taken[1], []).append((name, 1 - 1 / turns[name]))

    def runs(name: str) -> float:
        return 1 if name == entry or name not in callers else sum(n * runs(caller) for caller, n in callers[name])

    return {name: runs(name) for name in lines}


def _lines_by_computation(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    computation = ""
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            computation = line.split()[1 if line.startswith("ENTRY") else 0].lstrip("%")
        found.setdefault(computation, []).append(line)
    return found


def _turns(loop: str, condition: list[str]) -> int:
    """How often a loop turns, from the lines of its condition."""
    constants = dict(re.findall(r"%([\w.-]+) = [su]32\[\]\S* constant\((\d+)\)", "\n".join(condition)))
    compared = [re.search(r"ROOT .* compare\(%[\w.-]+, %([\w.-]+)\), direction=LT", line) for line in condition]
    limit = next((constants.get(match[1]) for match in compared if match is not None), None)
    if limit is None:
        raise ValueError(f"{loop} is a loop, and how often it turns is not known")
    return int(limit)
