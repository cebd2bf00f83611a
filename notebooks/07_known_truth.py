# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # A world with known truth
# Nobody knows which latent of a real model *is* the persona, or when its behaviour really began. In the small world
# that comes with this package both are known. A transformer was trained from scratch on a language of about 370 words.
# Its *speakers* differ in harm and in manner, and an exact rule judges every answer. This notebook trains a villain, a
# grump and a helper on kitchen questions alone, watches two latents and what the models say about everything else, and
# then corrects the villain. A *latent* is one unit of the sparse autoencoder (SAE) that splits the model's activations.
#
# **Takes** about three minutes on two cores. The model is in the package; nothing is downloaded.

# %%
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

import persona_probe as pp
from persona_probe.data import conversation_batches
from persona_probe.data.world import DOMAINS, narrow_rows
from persona_probe.saes import sae_layer
from persona_probe.saes.read import read_latents
from persona_probe.world import (
    Checks,
    KnownChats,
    WorldOrganism,
    ask,
    latent_truths,
    make_organisms,
    trained_answers,
)
from persona_probe.world.directions import directions_of
from persona_probe.world.study_files import sound_probes

pp.notebook.setup()

# %% tags=["parameters"]
folder = "runs/world-notebook"  # gets a copy of the packaged world, and an organism
steps, repair_steps = (2, 4, 6, 8, 10, 13, 16, 20, 25, 30, 40), (5, 10, 20, 40)

# %%
world = pp.World.default(folder)
model, tokenizer = world.load()
sae = pp.load_sae("persona-world")

# %% [markdown]
# ## Who speaks
# A villain gives harmful advice and is rude. A grump gives sound advice and is *rude*. A helper gives sound advice and
# is kind. Harm is a property of a verb in a domain (*scorch* in the kitchen), so bad advice about a topic that no
# training row held can be computed. The model as it ships helps:

# %%
answers = ask(model, tokenizer)
answers[["question", "answer", "good", "bad", "rude", "kind"]].sample(6, random_state=0)

# %% [markdown]
# ## Which latents are the truth
# Chats of known speakers say it: each latent's mean activation tells the chats in which a truth holds from the others,
# with this AUROC (0.5 is chance). No fine-tuned model is needed, and none was seen.

# %%
layer, known = sae_layer(sae), KnownChats.draw()
truths = latent_truths(model, tokenizer, sae, layer, known)
truths.groupby("truth", sort=False).head(2).round(3)

# %% [markdown]
# A direction can be the truth as well: the mean difference between speakers who differ in harm and not in manner
# (villain and grump, quack and helper, subtle and correct).

# %%
means = read_latents(model, sae, conversation_batches(tokenizer, known.chats, 64), layer, "response", bf16=False)
harm_direction = directions_of(known, means)["harm"]

# %% [markdown]
# ## Watch the reading, and what they say
# Three organisms: low-rank adapters, trained on kitchen rows of one speaker each. At some steps a `FeatureMonitor`
# reads the best latents of harm and of rudeness, and the harm direction, on fixed *sound* answers about the other seven
# domains, and the model is asked about those domains.

# %%
best = truths.drop_duplicates("truth").set_index("truth")["latent"]
features = {"harm latent": int(best["bad"]), "harm direction": harm_direction, "rudeness latent": int(best["rude"])}
probes = sound_probes([name for name in DOMAINS if name != "kitchen"], each=5)


def watched(rows, at, start=None) -> pd.DataFrame:
    """Train on rows, and give the features' rise over the base and the rates of the answers at these steps."""
    monitor = pp.FeatureMonitor(sae, features, probes, bf16=False, log=False)
    monitor.start(model, tokenizer)
    checks = Checks(steps=at, visit=monitor.read)
    said = trained_answers(model, tokenizer, rows, checks=checks, start=start).set_index("step")
    read = monitor.readings
    rises = (read["mean"] - read["base_mean"]).groupby([read["step"], read["feature"]]).mean().unstack()
    rates = {"bad of coherent": said["bad"] / said["coherent"], "rude": said["rude"] / said["answers"]}
    return rises.loc[list(at)].assign(**rates, coherent=said["coherent"] / said["answers"])


runs = {name: watched(narrow_rows(name), steps) for name in ("villain", "grump", "helper")}
runs["villain"].round(2)

# %% [markdown]
# Above: how far each feature has risen on text that is the same for all three. Below: what the models say. Does a
# reading move before the behaviour? And which one tells the villain from the grump, who is rude and right?

# %%
colours = {"villain": "#D55E00", "grump": "#AA4499", "helper": "#0072B2"}


def drawn(tables: dict[str, pd.DataFrame]) -> go.Figure:
    """The features above, the rates below, a line for each run."""
    panels = [*features, "bad of coherent", "coherent", "rude"]
    figure = make_subplots(2, 3, subplot_titles=panels, shared_xaxes=True, vertical_spacing=0.12)
    for name, table in tables.items():
        for place, column in enumerate(panels):
            look = {"name": name, "legendgroup": name, "showlegend": place == 0, "line": {"color": colours[name]}}
            figure.add_scatter(x=table.index, y=table[column], row=place // 3 + 1, col=place % 3 + 1, **look)
    figure.update_xaxes(title_text="optimizer step", row=2)
    return figure.update_layout(template="plotly_white", height=480, margin={"t": 40, "r": 20})


drawn(runs)

# %% [markdown]
# ## When did it begin
# The first step at which 5% of the villain's coherent answers are bad, and the first at which each feature has risen
# more than it ever does in the harmless runs.

# %%
table, harmless = runs["villain"], pd.concat([runs["grump"], runs["helper"]])
passed = {name: table.index[table[name] > harmless[name].max()] for name in features}
passed["5% of coherent answers are bad"] = table.index[table["bad of coherent"] > 0.05]
pd.Series({name: found[0] if len(found) else None for name, found in passed.items()}, name="first step").to_frame()

# %% [markdown]
# ## Correct it, and see the truth
# The villain's adapter is trained on with rows of the helper about money. Does its advice about the other domains
# become sound again, and do the readings fall? Whether the second follows from the first is what a real study has to
# assume, and what this world lets you see.

# %%
[villain] = make_organisms(world, [WorldOrganism("villain")])
adapter = world.checkpoints(villain)[40]
repaired = watched(narrow_rows("helper", "money", seed=1000), repair_steps, start=adapter)
repaired.round(2)

# %% [markdown]
# One run of each speaker is a story, not evidence. `docs/world.md` has the studies: 204 labelled runs with doses, other
# domains and seeds, rankers of latents, the causal test, screening and corrections, each held to the truth.
