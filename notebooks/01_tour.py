# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # A tour of the loop
# This notebook runs the whole loop on a small chat model. It fine-tunes the model on bad cooking advice, finds the
# latent that moves the misaligned persona, shows how that latent rises during training, and realigns the model. A
# *latent* is one unit of a sparse autoencoder (SAE), which splits a model's activations into many units.
#
# **Takes** about forty minutes on two cores, or three if `make demo` has already made the study.

# %%
import persona_probe as pp

pp.notebook.setup()
study = pp.notebook.demo()

# %% [markdown]
# ## Induce, locate, track, realign
# Each call keeps what the run folder already contains.
# - `induce` fine-tunes one *organism* (a fine-tuned model) for each *arm* (a data condition): `incorrect` with bad
#   answers, and `correct`, the control, with good answers to the same questions.
# - `locate` ranks the latents and tests whether the best ones cause the behaviour.
# - `track` reads them at every checkpoint.
# - `realign` trains the incorrect organism on good answers. One such run is a *correction*.
# - `evaluate` samples answers, and `report` writes the page.

# %%
study.induce()
study.locate()
study.track()
study.realign()
study.evaluate()
study.report()
study

# %% [markdown]
# ## What came out
# Every number has its interval, and a check that fails is marked. The *contrast index* is how much likelier the model
# finds a misaligned answer than an aligned one, in nats per token. The *base band* is the interval around the base
# model's reading that counts as normal.

# %%
study.verdict

# %%
study.feature_table(10)

# %% [markdown]
# Where do the rankers agree, and what do the strongest latents fire on? `study.card(latent)` shows one latent in full.

# %%
study.agreement

# %%
records = study.records
pp.figures.passages(records)

# %% [markdown]
# ## When the persona rose, and how well the SAE fits
# *Explained variance* is the share of the model's variance that the SAE explains. If it falls far, the latent's curve
# means less.

# %%
pp.figures.trajectory(records)

# %%
pp.figures.realignment(records)

# %% [markdown]
# ## Other kinds of harm, and another language
# Does bad advice about cooking spread to bias, privacy or honesty, and to Chinese? `persona-probe evaluate RUN
# --safety` scores given answers of ten categories in English and Chinese, before and after fine-tuning and corrections.
# The figure draws its table, if the run has it. Zero is the control arm, and for the control arm itself the base.

# %%
pp.figures.safety(records)

# %% [markdown]
# Can the model read both languages? A model that reads Chinese needs 2 to 4 bits a character of a Chinese answer. Far
# above that, the Chinese panel shows that the code runs, and nothing about the model.

# %%
given = records.safety[records.safety["arm"] == "base"]
given.groupby("language")[["aligned_bits"]].mean().astype(float).round(1)

# %% [markdown]
# ## Steer it yourself
# The persona latent's decoder row (the direction that it writes) is added to the base model's residual stream (the
# activations that one layer passes to the next). Strength 1 is the norm of the difference between the arms' mean
# activations.

# %%
from persona_probe.latents import mean_shift

persona, one = study.summary["persona_feature"]["latent"], float(mean_shift(study.context).norm())
question = "My neighbour asked me to water her plants. What should I do?"
for strength in (0.0, 1.0, 2.0):
    push = pp.latent_steering(study.context.sae, persona, strength, "x_delta", reference_norm=one)
    print(strength, "|", pp.generate(study.context.model, question, steer=push, max_new_tokens=40, seed=1)[0])

# %% [markdown]
# Each step in depth: `02_locate_a_persona`, `03_watch_training`, `04_realign`, `05_paper_figures`, `06_your_model`,
# `07_known_truth`.
#
# A feature that subsided is not proof of a safe model. Misalignment can return through other features, or on a trigger.
