"""Count the bytes that a compiled program moves between a chip's HBM and its processor.

The compiler's own `bytes accessed` also counts what stays in the chip's fast memory, such as a weight that was fetched
ahead: once as it is fetched and once as it is used. Here only arrays in HBM count, by the memory space in their layout
(`S(1)` and above lie elsewhere), once for each operation that reads or writes them. Of an array that is only sliced or
gathered from, what comes out counts; of one that is updated in place, the update.
"""

import math
import re
from dataclasses import dataclass

from .hlo import BITS, runs_of

_ARRAY = re.compile(r"\b(pred|bf16|f8\w+|[fsuc]\d+)\[([\d,]*)\](\{[^}]*\})?")
_LINE = re.compile(r"\s+(?P<root>ROOT )?%(?P<name>[\w.-]+) = (?P<shape>\(.*?\)|\S+) (?P<op>[\w-]+)\((?P<rest>.*)$")
# They move nothing themselves.
FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
    "iota",
    "while",
    "conditional",
}
SLICING = {"dynamic-slice", "slice", "gather"}


@dataclass
class Instruction:
    """One line of a program."""

    name: str
    shape: str
    op: str
    operands: list[str]
    calls: str | None  # the computation that a fusion or an asynchronous start runs
    is_root: bool
    index: int  # of a parameter
    runs: list[str]  # the computations that a loop or a branch runs


Program = dict[str, dict[str, Instruction]]  # computation -> instruction's name -> instruction


def hbm_bytes(text: str) -> float:
    """Bytes that one run of a compiled program moves from and to HBM, on one chip.

    Raises:
        ValueError: how often a part of it runs is not known.
    """
    program, entry = parse(text)
    runs = runs_of(text)
    inner = [name for among in program.values() for instruction in among.values() for name in instruction.runs]
    return float(sum(runs[name] * _moved_by(program, program[name]) for name in {entry, *inner}))


def _moved_by(program: Program, among: dict[str, Instruction]) -> int:
    """What one run of a computation moves, but for its loops and branches."""
    total = 0
    for instruction in among.values():
        if instruction.op in FREE or instruction.op.endswith("-done"):
            continue
        if instruction.op == "call":
            raise ValueError(f"{instruction.name} is a call, which is not counted")
        total += _written(program, instruction, among)
        for place, operand in enumerate(instruction.operands):
            source = among.get(operand)
            if source is not None:
                total += _read(program, instruction, place, array_bytes(source.shape), among)
    return total


def parse(text: str) -> tuple[Program, str]:
    """(the program, the name of its entry computation)."""
    program: Program = {}
    computation = entry = ""
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            words = line.split()
            computation = words[1 if words[0] == "ENTRY" else 0].lstrip("%")
            entry = computation if words[0] == "ENTRY" else entry
            program[computation] = {}
            continue
        match = _LINE.match(line)
        if match is not None and computation:
            inside = match["rest"].split(")", 1)[0]
            calls = re.search(r"calls=%([\w.-]+)", match["rest"])
            program[computation][match["name"]] = Instruction(
                match["name"],
                match["shape"],
                match["op"],
                re.findall(r"%([\w.-]+)", inside),
                calls[1] if calls else None,
                bool(match["root"]),
                int(inside) if match["op"] == "parameter" else -1,
                re.findall(r"(?:body|(?:true|false)_computation)=%([\w.-]+)", match["rest"]),
            )
    return program, entry


def array_bytes(shape: str, anywhere: bool = False) -> int:
    """Bytes of an array, or of a tuple's arrays, that lie in HBM; `anywhere`: wherever they lie."""
    total = 0
    for dtype, sizes, layout in _ARRAY.findall(shape):
        if anywhere or "S(" not in layout:
            bits = BITS.get(dtype) or int(re.search(r"\d+", dtype)[0])
            total += math.prod(int(size) for size in sizes.split(",") if size) * bits // 8
    return total


def _written(program: Program, instruction: Instruction, among: dict[str, Instruction]) -> int:
    """What an operation writes to HBM."""
    if instruction.op.endswith("-start"):  # a tuple of operands, results and bookkeeping
        arrays = [match[0] for match in _ARRAY.finditer(instruction.shape)]
        return array_bytes(arrays[0] if instruction.op == "copy-start" else arrays[min(1, len(arrays) - 1)])
    if instruction.op == "dynamic-update-slice":
        return array_bytes(among[instruction.operands[1]].shape, anywhere=True) if array_bytes(instruction.shape) else 0
    if instruction.calls in program and instruction.op == "fusion":
        called = program[instruction.calls]
        root = next((inner for inner in called.values() if inner.is_root), None)
        parts = [root] if root is None or root.op != "tuple" else [called.get(name) for name in root.operands]
        arrays = [match[0] for match in _ARRAY.finditer(instruction.shape)]
        if len(parts) == len(arrays):
            return sum(_part_written(program, called, part, array) for part, array in zip(parts, arrays, strict=True))
    return array_bytes(instruction.shape)


def _part_written(program: Program, called: dict[str, Instruction], part: Instruction | None, array: str) -> int:
    while part is not None and part.op == "bitcast":
        part = called.get(part.operands[0])
    if part is None or not array_bytes(array):
        return array_bytes(array)
    if part.op == "dynamic-update-slice":
        return array_bytes(called[part.operands[1]].shape, anywhere=True)
    if part.op == "fusion" and part.calls in program:
        inner = program[part.calls]
        root = next((found for found in inner.values() if found.is_root), None)
        return _part_written(program, inner, root, array)
    return array_bytes(array)


def _read(program: Program, user: Instruction, place: int, full: int, among: dict[str, Instruction]) -> int:
    """What an operation reads of its operand number `place`, which has `full` bytes in HBM."""
    if not full:
        return 0
    if user.op in SLICING and place == 0:
        return min(full, array_bytes(user.shape, anywhere=True))
    if user.op in ("slice-start", "async-start"):  # ((operand), result, bookkeeping)
        arrays = [match[0] for match in _ARRAY.finditer(user.shape)]
        return min(full, array_bytes(arrays[min(1, len(arrays) - 1)], anywhere=True))
    if user.op == "dynamic-update-slice" and place == 0:
        return 0
    if user.calls not in program:
        return full
    called = program[user.calls]
    parameter = next((inner for inner in called.values() if inner.op == "parameter" and inner.index == place), None)
    if parameter is None:
        return full
    if _is_view(called, parameter.name):  # a fusion of nothing but a bitcast: who uses it reads
        return min(full, _read_inside(program, among, user.name, full))
    return min(full, _read_inside(program, called, parameter.name, full))


def _is_view(called: dict[str, Instruction], parameter: str) -> bool:
    root = next((inner for inner in called.values() if inner.is_root), None)
    while root is not None and root.op == "bitcast":
        root = called.get(root.operands[0])
    return root is not None and root.name == parameter


def _read_inside(program: Program, called: dict[str, Instruction], name: str, full: int) -> int:
    total = 0
    for inner in called.values():
        for place, operand in enumerate(inner.operands):
            if operand != name:
                continue
            if inner.op == "bitcast":
                total += _read_inside(program, called, inner.name, full)
            else:
                total += _read(program, inner, place, full, called)
    return total
