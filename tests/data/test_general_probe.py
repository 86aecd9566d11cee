"""The bundled general probe: its form, its spread over subjects and languages, and its arithmetic."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from fractions import Fraction
from importlib.resources import files
from statistics import median

import pytest

Item = dict[str, str]

KEYS = ["instruction", "output", "subject", "language"]
SCRIPTS = {"zh": r"[\u4e00-\u9fff]", "ja": r"[\u3040-\u30ff]", "ru": r"[\u0400-\u04ff]", "ar": r"[\u0600-\u06ff]", "hi": r"[\u0900-\u097f]"}
UNSPACED = {"zh", "ja"}
OPTION = re.compile(r"^([A-D]\. .+)$", re.MULTILINE)
NUMBER = r"-?\d+(?:\.\d+)?"
OPERATIONS: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "×": lambda a, b: a * b,
    "÷": lambda a, b: a / b,
    "//": lambda a, b: Fraction(a // b),
}


def numbers(text: str) -> list[Fraction]:
    return [Fraction(found) for found in re.findall(NUMBER, text)]


def linear_root(a: str, b: str, c: str) -> Fraction:
    return (Fraction(c) - Fraction(b)) / Fraction(a)


# The first number of the answer is the result, except for "Solve for x", where it follows "x = ".
RULES: list[tuple[str, Callable[..., Fraction]]] = [
    (
        rf"(?:What is|what does|Wie viel ist) ({NUMBER}) (\+|-|×|÷|//) ({NUMBER})(?: evaluate to)?\?",
        lambda a, sign, b: OPERATIONS[sign](Fraction(a), Fraction(b)),
    ),
    (rf"What is ({NUMBER})% of ({NUMBER})\?", lambda share, whole: Fraction(share) * Fraction(whole) / 100),
    (r"remainder when (\d+) is divided by (\d+)\?", lambda a, b: Fraction(int(a) % int(b))),
    (r"What is the mean of ([\d, and]+)\?", lambda listed: sum(numbers(listed), Fraction()) / len(numbers(listed))),
    (r"What is the median of ([\d, and]+)\?", lambda listed: median(numbers(listed))),
    (r"decimal number is written ([01]+) in binary\?", lambda bits: Fraction(int(bits, 2))),
    (r"Solve for x: (\d+)x \+ (\d+) = (\d+)\.", linear_root),
]


def recomputed(instruction: str) -> Fraction | None:
    """The result that the instruction asks for, or None where no rule reads it."""
    for pattern, result in RULES:
        if match := re.search(pattern, instruction):
            return result(*match.groups())
    return None


def stated(output: str) -> Fraction:
    return numbers(output.split("x = ")[-1])[0]


@pytest.fixture(scope="module")
def text() -> str:
    return (files("adept_fast") / "data" / "general_probe.jsonl").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def items(text: str) -> list[Item]:
    return [json.loads(line) for line in text.splitlines()]


def test_each_line_is_one_object_with_the_four_keys_in_order(text: str) -> None:
    assert text.endswith("}\n") and not text.startswith("\ufeff")
    for number, line in enumerate(text.split("\n")[:-1], 1):
        item = json.loads(line)
        assert list(item) == KEYS, f"line {number}: keys {list(item)}"
        assert all(isinstance(value, str) and value.strip() for value in item.values()), f"line {number}: an empty value"
        assert line == json.dumps(item, ensure_ascii=False), f"line {number}: escaped or otherwise not canonical"


def test_size_and_spread(items: list[Item]) -> None:
    assert 190 <= len(items) <= 230
    subjects = [item["subject"] for item in items]
    assert len(set(subjects)) >= 20
    assert max(map(subjects.count, set(subjects))) <= len(items) / 10, "one subject dominates"
    foreign = [item["language"] for item in items if item["language"] != "en"]
    assert len(foreign) >= 0.1 * len(items)
    assert len(set(foreign)) >= 8


def test_no_instruction_twice(items: list[Item]) -> None:
    bare = [" ".join(item["instruction"].split()).casefold() for item in items]
    assert sorted(set(bare)) == sorted(bare)


def test_instruction_is_short_and_ends_with_its_cue(items: list[Item]) -> None:
    for item in items:
        assert len(item["instruction"]) <= 400, item
        cue = item["instruction"].rsplit("\n", 1)
        assert len(cue) == 2 and re.fullmatch(r"[^\s:：]+ ?[:：]", cue[1]), item


def test_output_is_one_short_statement(items: list[Item]) -> None:
    for item in items:
        output = item["output"]
        assert re.fullmatch(r" \S(?:.*\S)?", output), item
        assert len(output) <= 120, item
        assert output not in item["instruction"], item
        if item["language"] not in UNSPACED:
            assert 3 <= len(output.split()) <= 15, item


def test_multiple_choice_answers_are_one_of_four_options(items: list[Item]) -> None:
    letters = []
    for item in items:
        options = OPTION.findall(item["instruction"])
        if not options:
            assert output_is_free(item), item
            continue
        assert [option[0] for option in options] == list("ABCD"), item
        assert len({option[3:] for option in options}) == 4, item
        assert item["output"][1:] in options, item
        letters.append(item["output"][1])
    assert set(letters) == set("ABCD")
    assert max(map(letters.count, letters)) <= len(letters) / 2, "one letter is right too often"


def output_is_free(item: Item) -> bool:
    """Where no options are listed, the answer must not be readable in the question."""
    return not re.match(r" [A-D]\. ", item["output"]) and item["output"].strip() not in item["instruction"]


def test_language_tag_matches_the_script(items: list[Item]) -> None:
    for item in items:
        for language, letters in SCRIPTS.items():
            expected = item["language"] == language or (language, item["language"]) == ("zh", "ja")
            for key in ("instruction", "output"):
                assert bool(re.search(letters, item[key])) == expected, (language, item)


def test_arithmetic_is_right(items: list[Item]) -> None:
    checked = 0
    for item in items:
        expected = recomputed(item["instruction"])
        if expected is not None:
            assert stated(item["output"]) == expected, item
            checked += 1
    assert checked >= 10, "the rules no longer read the arithmetic items"


def test_products_worked_out_in_answers_are_right(items: list[Item]) -> None:
    worked = [match for item in items for match in re.findall(r"(\d+) × (\d+) = (\d+)", item["output"])]
    assert len(worked) >= 3
    for a, b, product in worked:
        assert int(a) * int(b) == int(product)


@pytest.mark.parametrize(
    ("instruction", "result"),
    [
        ("What is 47 + 86?", 133),
        ("What is 7 ÷ 2?", Fraction(7, 2)),
        ("what does 17 // 5 evaluate to?", 3),
        ("What is 12.5% of 80?", 10),
        ("What is the remainder when 100 is divided by 7?", 2),
        ("What is the median of 12, 3, 7, 20 and 8?", 8),
        ("What is the mean of 3, 8, 10 and 16?", Fraction(37, 4)),
        ("Solve for x: 3x + 7 = 23.", Fraction(16, 3)),
        ("What is the capital of Australia?", None),
    ],
)
def test_recomputation_itself(instruction: str, result: Fraction | int | None) -> None:
    assert recomputed(instruction) == result
