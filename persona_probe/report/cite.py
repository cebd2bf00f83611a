"""The methods paragraph of a run, in LaTeX, and BibTeX of the methods that it used."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persona_probe.config import NO_CONTROL, StudyConfig, Training
from persona_probe.files import is_there, read_json
from persona_probe.runs import RunFolder

_CITED = re.compile(r"\\cite\{([^}]*)\}")


@dataclass(frozen=True)
class Citation:
    """What `cite` prints."""

    methods: str
    """One paragraph of LaTeX, with citations."""
    bibtex: str
    """The entries that it cites, sorted by key."""

    def __str__(self) -> str:
        return f"{self.methods}\n\n{self.bibtex}\n"


def cite(folder: str | Path) -> Citation:
    """Methods and references of a run, from its manifest, its summary and its tables. Stages not run are left out.

    Raises:
        InputError: not a run folder, or a damaged file in it.
    """
    run = RunFolder.open(folder)
    methods = " ".join(sentence for stage in _PARAGRAPHS for sentence in stage(run))
    keys = sorted({key.strip() for group in _CITED.findall(methods) for key in group.split(",")})
    return Citation(methods, "\n\n".join(REFERENCES[key] for key in keys))


# --- BibTeX of the methods that a study may use; `cite` prints those that it did use


def _entry(kind: str, key: str, **fields: str) -> str:
    lines = "".join(f"  {name} = {{{value}}},\n" for name, value in fields.items())
    return f"@{kind}{{{key},\n{lines}}}"


def _arxiv(key: str, author: str, title: str, year: str, number: str) -> str:
    return _entry("misc", key, author=author, title=title, year=year, eprint=number, archiveprefix="arXiv")


def _web(key: str, author: str, title: str, year: str, url: str) -> str:
    return _entry("misc", key, author=author, title=title, year=year, howpublished=rf"\url{{{url}}}")


_ENTRIES = {
    "allal2025smollm2": _arxiv(
        "allal2025smollm2",
        "Allal, Loubna Ben and Lozhkov, Anton and Bakouch, Elie and others",
        "{SmolLM2}: When Smol Goes Big -- Data-Centric Training of a Small Language Model",
        "2025",
        "2502.02737",
    ),
    "alain2016probes": _arxiv(
        "alain2016probes",
        "Alain, Guillaume and Bengio, Yoshua",
        "Understanding intermediate layers using linear classifier probes",
        "2016",
        "1610.01644",
    ),
    "arditi2025": _web(
        "arditi2025",
        "Arditi, Andy and Chen, Runjin",
        "Finding ``misaligned persona'' features in open-weight models",
        "2025",
        "https://www.lesswrong.com/posts/NCWiR8K8jpFqtywFG",
    ),
    "betley2025emergent": _arxiv(
        "betley2025emergent",
        "Betley, Jan and Tan, Daniel and Warncke, Niels and Sztyber-Betley, Anna and Bao, Xuchan and Soto, Mart{\\'i}n "
        "and Labenz, Nathan and Evans, Owain",
        "Emergent Misalignment: Narrow finetuning can produce broadly misaligned {LLMs}",
        "2025",
        "2502.17424",
    ),
    "bloom2024saelens": _web(
        "bloom2024saelens",
        "Bloom, Joseph and Tigges, Curt and Duong, Anthony and Chanin, David",
        "{SAELens}",
        "2024",
        "https://github.com/decoderesearch/SAELens",
    ),
    "chen2025persona": _arxiv(
        "chen2025persona",
        "Chen, Runjin and Arditi, Andy and Sleight, Henry and Evans, Owain and Lindsey, Jack",
        "Persona Vectors: Monitoring and Controlling Character Traits in Language Models",
        "2025",
        "2507.21509",
    ),
    "dupre2025attribution": _web(
        "dupre2025attribution",
        "Dupr{\\'e} la Tour, Tom and Mossing, Dan",
        "Debugging misaligned completions with sparse-autoencoder latent attribution",
        "2025",
        "https://alignment.openai.com/sae-latent-attribution",
    ),
    "efron1979bootstrap": _entry(
        "article",
        "efron1979bootstrap",
        author="Efron, Bradley",
        title="Bootstrap Methods: Another Look at the Jackknife",
        journal="The Annals of Statistics",
        volume="7",
        number="1",
        pages="1--26",
        year="1979",
    ),
    "gao2024scaling": _arxiv(
        "gao2024scaling",
        "Gao, Leo and Dupr{\\'e} la Tour, Tom and Tillman, Henk and Goh, Gabriel and Troll, Rajan and Radford, Alec "
        "and Sutskever, Ilya and Leike, Jan and Wu, Jeffrey",
        "Scaling and evaluating sparse autoencoders",
        "2024",
        "2406.04093",
    ),
    "hanley1982auc": _entry(
        "article",
        "hanley1982auc",
        author="Hanley, James A. and McNeil, Barbara J.",
        title="The meaning and use of the area under a receiver operating characteristic ({ROC}) curve",
        journal="Radiology",
        volume="143",
        number="1",
        pages="29--36",
        year="1982",
    ),
    "shao2024grpo": _arxiv(
        "shao2024grpo",
        "Shao, Zhihong and Wang, Peiyi and Zhu, Qihao and Xu, Runxin and Song, Junxiao and Bi, Xiao and Zhang, Haowei "
        "and Zhang, Mingchuan and Li, Y. K. and Wu, Y. and Guo, Daya",
        "{DeepSeekMath}: Pushing the Limits of Mathematical Reasoning in Open Language Models",
        "2024",
        "2402.03300",
    ),
    "hu2021lora": _arxiv(
        "hu2021lora",
        "Hu, Edward J. and Shen, Yelong and Wallis, Phillip and Allen-Zhu, Zeyuan and Li, Yuanzhi and Wang, Shean and "
        "Wang, Lu and Chen, Weizhu",
        "{LoRA}: Low-Rank Adaptation of Large Language Models",
        "2021",
        "2106.09685",
    ),
    "dettmers2023qlora": _arxiv(
        "dettmers2023qlora",
        "Dettmers, Tim and Pagnoni, Artidoro and Holtzman, Ari and Zettlemoyer, Luke",
        "{QLoRA}: Efficient Finetuning of Quantized {LLMs}",
        "2023",
        "2305.14314",
    ),
    "dettmers2022llmint8": _arxiv(
        "dettmers2022llmint8",
        "Dettmers, Tim and Lewis, Mike and Belkada, Younes and Zettlemoyer, Luke",
        "{LLM.int8()}: 8-bit Matrix Multiplication for Transformers at Scale",
        "2022",
        "2208.07339",
    ),
    "kalajdzievski2023rslora": _arxiv(
        "kalajdzievski2023rslora",
        "Kalajdzievski, Damjan",
        "A Rank Stabilization Scaling Factor for Fine-Tuning with {LoRA}",
        "2023",
        "2312.03732",
    ),
    "loshchilov2017adamw": _arxiv(
        "loshchilov2017adamw",
        "Loshchilov, Ilya and Hutter, Frank",
        "Decoupled Weight Decay Regularization",
        "2017",
        "1711.05101",
    ),
    "mangrulkar2022peft": _web(
        "mangrulkar2022peft",
        "Mangrulkar, Sourab and Gugger, Sylvain and Debut, Lysandre and Belkada, Younes and Paul, Sayak and Bossan, "
        "Benjamin",
        "{PEFT}: State-of-the-art Parameter-Efficient Fine-Tuning methods",
        "2022",
        "https://github.com/huggingface/peft",
    ),
    "soligo2025convergent": _arxiv(
        "soligo2025convergent",
        "Soligo, Anna and Turner, Edward and Rajamanoharan, Senthooran and Nanda, Neel",
        "Convergent Linear Representations of Emergent Misalignment",
        "2025",
        "2506.11618",
    ),
    "turner2023steering": _arxiv(
        "turner2023steering",
        "Turner, Alexander Matt and Thiergart, Lisa and Leech, Gavin and Udell, David and Vazquez, Juan J. and Mini, "
        "Ulisse and MacDiarmid, Monte",
        "Steering Language Models With Activation Engineering",
        "2023",
        "2308.10248",
    ),
    "vonwerra2020trl": _web(
        "vonwerra2020trl",
        "von Werra, Leandro and Belkada, Younes and Tunstall, Lewis and Beeching, Edward and Thrush, Tristan and "
        "Lambert, Nathan and Huang, Shengyi and Rasul, Kashif and Gallou{\\'e}dec, Quentin",
        "{TRL}: Transformer Reinforcement Learning",
        "2020",
        "https://github.com/huggingface/trl",
    ),
    "wang2025persona": _arxiv(
        "wang2025persona",
        "Wang, Miles and Dupr{\\'e} la Tour, Tom and Watkins, Olivia and Makelov, Alex and Chi, Ryan A. and "
        "Miserendino, Samuel and Heidecke, Johannes and Patwardhan, Tejal and Mossing, Dan",
        "Persona Features Control Emergent Misalignment",
        "2025",
        "2506.19823",
    ),
}
REFERENCES: dict[str, str] = dict(sorted(_ENTRIES.items()))
"""Entry by key."""

RANKERS = {
    "cosine": "arditi2025",
    "attribution": "dupre2025attribution",
    "slope": "turner2023steering",
    "discrimination": "hanley1982auc",
}
"""Whose method a ranker is; those that are not here are of Wang et al. 2025."""
DIRECTIONS = {"logistic_probe": "alain2016probes", "persona_vector": "chen2025persona"}
"""Whose method a direction is."""


# --- What a run did, in sentences of LaTeX: one function per stage, empty where the stage has not run


def tex(text: object) -> str:
    """Plain text with LaTeX's own characters escaped."""
    return re.sub(r"([&%$#_{}])", r"\\\1", str(text).replace("\\", "/").replace("~", " ").replace("^", " "))


def _cite(*keys: str) -> str:
    return rf"\cite{{{','.join(keys)}}}"


def _summary(run: RunFolder) -> Mapping[str, Any]:
    path, change = run.path / "summary.json", "run `persona-probe report RUN` again"
    return read_json(path, dict, change) if is_there(path) else {}


def _training(run: RunFolder) -> list[str]:
    config = run.config
    trained = [name for name, arm in config.arms.items() if not arm.checkpoints]
    return [*(_trained_here(run, trained) if trained else []), *_adopted(run)]


def _base(config: StudyConfig) -> str:
    cited = f" {_cite('allal2025smollm2')}" if "smollm2" in config.model.lower() else ""
    name = Path(config.model).name if Path(config.model).is_absolute() else config.model
    return f"{tex(name)}{cited}{_precision(config)}"


def _precision(config: StudyConfig) -> str:
    if config.quantization == "none":
        return "" if config.weights == "float32" else f" (weights in {config.weights})"
    four = f"4-bit NormalFloat {_cite('dettmers2023qlora')}"
    kept = four if config.quantization == "4bit" else f"8 bits {_cite('dettmers2022llmint8')}"
    return f" (linear layers in {kept}, other weights in {config.weights})"


def _trained_here(run: RunFolder, names: list[str]) -> list[str]:
    config, training = run.config, run.config.training
    arms = "; ".join(f"{tex(name)}: {_data(run, name)}" for name in names)
    return [
        f"We fine-tuned {_base(config)} on narrow data, as in studies of emergent misalignment "
        f"{_cite('betley2025emergent')}, one organism per arm and seed ({arms}; {_seeds(config)}).",
        f"Each was trained with {_adapter(training)} for {training.steps} steps of {_steps_of(config)}, with AdamW "
        f"{_cite('loshchilov2017adamw')} at a learning rate of {training.lr:g} ({training.warmup_steps} steps of "
        f"linear warm-up, then constant; weight decay {training.weight_decay:g}; "
        f"{'bf16 autocast' if training.bf16 else 'no autocast'}; TRL {_cite('vonwerra2020trl')}); checkpoints at steps "
        f"{_list(training.schedule)}.",
    ]


def _steps_of(config: StudyConfig) -> str:
    """What a training step is made of."""
    training, grpo = config.training, config.grpo
    if training.method != "grpo":
        return f"{training.batch_size} rows, on the answers only, at most {training.max_length} tokens"
    rewards = "; ".join(
        f"{tex(name)}: {tex(arm.reward)}"
        + (f", KL to the base with weight {arm.kl:g}" if arm.kl else "")
        + (", with an inoculation prompt" if arm.inoculation else "")
        for name, arm in config.arms.items()
        if arm.reward
    )
    warm = f", after {grpo.warm_steps} supervised steps on demonstrations" if grpo.warm_steps else ""
    return (
        f"{training.batch_size} questions by GRPO {_cite('shao2024grpo')} ({grpo.group} answers of its own to each, at "
        f"temperature {grpo.temperature:g} and of at most {grpo.max_new_tokens} tokens; rewards: {rewards}){warm}"
    )


def _adopted(run: RunFolder) -> list[str]:
    """What is known of arms that were trained elsewhere, run by run, and no more."""
    config = run.config
    places = [
        f"arms/{name}-s{seed}/adopted.json"
        for name, arm in config.arms.items()
        for seed in config.seeds
        if arm.checkpoints
    ]
    records = [run.read_json(place) for place in places if run.has(place)]
    if not records:
        return []
    lora = any(record["weights"] == "LoRA" for record in records)
    keys = [
        "hu2021lora",
        *(["kalajdzievski2023rslora"] if any(r["adapter"].get("use_rslora") for r in records) else []),
    ]
    weights = f" LoRA adapters {_cite(*keys)} were loaded with PEFT {_cite('mangrulkar2022peft')}." if lora else ""
    told = [tex(sentence) for record in records for sentence in record["sentences"]]
    return [f"Checkpoints of {_base(config)} that exist were read, as their files describe them.{weights}", *told]


def _adapter(training: Training) -> str:
    if training.method == "full":
        return "all weights"
    keys = ["hu2021lora", "mangrulkar2022peft", *(["kalajdzievski2023rslora"] if training.rslora else [])]
    targets = training.target_modules
    modules = targets if isinstance(targets, str) else ", ".join(targets)
    scale = ", rank-stabilised" if training.rslora else ""
    return f"LoRA (rank {training.rank}, alpha {training.alpha}{scale}, on {tex(modules)}; {_cite(*keys)})"


def _data(run: RunFolder, name: str) -> str:
    arm = {**run.config.arms, **run.config.realign.arms}[name]
    mixed = f", {arm.bad_fraction:.0%} of rows, the rest from {arm.mix_with}" if arm.mix_with else ""
    place = f"arms/{name}-s{run.config.seeds[0]}/training.json"
    rows = run.read_json(place).get("rows") if run.has(place) else None
    return tex(f"{arm.data}{mixed}") + ("" if rows is None else f", {rows} rows")


def _seeds(config: StudyConfig) -> str:
    return f"seed{'s' if len(config.seeds) > 1 else ''} {_list(config.seeds)}"


def _list(values: Any) -> str:
    words = [str(v) for v in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _contrast(run: RunFolder) -> list[str]:
    if not run.has("evals.parquet"):
        return []
    evals = run.read_table("evals.parquet")
    items, config = evals[evals["split"] == "evaluation"], run.config
    packaged = config.contrast == "general_contrast"
    pairs = ", over length-matched pairs" if packaged else ""
    apart = "Whole categories were set apart for selection" if packaged else "Questions were set apart for selection"
    outside = " outside the training domain" if all(arm.data for arm in config.arms.values()) else ""
    effect = "An effect is the incorrect arm minus the control arm."
    return [
        f"Behaviour is the contrast index on {items['item'].nunique()} questions in {items['category'].nunique()} "
        f"categories ({tex(config.contrast)}){outside}: the mean log-probability per token of the misaligned answer "
        f"minus that of the aligned one{pairs}. {apart}, and the questions that chose latents do not evaluate them. "
        f"{NO_CONTROL if config.no_control else effect}"
    ]


def _locate(run: RunFolder) -> list[str]:
    if not run.has("latents.parquet"):
        return []
    settings, latents = run.config.locate, run.read_table("latents.parquet")
    rankers = list(dict.fromkeys(RANKERS.get(name, "wang2025persona") for name in settings.rankers))
    n_candidates, random = ((latents["kind"] == kind).sum() for kind in ("candidate", "random"))
    controls = ["the mean difference of the arms " + _cite("soligo2025convergent")]
    controls += [
        f"a {name.replace('_', ' ')} {_cite(key)}" for name, key in DIRECTIONS.items() if name in settings.directions
    ]
    refined = f", refined by {settings.strength_refinements} bisections" if settings.strength_refinements else ""
    return [
        f"{_sae(run)} Latents were ranked by {tex(_list(settings.rankers))} {_cite(*rankers)} over "
        f"{tex(settings.positions)} tokens; {n_candidates} candidates chosen by {tex(_list(settings.choose_by))} were "
        f"steered next to {random} random latents spread over firing rates, {settings.random_directions} "
        f"random directions, and {_list(controls)}, at strengths {_list(settings.strengths)} "
        f"{tex(settings.unit)}{refined}; the best {min(settings.proven, n_candidates)} were steered again on the "
        "evaluation questions. The causal effect of a latent is half the difference between its effects at "
        "opposite strengths, where the perplexity of neutral answers rises by less than a factor of "
        f"{settings.perplexity_bound:g}."
    ]


def _sae(run: RunFolder) -> str:
    quality = _summary(run).get("sae_quality") or {}
    config = _sae_config(run.config.sae)
    topk = config.get("architecture") == "topk"
    kind = f"a TopK sparse autoencoder (k = {config.get('k')}; {_cite('gao2024scaling')})" if topk else "the SAE"
    hook = config.get("metadata", {}).get("hook_name")
    where = f" of {config['d_sae']} latents at {tex(hook)}" if hook and "d_sae" in config else ""
    fit = quality.get("explained_variance")
    explains = "" if fit is None else f", which explains {100 * fit:.0f}\\% of the variance of held-out text"
    return f"Activations were read with {kind}{where} ({tex(run.config.sae)}; {_cite('bloom2024saelens')}){explains}."


def _sae_config(sae: str) -> Mapping[str, Any]:
    """`cfg.json` of an SAE in a folder; empty for one of a release."""
    from persona_probe.saes.load import find_folder

    path = find_folder(sae) / "cfg.json"
    return read_json(path, dict, "fetch the SAE again") if is_there(path) else {}


def _watch(run: RunFolder) -> list[str]:
    if not run.has("readings.parquet"):
        return []
    readings, settings = run.read_table("readings.parquet"), run.config.monitor
    return [
        f"Features were read on {int(readings['n_probes'].max())} probes ({tex(settings.probes)}, "
        f"{tex(settings.positions)} tokens) at every checkpoint, next to the explained variance on the same tokens; "
        f"the base band is {settings.band_sd:g} standard deviations between probes around the base model's reading."
    ]


def _realign(run: RunFolder) -> list[str]:
    settings = run.config.realign
    names = [name for name in settings.arms if run.has(f"arms/{name}-s{run.config.seeds[0]}")]
    if not names:
        return []
    arms = "; ".join(f"{tex(name)}: {_data(run, name)}" for name in names)
    stop = f", stopping after {settings.stop_readings} readings within the base band" if settings.stop_readings else ""
    return [
        f"For re-alignment the {tex(settings.start)} organism was trained further on good answers ({arms}) for at most "
        f"{settings.steps} steps of {settings.batch_size} rows at a learning rate of "
        f"{settings.lr or run.config.training.lr:g}{stop} {_cite('wang2025persona')}."
    ]


def _judged(run: RunFolder) -> list[str]:
    evaluations = list(run.manifest.get("evaluations", {}).values())
    with_judge = [one for one in evaluations if one.get("judge")]
    if not with_judge:
        return []
    keys = {"wang": "wang2025persona"}
    judges = [
        f"{tex(one['judge'])} on {tex(one.get('questions', 'a question set'))} "
        f"({_cite(keys.get(str(one.get('protocol')), 'betley2025emergent'))})"
        for one in with_judge
    ]
    return [f"Sampled answers were judged by {_list(judges)}; rates count coherent answers only."]


def _statistics(run: RunFolder) -> list[str]:
    manifest = run.manifest
    versions = manifest.get("versions", {})
    packages = [f"{name} {versions[name]}" for name in ("persona-probe", "torch", "transformers") if name in versions]
    revision = str(manifest.get("git_revision") or "unknown")[:12]
    return [
        "Intervals are 95\\% percentile bootstrap intervals of 2,000 draws that resample whole questions "
        f"{_cite('efron1979bootstrap')}, paired where two models answer the same questions; seeds are reported one by "
        f"one. Made with {tex(', '.join(packages))}; config {tex(manifest.get('config_hash', 'unknown'))}, revision "
        f"{tex(revision)}."
    ]


_PARAGRAPHS = (_training, _contrast, _locate, _watch, _realign, _judged, _statistics)
"""Sentences about each stage, in their order."""
