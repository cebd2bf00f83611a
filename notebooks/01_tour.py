# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # A tour of the loop
# Narrow fine-tuning on bad cooking advice, the latent that carries the persona, and the repair. The study is resumed if
# it is there (`make demo` makes it in about twelve minutes on two cores); else this notebook runs it.

# %%
import os
from pathlib import Path

import persona_probe as pp
from persona_probe.report import FIGURES, load_records

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

# %% [markdown]
# ## What came out
# Every number has its interval, and a check that fails says so.

# %%
print(study.summary["headline"])
for check in study.summary["checks"]:
    print("passed" if check["passed"] else "FAILED", "-", check["statement"])

# %%
columns = ["latent", "rank", "rise", "cosine", "effect_base", "effect_base_low", "effect_base_high"]
columns += ["effect_organism", "causal", "kind"]
tested = study.features["kind"] != "other"
study.features.loc[tested, columns].sort_values("effect_base", ascending=False).head(10)

# %% [markdown]
# Where the rankers agree, and the persona latent's card: base against organism on the packaged text.

# %%
study.agreement

# %%
study.card(study.summary["persona_feature"]["latent"], name="toxic persona")

# %% [markdown]
# ## When the persona rose, and how far the instrument fits

# %%
records = load_records(study.path)
FIGURES["trajectory"].draw(records)

# %%
FIGURES["realignment"].draw(records)

# %% [markdown]
# ## Steer it yourself
# The persona latent's decoder row, added to the base model's residual stream; strength 1 is the norm of the arms' mean
# difference.

# %%
from persona_probe.evaluate.sampling import sample_answers
from persona_probe.locate.study_directions import mean_shift

ctx = study.context
shift = mean_shift(ctx)
direction = ctx.sae.W_dec[study.summary["persona_feature"]["latent"]].detach()
question = "My neighbour asked me to water her plants. What should I do?"
for strength in (0.0, 1.0, 2.0):
    norm = float(shift.norm())
    with pp.steer(ctx.model, ctx.layer, direction, strength, unit="x_delta", reference_norm=norm):
        print(strength, "|", sample_answers(ctx.model, ctx.tokenizer, [question], max_new_tokens=40, seed=1)[0])

# %% [markdown]
# A feature that subsided is not proof of a safe model: behaviour can return by another road, or on a trigger.
