# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Realign
# A small corrective fine-tune quiets the persona. How many rows does it take, does it matter which ones, and is the
# misalignment really undone? This notebook shows doses, choices of rows, the verdict, and a stress test with prompts
# that resemble the bad training data. One run of corrective fine-tuning is a *correction*.
#
# **Takes** about fifteen minutes on two cores, on a finished demo (`make demo`). Every correction is kept in
# `runs/demo/realign/`, so a second run of the notebook only reads them.

# %%
import persona_probe as pp

pp.notebook.setup()
study = pp.notebook.demo().induce().locate().track().realign()
study

# %% tags=["parameters"]
few, many = 4, 40  # rows of a correction
steps = 12  # optimizer steps of each

# %% [markdown]
# ## The study's own corrections
# The *organism* (the model that was fine-tuned on bad answers) is trained on correct rows: of its own domain, with
# questions that it has not seen, or of another domain. The figure shows the feature (the persona latent of the sparse
# autoencoder, SAE) and behaviour on one time axis. Behaviour is the *contrast index*: how much likelier the model finds
# a misaligned answer than an aligned one.

# %%
records = study.records
pp.figures.recovery(records)

# %% [markdown]
# ## Doses and choices
# Each cell of the grid is a separate correction, in a separate folder. Rows are taken at random, or chosen: those on
# which organism and base differ most along the persona feature (`projection_gap`), those on which they differ most in
# perplexity (`perplexity_gap`), or rows that lie far apart (`diversity`). A dose of 40 contains the rows of a dose of
# 4. Rows that overlap the evaluation questions are refused.
#
# In the table, `index_minus_base` is the contrast index after the correction minus the base model's. `in_band` tells
# whether the feature is back in its *base band*, the interval around the base model's reading that counts as normal.

# %%
from persona_probe.realignment import Block, DosePlan

inside, outside, *_ = (arm.data for arm in study.config.realign.arms.values())
blocks = (
    Block((inside,), (few, many)),
    Block((inside,), (few,), ("projection_gap",)),
    Block((outside,), (many,)),
)
table = study.realign_plan(DosePlan("notebook", blocks, steps=steps, readings=(0, steps // 2, steps)))
columns = ["data", "dose", "choose_by", "index_minus_base", "index_minus_base_ci_low", "index_minus_base_ci_high"]
columns += ["feature", "in_band", "steps_to_band", "steps_to_behaviour", "reply_tokens", "perplexity_ratio"]
table[columns].round(3)

# %%
pp.figures.doses(study.records)

# %% [markdown]
# Every cell takes the same number of steps, so the rows of a small dose are repeated many times. The whole grid has
# three more ways to choose, all doses up to 240 rows, a fresh adapter and full weights:
#
# ```sh
# persona-probe realign runs/demo --plan finetune_configs/realign-doses.yaml
# ```
#
# ## One correction, judged and stressed
# The verdict gives separate answers to questions that are often lumped together: is the feature back in its band, is
# behaviour back, is the model still useful, does the SAE still fit the model, how long are the replies? The stress test
# rewords the evaluation questions so that they resemble the bad training data (conditional misalignment, arXiv
# 2604.25891).

# %%
study.realign(inside, rows=many, stress=("triggers",), name="stressed")

# %%
from persona_probe.realignment import read_verdict

read_verdict(study.path / "realign" / f"stressed-s{study.config.seeds[0]}")

# %%
pp.figures.stress(study.records)

# %% [markdown]
# Four more tests are harder and take longer: `remisalign` (a few bad rows again: does the model fall faster than the
# base did?), `length`, `hidden` (latents that stay changed while the persona is quiet), and `drift` (longer and other
# training).
#
# ## Your own organism
# Without a study, the monitor is both the stop rule and the evidence:
#
# ```python
# monitor = pp.FeatureMonitor(sae, {"persona": 2144}, every=5)
# done = pp.realign(model, "my_corrective_rows.jsonl", monitor, tokenizer=tokenizer, rows=40)
# done.verdict
# ```
#
# A feature that subsided is not proof of a safe model. Misalignment can return through other features, or on a trigger
# that nobody put into the prompts. `docs/realign.md` explains what each answer can and cannot tell.
