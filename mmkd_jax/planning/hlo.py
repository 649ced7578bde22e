"""A compiled program's text (HLO), read into computations and instructions; loops with how often they run.

The text is that of `jax.stages.Compiled.as_text()` for CPUs and TPUs. What it leaves unsaid is not guessed.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8,
    "u64": 8, "f64": 8, "c64": 8, "c128": 16, "s4": 0.5, "u4": 0.5, "token": 0, "opaque": 0,
}  # fmt: skip
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_SAME = ("copy", "bitcast", "reshape", "convert", "copy-start", "copy-done", "optimization-barrier")
_OPENS, _CLOSES = "([{", ")]}"


class HloError(Exception):
    """The text does not say what has to be known, such as how often a loop runs."""


@dataclasses.dataclass(frozen=True)
class Array:
    """Element type and dimensions of one array."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes without padding."""
        return int(self.size * BYTES.get(self.dtype, 1 if self.dtype.startswith("f8") else 4))


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `name = results opcode(operands), attributes`."""

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    root: bool

    def calls(self, key: str) -> str:
        """Name of the computation that the attribute `key` refers to; empty if there is none."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else ""


class Computation(dict):
    """Instructions by name, in order."""

    @functools.cached_property
    def root(self) -> Instruction:
        """What it returns."""
        return next(one for one in self.values() if one.root)

    @functools.cached_property
    def parameters(self) -> dict[int, str]:
        """Names of its parameters by number."""
        return {int(one.arguments): one.name for one in self.values() if one.opcode == "parameter"}


@dataclasses.dataclass
class Module:
    """A whole program: computations by name, and the name of the first one."""

    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """Reads a program.

    Raises:
      HloError: it has no entry, or a line is not understood.
    """
    computations, entry, current = {}, "", None
    for line in text.splitlines():
        if current is None:
            header = _HEADER.match(line)
            if header:
                current = computations[header[2]] = Computation()
                entry = header[2] if header[1] else entry
        elif line == "}":  # bodies of kernels have lines that begin with it
            current = None
        elif " = " in line and re.match(r"\s*(ROOT )?%?[\w.\-]+ = ", line):
            one = _instruction(line)
            current[one.name] = one
    if not entry:
        raise HloError("the program's text has no entry computation")
    return Module(computations, entry)


def _instruction(line: str) -> Instruction:
    left, _, right = line.strip().partition(" = ")
    types, right = _type(right)
    opcode, _, right = right.partition("(")
    arguments, attributes = _enclosed("(" + right)
    operands = tuple(_NAME.findall(arguments))
    name = left.removeprefix("ROOT ").removeprefix("%")
    arrays = tuple(_arrays(types))
    return Instruction(name, opcode, arrays, operands, arguments, attributes, left.startswith("ROOT "))


def _type(text: str) -> tuple[str, str]:
    """The type in front of `text`, and what follows it."""
    if text.startswith("("):
        types, rest = _enclosed(text)
        return types, rest.lstrip()
    types, _, rest = text.partition(" ")
    return types, rest


def _enclosed(text: str) -> tuple[str, str]:
    """What stands between the bracket in front of `text` and its partner, and what follows."""
    depth, quoted = 0, False
    for place, letter in enumerate(text):
        if letter == '"' and text[place - 1] != "\\":
            quoted = not quoted
        elif quoted:
            continue
        elif letter in _OPENS:
            depth += 1
        elif letter in _CLOSES:
            depth -= 1
            if not depth:
                return text[1:place], text[place + 1 :]
    raise HloError(f"a line of the program is cut off: {text[:60]}")


def _arrays(types: str) -> Iterator[Array]:
    for dtype, dims in _ARRAY.findall(types):
        yield Array(dtype, tuple(int(size.removeprefix("<=")) for size in dims.split(",") if size))


def trip_count(module: Module, where: Computation, loop: Instruction) -> int:
    """How often the body of `loop`, a `while` within `where`, runs.

    It is what the compiler says, or what follows from a counter that starts at a constant, goes up by a constant and is
    compared with a constant.

    Raises:
      HloError: neither can be read.
    """
    said = re.search(r'known_trip_count["\\]*:?=?\{["\\]*n["\\]*[:=]["\\]*(\d+)', loop.attributes)
    if said:
        return int(said[1])
    condition, body = (module.computations.get(loop.calls(key)) for key in ("condition", "body"))
    if condition is None or body is None:
        raise HloError(f"the loop {loop.name} has no condition or body in the program's text")
    test, direction = _comparison(module, condition)
    if direction not in ("LT", "LE", "GT", "NE") or test is None:
        raise HloError(f"cannot read how often the loop {loop.name} runs: its condition is no comparison with a number")
    of_state = [_state(condition, name) for name in test]
    counters = [side for side, place in enumerate(of_state) if place is not None and _steps(module, body, place)]
    if len(counters) != 1:
        raise HloError(f"cannot read how often the loop {loop.name} runs: it has no counter in its condition")
    mine = counters[0]
    start = _started(where, loop, of_state[mine])
    step = _steps(module, body, of_state[mine])
    end = _constant(condition, test[1 - mine])
    if end is None and of_state[1 - mine] is not None and _kept(body, of_state[1 - mine]):
        end = _started(where, loop, of_state[1 - mine])
    if start is None or end is None:
        raise HloError(f"cannot read how often the loop {loop.name} runs: where its counter starts or ends is not said")
    if mine == 1:  # N > i is i < N
        direction = {"GT": "LT", "NE": "NE"}.get(direction, "")
    end += direction == "LE"
    if direction not in ("LT", "LE", "NE") or step <= 0 or (direction == "NE" and (end - start) % step):
        raise HloError(f"cannot read how often the loop {loop.name} runs: it counts in an unusual way")
    return max(0, -(-(end - start) // step))


def _comparison(module: Module, condition: Computation) -> tuple[tuple[str, ...] | None, str]:
    """Names, within `condition`, of the two numbers that it compares, and how."""
    root = condition.root
    inner, names = root, root.operands
    if root.opcode in ("fusion", "call"):
        called = module.computations[root.calls("calls") or root.calls("to_apply")]
        inner = called.root
        outside = {name: root.operands[number] for number, name in called.parameters.items()}
        constants = [_constant(called, name) for name in inner.operands]
        if any(value is not None for value in constants):
            number = next(place for place, value in enumerate(constants) if value is not None)
            made = dataclasses.replace(inner, name="limit", opcode="constant", arguments=str(constants[number]))
            condition["limit"] = made
            outside[inner.operands[number]] = "limit"
        names = tuple(outside.get(_source(called, name), "") for name in inner.operands)
        names = tuple(outside.get(own, name) for own, name in zip(inner.operands, names, strict=True))
    if inner.opcode != "compare":
        return None, ""
    return names, inner.attributes.split("direction=")[-1][:2]


def _source(where: Computation, name: str) -> str:
    """`name`, or what it is a mere copy of."""
    while name in where and where[name].opcode in _SAME and where[name].operands:
        name = where[name].operands[0]
    return name


def _constant(where: Computation, name: str) -> int | None:
    """The integer that `name` is, None if the text does not say."""
    name = _source(where, name)
    one = where.get(name)
    if one is None or one.opcode != "constant" or not re.fullmatch(r"-?\d+", one.arguments):
        return None
    return int(one.arguments)


def _state(where: Computation, name: str) -> int | None:
    """Which part of a loop's state `name` is, None if it is none."""
    one = where.get(_source(where, name))
    if one is None or one.opcode != "get-tuple-element":
        return None
    held = where.get(_source(where, one.operands[0]))
    return int(re.search(r"index=(\d+)", one.attributes)[1]) if held and held.opcode == "parameter" else None


def _started(where: Computation, loop: Instruction, place: int) -> int | None:
    """The constant with which part `place` of a loop's state starts."""
    state = where.get(_source(where, loop.operands[0]))
    return _constant(where, state.operands[place]) if state is not None and state.opcode == "tuple" else None


def _kept(body: Computation, place: int) -> bool:
    """Whether the body leaves part `place` of the state as it is."""
    root = body.root
    return root.opcode == "tuple" and _state(body, root.operands[place]) == place


def _steps(module: Module, body: Computation, place: int) -> int:
    """By how much the body raises part `place` of the state each time; 0 if it is not a constant."""
    root = body.root
    if root.opcode != "tuple" or place >= len(root.operands):
        return 0
    where, one, outside = body, body.get(_source(body, root.operands[place])), None
    if one is not None and one.opcode in ("fusion", "call"):
        where, outside = module.computations[one.calls("calls") or one.calls("to_apply")], one
        one = where.root
    if one is None or one.opcode != "add":
        return 0
    numbers = [_number(body, where, outside, name) for name in one.operands]
    parts = [_part(body, where, outside, name) for name in one.operands]
    for mine, other in ((0, 1), (1, 0)):
        if parts[mine] == place and numbers[other] is not None:
            return numbers[other]
    return 0


def _outer(where: Computation, outside: Instruction | None, name: str) -> str:
    """The name outside a called computation of what is `name` inside it."""
    one = where.get(_source(where, name))
    if outside is None or one is None or one.opcode != "parameter":
        return ""
    return outside.operands[int(one.arguments)]


def _number(body: Computation, where: Computation, outside: Instruction | None, name: str) -> int | None:
    inner = _constant(where, name)
    return inner if inner is not None else _constant(body, _outer(where, outside, name))


def _part(body: Computation, where: Computation, outside: Instruction | None, name: str) -> int | None:
    return _state(body, name if outside is None else _outer(where, outside, name))
