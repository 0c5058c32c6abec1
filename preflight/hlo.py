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
        ValueError: a collective stands in a loop, whose turns are not counted here.
    """
    num_partitions = int(found[1]) if (found := re.search(r"num_partitions=(\d+)", text)) else 1
    by_channel: dict[str, Collective] = {}
    in_loops = _computations_of_loops(text)
    computation = ""
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            computation = line.split()[1 if line.startswith("ENTRY") else 0].lstrip("%")
        match = _COLLECTIVE.search(line)
        if match is None:
            continue
        if computation in in_loops:
            raise ValueError(f"{match['name']} stands in a loop")
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
            by_channel.setdefault(channel[1] if channel else match["name"], collective)
    return list(by_channel.values())


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


def _computations_of_loops(text: str) -> set[str]:
    """Names of the bodies and conditions of while loops, and of what they call."""
    called: dict[str, set[str]] = {}
    loops: set[str] = set()
    computation = ""
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            computation = line.split()[1 if line.startswith("ENTRY") else 0].lstrip("%")
        names = set(re.findall(r"(?:calls|to_apply|body|condition)=%([\w.-]+)", line))
        called.setdefault(computation, set()).update(names)
        if " while(" in line:
            loops |= names
    frontier = set(loops)
    while frontier:
        frontier = set().union(*(called.get(name, set()) for name in frontier)) - loops
        loops |= frontier
    return loops
