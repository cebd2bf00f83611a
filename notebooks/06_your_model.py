# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Your model, your data, your SAE
# What changes if the model is yours: a Hugging Face pair (before and after fine-tuning), a sparse autoencoder (SAE) of
# the base model, and your texts. An SAE splits a model's activations into many units, called *latents*. This notebook
# makes every choice in the open: layer, positions, units, strengths.
#
# **Takes** about three minutes on two cores. It runs offline: the pair is a folder that this notebook writes and
# adapters of the demo (`make demo`), and the SAE is the packaged one. The lines for the hub are shown as text.

# %%
import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

import persona_probe as pp

pp.notebook.setup()
study = pp.notebook.demo().induce()
device = "cuda" if torch.cuda.is_available() else "cpu"

# %% tags=["parameters"]
n_probes, n_items = 32, 24  # texts for the SAE's fit, and questions to locate with
strengths = (-2.0, -1.0, 1.0, 2.0)

# %% [markdown]
# ## The pair
# `base` is the model before fine-tuning, `tuned` the model after. Each is a hub id, a folder of weights, or a folder of
# a PEFT adapter. A `control` (the same questions with good answers) turns "fine-tuning did this" into "bad answers did
# this".
#
# ```python
# base, tuned, control = "Qwen/Qwen2.5-7B-Instruct", "you/qwen-bad-advice", "you/qwen-good-advice"
# ```

# %%
base = study.path / "notebook" / "base"
plain, tokenizer = pp.load_model(study.config.model)
plain.save_pretrained(base)
tokenizer.save_pretrained(base)

seed = study.config.seeds[0]
tuned, control = (
    study.run_folder.checkpoint(arm, seed, study.run_folder.steps(arm, seed)[-1]) for arm in ("incorrect", "correct")
)
model, tokenizer = pp.load_model(str(base), device=device)
sum(p.numel() for p in model.parameters()) / 1e6, len(model.model.layers)

# %% [markdown]
# ## The SAE
# You need an SAE of the *base* model's residual stream (the activations that one layer passes to the next): a folder in
# SAELens format, or a SAELens release as `release/sae_id`. A release for another model of the family does not work. An
# SAE of the pretrained model may work on a chat model, if it still fits.
#
# ```python
# sae = pp.load_sae("qwen2.5-7b-instruct-andyrdt/resid_post_layer_15_trainer_1")  # for Qwen2.5-7B-Instruct
# sae = pp.load_sae("llama-3.1-8b-instruct-andyrdt/resid_post_layer_15_trainer_1")  # for Llama-3.1-8B-Instruct
# sae = pp.load_sae("gemma-scope-2-1b-it-res/layer_17_width_16k_l0_medium")  # for gemma-3-1b-it
# ```
# `persona-probe saes list` shows what fits which model. Before you interpret anything: does it reconstruct this model
# on chat text? *Explained variance* is the share of the model's variance that it reconstructs. Below one half (our
# default), a latent's activity tells little.

# %%
from persona_probe.saes import check_explained_variance, sae_layer

sae = pp.load_sae(study.config.sae, device=device)
layer = sae_layer(sae)
probes = study.context.probes[:n_probes]
least = study.config.locate.minimum_explained_variance
fit = check_explained_variance(model, tokenizer, sae, probes, layer, least, positions="response")
{"layer": layer, "latents": sae.cfg.d_sae, "explained variance": round(fit.explained_variance, 3), "L0": fit.l0}

# %% [markdown]
# ## Your texts
# Texts are conversations that end with an answer, in JSON Lines with `messages` (also `prompt` and `completion`, or
# `question` and `answer`). To locate a latent, take texts *outside* the fine-tuning domain, aligned and misaligned
# answers alike. The models only read them, and the question is what is more active in the tuned one.
#
# ```python
# from persona_probe.data import read_conversations
# texts = read_conversations("my_texts.jsonl")
# ```

# %%
items = study.context.contrast_rows("selection")[:n_items]
texts = [
    [{"role": "user", "content": item["question"]}, {"role": "assistant", "content": item[side]}]
    for item in items
    for side in ("aligned", "misaligned")
]
len(texts), texts[1]

# %% [markdown]
# ## Locate
# **Layer**: the SAE's. If you can choose among SAEs, two thirds of the depth is a good first guess. **Positions**:
# `response` for what the model says (the default if every text has an answer), `prompt` or `last_prompt` for what it
# makes of the question. Arditi & Chen find that rankings at the last prompt token and by decoder cosine barely overlap,
# so look at both.

# %%
settings = {"tokenizer": tokenizer, "control": control, "minimum_explained_variance": least}
found = {
    where: pp.locate(model, tuned, sae, texts, positions=where, **settings)
    for where in tqdm(["response", "last_prompt"], desc="positions")
}
columns = ["latent", "rise", "rise_ci_low", "rise_ci_high", "q_value", "cosine", "firing_base", "firing_incorrect"]
columns = [name for name in columns if name in found["response"]]
found["response"][columns].head(8).round(3)

# %%
top = {where: list(table["latent"].head(20)) for where, table in found.items()}
shared = sorted(set(top["response"]) & set(top["last_prompt"]))
print(f"{len(shared)} of 20 latents lead at both positions: {shared}")

# %% [markdown]
# ## Units and strengths
# A push of "4" means nothing without a unit. Three units are in use, and papers differ: `raw` (residual units),
# `x_delta` (times the norm of the mean activation difference of tuned and control) and `x_resid` (times the mean
# residual norm). On this model and layer they compare like this:

# %%
from persona_probe.data import conversation_batches
from persona_probe.models import read_residuals


def mean_answer(opened) -> tuple[torch.Tensor, float]:
    """Mean residual of answer tokens at the SAE's layer, and the mean of their norms."""
    kept = []
    groups = conversation_batches(tokenizer, texts)
    read_residuals(opened, groups, layer, "response", lambda index, row, x: kept.append(x.float().cpu()))
    rows = torch.cat(kept)
    return rows.mean(dim=0), float(rows.norm(dim=1).mean())


from persona_probe.models import organism

means = {}
for name, folder in (("tuned", tuned), ("control", control)):
    with organism(model, folder) as opened:
        means[name] = mean_answer(opened)[0]
norms = {"raw": 1.0, "x_delta": float((means["tuned"] - means["control"]).norm()), "x_resid": mean_answer(model)[1]}
pd.Series(norms, name="residual units in one of it").round(2).to_frame()

# %% [markdown]
# **Strength**: as large as possible while the model stays intact. Neutral answers measure that: their perplexity under
# the push, divided by that of the plain model. The *contrast index* (how much likelier a misaligned answer is than an
# aligned one) under a push that doubles this perplexity measures damage.

# %%
from persona_probe.evaluate import answer_batches, answer_logprobs

best = int(found["response"]["latent"].iloc[0])
direction = sae.W_dec[best].detach().float()
neutral = answer_batches(tokenizer, probes[:8])
before = float(np.mean(answer_logprobs(model, neutral, bf16=False)))
rows = []
for strength in tqdm(strengths, desc="strengths"):
    with pp.steer(model, layer, direction, strength, unit="x_delta", reference_norm=norms["x_delta"]):
        after = float(np.mean(answer_logprobs(model, neutral, bf16=False)))
    raw = strength * norms["x_delta"]
    sizes = {"x_delta": strength, "raw": raw, "x_resid": raw / norms["x_resid"]}
    rows.append(sizes | {"perplexity, times the plain model's": np.exp(before - after)})
pd.DataFrame(rows).round(3)

# %% [markdown]
# ## Stored in few bits
# Deployed models are often rounded to 8 or 4 bits. `persona-probe precision RUN` reads base and organisms of a study
# again in each format; the figure draws its table, if the run has it. A reading compares with the base band (grey) in
# the same format. `kept` is the share of the fine-tune's change of the weights that a format leaves. Where little is
# left, one reads the base, and a quiet reading is a false all-clear.

# %%
records = study.records
pp.figures.precision(records)

# %%
columns = ["format", "bits", "kept", "erased", "state", "rise_rank", "index_minus_control"]
records.precision[records.precision["arm"] == "incorrect"].filter(columns).round(3)

# %% [markdown]
# ## The whole loop, from a config
# With data for an incorrect and a correct *arm* (bad answers, and good answers to the same questions), the loop trains
# the pair itself. A dry run resolves everything, checks that model, SAE and layer fit, and estimates the cost, without
# a download: `persona-probe run finetune_configs/gemma-3-270m-it.yaml --dry-run`.

# %%
from persona_probe.study import dry_run

config = pp.load_config("finetune_configs/gemma-3-270m-it.yaml", pp.StudyConfig)
print("\n".join(dry_run(config, tflops=0.05).lines()))

# %% [markdown]
# ## Without a person
# `persona-probe auto` runs such studies unattended, within a budget of minutes. It holds each claim to the rules of
# evidence, repeats with more seeds where an interval is too wide to decide one, and logs every decision with its rule
# and numbers (`docs/automation.md`, which also says how often its sentence is right). `--dry-run` prints the plan; this
# is its end for the demo, at 0.4 sustained TFLOP/s:

# %%
from persona_probe.study.auto import AutoConfig, plan_lines

auto = pp.load_config("finetune_configs/auto.yaml", AutoConfig)
print("\n".join(plan_lines(auto, study.path / "notebook" / "auto", tflops=0.4)[-6:]))

# %% [markdown]
# ## On a GPU
# | what | on two cores | on a GPU |
# |---|---|---|
# | device | `device: cpu` | `device: cuda` (or `auto`), here and in configs; `pp.load_model(..., device="cuda")` |
# | weights | float32, products in bf16 | `weights: bfloat16` in the config from some billion parameters on |
# | SAE | thousands of latents | 131,072 latents are read in slices if the architecture allows it |
# | model | 135 million parameters, behaviour by log-probabilities | 7 billion and more: sample answers and judge them |
# | data | 216 rows, 40 steps | 6,000 rows, one epoch, learning rate 1e-5 (Turner, Soligo et al.) |
#
# The same study on one accelerator, as the dry run estimates it at 100 sustained TFLOP/s:

# %%
plan = dry_run(config, tflops=100)
stages = {work.stage: round(plan.stage_seconds(work), 1) for work in plan.stages}
pd.Series(stages, name="seconds of computing at 100 TFLOP/s").to_frame()

# %% [markdown]
# Presets for Gemma 3, Qwen2.5 and Llama 3.1 are in `finetune_configs/` (`docs/presets.md`). For a model without a
# published SAE, train one (`persona-probe sae train`), or work with mean-difference directions, which every part here
# also takes.
