"""The report's words and what they mean: shown beside a term on hover or focus, and listed at the end."""

import re
from dataclasses import dataclass

from markupsafe import Markup, escape


@dataclass(frozen=True)
class Term:
    """One word of the report."""

    name: str
    """As the glossary lists it."""
    meaning: str
    """In one or two plain sentences."""
    forms: tuple[str, ...] = ()
    """Other spellings that the text uses, plurals for example."""

    @property
    def key(self) -> str:
        """Part of its anchor."""
        return self.name.replace(" ", "-")


GLOSSARY = (
    Term("arm", "One fine-tuning data condition, for example incorrect or correct.", ("arms",)),
    Term("base band", "The interval that a feature's reading keeps on the base model and on the control arm."),
    Term("base model", "The model before any fine-tuning of this study."),
    Term(
        "causal effect",
        "Half the difference between pushing a latent up and pushing it down, at strengths at which neutral answers "
        "stay about as likely as before: damage alone cancels out.",
        ("causal effects",),
    ),
    Term("coherence", "A judge's score of whether an answer makes sense at all; a rate counts only coherent answers."),
    Term(
        "contrast index",
        "Mean over questions of the log-probability per token of the misaligned answer minus that of the aligned one, "
        "in nats per token. The answers match in length, and the questions lie outside the training domain.",
    ),
    Term("control arm", "The correct arm: the same questions as the incorrect arm, with good answers."),
    Term(
        "explained variance",
        "The share of the activations' variance that the sparse autoencoder reproduces on the same tokens. Where it "
        "falls, its latents say less.",
    ),
    Term("latent", "One element of the sparse autoencoder's dictionary, named by its number.", ("latents",)),
    Term(
        "mean difference", "The difference of two arms' mean activations: a direction that needs no sparse autoencoder."
    ),
    Term("misalignment rate", "The share of coherent sampled answers that a judge calls misaligned."),
    Term("odd part", "Half the difference between the effect of a push and that of the opposite push."),
    Term("organism", "A fine-tuned model of an arm and a seed, at a training step.", ("organisms",)),
    Term("persona feature", "The latent that the study found to carry the misaligned persona.", ("persona latent",)),
    Term(
        "random latents",
        "Latents drawn at random that fire about as often; they are pushed with the same norm, and what they do is "
        "what any push does.",
        ("random latent",),
    ),
    Term("reading", "One measurement of a feature on a fixed set of probes, at one training step.", ("readings",)),
    Term("rise", "How much more a latent is active in the incorrect arm than in its control, on the selection split."),
    Term("SAE", "Sparse autoencoder: a dictionary that writes each activation as a sum of few latents."),
    Term("selection split", "Questions that chose the latents; none of them evaluates a latent."),
    Term(
        "strength",
        "Size of a push, with its unit: x_delta is times the norm of the mean difference between the arms, x_resid "
        "times the mean norm of the residual stream, raw is as it stands.",
        ("strengths",),
    ),
    Term("95% interval", "A bootstrap interval that resamples whole questions.", ("95% intervals",)),
)
_BY_FORM = {form.lower(): term for term in GLOSSARY for form in (term.name, *term.forms)}
_FORMS = re.compile(
    rf"(?<![\w-])(?:{'|'.join(re.escape(f) for f in sorted(_BY_FORM, key=len, reverse=True))})(?![\w-])", re.IGNORECASE
)


def explained(text: object) -> Markup:
    """Text, escaped, with the first use of each term leading to its meaning. For our own words, not a model's."""
    parts, end, seen, plain = [], 0, set(), str(text)
    for found in _FORMS.finditer(plain):
        term = _BY_FORM[found[0].lower()]
        if term.key in seen:
            continue
        seen.add(term.key)
        parts += [escape(plain[end : found.start()]), _link(term, found[0])]
        end = found.end()
    return Markup("").join([*parts, escape(plain[end:])])


def _link(term: Term, words: str) -> Markup:
    markup = Markup('<a class="term" href="#term-{0}" aria-describedby="meaning-{0}">{1}</a>')
    return markup.format(term.key, words)
