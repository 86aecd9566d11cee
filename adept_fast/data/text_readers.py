"""Split .txt and .md files into documents.

    .txt   split at blank lines; without any, one document per file if the source has several files, else a document per 20 lines, so that
           some can be held out
    .md    one document per file if the source has several files, else split at headings
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice

from adept_fast.data.file_readers import FileReader, opened, undecodable
from adept_fast.data.sources import Record
from adept_fast.errors import InputError

LINES_PER_PIECE = 20  # per document of a text without blank lines
HEADING, FENCE = re.compile(r"#{1,6}(\s|$)"), re.compile(r" {0,3}(?:```|~~~)")

Part = tuple[list[str], int]
"""Lines of one document, and the offset behind it."""


class Paragraphs(FileReader):
    """Documents of a .txt."""

    def records(self) -> Iterator[Record]:
        number = self.position["record"]
        for lines, behind in self._parts():
            number += 1
            self.position = {"byte": behind, "record": number}
            yield self._record({"text": "".join(lines).strip("\n")}, f"{self.path} document {number}")
        if not number and not self.alone:  # an empty file among others is an empty document, and counted as one
            self.position = {"byte": 0, "record": 1}
            yield self._record({"text": ""}, str(self.path))

    def _parts(self) -> Iterator[Part]:
        if self._blank_lines_part():
            return self._paragraphs(None)
        return self._paragraphs(LINES_PER_PIECE) if self.alone else self._whole()

    def _paragraphs(self, longest: int | None) -> Iterator[Part]:
        """Split at blank lines, and after `longest` lines."""
        lines, behind = [], 0
        for line, behind in self._decoded():
            if line.strip():
                lines.append(line)
            if lines and (len(lines) == longest or not line.strip()):
                yield lines, behind
                lines = []
        if lines:
            yield lines, behind

    def _whole(self) -> Iterator[Part]:
        if not self.position["record"]:
            decoded = [*self._decoded()]
            if any(line.strip() for line, _ in decoded):
                yield [line for line, _ in decoded], decoded[-1][1]

    def _blank_lines_part(self) -> bool:
        """Whether there is a blank line between two others."""
        begun = ended = False
        for line, _ in self._from_the_start():
            blank = not line.strip()
            if ended and not blank:
                return True
            begun, ended = begun or not blank, begun and blank
        return False

    def _from_the_start(self) -> Iterator[tuple[str, int]]:
        here, self.position = self.position, {"byte": 0, "record": 0}
        try:
            yield from self._decoded()
        finally:
            self.position = here

    def _decoded(self) -> Iterator[tuple[str, int]]:
        behind = self.position["byte"]
        for line, offset in self._lines():
            try:
                yield line.decode("utf-8").replace("\r\n", "\n"), offset
            except UnicodeDecodeError as error:
                raise InputError(f"{self.path}:{self._line_at(behind)}: {undecodable(line, error)}") from None
            behind = offset

    def _line_at(self, offset: int) -> int:
        """Return the number of the line at an offset."""
        at = 0
        with opened(self.path) as file:
            return 1 + next((number for number, line in enumerate(file) if (at := at + len(line)) > offset), 0)


class Markdown(Paragraphs):
    """Documents of a .md."""

    def _parts(self) -> Iterator[Part]:
        if not self.alone:
            return self._whole()
        headings = (1 for _, _, heading in self._with_headings(self._from_the_start()) if heading)
        return self._sections() if len(list(islice(headings, 2))) == 2 else super()._parts()

    def _sections(self) -> Iterator[Part]:
        """Split at headings. Text before the first heading is a section too."""
        lines: list[str] = []
        behind = self.position["byte"]
        for line, offset, heading in self._with_headings(self._decoded()):
            if heading and any(line.strip() for line in lines):
                yield lines, behind
                lines = []
            lines.append(line)
            behind = offset
        if any(line.strip() for line in lines):
            yield lines, behind

    @staticmethod
    def _with_headings(lines: Iterator[tuple[str, int]]) -> Iterator[tuple[str, int, bool]]:
        """Yield each line, its offset, and whether it is a heading; inside a fenced code block none is."""
        fence = ""
        for line, offset in lines:
            if mark := FENCE.match(line):
                found = mark.group().strip()
                fence = "" if fence == found else fence or found
            yield line, offset, not fence and bool(HEADING.match(line))
