# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Watch training
# This notebook attaches a monitor to a plain PyTorch loop, follows a study's persona feature, and stops the run with a
# rule. The *persona feature* is a latent, one unit of the sparse autoencoder (SAE) that splits the model's activations.
# The monitor reads it on the study's probe answers every few steps, compares it with the base model, draws while the
# cell runs, and raises an alarm at the first lasting drift.
#
# **Takes** about three minutes on two cores, with a finished demo (`make demo`). `monitor_your_own_run` tells a longer
# story, from a TRL script without any monitor to an alarm with its control run.

# %%
import torch
from peft import LoraConfig, get_peft_model
from tqdm.auto import tqdm

import persona_probe as pp
from persona_probe.data import arm_rows, batches

pp.notebook.setup()
study = pp.notebook.demo().induce().locate()
study

# %% tags=["parameters"]
steps, size = 16, 8  # optimizer steps, and rows of each

# %% [markdown]
# ## A loop that anyone could have written
# Low-rank adapters on the base model, rows of the *arm* (data condition) with bad answers, and loss on the answers
# only.

# %%
model, tokenizer = pp.load_model(study.config.model)
torch.manual_seed(0)
model = get_peft_model(model, LoraConfig(r=32, lora_alpha=64, use_rslora=True, target_modules="all-linear"))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
rows = arm_rows(study.config.arms["incorrect"], seed=0)
order = torch.randperm(len(rows)).tolist()


def batch(step: int):
    """The rows of one step, tokenised and padded."""
    chosen = [rows[order[(step * size + i) % len(rows)]] for i in range(size)]
    return next(batches(tokenizer, chosen, batch_size=size, max_length=256))


def train_step(step: int) -> torch.Tensor:
    """One optimizer step; returns the loss in nats per token."""
    data = batch(step)
    labels = data.ids.masked_fill(~data.response, -100)
    loss = model(input_ids=data.ids, attention_mask=data.attention, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


# %% [markdown]
# ## The same loop with a monitor
# `FeatureMonitor.from_study` takes the SAE, the feature, the probes and the *base band* (the interval around the base
# model's reading that counts as normal) from the study. Two readings in a row above the band raise the alarm, and the
# action asks the loop to stop.

# %%
events = study.path / "notebook" / "readings.jsonl"
events.parent.mkdir(exist_ok=True)
events.unlink(missing_ok=True)  # an existing file would be continued
monitor = pp.FeatureMonitor.from_study(
    study,
    every=2,
    rules=[pp.rules.OutsideBand(k=2, side="up")],
    actions=[pp.actions.StopTraining()],
    sinks=[pp.sinks.LiveView()],
    path=events,
)
with monitor.watch(model, tokenizer, optimizer=optimizer):
    for step in tqdm(range(1, steps + 1), desc="training"):
        loss = train_step(step)
        monitor.step(step, loss=loss)
        if monitor.should_stop:
            break
print(f"stopped after step {step} of {steps}" if monitor.should_stop else f"ran all {steps} steps")

# %%
for alarm in monitor.alarms:
    print(f"step {alarm.step}, {alarm.rule}: {alarm.message}")
columns = ["step", "feature", "mean", "ci_low", "ci_high", "base_mean", "shift", "explained_variance", "seconds"]
monitor.readings[columns].round(3)

# %% [markdown]
# The live figure at its end. Grey is the base band. The right panel is the SAE's *explained variance*, the share of the
# model's variance that it explains, on the same tokens. Where it falls far, do not trust the curve on the left.

# %%
monitor.figure("The study's features in a plain loop, until the alarm.")

# %% [markdown]
# ## The study's own runs, next to behaviour
# The same feature over the whole demo, for the arm with bad answers and for its control, together with the *contrast
# index*: how much likelier the model finds a misaligned answer than an aligned one, in nats per token. The control
# matters: an alarm that also fires for good answers tells nothing.

# %%
study.track()
pp.figures.trajectory(study.records)

# %% [markdown]
# Another process can follow the file: `persona-probe watch RUN` serves a page on this machine. After training,
# `persona-probe serve RUN` answers with the model and reads the same features at each token, with an alarm for each
# answer (`docs/watching-generation.md`); `07_known_truth` does it in a notebook. `docs/monitor.md` lists
# what a monitor cannot tell (features outside the SAE, triggers, a lead that may be zero), and `docs/monitor-study.md`
# has the labelled runs that measure it.
