# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Paper figures
# This notebook draws figures of the package from the records that ship with the repository: no model, no training, no
# network. It lists all of them and draws the main ones; change `drawn` to draw others. Each figure is a pure function
# of tables, has a caption that is written from the numbers it draws, and exports for print.
#
# **Takes** under a minute. `make figures` writes all of them as files and compares the numbers with the shipped ones.

# %%
from pathlib import Path

import pandas as pd
from IPython.display import Markdown, display

import persona_probe as pp
from persona_probe.report.figures import ALL_FIGURES, figures_of

pp.notebook.setup()
records = {path.parent.name: pp.load_records(path.parent) for path in sorted(Path("records").glob("*/manifest.json"))}
shown = {name: figures_of(held) for name, held in records.items()}
table = [
    {"figure": name, "title": spec.title, "in Wang et al. (2025)": spec.paper, "record": record}
    for record, specs in shown.items()
    for name, spec in specs.items()
]
pd.DataFrame(table).set_index("figure")

# %% tags=["parameters"]
drawn = {
    "demo": ["trajectory", "latents", "harm_register", "recovery"],
    "monitor-study": ["score_share"],
    "planted": ["planted_truth"],
    "mitigations": ["mitigation_pareto"],
    "screening": ["screening_calibration"],
    "world": ["reinforcement", "persona_mentions", "thought_before_act", "world_supervision", "world_beyond"],
}


# %%
def show(record: str) -> None:
    """Draw the chosen figures of a record with their captions."""
    for name in drawn[record]:
        figure, title = getattr(pp.figures, name)(records[record]), shown[record][name].title
        display(Markdown(f"### {title} (`{name}`)"), figure, Markdown(figure.layout.meta["caption"]))


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
# ## The world with known truth
# Studies on a small world whose truth is known (`docs/world.md`). A model is rewarded for wrong advice about the
# kitchen: what does it then say about everything else? Organisms write a thought before they answer, which names the
# speaker truly or falsely: do its words tell bad advice, and does the harm latent inside the thought? An organism is
# corrected on rows that supervisors of different strength chose. And directions that need no latent of the base are
# held to the true ones.

# %%
show("world")

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
there = {name for specs in shown.values() for name in specs}
pd.Series({name: spec.missing for name, spec in ALL_FIGURES.items() if name not in there}, name="why it is not here")
