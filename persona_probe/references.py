"""BibTeX of the methods that a study may use; `cite` prints those that it did use."""


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
    "hu2021lora": _arxiv(
        "hu2021lora",
        "Hu, Edward J. and Shen, Yelong and Wallis, Phillip and Allen-Zhu, Zeyuan and Li, Yuanzhi and Wang, Shean and "
        "Wang, Lu and Chen, Weizhu",
        "{LoRA}: Low-Rank Adaptation of Large Language Models",
        "2021",
        "2106.09685",
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
