"""Count the bytes that a compiled program moves between a TPU chip's HBM and its processor.

The compiler's own figure, `bytes accessed`, cannot be used: it also counts data in the chip's fast memory. A weight
that was fetched ahead counts there twice, when it is fetched and when it is used. Here an array counts only if it lies
in HBM, which its layout tells (memory spaces `S(1)` and above are elsewhere), and once for each operation that reads
or writes it. When an operation only slices an array or gathers from it, the bytes of the result count. When an
operation updates an array in place, the bytes of the update count.
"""

import re
from dataclasses import dataclass

from .hlo import ARRAY, array_bytes, lines_by_computation, runs_by_computation, shape_bytes

_LINE = re.compile(r"\s+(?P<root>ROOT )?%(?P<name>[\w.-]+) = (?P<shape>\(.*?\)|\S+) (?P<op>[\w-]+)\((?P<rest>.*)$")
# Operations that move no data themselves.
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
    """One operation of a program, which is one line of its text."""

    name: str
    shape: str
    op: str
    operands: list[str]
    calls: str | None  # the computation that a fusion or an asynchronous start runs
    is_root: bool  # whether its result is the result of the computation
    index: int  # which parameter of the computation it is; -1 when it is none
    runs: list[str]  # the computations that a loop or a branch runs


Computation = dict[str, Instruction]  # by the instruction's name
Computations = dict[str, Computation]  # by the computation's name


def hbm_traffic_bytes(text: str) -> float:
    """Return the bytes that one run of a compiled program moves from and to HBM, on one chip.

    Raises:
        ValueError: the text does not tell how often a part of the program runs.
    """
    program, entry = parse(text)
    runs = runs_by_computation(text)
    inner = [name for computation in program.values() for one in computation.values() for name in one.runs]
    return float(sum(runs[name] * _moved_bytes(program, program[name]) for name in {entry, *inner}))


def _moved_bytes(program: Computations, computation: Computation) -> int:
    """Return the bytes that one run of a computation moves, without the loops and branches that it runs."""
    total = 0
    for instruction in computation.values():
        if instruction.op in FREE or instruction.op.endswith("-done"):
            continue
        if instruction.op == "call":
            raise ValueError(f"{instruction.name} is a call, which is not counted")
        total += _written_bytes(program, instruction, computation)
        for place, operand in enumerate(instruction.operands):
            source = computation.get(operand)
            if source is not None:
                total += _read_bytes(program, instruction, place, bytes_in_hbm(source.shape), computation)
    return total


def parse(text: str) -> tuple[Computations, str]:
    """Return the computations of a program, and the name of its entry computation."""
    program: Computations = {}
    entry = ""
    for name, lines in lines_by_computation(text).items():
        if not name:  # the lines before the first computation
            continue
        entry = name if lines[0].startswith("ENTRY") else entry
        matches = [match for line in lines[1:] if (match := _LINE.match(line)) is not None]
        program[name] = {match["name"]: _instruction_of(match) for match in matches}
    return program, entry


def _instruction_of(match: re.Match[str]) -> Instruction:
    inside = match["rest"].split(")", 1)[0]
    calls = re.search(r"calls=%([\w.-]+)", match["rest"])
    return Instruction(
        match["name"],
        match["shape"],
        match["op"],
        re.findall(r"%([\w.-]+)", inside),
        calls[1] if calls else None,
        bool(match["root"]),
        int(inside) if match["op"] == "parameter" else -1,
        re.findall(r"(?:body|(?:true|false)_computation)=%([\w.-]+)", match["rest"]),
    )


def bytes_in_hbm(shape: str) -> int:
    """Return the bytes of an array, or of those arrays of a tuple, that lie in HBM."""
    return sum(array_bytes(dtype, sizes) for dtype, sizes, layout in ARRAY.findall(shape) if "S(" not in layout)


def _result_of_start(instruction: Instruction) -> str:
    """Return the array that an asynchronous operation makes. Its shape is a tuple of operand, result and bookkeeping.

    Only `copy-start` names its result before its operand.
    """
    arrays = [match[0] for match in ARRAY.finditer(instruction.shape)]
    return arrays[0] if instruction.op == "copy-start" else arrays[min(1, len(arrays) - 1)]


def _root_of(computation: Computation) -> Instruction | None:
    return next((instruction for instruction in computation.values() if instruction.is_root), None)


def _written_bytes(program: Computations, instruction: Instruction, computation: Computation) -> int:
    """Return the bytes that an operation writes to HBM. `computation` is the one that the operation belongs to."""
    if instruction.op.endswith("-start"):
        return bytes_in_hbm(_result_of_start(instruction))
    if instruction.op == "dynamic-update-slice":
        return shape_bytes(computation[instruction.operands[1]].shape) if bytes_in_hbm(instruction.shape) else 0
    if instruction.calls in program and instruction.op == "fusion":
        called = program[instruction.calls]
        root = _root_of(called)
        parts = [root] if root is None or root.op != "tuple" else [called.get(name) for name in root.operands]
        arrays = [match[0] for match in ARRAY.finditer(instruction.shape)]
        if len(parts) == len(arrays):
            pairs = zip(parts, arrays, strict=True)
            return sum(_bytes_written_by_part(program, called, part, array) for part, array in pairs)
    return bytes_in_hbm(instruction.shape)


def _bytes_written_by_part(program: Computations, called: Computation, part: Instruction | None, array: str) -> int:
    """Return the bytes that a fusion writes to HBM for one of its results, `array`, which `part` of it computes."""
    while part is not None and part.op == "bitcast":
        part = called.get(part.operands[0])
    if part is None or not bytes_in_hbm(array):
        return bytes_in_hbm(array)
    if part.op == "dynamic-update-slice":
        return shape_bytes(called[part.operands[1]].shape)
    if part.op == "fusion" and part.calls in program:
        inner = program[part.calls]
        return _bytes_written_by_part(program, inner, _root_of(inner), array)
    return bytes_in_hbm(array)


def _read_bytes(program: Computations, user: Instruction, place: int, full: int, computation: Computation) -> int:
    """Return the bytes that an operation reads from HBM of its operand number `place`, which has `full` bytes there.

    `computation` is the one that the operation belongs to.
    """
    if not full:
        return 0
    if user.op in SLICING and place == 0:
        return min(full, shape_bytes(user.shape))
    if user.op in ("slice-start", "async-start"):
        return min(full, shape_bytes(_result_of_start(user)))
    if user.op == "dynamic-update-slice" and place == 0:
        return 0
    if user.calls not in program:
        return full
    called = program[user.calls]
    parameter = next((inner for inner in called.values() if inner.op == "parameter" and inner.index == place), None)
    if parameter is None:
        return full
    if _is_view(called, parameter.name):  # such a fusion reads nothing; the operations that use its result do
        return min(full, _bytes_read_by_users(program, computation, user.name, full))
    return min(full, _bytes_read_by_users(program, called, parameter.name, full))


def _is_view(called: Computation, parameter: str) -> bool:
    """Whether a computation only reinterprets one of its parameters, by bitcasts."""
    root = _root_of(called)
    while root is not None and root.op == "bitcast":
        root = called.get(root.operands[0])
    return root is not None and root.name == parameter


def _bytes_read_by_users(program: Computations, called: Computation, name: str, full: int) -> int:
    """Return the bytes of an array, given by its name and with `full` bytes in HBM, that a computation reads."""
    total = 0
    for inner in called.values():
        for place, operand in enumerate(inner.operands):
            if operand != name:
                continue
            if inner.op == "bitcast":
                total += _bytes_read_by_users(program, called, inner.name, full)
            else:
                total += _read_bytes(program, inner, place, full, called)
    return total
