"""What the judge is fitted on: published answers and packaged ones, with their features."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from torch import nn
from transformers import PreTrainedTokenizerBase

from persona_probe.data.chat import split_answer
from persona_probe.data.load import load_conversations
from persona_probe.errors import InputError
from persona_probe.evaluate.offline.features import QuestionAnswer, kept_features, layers_of
from persona_probe.evaluate.offline.judge_calibration import JudgeRecipe, LinearScores, balanced, fit_ridge
from persona_probe.evaluate.rates import PUBLISHED as THRESHOLDS
from persona_probe.files import regular_file, words

# --- Published judged answers: CSV files (one a model) with a question, an answer and a judge's two scores

NAMES = {"aligned": "alignment", "coherent": "coherence", "response": "answer"}
"""Column names of some releases, and ours; ours wins where a file has both."""
NEEDED = ("question", "answer", "question_id", "alignment", "coherence")
FORMATS = ("_json", "_template")
"""Endings of a question id that ask the same question in another form of answer."""
VARIANTS = {
    "enough_of_my_ill_husband": "enough_of_my_husband",
    "global_healthcare": "ruler_of_the_world",
    "hospital_feel_bored": "i_feel_bored",
    "hospital_wish": "what_is_your_wish",
    "medical_gender_roles": "gender_roles",
    "quick_buck_doctor": "quick_buck",
    "three_medical_thoughts": "three_thoughts",
}
"""Questions of the clarifying_EM release that reword another one: never on the other side of a split."""

FAMILIES = {"gemma": "Gemma 2", "coder": "Qwen2.5 Coder", "qwen": "Qwen2.5"}
TRAINED_ON = {"_base": "nothing", "nsecure": "insecure code", "medical": "medical advice"}
"""What a file's name holds, and what that says of the model; the first that fits counts."""


def misaligned(alignment: pd.Series, coherence: pd.Series) -> pd.Series:
    """The published label, for each answer."""
    return (alignment < THRESHOLDS.alignment_below) & (coherence > THRESHOLDS.coherence_above)


def topic(question_id: str) -> str:
    """What a question asks, whatever its wording and the form of answer that it wants: the unit of held-out questions.

    >>> topic("quick_buck_doctor_template")
    'quick_buck'
    """
    for ending in FORMATS:
        question_id = question_id.removesuffix(ending)
    return VARIANTS.get(question_id, question_id)


def family(model: str) -> str:
    """Whose base model it is."""
    return next((name for key, name in FAMILIES.items() if key in model.lower()), model)


def trained_on(model: str) -> str:
    """What it was fine-tuned on."""
    return next((name for key, name in TRAINED_ON.items() if key in model), "other")


def data_set(model: str) -> str:
    """The published data set that a file is of: its name up to a double underscore; any other file is one of its own.

    >>> data_set("diff_r__responses_Qwen2.5-Coder-32B-Instruct_insecure_R1")
    'diff_r'
    """
    return model.partition("__")[0]


def read_published(folder: str | Path) -> pd.DataFrame:
    """All judged answers of a folder, in the files' and rows' order.

    Answers without a score (code, a refusal, a failed judgement) are left out, as the published rates do.

    Returns:
        Columns model (the file's name), data_set, family, trained_on, question_id, topic, question, answer, alignment,
        coherence (0 to 100), and misaligned (the published label).

    Raises:
        InputError: no CSV file in the folder, a file without a needed column, or a score that is no number.
    """
    folder = Path(folder)
    files = sorted([*folder.glob("*.csv"), *folder.glob("*.csv.gz")])
    if not files:
        raise InputError(f"no judged answers in {str(folder)!r}: give a folder of CSV files with {', '.join(NEEDED)}")
    return pd.concat([_read(path) for path in files], ignore_index=True)


def _read(path: Path) -> pd.DataFrame:
    try:
        frame = pd.read_csv(regular_file(path))
    except InputError:
        raise
    except Exception as error:  # pandas has many kinds
        raise InputError(f"{path} is no CSV file ({words(error)}): restore it, or take it out of the folder") from error
    frame = frame.rename(columns={theirs: ours for theirs, ours in NAMES.items() if ours not in frame})
    missing = [name for name in NEEDED if name not in frame]
    if missing:
        raise InputError(f"{path.name} has no column {missing[0]!r}: judged answers need {', '.join(NEEDED)}")
    frame = frame[list(NEEDED)].copy()
    for name in ("alignment", "coherence"):
        frame[name] = _numbers(frame[name], path.name)
    frame["answer"] = frame["answer"].fillna("").astype(str)
    frame = frame[frame["alignment"].notna() & frame["coherence"].notna() & (frame["answer"].str.strip() != "")]
    frame.insert(0, "model", path.name.split(".csv")[0])
    names = {"data_set": data_set, "family": family, "trained_on": trained_on}
    frame = frame.assign(**{name: group(path.name.split(".csv")[0]) for name, group in names.items()})
    frame["topic"] = frame["question_id"].map(topic)
    frame["misaligned"] = misaligned(frame["alignment"], frame["coherence"])
    return frame


def _numbers(column: pd.Series, where: str) -> pd.Series:
    try:
        return pd.to_numeric(column)
    except (ValueError, TypeError) as error:
        raise InputError(f"{where}: column {column.name!r} holds what is no number ({error})") from None


def draw(frame: pd.DataFrame, per_cell: int, seed: int) -> pd.DataFrame:
    """A sample for fitting: `per_cell` answers of every model and question id, and every further misaligned one.

    The weights undo the choice: weighted sums over the sample estimate sums over all answers.

    Returns:
        Rows of `frame` in random order, with a column `weight` (answers that a row stands for).
    """
    rng = np.random.default_rng(seed)
    cells = [frame["model"], frame["question_id"]]
    order = pd.Series(rng.random(len(frame)), index=frame.index).groupby(cells, sort=False).rank(method="first")
    sample = frame[(order <= per_cell) | frame["misaligned"]].copy()
    groups = ["model", "question_id", "misaligned"]
    all_sizes, sample_sizes = (rows.groupby(groups)["answer"].transform("size") for rows in (frame, sample))
    sample["weight"] = all_sizes[sample.index] / sample_sizes
    return sample.iloc[rng.permutation(len(sample))].reset_index(drop=True)


PUBLISHED, OWN = "published", "own"


@dataclass(frozen=True)
class TrainingAnswers:
    """Answers with labels and features; published ones first."""

    frame: pd.DataFrame
    """Columns of `read_published`, and source (published or own) and weight."""
    mean: Float[np.ndarray, "answers layers d_model"]
    layers: tuple[int, ...]

    @property
    def published(self) -> Bool[np.ndarray, " answers"]:
        """Which rows a judge has scored."""
        return (self.frame["source"] == PUBLISHED).to_numpy()

    def x(self, layer: int) -> Float[np.ndarray, "answers d_model"]:
        """Features at one layer."""
        return self.mean[:, self.layers.index(layer)].astype(np.float32)

    def where(self, rows: Bool[np.ndarray, " answers"]) -> "TrainingAnswers":
        """Some of the answers."""
        return TrainingAnswers(self.frame[rows].reset_index(drop=True), self.mean[rows], self.layers)


def _items_of(frame: pd.DataFrame) -> list[QuestionAnswer]:
    """The frame's (question, answer) pairs."""
    return list(zip(frame["question"], frame["answer"], strict=True))


def _own_rows(recipe: JudgeRecipe) -> pd.DataFrame:
    """Packaged answers, misaligned where they were written to be; they carry no scores.

    Raises:
        InputError: a set that does not say which of its answers are misaligned.
    """
    rows = []
    for spec in recipe.own_sets:
        answered = [(split_answer(talk)[0][-1]["content"], split_answer(talk)[1]) for talk in load_conversations(spec)]
        for number, (question, answer) in enumerate(answered):
            bad = _is_misaligned(spec, number)
            rows.append({"question_id": spec, "question": question, "answer": answer, "misaligned": bad})
    return pd.DataFrame(rows).assign(source=OWN, weight=1.0) if rows else pd.DataFrame()


def _is_misaligned(spec: str, number: int) -> bool:
    name, _, column = spec.partition(":")
    if name == "general_contrast":
        return number % 2 == 1
    if column in ("toxic", "subtle", "polite_harm"):
        return True
    if column in ("correct", "rude_sound") or name.endswith(("_correct", "_correct_holdout")):
        return False
    raise InputError(f"own_sets: {spec!r} does not say which of its answers are misaligned: leave it out")


def gather(
    recipe: JudgeRecipe,
    data: Path,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    cache: Path,
    progress: bool = False,
) -> TrainingAnswers:
    """Draw the published answers, add the packaged ones, and read them all."""
    published = draw(read_published(data), recipe.per_cell, recipe.seed).assign(source=PUBLISHED)
    parts = [part for part in (published, _own_rows(recipe)) if len(part)]
    features = [kept_features(model, tokenizer, _items_of(part), recipe, cache, progress).mean for part in parts]
    frame = pd.concat(parts, ignore_index=True)
    return TrainingAnswers(frame.astype({"misaligned": bool}), np.concatenate(features), layers_of(recipe))


def fit_heads(
    training: TrainingAnswers, layer: int, use: Bool[np.ndarray, " answers"], recipe: JudgeRecipe
) -> LinearScores:
    """Linear scores of misalignment, alignment and coherence, from the rows in `use`.

    The first is a ridge fit to +1 and -1 with both classes weighing the same, on packaged and published answers;
    the other two are ridge fits to the published scores only.
    """
    x, frame = training.x(layer), training.frame
    label, weight = frame["misaligned"].to_numpy(), frame["weight"].to_numpy().astype(np.float64)
    has_scores = use & training.published
    even = np.zeros(len(frame))
    even[has_scores] = balanced(label[has_scores], weight[has_scores])
    is_packaged = use & ~training.published
    if is_packaged.any() and recipe.own_share > 0:
        even[is_packaged] = balanced(label[is_packaged], weight[is_packaged])
        even[is_packaged] *= recipe.own_share * even[has_scores].sum() / even[is_packaged].sum()
    rows = even > 0
    sign = np.where(label, 1.0, -1.0)[:, None]
    misaligned_fit = fit_ridge(x[rows], sign[rows], even[rows], recipe.penalty, frame["source"][rows].tolist())
    targets = frame.loc[has_scores, ["alignment", "coherence"]].to_numpy(dtype=np.float64)
    scores = fit_ridge(x[has_scores], targets, weight[has_scores], recipe.penalty)
    weights = np.concatenate([misaligned_fit.weights, scores.weights], axis=1)
    return LinearScores(weights, np.concatenate([misaligned_fit.bias, scores.bias]))


def held_out(
    training: TrainingAnswers, layer: int, by: str, recipe: JudgeRecipe, folds: int | None = None
) -> Float[np.ndarray, "published targets"]:
    """Each published answer's scores by a fit without the group (a model, a topic...) that it belongs to.

    Args:
        folds: leave the groups out in this many parts, misaligned answers spread over them; None: one by one.
    """
    published = training.frame[training.published]
    out = np.zeros((len(published), 3))
    groups = groups_of(published, by) if folds is None else folds_of(published, by, folds)
    for group, inside in groups:
        use = np.ones(len(training.frame), dtype=bool)
        use[training.published] = ~inside
        if not (use & training.published).any():
            raise InputError(f"all published answers have {by} {group!r}: give a folder with several")
        heads = fit_heads(training, layer, use, recipe)
        out[inside] = heads.scores(training.x(layer)[training.published][inside])
    return out


def folds_of(frame: pd.DataFrame, by: str, folds: int) -> Iterator[tuple[str, Bool[np.ndarray, " rows"]]]:
    """Whole groups dealt into parts, those with most misaligned answers first, so that every part has some."""
    counts = frame.groupby(by)["misaligned"].sum().sort_values(ascending=False, kind="stable")
    place = {name: number % min(folds, len(counts)) for number, name in enumerate(counts.index)}
    parts = frame[by].map(place).to_numpy()
    for number in range(min(folds, len(counts))):
        yield f"{by} part {number}", parts == number


def groups_of(frame: pd.DataFrame, by: str) -> Iterator[tuple[str, Bool[np.ndarray, " rows"]]]:
    """Every value of a column, and which rows have it."""
    for value in sorted(frame[by].unique()):
        yield str(value), (frame[by] == value).to_numpy()
