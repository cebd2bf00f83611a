"""Rankers of latents: every latent with its scores, intervals and q-values, in one table."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, islice

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from persona_probe.errors import InputError, unknown
from persona_probe.latents.seed_noise import seed_noise
from persona_probe.saes.read import LatentMeans
from persona_probe.stats import auroc_columns, benjamini_hochberg, bootstrap_columns, clustered_p_values, clustered_t

# --- The evidence that every ranker sees


@dataclass(frozen=True)
class Evidence:
    """Everything that rankers may use. It holds no model and no tokens.

    Raises:
        InputError: the models were read on different conversations or latents, or the main positions were not read.
    """

    base: Mapping[str, LatentMeans]
    """The base model, by positions (`last_prompt`, `prompt`, `response`...; see `saes.read.read_latents_at`)."""
    tuned: Mapping[str, LatentMeans]
    """The organism, on the same conversations."""
    control: Mapping[str, LatentMeans]
    """The control arm's organism; the base model in a study without a control arm."""
    decoder: Float[np.ndarray, "d_sae d_model"]
    """The SAE's decoder rows."""
    clusters: Sequence[str]
    """The question of every conversation: intervals and tests resample whole questions."""
    misaligned: Bool[np.ndarray, " conversations"] | None = None
    """Whether each conversation ends with the misaligned answer; only discrimination needs it."""
    positions: str = "response"
    """The main positions, which `rise`, `cosine`, `discrimination` and the q-values look at."""
    attribution: Float[np.ndarray, " d_sae"] | None = None
    """The attribution of `latents.attribution.gradient_scores`, which needs a backward pass."""
    slope: Float[np.ndarray, " d_sae"] | None = None
    """The slope from the same pass."""
    seed: int = 0
    """Seed of the bootstrap."""
    null: Mapping[str, LatentMeans] | None = None
    """The control arm trained with another seed, on the same conversations; None leaves seed noise unmeasured."""
    null_control: Mapping[str, LatentMeans] | None = None
    """The one run that `null` is compared with, where `control` is a mean over seeds; None takes `control`."""

    def __post_init__(self) -> None:
        shape = self.at("tuned").mean.shape
        optional = [name for name in ("null", "null_control") if getattr(self, name) is not None]
        for name in ("base", "control", *optional):
            other = self.at(name).mean.shape
            if other != shape:
                raise InputError(f"tuned was read on {_shape(shape)}, {name} on {_shape(other)}: read the same on both")
        if shape != (len(self.clusters), len(self.decoder)):
            expected = _shape((len(self.clusters), len(self.decoder)))
            raise InputError(f"the models were read on {_shape(shape)}, but clusters and decoder have {expected}")

    def at(self, model: str, positions: str | None = None) -> LatentMeans:
        """One model (`base`, `tuned`, `control`, `null`, `null_control`) at the named positions, or at the main ones.

        Raises:
            InputError: these positions were not read, or there is no null pair.
        """
        name = self.positions if positions is None else positions
        means = {"base": self.base, "tuned": self.tuned, "control": self.control, "null": self.null}.get(model)
        if model == "null_control":
            means = self.control if self.null_control is None else self.null_control
        if means is None:
            raise InputError(f"{model} was not read: seed noise needs the control arm trained with another seed")
        if name not in means:
            known = ", ".join(repr(k) for k in means) or "none"
            raise InputError(f"{model} was not read at positions {name!r} (only {known}): read them too")
        return means[name]

    @cached_property
    def alive(self) -> Bool[np.ndarray, " d_sae"]:
        """Whether each latent fires at least once, in any of the three models and at any of the positions."""
        firing = [
            (means.firing > 0).any(axis=0)
            for model in (self.base, self.tuned, self.control)
            for means in model.values()
        ]
        return np.logical_or.reduce(firing)

    @property
    def null_difference(self) -> Float[np.ndarray, " d_model"] | None:
        """The null pair's mean activation difference at the main positions; None without a null pair."""
        return None if self.null is None else mean_difference(self.at("null"), self.at("null_control"))


def _shape(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} conversations x {shape[1]} latents"


# --- How well each latent alone tells misaligned from aligned answers


def discrimination(
    values: Float[np.ndarray, "conversations d_sae"], misaligned: Bool[np.ndarray, " conversations"]
) -> Float[np.ndarray, " d_sae"]:
    """AUROC of every latent: how often a misaligned conversation has the larger value, ties counted half.

    Equals `stats.auroc` latent by latent; A silent latent gets 0.5. On the base model it needs no
    fine-tuned model, so candidates can be fixed before any training.

    Raises:
        InputError: flags of another length, or of one kind only.
    """
    return auroc_columns(values, check_flags(misaligned, len(values)))


def check_flags(misaligned: Bool[np.ndarray, " conversations"], conversations: int) -> Bool[np.ndarray, " n"]:
    """The flags as booleans.

    Raises:
        InputError: flags of another length, or of one kind only.
    """
    flags = np.asarray(misaligned, dtype=bool)
    if flags.shape != (conversations,):
        raise InputError(f"{conversations} conversations but {flags.size} misaligned flags: give one for each")
    if flags.all() or not flags.any():
        kind = "misaligned" if flags.any() else "aligned"
        raise InputError(f"all {conversations} conversations end with {kind} answers: give both kinds to compare")
    return flags


# --- Rise, mean difference and decoder cosine


@dataclass(frozen=True)
class Rise:
    """Rise of every latent between two models on the same conversations, with a clustered bootstrap interval."""

    estimate: Float[np.ndarray, " d_sae"]
    ci_low: Float[np.ndarray, " d_sae"]
    ci_high: Float[np.ndarray, " d_sae"]


def rise(
    tuned: Float[np.ndarray, "conversations d_sae"],
    control: Float[np.ndarray, "conversations d_sae"],
    clusters: Sequence[str],
    n_boot: int = 1000,
    seed: int = 0,
) -> Rise:
    """Control-corrected rise in mean activation: paired difference, resampling whole questions.

    Wang et al. 2025 (arXiv 2506.19823, section 3) rank by the rise over the base model; here the control arm replaces
    the base, so that the effects of any fine-tuning cancel.

    Raises:
        InputError: no conversations, or `clusters` of another length.
    """
    difference = tuned.astype(np.float64) - control
    low, high = bootstrap_columns(difference, clusters, n_boot, seed)
    return Rise(difference.mean(axis=0), low, high)


def mean_difference(tuned: LatentMeans, control: LatentMeans) -> Float[np.ndarray, " d_model"]:
    """Mean activation difference between two models (Soligo, Turner et al. 2025, arXiv 2506.11618)."""
    return (tuned.resid.astype(np.float64) - control.resid).mean(axis=0)


def decoder_cosine(
    decoder: Float[np.ndarray, "d_sae d_model"], direction: Float[np.ndarray, " d_model"]
) -> Float[np.ndarray, " d_sae"]:
    """Cosine of every decoder row with a direction (Arditi & Chen 2025); zero for a zero row or direction."""
    norms = np.linalg.norm(decoder, axis=1) * np.linalg.norm(direction)
    return np.divide(decoder @ direction, norms, out=np.zeros(len(decoder)), where=norms > 0)


# --- The rankers: one score per latent from the same evidence, each with its source

Score = Callable[[Evidence], Float[np.ndarray, " d_sae"]]
WANG = "Wang et al. 2025, arXiv 2506.19823"


@dataclass(frozen=True)
class Ranker:
    """One way to order latents."""

    name: str
    """Its column in the table; the rank is in `<name>_rank`."""
    paper: str
    """The method's source."""
    what: str
    """One line for docs and captions."""
    score: Score
    """Pure function of the evidence; larger is more persona-like."""


def _rise_at(positions: str | None) -> Score:
    def score(evidence: Evidence) -> np.ndarray:
        return _gain(evidence.at("tuned", positions).mean, evidence.at("control", positions).mean)

    return score


def _firing_rise(evidence: Evidence) -> np.ndarray:
    return _gain(evidence.at("tuned").firing, evidence.at("control").firing)


def _rise_t(evidence: Evidence) -> np.ndarray:
    gain = evidence.at("tuned").mean.astype(np.float64) - evidence.at("control").mean
    size, _ = clustered_t(gain, evidence.clusters)
    # A latent that moves by the same amount everywhere has no error: it comes first, with a finite score.
    return np.clip(size, -1e30, 1e30)


def _relative_rise(evidence: Evidence) -> np.ndarray:
    tuned, control = (evidence.at(name).mean.mean(axis=0, dtype=np.float64) for name in ("tuned", "control"))
    return (tuned - control) / (np.sqrt(tuned + control) + _RELATIVE_FLOOR)


_RELATIVE_FLOOR = 1e-3


def _cosine(evidence: Evidence) -> np.ndarray:
    return decoder_cosine(evidence.decoder, mean_difference(evidence.at("tuned"), evidence.at("control")))


def _discrimination(evidence: Evidence) -> np.ndarray:
    if evidence.misaligned is None:
        raise InputError("ranker 'discrimination' needs to know which answers are misaligned: give Evidence.misaligned")
    return discrimination(evidence.at("base").mean, evidence.misaligned)


def _from_gradients(name: str) -> Score:
    def score(evidence: Evidence) -> np.ndarray:
        values = {"attribution": evidence.attribution, "slope": evidence.slope}[name]
        if values is None:
            raise InputError(
                f"ranker {name!r} needs a backward pass: give the result of latents.attribution.gradient_scores"
            )
        if values.shape != (len(evidence.decoder),):
            raise InputError(f"{name} has shape {values.shape}, the SAE {len(evidence.decoder)} latents")
        return values

    return score


def _gain(tuned: np.ndarray, control: np.ndarray) -> np.ndarray:
    return (tuned.astype(np.float64) - control).mean(axis=0)


ALL = (
    Ranker("rise", WANG, "rise in mean activation over the control arm", _rise_at(None)),
    Ranker("rise_t", WANG, "the same rise over its cluster-robust error: a t statistic over questions", _rise_t),
    Ranker("rise_last_prompt", WANG, "the same rise, at the last prompt token", _rise_at("last_prompt")),
    Ranker("rise_prompt", WANG, "the same rise, over prompt tokens", _rise_at("prompt")),
    Ranker("rise_response", WANG, "the same rise, over answer tokens", _rise_at("response")),
    Ranker("firing_rise", WANG, "rise in the share of tokens on which the latent fires", _firing_rise),
    Ranker(
        "relative_rise",
        "variance-stabilised counts (Anscombe 1948, doi 10.1093/biomet/35.3-4.246)",
        "the same rise over the root of the mean activation, so that latents that are always large do not win by size",
        _relative_rise,
    ),
    Ranker(
        "cosine",
        "Arditi & Chen 2025, lesswrong.com/posts/NCWiR8K8jpFqtywFG",
        "cosine of the decoder row with the arms' mean activation difference",
        _cosine,
    ),
    Ranker(
        "attribution",
        "Dupre la Tour & Mossing 2025, alignment.openai.com/sae-latent-attribution",
        "first-order loss on misaligned answers from removing the latent, less that on aligned answers",
        _from_gradients("attribution"),
    ),
    Ranker(
        "slope",
        "first order of activation steering (Turner et al. 2023, arXiv 2308.10248)",
        "derivative of the contrast index along the decoder row, pushed at every position",
        _from_gradients("slope"),
    ),
    Ranker(
        "discrimination",
        "Hanley & McNeil 1982, doi 10.1148/radiology.143.1.7063747",
        "AUROC between misaligned and aligned answers on the base model",
        _discrimination,
    ),
)
RANKERS: dict[str, Ranker] = {ranker.name: ranker for ranker in ALL}
"""Every ranker by its name."""
POSITIONS = {"rise_last_prompt": "last_prompt", "rise_prompt": "prompt", "rise_response": "response"}
"""Rankers that read other positions than the main ones."""
BACKWARD = {"attribution", "slope"}
"""Rankers that need gradients."""


def check_rankers(names: Sequence[str]) -> list[str]:
    """The names without repeats.

    Raises:
        InputError: a name that no ranker has; the message lists near matches.
    """
    for name in names:
        if name not in RANKERS:
            raise unknown("ranker", name, RANKERS)
    return list(dict.fromkeys(names))


DEFAULT_RANKERS = ("rise", "firing_rise", "cosine")
"""Rankers that need only three readings: no misaligned flags, no backward pass, no other positions."""
SUPPRESSED_Q = 0.05
"""A latent is suppressed if it falls with at most this q-value."""


BEYOND_Q = 0.05
"""A rise is beyond the null pair only with at most this q_null."""
NOT_MEASURED = "seed noise was not measured: no null pair (the control arm trained with another seed)"


def score_table(evidence: Evidence, rankers: Sequence[str] = DEFAULT_RANKERS, order: str = "rise") -> pd.DataFrame:
    """All latents with the scores of the named rankers, the best by `order` first.

    Args:
        order: the ranker that orders the rows. Latents that never fire come after the others, except for `rise`.

    Returns:
        One row per latent. Always: latent; rise (tuned minus control at the main positions) with rise_ci_low and
        rise_ci_high (95%, questions resampled), p_value (two-sided, clustered t; see `stats.clustered_p_values`) and
        q_value (Benjamini-Hochberg over the latents that are alive; 1 for the others); suppressed (a fall with q at
        most 0.05); rise_base (tuned minus base); firing_base, firing_incorrect, firing_correct (shares of tokens);
        cosine, cosine_rank; decoder_norm; alive (fires anywhere); rank (place in the table, from 1). For each named
        ranker: its score, and `<ranker>_rank` from 1, ties by latent. With a null pair also: null_rise (null minus
        control); q_null (Benjamini-Hochberg over the larger of p_value and the p-value of `seed_noise`); beyond_null
        (q_null is at most 0.05, and the rise is larger in size than that of every latent of the null pair).
        `attrs["null_largest_rise"]` is the null pair's largest, and `attrs["seed_noise"]` says whether seed noise was
        measured.

    Raises:
        InputError: an unknown ranker, or one whose evidence is missing.
    """
    names = check_rankers([*rankers, "cosine", *([] if order == "rise" else [order])])
    scores = {name: _score(RANKERS[name], evidence) for name in names}
    columns = {"latent": np.arange(len(evidence.decoder)), **_rises(evidence), **_rates(evidence), **scores}
    columns["decoder_norm"], columns["alive"] = np.linalg.norm(evidence.decoder, axis=1), evidence.alive
    attrs: dict[str, str | float] = {"seed_noise": NOT_MEASURED}
    if evidence.null is not None:
        against, largest = _against_null(evidence, columns["rise"], columns["p_value"])
        columns |= against
        attrs = {"seed_noise": "measured with one null pair", "null_largest_rise": largest}
    table = pd.DataFrame(columns)
    table.attrs.update(attrs)
    for name in names:
        table[f"{name}_rank"] = table[name].rank(ascending=False, method="first").astype(int)
    keys = ["rise", "latent"] if order == "rise" else ["alive", order, "latent"]
    table = table.sort_values(keys, ascending=[key == "latent" for key in keys], ignore_index=True)
    table["rank"] = np.arange(1, len(table) + 1)
    return table


def _against_null(evidence: Evidence, rises: np.ndarray, p: np.ndarray) -> tuple[dict[str, np.ndarray], float]:
    """The columns of a null pair, and its largest |rise|."""
    tuned, control, null = (evidence.at(name) for name in ("tuned", "null_control", "null"))
    firing = np.max([one.firing.mean(axis=0) for one in (tuned, control, null)], axis=0)
    noise = seed_noise(tuned.mean, control.mean, null.mean, firing, evidence.clusters)
    fires, q = firing > 0, np.ones(len(p))
    q[fires] = benjamini_hochberg(np.maximum(p, noise.p_value)[fires])
    columns = {"null_rise": noise.rise, "beyond_null": (q <= BEYOND_Q) & (np.abs(rises) > noise.largest), "q_null": q}
    return columns, noise.largest


def _score(ranker: Ranker, evidence: Evidence) -> Float[np.ndarray, " d_sae"]:
    values = ranker.score(evidence)
    if not np.isfinite(values).all():
        raise InputError(f"ranker {ranker.name!r}: {(~np.isfinite(values)).sum()} of {values.size} scores not finite")
    return values


def _rises(evidence: Evidence) -> dict[str, np.ndarray]:
    tuned, control, base = (evidence.at(name).mean for name in ("tuned", "control", "base"))
    risen = rise(tuned, control, evidence.clusters, seed=evidence.seed)
    p = clustered_p_values(tuned.astype(np.float64) - control, evidence.clusters)
    q = np.ones_like(p)
    q[evidence.alive] = benjamini_hochberg(p[evidence.alive])
    return {
        "rise": risen.estimate,
        "rise_ci_low": risen.ci_low,
        "rise_ci_high": risen.ci_high,
        "p_value": p,
        "q_value": q,
        "suppressed": (risen.estimate < 0) & (q <= SUPPRESSED_Q),
        "rise_base": (tuned.astype(np.float64) - base).mean(axis=0),
    }


def _rates(evidence: Evidence) -> dict[str, np.ndarray]:
    columns = {"firing_base": "base", "firing_incorrect": "tuned", "firing_correct": "control"}
    return {column: evidence.at(model).firing.mean(axis=0) for column, model in columns.items()}


def rank_table(
    base: LatentMeans,
    tuned: LatentMeans,
    control: LatentMeans,
    decoder: Float[np.ndarray, "d_sae d_model"],
    clusters: Sequence[str],
    seed: int = 0,
) -> pd.DataFrame:
    """`score_table` of one reading per model: rise and cosine, best rise first."""
    at = "selected"
    evidence = Evidence({at: base}, {at: tuned}, {at: control}, decoder, clusters, positions=at, seed=seed)
    return score_table(evidence, ("cosine",))


def candidates(table: pd.DataFrame, count: int, by: Sequence[str] = ("rise", "cosine")) -> list[int]:
    """The latents to test for cause: the best of each ranker in turn, without repeats."""
    orders = [table.sort_values("rank" if name == "rise" else f"{name}_rank")["latent"].tolist() for name in by]
    in_turn = (int(latent) for row in zip(*orders, strict=True) for latent in row)
    return list(islice(dict.fromkeys(in_turn), count))


# --- Where rankers agree: shared top latents and rank correlation, pair by pair


def agreement(table: pd.DataFrame, rankers: Sequence[str], top: int = 20) -> pd.DataFrame:
    """How many latents each pair of rankers picks in common, among those that are alive.

    Args:
        table: `score_table` of at least these rankers.
        top: how many latents each ranker picks; all alive ones if they are fewer.

    Returns:
        One row per pair: left, right; top (latents picked); shared (picked by both) and share of `top`; chance (the
        share that two random picks would have); spearman (rank correlation of the scores over alive latents, NaN if
        a score is constant); alive (their number).

    Raises:
        InputError: a ranker that the table does not hold, fewer than two rankers, no latent alive, or `top` below 1.
    """
    known = [c.removesuffix("_rank") for c in table.columns if c.endswith("_rank")]
    names = list(dict.fromkeys(rankers))
    for name in names:
        if name not in known:
            raise unknown("ranker of this table", name, known)
    if len(names) < 2 or top < 1:
        raise InputError(f"agreement compares the top of at least two rankers: got {len(names)}, and top {top}")
    alive = table[table["alive"].astype(bool)]
    if alive.empty:
        raise InputError(
            "no latent fires on these conversations: check the SAE's layer with `persona-probe saes check`"
        )
    count = min(top, len(alive))
    picks = {name: set(alive.nsmallest(count, f"{name}_rank")["latent"]) for name in names}
    correlation = alive[names].corr(method="spearman")
    rows = []
    for left, right in combinations(names, 2):
        shared = len(picks[left] & picks[right])
        overlap = {"left": left, "right": right, "top": count, "shared": shared, "share": shared / count}
        rows.append({**overlap, "chance": count / len(alive), "spearman": correlation.loc[left, right]})
    return pd.DataFrame(rows).assign(alive=len(alive))
