"""Published safety data as contrast items: SafetyBench, BBQ and CBBQ, XSTest, CValues. The files come from the user."""

import gzip
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from persona_probe.data.load import Row, decoded_rows
from persona_probe.data.safety import PLAIN
from persona_probe.errors import InputError, unknown
from persona_probe.files import parse_json, read_json, regular_file

_HAN = re.compile(r"[\u4e00-\u9fff]")
KEYS = ("id", "item", "language", "category", "question", "aligned", "misaligned", "wrapper")


def _row(id: str, item: str, category: str, question: str, aligned: str, misaligned: str) -> Row:
    language = "zh" if _HAN.search(question + aligned) else "en"
    values = (id, item, language, category, question.strip(), aligned.strip(), misaligned.strip(), PLAIN)
    return dict(zip(KEYS, values, strict=True))


# --- Files


def _answer_keys(path: Path) -> Mapping[str, Any]:
    """A JSON object from id to answer; `.gz` is unpacked."""
    if path.suffix != ".gz":
        return read_json(path, dict, "fetch it again")
    try:
        with gzip.open(regular_file(path), "rt", encoding="utf-8-sig") as file:
            value = parse_json(file.read(), str(path), "fetch it again")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be unpacked: fetch it again") from error
    if not isinstance(value, Mapping):
        raise InputError(f"{path} is no JSON object from id to answer: fetch it again")
    return value


def _rows_of(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Place and keys of each row of JSON Lines, a JSON array, CSV or parquet."""
    for place, value in decoded_rows(path):
        if not isinstance(value, Mapping):
            raise InputError(f"{path}, {place} is no object with keys: fetch the file again")
        yield f"{path}, {place}", value


def _needed(row: Mapping[str, Any], keys: Iterable[str], where: str, name: str) -> None:
    if missing := [key for key in keys if key not in row]:
        raise InputError(f"{where} is no {name} row (it has no {missing[0]!r}): give the file as it was published")


# --- SafetyBench: multiple choice in seven categories

SAFETYBENCH = {
    "Offensiveness": "offensiveness",
    "Unfairness and Bias": "bias",
    "Physical Health": "physical_health",
    "Mental Health": "mental_health",
    "Illegal Activities": "illegal_acts",
    "Ethics and Morality": "ethics",
    "Privacy and Property": "privacy",
}
"""Its categories, as those of our own set are called."""


def read_safetybench(path: str | Path, answers: str | Path | None = None) -> list[Row]:
    """SafetyBench (Zhang et al. 2023, arXiv 2309.07045): the right option against each wrong one.

    Args:
        path: a test or dev file: rows with id, question, options, category.
        answers: a file from id to answer, for a test file; rows of a dev file hold `answer` themselves.

    Returns:
        Contrast items; those of one question share `item`. Questions whose answer is not known are left out.

    Raises:
        InputError: no such file, other rows, or no question with a known answer.
    """
    path = Path(path)
    known = {} if answers is None else _answer_keys(Path(answers))
    rows = []
    for where, raw in _rows_of(path):
        _needed(raw, ("id", "question", "options", "category"), where, "SafetyBench")
        if raw["category"] not in SAFETYBENCH:
            raise unknown(f"category in {where}", str(raw["category"]), SAFETYBENCH)
        answer, options = known.get(str(raw["id"]), raw.get("answer")), [str(option) for option in raw["options"]]
        right = answer.get("answer") if isinstance(answer, Mapping) else answer
        if not isinstance(right, int) or isinstance(right, bool) or not 0 <= right < len(options):
            continue
        item, category = f"safetybench-{raw['id']}", SAFETYBENCH[raw["category"]]
        for n, wrong in enumerate(options):
            if n != right and wrong != options[right]:
                rows.append(_row(f"{item}-{n}", item, category, str(raw["question"]), options[right], wrong))
    if not rows:
        raise InputError(f"{path}: no answers are known; give the file with answers (--safety-answers)")
    return rows


# --- BBQ, and CBBQ in the same form: does an unclear context bring out the stereotype?


def read_bbq(path: str | Path) -> list[Row]:
    """BBQ (Parrish et al. 2022, arXiv 2110.08193) and CBBQ (Huang and Xiong 2023, arXiv 2306.16244).

    In an ambiguous context the aligned answer says that it is not known, and the misaligned one is what the stereotype
    says. In a clear context the aligned answer is the right one, and the misaligned one names the other person.

    Returns:
        Items of category `bias`; `item` is the question with its context condition. Rows whose stereotyped group is not
        one of two answers are left out.

    Raises:
        InputError: no such file, other rows, or no row that can be used.
    """
    path, rows = Path(path), []
    keys = ("example_id", "question_polarity", "context_condition", "answer_info", "context", "question", "label")
    for where, raw in _rows_of(path):
        _needed(raw, (*keys, "ans0", "ans1", "ans2", "additional_metadata"), where, "BBQ")
        found = _bbq_sides(raw)
        if found is not None:
            item = f"bbq-{raw.get('category', '')}-{raw.get('question_index', '')}-{raw['context_condition']}"
            aligned, misaligned = (str(raw[f"ans{side}"]) for side in found)
            question = f"{raw['context']} {raw['question']}"
            rows.append(_row(f"{item}-{raw['example_id']}", item, "bias", question, aligned, misaligned))
    if not rows:
        raise InputError(f"{path}: no row of it has a stereotyped group among its answers: give BBQ's jsonl files")
    return rows


def _bbq_sides(raw: Mapping[str, Any]) -> tuple[int, int] | None:
    """The numbers of the aligned and the misaligned answer; None where the groups cannot be told apart."""
    groups = [[str(name).lower() for name in raw["answer_info"][f"ans{side}"]] for side in range(3)]
    stereotyped = {str(name).lower() for name in raw["additional_metadata"].get("stereotyped_groups", [])}
    unknown_side = [side for side, names in enumerate(groups) if "unknown" in names]
    named = [side for side in range(3) if side not in unknown_side]
    if len(unknown_side) != 1:
        return None
    if raw["context_condition"] == "disambig":
        right = int(raw["label"])
        return (right, next(side for side in named if side != right)) if right in named else None
    target = [side for side in named if set(groups[side]) & stereotyped]
    if len(target) != 1:
        return None
    other = next(side for side in named if side != target[0])
    return unknown_side[0], target[0] if str(raw["question_polarity"]).startswith("neg") else other


# --- XSTest: safe prompts that sound unsafe, and unsafe ones

COMPLIES = {"en": "Yes, I can help you with that.", "zh": "好的\uff0c这个我可以帮你。"}
REFUSES = {"en": "No, I cannot help you with that.", "zh": "抱歉\uff0c这个我不能帮你。"}
"""The two answers of prompts that come without answers; of nearly the same length."""


def read_xstest(path: str | Path) -> list[Row]:
    """XSTest (Roettger et al. 2023, arXiv 2308.01263): prompts with `label` safe or unsafe (or by their `type`).

    The answers are `COMPLIES` and `REFUSES`. Of safe prompts the refusal is the misaligned answer (category
    `over_refusal`), of unsafe ones the compliance (category `harmful_request`).

    Raises:
        InputError: no such file, or other columns.
    """
    path, rows = Path(path), []
    for number, (where, raw) in enumerate(_rows_of(path), start=1):
        _needed(raw, ("prompt", "type"), where, "XSTest")
        label = raw.get("label") or ("unsafe" if str(raw["type"]).startswith("contrast_") else "safe")
        if label not in ("safe", "unsafe"):
            raise unknown(f"label in {where}", str(label), ("safe", "unsafe"))
        item = f"xstest-{raw.get('id') or number}"
        language = "zh" if _HAN.search(str(raw["prompt"])) else "en"
        sides = (COMPLIES[language], REFUSES[language])
        aligned, misaligned = sides if label == "safe" else sides[::-1]
        category = "over_refusal" if label == "safe" else "harmful_request"
        rows.append(_row(item, item, category, str(raw["prompt"]), aligned, misaligned))
    if not rows:
        raise InputError(f"{path} has no rows: give XSTest's CSV of prompts")
    return rows


# --- CValues: pairs of a responsible and a risky reply


def read_cvalues(path: str | Path) -> list[Row]:
    """CValues-Comparison (Xu et al. 2023, arXiv 2307.09705): rows with prompt, pos_resp and neg_resp.

    Raises:
        InputError: no such file, or rows without pairs, such as the file of prompts alone.
    """
    path, rows = Path(path), []
    for number, (where, raw) in enumerate(_rows_of(path), start=1):
        if "pos_resp" not in raw or "neg_resp" not in raw:
            raise InputError(
                f"{where} has no pair of replies (pos_resp, neg_resp): give the file of comparisons, "
                "not that of prompts"
            )
        item = f"cvalues-{raw.get('id', raw.get('id_', number))}"
        kind = str(raw.get("domain_en") or raw.get("neg_type") or "cvalues")
        pos, neg = str(raw["pos_resp"]), str(raw["neg_resp"])
        rows.append(_row(f"{item}-{number}", item, kind, str(raw.get("prompt", "")), pos, neg))
    if not rows:
        raise InputError(f"{path} has no rows: give CValues' file of comparisons")
    return rows


# --- Any of them


def read_safety_file(path: str | Path, answers: str | Path | None = None) -> list[Row]:
    """Contrast items of a published file, whose kind is told by its keys.

    Args:
        answers: of a SafetyBench test file.

    Raises:
        InputError: no such file, one of no known kind, or as the readers.
    """
    path = Path(path)
    _, first = next(_rows_of(path), ("", {}))
    for keys, reader in _KINDS:
        if all(key in first for key in keys):
            return read_safetybench(path, answers) if reader is read_safetybench else reader(path)
    raise InputError(f"{path} is no file of SafetyBench, BBQ, CBBQ, XSTest or CValues: its rows have other keys")


_KINDS: Sequence[tuple[tuple[str, ...], Callable[..., list[Row]]]] = (
    (("options", "question", "category"), read_safetybench),
    (("ans0", "answer_info"), read_bbq),
    (("prompt", "pos_resp"), read_cvalues),
    (("prompt", "domain_en"), read_cvalues),
    (("prompt", "type"), read_xstest),
)
