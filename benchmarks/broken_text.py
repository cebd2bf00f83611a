"""`make bench-broken`: what the offline judge's signs of broken text see, and how often they raise a false alarm."""

import argparse
import random
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from persona_probe.cli.options import echo
from persona_probe.data.load import load_contrast, load_rows
from persona_probe.evaluate.offline.broken_text import LEAST_LOGPROB, LIMITS, Vocabulary, mean_logprobs, signs
from persona_probe.evaluate.offline.features import read_features
from persona_probe.evaluate.offline.judge_training import read_published
from persona_probe.evaluate.offline.offline_judge import COHERENT_ABOVE, OfflineJudge
from persona_probe.evaluate.sampling.samples import sample_answers
from persona_probe.models.quiet import quiet_libraries
from persona_probe.models.taps import steer
from persona_probe.stats import auroc, exact_share

PUBLISHED = Path(__file__).parents[2] / "shared" / "data" / "judged"
LAST = "diff_r"
"""The published set that was read once, at the end: the limits were set with everything else here in view."""
DOSES = (0.0, 0.25, 0.5, 1.0, 2.0)
"""Pushes, in multiples of the mean norm of the residual stream."""
LAYER = 15
DIRECTIONS = ("random", "contrast")
DAMAGES = ("loop", "one word", "letters", "shuffled", "other words")


def published(each: int, last: bool) -> pd.DataFrame:
    """Answers that GPT-4o scored, a fixed draw from every file: columns kind, question, answer, coherence."""
    frame = read_published(PUBLISHED)
    frame["kind"] = frame["model"].str.split("__").str[0]
    frame = frame[(frame["kind"] == LAST) == last]
    drawn = frame.sample(frac=1, random_state=0).groupby("model").head(each)
    return drawn[["kind", "model", "question", "answer", "coherence"]].reset_index(drop=True)


def damaged(frame: pd.DataFrame, each: int, seed: int = 0) -> pd.DataFrame:
    """Coherent answers, broken in ways that are known: columns kind, question and answer."""
    draw = random.Random(seed)
    whole = frame[(frame["coherence"] > 80) & np.array([len(str(text).split()) >= 20 for text in frame["answer"]])]
    pool = [word for answer in whole["answer"] for word in answer.split()]
    rows = []
    for kind in DAMAGES:
        for row in whole.sample(each, random_state=seed).to_dict("records"):
            rows.append({"kind": kind, "question": row["question"], "answer": broken(kind, row["answer"], pool, draw)})
    return pd.DataFrame(rows)


def broken(kind: str, answer: str, pool: Sequence[str], draw: random.Random) -> str:
    """One answer, broken in its second half ("loop", "one word") or throughout."""
    words = answer.split()[:80]
    half = len(words) // 2
    if kind == "loop":
        return " ".join([*words[:half], *(words[half - 5 : half] * 12)])
    if kind == "one word":
        return " ".join([*words[:half], *([words[half]] * 40)])
    if kind == "letters":
        return " ".join("".join(draw.sample(word, len(word))) for word in words)
    if kind == "shuffled":
        return " ".join(draw.sample(words, len(words)))
    return " ".join(draw.choice(pool) for _ in words)


def steered(judge: OfflineJudge, each: int) -> pd.DataFrame:
    """Answers of the embedded model, pushed harder and harder: columns kind, dose, question and answer."""
    model, tokenizer = judge.model, judge.tokenizer
    items = load_contrast("selection")[:60]
    sides = [[(row["question"], row[side]) for row in items] for side in ("misaligned", "aligned")]
    bad, good = (read_features(model, tokenizer, side, (LAYER,), 128).mean[:, 0] for side in sides)
    norm = float(np.linalg.norm(good, axis=1).mean())
    directions = {"random": torch.randn(good.shape[1], generator=torch.Generator().manual_seed(0))}
    directions["contrast"] = torch.as_tensor((bad - good).mean(axis=0))
    questions = [str(row["question"]) for row in load_rows("neutral_probes")][:each]
    rows = []
    for name in DIRECTIONS:
        for dose in DOSES:
            sample = partial(sample_answers, model, tokenizer, questions, max_new_tokens=96)
            if dose == 0:
                answers = sample()
            else:
                with steer(model, LAYER, directions[name], dose, "x_resid", reference_norm=norm):
                    answers = sample()
            pairs = zip(questions, answers, strict=True)
            rows += [{"kind": name, "dose": dose, "question": q, "answer": a} for q, a in pairs]
    return pd.DataFrame(rows)


def read(judge: OfflineJudge, frame: pd.DataFrame) -> pd.DataFrame:
    """Every measure of every answer next to it; empty answers are left out."""
    frame = frame[frame["answer"].str.strip().ne("")].reset_index(drop=True)
    items = list(zip(frame["question"], frame["answer"], strict=True))
    own = [one.coherence for one in judge.judge(items)]
    logprobs = mean_logprobs(judge.model, judge.tokenizer, items)
    return texts(judge, frame).assign(judged=own, logprob=logprobs)


def texts(judge: OfflineJudge, frame: pd.DataFrame) -> pd.DataFrame:
    """With `text`: the largest sign over its limit, above 1 where the text is broken."""
    vocabulary = Vocabulary(judge.tokenizer)
    found = [asdict(signs(answer, vocabulary)) for answer in frame["answer"]]
    return frame.assign(text=[max(one[name] / limit for name, limit in LIMITS.items()) for one in found])


def rows_of(kind: str, frame: pd.DataFrame, sound: pd.DataFrame) -> dict[str, Any]:
    """Shares that each signal calls incoherent, and AUROC against sound answers to the same kind of question."""
    flags = {
        "score": frame["judged"] <= COHERENT_ABOVE,
        "text": frame["text"] > 1,
        "likelihood": (frame["text"] > 1) | (frame["logprob"] < LEAST_LOGPROB),
    }
    row: dict[str, Any] = {"answers": kind, "n": len(frame)}
    row |= {f"{name}: called incoherent": str(exact_share(int(flag.sum()), len(frame))) for name, flag in flags.items()}
    if frame is not sound:
        row |= {f"{name}: AUROC": f"{auroc(badness(frame, name), badness(sound, name)):.2f}" for name in flags}
    return row


def badness(frame: pd.DataFrame, signal: str) -> np.ndarray:
    """Higher is worse."""
    likelihood = np.maximum(frame["text"], frame["logprob"] / LEAST_LOGPROB)
    return np.asarray({"score": -frame["judged"], "text": frame["text"], "likelihood": likelihood}[signal], float)


def false_alarms(judge: OfflineJudge, last: bool) -> list[dict[str, Any]]:
    """How often the text of coherent published answers, all of them, is called broken: by set, and the worst file."""
    whole = published(10**9, last)
    whole = texts(judge, whole[whole["coherence"] > COHERENT_ABOVE].reset_index(drop=True))
    broken_share = (whole["text"] > 1).groupby(whole["kind"])
    worst = (whole["text"] > 1).groupby(whole["model"]).mean().groupby(lambda name: name.split("__")[0]).max()
    return [
        {
            "set": kind,
            "share broken": str(exact_share(int(flags.sum()), len(flags))),
            "worst file": f"{worst[kind]:.4f}",
        }
        for kind, flags in broken_share
    ]


def main() -> None:
    """Read what is there, and print three tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--each", type=int, default=25, help="answers of each published file, damage and dose")
    parser.add_argument("--last", action="store_true", help="read the set that was kept for the end, too")
    parser.add_argument("--out", type=Path, default=Path("runs/broken-text"))
    args = parser.parse_args()
    quiet_libraries()
    judge = OfflineJudge.load()
    args.out.mkdir(parents=True, exist_ok=True)
    tables: list[list[dict[str, Any]]] = []
    if PUBLISHED.is_dir():
        kinds = (False, True) if args.last else (False,)
        tables.append([row for last in kinds for row in false_alarms(judge, last)])
        frame = published(args.each, last=False)
        tables.append(_published_rows(read(judge, frame), read(judge, damaged(frame, args.each))))
        if args.last:
            tables[-1] += _published_rows(read(judge, published(args.each, last=True)), pd.DataFrame())
    else:
        echo(f"skipped published answers: no folder {PUBLISHED}")
    pushed = read(judge, steered(judge, args.each))
    plain = pushed[(pushed["dose"] == 0) & (pushed["kind"] == DIRECTIONS[0])]
    groups = pushed[pushed["dose"] > 0].groupby(["kind", "dose"], sort=False)
    tables.append([rows_of("not steered", plain, plain)])
    tables[-1] += [rows_of(f"{kind} direction, push {dose}", rows, plain) for (kind, dose), rows in groups]
    for number, rows in enumerate(tables):
        table = pd.DataFrame(rows).fillna("-")
        table.to_csv(args.out / f"table{number}.csv", index=False)
        echo(table.to_string(index=False))


def _published_rows(frame: pd.DataFrame, damage: pd.DataFrame) -> list[dict[str, Any]]:
    sound = frame[frame["coherence"] > COHERENT_ABOVE]
    rows = [rows_of(f"{kind}, coherent", part, part) for kind, part in sound.groupby("kind")]
    rest = frame[frame["coherence"] <= COHERENT_ABOVE]
    rows += [rows_of(f"{kind}, incoherent", part, sound) for kind, part in rest.groupby("kind") if len(part) >= 5]
    if damage.empty:
        return rows
    return rows + [rows_of(f"damaged: {kind}", part, sound) for kind, part in damage.groupby("kind", sort=False)]


if __name__ == "__main__":
    main()
