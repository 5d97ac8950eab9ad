"""Reads compiled kernels: registers, spills, and what the loops of a binary execute.

The disassembler comes with Triton. An instruction of one loop, times the warps that execute it,
over the scores of its tile, is what a GPU issues for a score: kernels of this package are bound by
that and by the tensor cores. wgmma is HGMMA in a binary, its wait WARPGROUP.DEPBAR.
"""

import json
import re
import subprocess
from collections import deque
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, NamedTuple

import triton

TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", re.MULTILINE)
JUMP = re.compile(r"\bBRA(?:\.\S+)?\s+(?:!?U?P\d+,\s+)?(?:`?\(?)?0x([0-9a-f]+)")
UNDER_PREDICATE = re.compile(r"\bBRA(?:\.\S+)?\s+!?U?P\d")
WGMMA = re.compile(r"\bHGMMA\.(\d+)x(\d+)x\d+")
LOCAL = re.compile(r"\b(?:LDL|STL)\b")


class Loop(NamedTuple):
    """Instructions of the shortest way through an innermost loop with tensor core products.

    Tiles that need no mask go this way: they jump over the mask.
    """

    instructions: list[str]

    def count(self, pattern: str | re.Pattern[str]) -> int:
        """Return the number of instructions in which the pattern is found."""
        return sum(re.search(pattern, one) is not None for one in self.instructions)

    @property
    def shapes(self) -> set[tuple[int, int]]:
        """Return (rows, columns) of every wgmma."""
        found = (WGMMA.search(one) for one in self.instructions)
        return {(int(one[1]), int(one[2])) for one in found if one}

    @property
    def products(self) -> int:
        """Return the number of products: runs of wgmma that one group of warps commits at once."""
        return self.count(r"\bHGMMA\b.*gsb0")

    @property
    def waits(self) -> int:
        """Return how often the loop waits for wgmma."""
        return self.count(r"WARPGROUP\.DEPBAR")

    @property
    def local(self) -> int:
        """Return the number of loads and stores of spilled registers."""
        return self.count(LOCAL)

    @property
    def covered(self) -> float:
        """Return the share of instructions issued while a wgmma runs.

        The loop is walked twice, as a product may run from one step into the next.
        """
        flying, covered = False, 0
        for number, one in enumerate(self.instructions * 2):
            flying = (flying or "HGMMA" in one) and "WARPGROUP.DEPBAR" not in one
            covered += flying and number >= len(self.instructions)
        return covered / len(self.instructions)


class MachineCode:
    """The binary of a kernel that `compiling.compiled_for` made."""

    def __init__(self, compiled: Any) -> None:
        self.name = compiled.metadata.name
        self.threads = 32 * compiled.metadata.num_warps
        self._binary = compiled.asm["cubin"]
        self._source = compiled.src
        # Bytes of shared memory of a block.
        self.shared = compiled.metadata.shared

    def _read(self, option: str) -> str:
        with NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self._binary)
            file.flush()
            command = [str(TOOL), option, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    @cached_property
    def _usage(self) -> dict[str, int]:
        return {k: int(v) for k, v in re.findall(r"(REG|STACK):(\d+)", self._read("-res-usage"))}

    @property
    def registers(self) -> int:
        """Return the number of registers of a thread."""
        return self._usage["REG"]

    @property
    def stack(self) -> int:
        """Return the bytes of spilled registers of a thread."""
        return self._usage["STACK"]

    @cached_property
    def loops(self) -> list[Loop]:
        """Return the innermost loops with wgmma, in the order of the binary."""
        code = [(int(at, 16), text) for at, text in INSTRUCTION.findall(self._read("-sass"))]
        place = {at: i for i, (at, _) in enumerate(code)}
        jumps = [JUMP.search(text) for _, text in code]
        targets = [place.get(int(jump[1], 16)) if jump else None for jump in jumps]
        spans = sorted((to, i) for i, to in enumerate(targets) if to is not None and to < i)
        ways = [(span, _shortest_way(code, targets, *span)) for span in spans]
        loops = {span: Loop([code[i][1] for i in way]) for span, way in ways}
        found = [span for span, body in loops.items() if body.shapes]
        return [
            loops[first, last]
            for first, last in found
            if not any(first <= a and b <= last for a, b in found if (a, b) != (first, last))
        ]

    @property
    def whole_tiles(self) -> Loop:
        """Return the loop over tiles that need no mask: the one with the fewest instructions.

        Landmark attention has two kinds of tile: those of past blocks have more exponentials.
        """
        return min(self.loops, key=lambda loop: (-loop.count(r"\bMUFU\b"), len(loop.instructions)))

    def block(self, name: str) -> int:
        """Return a constant of the kernel, such as BLOCK_M."""
        return self._source.constants[(self._source.fn.arg_names.index(name),)]

    def per_score(self, loop: Loop) -> float:
        """Return instructions of a thread for each score of its share of a tile."""
        scores = self.block("BLOCK_M") * self.block("BLOCK_N")
        return len(loop.instructions) * self.threads / scores


def _shortest_way(
    code: list[tuple[int, str]], targets: list[int | None], first: int, last: int
) -> list[int]:
    """Return the numbers of the fewest instructions from `first` to `last`; none if it is no way.

    code: address and text of instructions. targets: what each one jumps to.
    """
    before = {first: first}
    ends = deque([first])
    while ends and last not in before:
        at = ends.popleft()
        text = code[at][1]
        # A jump under a predicate, such as "@P0 BRA 0x80" or "BRA P0, 0x80", may be passed by.
        ends_here = targets[at] is not None or text.startswith("EXIT")
        passed = not ends_here or text.startswith("@") or bool(UNDER_PREDICATE.search(text))
        for to in (targets[at], at + 1 if passed else None):
            if to is not None and to < len(code) and to not in before:
                before[to] = at
                ends.append(to)
    if last not in before:
        return []
    way = [last]
    while way[-1] != first:
        way.append(before[way[-1]])
    return way[::-1]


def report(made: Iterable[Any]) -> None:
    """Print a line of JSON about the loop over whole tiles of each compiled kernel."""
    for code in map(MachineCode, made):
        loop = code.whole_tiles
        facts = {
            "name": code.name,
            "registers": code.registers,
            "stack": code.stack,
            "shared": code.shared,
            "instructions": round(code.per_score(loop), 2),
            "products": loop.products,
            "waits": loop.waits,
            "local": loop.local,
            "covered": round(loop.covered, 2),
            "shapes": sorted(set().union(*(each.shapes for each in code.loops))),
            "block_m": code.block("BLOCK_M"),
            "block_n": code.block("BLOCK_N"),
        }
        print(json.dumps(facts))
