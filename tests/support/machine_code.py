"""Count the instructions of loops in NVIDIA machine code, as cuobjdump -sass prints it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
ENDS = ("EXIT", "RET", "BRX", "JMX")


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str | None
    name: str
    operands: str

    @property
    def target(self) -> int | None:
        """The address that a branch goes to."""
        found = re.search(r"0x([0-9a-f]+)$", self.operands) if self.name.startswith("BRA") else None
        return None if found is None else int(found[1], 16)

    @property
    def is_conditional(self) -> bool:
        return self.predicate is not None or self.name == "BRA.DIV" or bool(re.match(r"!?U?P\w+,", self.operands))


def functions(sass: str) -> dict[tuple[str, str], list[Instruction]]:
    """Return the instructions of each function by its architecture and mangled name."""
    found = {}
    for section in re.split(r"(?=code for sm_)", sass):
        architecture = re.match(r"code for (\w+)", section)
        parts = re.split(r"Function : (\S+)", section)
        for name, text in zip(parts[1::2], parts[2::2], strict=True):
            assert architecture is not None
            found[architecture[1], name] = [Instruction(int(at, 16), given or None, op, rest) for at, given, op, rest in LINE.findall(text)]
    return found


def loops(code: Sequence[Instruction], choose: Callable[..., int] = max) -> list[list[Instruction]]:
    """Return the longest (choose: max) or shortest (min) way around each innermost loop that calls no subroutine.

    The slow ways of square roots and divisions are subroutines: infinities, denormals and zeros take them.
    """
    at = {instruction.address: i for i, instruction in enumerate(code)}
    backward = [(at[t], i) for i, each in enumerate(code) if (t := each.target) is not None and t in at and at[t] < i]
    innermost = [(a, b) for a, b in backward if not any(a <= c and d < b and (c, d) != (a, b) for c, d in backward)]
    return [way for first, last in innermost if (way := _way(code, at, first, last, choose))]


def _way(code: Sequence[Instruction], at: dict[int, int], first: int, last: int, choose: Callable[..., int]) -> list[Instruction]:
    lengths, following = {last: 1}, {last: last}  # of the way to the end of the loop, by index
    for i in range(last - 1, first - 1, -1):
        instruction = code[i]
        if instruction.name.startswith(("CALL", *ENDS)) and instruction.predicate is None:
            continue
        target = None if instruction.target is None else at.get(instruction.target)
        nexts = [i + 1] if target is None or instruction.is_conditional else []
        nexts = [each for each in (*nexts, target) if each is not None and i < each and each in lengths]
        if nexts:
            following[i] = choose(nexts, key=lengths.__getitem__)
            lengths[i] = 1 + lengths[following[i]]
    if first not in lengths:
        return []
    way, i = [code[first]], first
    while i != last:
        i = following[i]
        way.append(code[i])
    return way
