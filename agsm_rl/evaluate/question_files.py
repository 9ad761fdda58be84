"""Benchmarks' published files of prompts and questions, in the form that the suite and the reward `questions` take.

    python -m agsm_rl.evaluate.question_files geneval2 geneval2_data.jsonl prompts.jsonl

Fetch the files from their authors; none is part of this package.

- `geneval2`: geneval2_data.jsonl of facebookresearch/GenEval2 (arXiv 2512.16853).
- `dpg_bench`: dpg_bench.csv of TencentQQGYLab/ELLA (arXiv 2403.05135).
- `unigenbench`: test_prompts_*.csv of CodeGoat24/UniGenBench (arXiv 2508.20751), English or Chinese. Its authors have a
  model judge all test points of a prompt in one written answer; here each test point is a question answered by yes or
  no, so figures are not those of its leaderboard.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from agsm_rl_rewards.question_list import COLUMN

from agsm_rl.errors import UserError, unknown_name
from agsm_rl.files import check_regular, write_text
from agsm_rl.sources.tables import TABLES, read_rows

Row = tuple[str, Mapping[str, Any]]
"""A row's place, for messages, and its columns."""
TEST_POINT = (
    "The picture was generated for the prompt: {prompt}\nDoes it meet the requirement '{point}', namely: "
    "{description}? Answer yes or no."
)


def read_question_file(form: str, file: str | Path, *, where: str = "prompts") -> list[dict[str, Any]]:
    """The rows {"prompt", "questions", …} of a benchmark's published file.

    UserError, with the place, for an unknown form, a missing file, or a row that is not in the published form.
    """
    if form not in FORMS:
        raise unknown_name("form", form, "a form of questions", FORMS)
    path, named = Path(file).expanduser(), f"{where} '{file}'"
    if not path.is_file():
        raise UserError(f"{named}: there is no such file; fetch it from the benchmark's authors ({SOURCES[form]})")
    check_regular(path)
    if path.suffix.lower() not in TABLES:
        raise UserError(f"{named}: a {form} file is a table ({', '.join(TABLES)}); give the file as published")
    rows = read_rows(path, named)
    if not rows:
        raise UserError(f"{named}: it has no rows")
    try:
        return list(FORMS[form](rows))
    except _NotInForm as error:
        raise UserError(f"{named}: {error}; correct it (the form is that of {SOURCES[form]})") from error


class _NotInForm(Exception):
    """What a row lacks, with its place."""


def _geneval2(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    for place, row in rows:
        pairs, skills = _value(row, "vqa_list", list, place), _value(row, "skills", list, place)
        if len(pairs) != len(skills) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            raise _NotInForm(f"{place}: its `vqa_list` does not have one question and answer for each of its `skills`")
        questions = [
            {"question": question, "answer": answer, "category": skill}
            for (question, answer), skill in zip(pairs, skills, strict=True)
        ]
        yield {"prompt": _text(row, "prompt", place), "atom_count": row.get("atom_count"), COLUMN: questions}


def _dpg_bench(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    items: dict[str, list[Row]] = {}
    for place, row in rows:
        items.setdefault(_text(row, "item_id", place), []).append((place, row))
    for name, group in items.items():
        numbers = [_number(row.get("proposition_id"), place) for place, row in group]
        place_of = {number: index for index, number in enumerate(numbers)}
        texts = [str(row.get("text") or "").strip() for _, row in group]
        prompt = next(filter(None, texts), "")
        if not prompt or len(place_of) < len(group):
            raise _NotInForm(f"{group[0][0]}: the item '{name}' has no `text`, or a `proposition_id` twice")
        questions = [_proposition(place, row, place_of) for place, row in group]
        yield {"prompt": prompt, "item_id": name, COLUMN: questions}


def _proposition(place: str, row: Mapping[str, Any], place_of: Mapping[int, int]) -> dict[str, Any]:
    numbers = [_number(part, place) for part in str(row.get("dependency", "")).split(",")]
    parents = [number for number in numbers if number]
    for parent in parents:
        if parent not in place_of:
            raise _NotInForm(f"{place}: its `dependency` names {parent}, which is not a proposition of its item")
    # As its authors do, the category is what `tuple` has before its parenthesis: "entity - whole (crate)".
    return {
        "question": _text(row, "question_natural_language", place),
        "category": _text(row, "tuple", place).partition("(")[0].strip(),
        "requires": [place_of[parent] for parent in parents],
    }


def _unigenbench(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    for place, row in rows:
        language = next((name for name in ("en", "zh") if f"prompt_{name}" in row), None)
        if language is None:
            raise _NotInForm(f"{place}: it has no column `prompt_en` or `prompt_zh`")
        prompt = _text(row, f"prompt_{language}", place)
        try:
            content = json.loads(_text(row, f"sub_dims_{language}", place))
        except (ValueError, RecursionError) as error:
            raise _NotInForm(f"{place}: its `sub_dims_{language}` is not JSON ({error})") from error
        keys = ("Testpoints", "Testpoint Description") if language == "en" else ("考点", "考点对应描述")
        points, descriptions = (_value(content, key, list, place) for key in keys)
        if len(points) != len(descriptions):
            raise _NotInForm(f"{place}: it has {len(points)} test points, but {len(descriptions)} descriptions")
        questions = [
            {"question": TEST_POINT.format(prompt=prompt, point=point, description=description), "category": point}
            for point, description in zip(points, descriptions, strict=True)
        ]
        yield {"prompt": prompt, "index": row.get("index"), COLUMN: questions}


def _value(row: Any, key: str, kind: type, place: str) -> Any:
    value = row.get(key) if isinstance(row, Mapping) else None
    if not isinstance(value, kind) or not value:
        raise _NotInForm(f"{place}: it has no `{key}`")
    return value


def _text(row: Mapping[str, Any], key: str, place: str) -> str:
    return str(_value(row, key, str, place)).strip()


def _number(value: Any, place: str) -> int:
    try:
        return int(str(value).strip())
    except ValueError as error:
        raise _NotInForm(f"{place}: '{value}' is not a proposition's number") from error


FORMS: dict[str, Callable[[Sequence[Row]], Iterator[dict[str, Any]]]] = {
    "geneval2": _geneval2,
    "dpg_bench": _dpg_bench,
    "unigenbench": _unigenbench,
}
SOURCES = {
    "geneval2": "github.com/facebookresearch/GenEval2",
    "dpg_bench": "github.com/TencentQQGYLab/ELLA",
    "unigenbench": "github.com/CodeGoat24/UniGenBench",
}


def main(arguments: Sequence[str]) -> int:
    """Convert a file; the exit code, 2 after a mistake of the user's."""
    if len(arguments) != 3:
        print("usage: python -m agsm_rl.evaluate.question_files FORM FILE OUT.jsonl", file=sys.stderr)
        print(f"FORM: {', '.join(FORMS)}", file=sys.stderr)
        return 2
    form, file, out = arguments
    try:
        rows = read_question_file(form, file, where="FILE")
        write_text(Path(out), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    except UserError as error:
        print(f"agsm-rl: {error}", file=sys.stderr)
        return 2
    print(f"{out}: {len(rows)} prompts, {sum(len(row[COLUMN]) for row in rows)} questions")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
