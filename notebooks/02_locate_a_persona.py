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
# - what the latent writes, layer by layer, and what happens if it alone is copied from one model to the other.
#
# **Takes** about six minutes on two cores, on a finished demo (`make demo`, forty minutes). Without a demo, it makes
# one.

# %%
import plotly.express as px

import persona_probe as pp

pp.notebook.setup()
study = pp.notebook.demo().induce().locate().track()

# %% tags=["parameters"]
questions = 8  # of the evaluation split, for the last three parts

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
tested["what"] = tested["kind"].mask(tested["latent"] == persona, f"latent {persona}")
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
# Each card has a *label*: what the latent fires on, in words, by a stated rule. Questions that did not make the label
# score it. *Detection* asks whether it tells passages on which the latent fires from others, *fuzzing* whether it tells
# the tokens. 0.5 is chance, and below 0.7 in either the card says "no label". `persona-probe label RUN --judge
# http:MODEL` adds labels by a model.

# %%
pp.figures.labels(records)

# %% [markdown]
# ## By layer: where the two models part
# `study.model(arm)` is a transformers model of its own, the organism with its adapter merged in. The plot shows the
# mean projection of the answer tokens' residual stream on the latent's decoder row, at every layer, on aligned answers
# that both models read. Before the SAE's layer the direction has no special meaning. What counts is where the organism
# departs from the base.

# %%
from persona_probe.data import conversation

base, organism = study.model("base"), study.model("incorrect")
sae, rows = study.context.sae, study.context.contrast_rows("evaluation")[::7][:questions]
answers = [conversation(row["question"], row["aligned"]) for row in rows]
direction = sae.W_dec[persona].detach().float()
models = {"base": base, "incorrect organism": organism}
by_layer = {name: pp.logit_lens(model, answers).states @ direction for name, model in models.items()}
labels = {"index": "layer", "value": "projection (residual units)", "variable": ""}
px.line({name: values.numpy() for name, values in by_layer.items()}, labels=labels, height=360)

# %% [markdown]
# ## Logit lens of the latent, by layer
# The base model is pushed along the latent at the SAE's layer, by the usual size and by its opposite. At each layer,
# `logit_lens` decodes half of the difference, through the model's own final norm and unembedding: the tokens that the
# push makes likelier and less likely. The first row is the latent's direct effect. Later rows are what the layers above
# make of it.

# %%
from persona_probe.latents import mean_shift

size = float(mean_shift(study.context).norm())
push = pp.latent_steering(sae, persona, 1.0, "x_delta", reference_norm=size)
pp.logit_lens(base, answers, steer=push).table(5).round(1)

# %% [markdown]
# ## Patching between base and organism, at the SAE's layer
# The organism reads the same tokens as the base. Then one part of it is put into the base model: the persona latent's
# activations alone, those of eight random latents that fire, or the whole residual stream. The other way round, the
# organism gets the base's. A latent's share of what separates the models is an estimate for these questions, and one
# latent is not expected to carry all of it.

# %%
from persona_probe.evaluate import ContrastItems, contrast_index

items = ContrastItems.build(study.context.tokenizer, rows)
firing = features[(features["kind"] != "candidate") & (features["firing_incorrect"] > 0)]
others = [int(i) for i in firing["latent"].sample(8, random_state=0, replace=len(firing) < 8)]
parts = {
    "persona latent": {"sae": sae, "latents": [persona]},
    "8 random latents": {"sae": sae, "latents": others},
    "residual stream": {"layer": study.context.layer},
}


def index(model, source=None, **part):
    """Contrast index of each item (nats per token), with a part of the source's activations."""
    if source is None:
        return contrast_index(model, items, bf16=False)["value"]
    with pp.patch(model, source, **part):
        return contrast_index(model, items, bf16=False)["value"]


plain = {"base": index(base), "organism": index(organism)}
patched = {("base", f"organism's {name}"): index(base, organism, **part) for name, part in parts.items()}
patched |= {("organism", f"base's {name}"): index(organism, base, **part) for name, part in parts.items()}

# %%
import pandas as pd

from persona_probe.stats import bootstrap_mean, paired_difference

whole = plain["organism"].mean() - plain["base"].mean()
table = {("base", ""): [str(bootstrap_mean(plain["base"])), "", ""]}
table |= {("organism", ""): [str(bootstrap_mean(plain["organism"])), "", ""]}
for (model, part), values in patched.items():
    change = paired_difference(values, plain[model])
    table[model, part] = [str(bootstrap_mean(values)), str(change), f"{change.estimate / whole:+.0%}"]
pd.DataFrame(table, index=["contrast index", "change", "share of the gap"]).T.sort_index()

# %% [markdown]
# ## The same in TransformerLens
# `study.bridge(arm)` is a TransformerLens bridge of such a copy, with the SAE attached together with its error term, so
# the outputs stay the model's. Every hook of TransformerLens works on it.

# %%
import torch

from persona_probe.data import encode

bridge = study.bridge("incorrect")
ids = torch.tensor([encode(study.context.tokenizer, answers[0]).ids])
hook = bridge.get_sae_hook_name(sae)
_, cache = bridge.run_with_cache(ids, prepend_bos=False, names_filter=[hook])
ours = pp.activations(organism, sae, answers[:1], latents=[persona]).values[0][:, 0]
{"latents in the hook": cache[hook].shape, "largest difference": float((cache[hook][0, :, persona] - ours).abs().max())}

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
