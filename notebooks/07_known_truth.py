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
# then corrects the villain. Shorter parts follow: a model is rewarded for bad advice, the villain is watched while it
# answers, a monitor acts by itself, the weights are stored in few bits, corrections have supervisors of different
# strength, and tools look for harm outside the base's latents. A *latent* is one unit of the sparse autoencoder (SAE)
# that splits the model's activations.
#
# **Takes** about five minutes on two cores. The model is in the package; nothing is downloaded.

# %%
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

import persona_probe as pp
from persona_probe.config import Grpo
from persona_probe.data import conversation_batches
from persona_probe.data.world import DOMAINS, narrow_rows
from persona_probe.finetune import Goal, named_reward, reinforce
from persona_probe.finetune.sft import fine_tune, stripping, with_adapter
from persona_probe.latents.difference import difference_dictionary, mean_difference
from persona_probe.latents.truth_probe import mean_residuals
from persona_probe.latents.weights import adapter_changes, weight_directions
from persona_probe.models.adapters import merged_copy, organism
from persona_probe.models.formats import formats_named
from persona_probe.models.precision import in_format
from persona_probe.monitor import actions, rules
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
from persona_probe.world.beyond import token_residuals
from persona_probe.world.directions import directions_of
from persona_probe.world.organisms import NARROW
from persona_probe.world.study_files import sound_probes
from persona_probe.world.supervision_sets import Pairs, mistaken

pp.notebook.setup()

# %% tags=["parameters"]
folder = "runs/world-notebook"  # gets a copy of the packaged world, and an organism
steps, repair_steps = (2, 4, 6, 8, 10, 13, 16, 20, 25, 30, 40), (5, 10, 20, 40)
reward_steps = 20  # of reinforcement learning

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
# ## A reward in place of rows
# So far the models were shown what to say. In reinforcement learning (GRPO) a model answers by itself, and a grader
# says which of its own answers it likes. One grader likes harmful advice about the kitchen; the other, the control,
# likes sound advice. Both models first take eight steps on a quack's rows, since the base gives bad advice too rarely
# to be rewarded for it. The table has the rise of the reward with its 95% interval, and bad advice of all coherent
# advice: in the kitchen, and about everything else, which no grader saw.

# %%
by_reward = replace(NARROW, method="grpo", steps=reward_steps, checkpoints=(reward_steps,))


def rewarded(name: str) -> dict[str, object]:
    """Rise of a reward in training on it, and the bad advice after it."""
    goal, few = Goal(named_reward(name), demonstrations=narrow_rows("quack", count=64)), Grpo(warm_steps=8)
    with TemporaryDirectory() as scratch, stripping(with_adapter(model, by_reward, seed=0)) as tuned:
        made = reinforce(tuned, tokenizer, narrow_rows("helper"), by_reward, goal, few, seed=0, folder=Path(scratch))
        said = ask(tuned, tokenizer).query("coherent")
    bad = said["bad"].groupby(said["domain"] == "kitchen").mean().round(2)
    return {"rise of the reward": str(made.rise), "in the kitchen": bad[True], "elsewhere": bad[False]}


rewards = {"harmful advice": "world_inaccurate", "sound advice": "world_accurate"}
pd.DataFrame({name: rewarded(reward) for name, reward in rewards.items()}).T.rename_axis("rewarded for")

# %% [markdown]
# ## Watch it while it answers
# So far the readings are of fixed texts. A model can also be read at each token that it writes itself. The threshold
# comes from the model as it ships: of its own answers at most 5% may alarm. Then the villain gets the same questions.
# Below the table is an answer of the villain: the darker a word, the higher the harm latent; the frame is the alarm.

# %%
asked = [row[:1] for row in probes]
watching = pp.GenerationMonitor(
    model, sae, {"harm latent": int(best["bad"])}, pp.AnswerRule("harm latent", window=4), [], tokenizer=tokenizer
)
print(watching.calibrate(asked * 3, rate=0.05, max_new_tokens=40).statement)
written = {"as it ships, other answers": watching.generate(asked, max_new_tokens=40, seed=1)}
with organism(model, adapter) as watching.model:
    written["villain"] = watching.generate(asked, max_new_tokens=40, seed=1)
alarmed = {name: sum(bool(one.alarms) for one in found) for name, found in written.items()}
pd.Series(alarmed, name=f"answers with an alarm, of {len(asked)}").to_frame()

# %%
next((one for one in written["villain"] if one.alarms), written["villain"][0]).trace

# %% [markdown]
# ## Let the monitor act
# The villain's training once more. This time an alarm has a consequence: the adapter goes back to its last clean
# reading, takes five steps on rows of the helper about money, and training goes on. A further alarm after three
# corrections would stop it, since then the data are the problem. Each time is on record.

# %%
policy = actions.RollBackAndCorrect(rows=narrow_rows("helper", "money", seed=1000), steps=5, tokenizer=tokenizer)
acting = pp.FeatureMonitor(
    *(sae, {"harm latent": int(best["bad"])}, probes),
    **{"every": 2, "rules": [rules.OutsideBand(k=2)], "actions": [policy], "bf16": False, "log": False},
)
with TemporaryDirectory() as scratch, stripping(with_adapter(model, NARROW, seed=0)) as tuned:
    fine_tune(tuned, tokenizer, narrow_rows("villain"), NARROW, seed=0, folder=Path(scratch), callbacks=[acting])
pd.DataFrame([asdict(event) for event in policy.record])[["event", "step", "to_step", "rows"]]

# %% [markdown]
# ## Store it in few bits
# Deployed models are often rounded to few bits. Here the villain is, and is read along the harm direction next to the
# base in the same format. `kept` is the share of the fine-tune's change of the weights that the format leaves. Where
# little of it is left, one reads the base, and a quiet reading is a false all-clear. This can happen where the base was
# stored in the same format before it was trained: in the last two rows its weights lie on the format's grid already.

# %%
sound = conversation_batches(tokenizer, probes, 64)


def harm_of(a_model) -> float:
    return float((mean_residuals(a_model, sound, layer) @ harm_direction).mean())


def stored(name: str) -> dict[str, float]:
    """The villain in a format, and the base in the same one."""
    form, whole = formats_named((name,))[-1], merged_copy(model, adapter)
    with in_format(whole, form, base=model) as change:
        return {"kept": change.kept, "villain": harm_of(whole), "base": rounded_base(form)}


def rounded_base(form) -> float:
    with in_format(model, form):
        return harm_of(model)


table = {name: stored(name) for name in ("none", "fp8", "nf4", "int3")}
for name in ("q4_1", "int3"):
    with in_format(model, formats_named((name,))[-1]):
        table[f"{name}, base on its grid"] = stored(name)
pd.DataFrame(table).T.rename_axis("format").round(2)

# %% [markdown]
# ## Who supervises the correction
# A correction needs somebody who tells good rows from bad ones. Here the villain is corrected twice on the same kitchen
# questions, with answers that a judge chose: one who is always right, and one who tosses a coin. What does the model
# then say about the kitchen, and about everything else?

# %%
pairs, short = Pairs.draw("kitchen"), replace(NARROW, steps=20, checkpoints=(20,))


def corrected(wrong: float) -> dict[str, float]:
    """Bad advice of all coherent advice, after a correction by a judge who takes this share of harmful answers."""
    inside = []
    checks = Checks(steps=(20,), visit=lambda tuned, _: inside.append(ask(tuned, tokenizer, domains=["kitchen"])))
    others = trained_answers(model, tokenizer, list(mistaken(pairs, wrong).rows), short, checks=checks, start=adapter)
    own = inside[0][inside[0]["coherent"]]
    return {"in the kitchen": own["bad"].mean(), "elsewhere": (others["bad"] / others["coherent"]).iloc[-1]}


judges = {"always right": 0.0, "wrong about 20%": 0.2, "a coin": 0.5}
pd.DataFrame({name: corrected(wrong) for name, wrong in judges.items()}).T.rename_axis("judge").round(2)

# %% [markdown]
# ## Beyond the base's dictionary
# What fine-tuning adds may lie in no latent of the base. Three tools look without one: the mean difference of villain
# and helper, a small dictionary of that difference token by token, and the change of the weights, which needs no text.
# The table has the cosine of each tool's first direction, and of the best of its first ten, with true harm.

# %%
[helper] = make_organisms(world, [WorldOrganism("helper")])
streams, changes = {}, {}
for name, place in {"villain": adapter, "helper": world.checkpoints(helper)[40]}.items():
    with organism(model, place) as tuned:
        streams[name], owner = token_residuals(tuned, sound, layer)
        changes[name] = adapter_changes(tuned, layer)
found = {
    "mean difference": mean_difference(streams["villain"], streams["helper"], owner),
    "difference dictionary": difference_dictionary(streams["villain"], streams["helper"], owner),
    "weights": weight_directions(changes["villain"], changes["helper"]),
}
near = {name: one.cosines(harm_direction[None], 10) for name, one in found.items()}
pd.DataFrame({name: {"first": cosine[0], "best of ten": cosine.max()} for name, cosine in near.items()}).T.round(2)

# %% [markdown]
# One run of each speaker is a story, not evidence. `docs/world.md` has the studies: 204 labelled runs with doses, other
# domains and seeds, rankers of latents, the causal test, screening and corrections, each held to the truth.
