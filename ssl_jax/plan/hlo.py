"""Parses compiled programs (`compiled.as_text()`): collectives, memory traffic, cycles.

Instructions in a loop count for every iteration, if the loop is annotated with its trip count or
counts from 0 to a constant, as JAX's loops do. Of a conditional's branches, the one with the most
collectives counts.
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Iterable

_KINDS = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "u64": 8}
_BYTES |= {"f64": 8, "c64": 8}  # all others: 4
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(r"(?:body|calls|to_apply|async_execution)=%?([\w.\-]+)")
# Operations without memory traffic: names, and the ends of operations counted at their start.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"}
_FREE |= {"call", "async-start", "after-all", "optimization-barrier", "partition-id", "replica-id"}
# Name scopes of `step.py`.
_PARTS = ("augment", "optimizer", "update", "loss", "forward")


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shapes: str  # of the results
    op: str
    rest: str  # operands and attributes
    times: int

    @property
    def operands(self) -> list[str]:
        return _operands(self.rest)

    @property
    def op_name(self) -> str:
        where = re.search(r'op_name="([^"]*)"', self.rest)
        return where[1] if where else ""


@dataclasses.dataclass(frozen=True)
class Collectives:
    """All collectives of one kind in a step.

    Attributes:
      kind: XLA's name, such as "all-reduce".
      count: Number of executions.
      bytes: Total size of the results on one device.
    """

    kind: str
    count: int
    bytes: int


class CompiledText:
    """A compiled program, parsed from its text."""

    def __init__(self, text: str) -> None:
        self._bodies: dict[str, list[str]] = {}
        self._entry, current = "", ""
        for line in text.splitlines():
            head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
            if head and not line.startswith(" "):
                current = head[2]
                self._bodies[current] = []
                self._entry = current if head[1] else self._entry
            elif current:
                self._bodies[current].append(line)

    @functools.cache  # noqa: B019 - instances are short-lived
    def _parsed(self, name: str) -> list[tuple[str, str, str, str]]:
        matches = (_INSTRUCTION.match(line) for line in self._bodies.get(name, ()))
        return [match.groups() for match in matches if match]  # type: ignore[misc]

    def _run(self, name: str, times: int, fused: bool) -> list[_Instruction]:
        """Returns all instructions that a computation executes; those in fusions if `fused`."""
        done = []
        for parts in self._parsed(name):
            instruction = _Instruction(*parts, times)
            done.append(instruction)
            op, rest = instruction.op, instruction.rest
            if op == "fusion" and not fused:
                continue
            inside = times * self._trips(rest) if op == "while" else times
            for called in _CALLED.findall(rest):
                done += self._run(called, inside, fused)
            names = re.search(r"branch_computations=\{(.*?)\}", rest)
            branches = names[1].replace("%", "").split(", ") if names else []
            branches += re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", rest)
            ran = [self._run(branch, times, fused) for branch in branches]
            done += max(ran, key=_collective_count, default=[])
        return done

    def _trips(self, loop: str) -> int:
        """Returns a loop's trip count, from its annotation or from its condition."""
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop):
            return int(known[1])
        condition = re.search(r"condition=%?([\w.\-]+)", loop)
        body = self._parsed(condition[1]) if condition else []
        numbers = {
            name: int(rest.split(")")[0])
            for name, shape, op, rest in body
            if op == "constant" and re.match(r"[su]\d+\[\]", shape)
        }
        for _, _, op, rest in body:
            if op == "compare" and "direction=LT" in rest:
                return numbers.get(_operands(rest)[-1], 1)
        return 1

    def collectives(self) -> list[Collectives]:
        """Returns the collectives by kind."""
        found: dict[str, list[int]] = {}
        chains: set[str] = set()
        for instruction in self._run(self._entry, 1, fused=True):
            kind = instruction.op.removesuffix("-start")
            if kind not in _KINDS:
                continue
            # On a TPU, one collective may be split over the computations that it overlaps with.
            chain = re.search(r'chain_id="(\d+)"', instruction.rest)
            if chain and chain[1] in chains:
                continue
            chains.update(chain.groups() if chain else ())
            arrays = _ARRAY.findall(instruction.shapes)
            if kind != instruction.op and kind == "all-gather" and len(arrays) % 2 == 0:
                arrays = arrays[len(arrays) // 2 :]  # operands, then results
            elif kind != instruction.op and kind == "collective-permute":
                arrays = arrays[1:2]  # operand, result, contexts
            total = found.setdefault(kind, [0, 0])
            total[0] += instruction.times
            total[1] += instruction.times * sum(map(_size, arrays))
        return [Collectives(kind, *found[kind]) for kind in _KINDS if kind in found]

    def traffic(self) -> int:
        """Returns the bytes between a TPU chip and its memory; arrays kept on the chip are free.

        Every instruction reads its operands and writes its results; a fusion that only slices an
        operand reads the slices.
        """
        total, sizes = 0, {}
        for instruction in self._run(self._entry, 1, fused=False):
            arrays = _ARRAY.findall(instruction.shapes)
            sizes[instruction.name] = sum(_size(a) for a in arrays if not _on_chip(a))
            op = instruction.op
            if op in _FREE or op.endswith(("-done", "-update")):
                continue
            if op in ("copy-start", "slice-start") and len(arrays) > 1:
                # Copies the second to the first; an end counts if it is in memory.
                moved = min(_size(arrays[0]), _size(arrays[1]))
                ends = sum(not _on_chip(array) for array in arrays[:2])
                total += instruction.times * moved * ends
                continue
            read = self._reads(instruction, sizes)
            total += instruction.times * (read + self._writes(instruction, sizes))
        return total

    def _reads(self, instruction: _Instruction, sizes: dict[str, int]) -> int:
        whole = [sizes.get(name, 0) for name in instruction.operands]
        if instruction.op in ("dynamic-slice", "gather"):
            return min(sizes[instruction.name] or whole[0], whole[0])
        if instruction.op == "dynamic-update-slice":
            return whole[1]
        if instruction.op != "fusion":
            return sum(whole)
        limits = self._sliced(_CALLED.findall(instruction.rest)[0])
        return sum(min(size, limits.get(i, size)) for i, size in enumerate(whole))

    def _writes(self, instruction: _Instruction, sizes: dict[str, int]) -> int:
        if instruction.op == "dynamic-update-slice":
            return sizes.get(instruction.operands[1], 0)
        if instruction.op == "fusion":
            body = self._parsed(_CALLED.findall(instruction.rest)[0])
            _, _, op, rest = body[-1]
            if op == "dynamic-update-slice":
                return min(sizes[instruction.name], self._of_body(body, _operands(rest)[1]))
        return sizes[instruction.name]

    def _of_body(self, body: list[tuple[str, str, str, str]], name: str) -> int:
        found = [shapes for each, shapes, _, _ in body if each == name]
        return sum(map(_size, _ARRAY.findall(found[0]))) if found else 0

    @functools.cache  # noqa: B019
    def _sliced(self, name: str) -> dict[int, int]:
        """Returns the bytes read from those operands of a fusion that it only slices."""
        body = self._parsed(name)
        numbers = {each: int(rest.split(")")[0]) for each, _, op, rest in body if op == "parameter"}
        taken: Counter[str] = Counter()
        whole = set()
        for _, shapes, op, rest in body:
            operands = _operands(rest)
            for position, operand in enumerate(operands):
                if operand not in numbers:
                    continue
                if op in ("dynamic-slice", "slice", "gather") and position == 0:
                    taken[operand] += sum(map(_size, _ARRAY.findall(shapes)))
                elif op == "dynamic-update-slice" and position == 0:
                    taken[operand] += 0  # written in place
                else:
                    whole.add(operand)
        return {numbers[name]: taken[name] for name in taken if name not in whole}

    def cycles(self) -> dict[str, int]:
        """Returns the TPU compiler's estimate of cycles by part of the step; {} for others."""
        found: Counter[str] = Counter()
        for instruction in self._run(self._entry, 1, fused=False):
            estimate = re.search(r'"estimated_cycles":"(\d+)"', instruction.rest)
            if estimate and instruction.op not in ("while", "conditional", "call"):
                found[part_of(instruction.op_name)] += instruction.times * int(estimate[1])
        return dict(found)

    def float32_arrays(self, min_bytes: int) -> list[tuple[str, str]]:
        """Returns large float32 results in memory: shape, and name stack of the operation.

        Args:
          min_bytes: Size from which an array is listed.
        """
        found: dict[tuple[str, str], None] = {}
        for instruction in self._run(self._entry, 1, fused=False):
            if instruction.op in _FREE or instruction.op.endswith("-done"):
                continue
            for array in _ARRAY.findall(instruction.shapes):
                if array[0] == "f32" and _size(array) >= min_bytes and not _on_chip(array):
                    found[f"f32[{array[1]}]", instruction.op_name] = None
        return list(found)


def part_of(op_name: str) -> str:
    """Returns the part of the train step to which an operation belongs.

    Args:
      op_name: The name stack in the operation's metadata.

    Returns:
      "augment", "forward", "backward", "loss", "optimizer", "update" or "other".
    """
    for part in _PARTS:
        if re.search(rf"\b{part}\b", op_name):
            return "backward" if part == "forward" and "transpose(" in op_name else part
    return "other"


def _operands(rest: str) -> list[str]:
    return re.findall(r"%([\w.\-]+)", rest.split("), ")[0])


def _size(array: tuple[str, str, str]) -> int:
    kind, dimensions, _ = array
    return _BYTES.get(kind, 4) * math.prod(int(d) for d in dimensions.split(",") if d)


def _on_chip(array: tuple[str, str, str]) -> bool:
    return "S(" in array[2] and "S(0)" not in array[2]


def _collective_count(instructions: Iterable[_Instruction]) -> int:
    return sum(i.times for i in instructions if i.op.removesuffix("-start") in _KINDS)
