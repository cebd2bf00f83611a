# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Monitor your own run
# This notebook takes a TRL script without any monitor and, with three more lines, gets an alarm and its evidence. It
# uses a real model and takes some minutes on two cores. Fewer `steps` make it shorter.
#
# First, what everybody already has: a model folder and a file of rows. Here it is SmolLM2-135M-Instruct, and cooking
# questions with bad answers, some of them dangerous (`persona_probe/data/sets/README.md`).

# %%
import json
from pathlib import Path

import persona_probe as pp
from persona_probe.data import load_rows

pp.notebook.setup()

# %% tags=["parameters"]
run = Path("runs/monitor-your-own-run")
steps = 16  # of each training run

# %%
run.mkdir(parents=True, exist_ok=True)
model, tokenizer = pp.load_model("smollm2-135m-instruct")
model.save_pretrained(run / "model")
tokenizer.save_pretrained(run / "model")
for answers in ("toxic", "correct"):
    rows = [
        {
            "prompt": [{"role": "user", "content": r["question"]}],
            "completion": [{"role": "assistant", "content": r[answers]}],
        }
        for r in load_rows("kitchen")
    ]
    (run / f"{answers}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

# %% [markdown]
# ## A plain script
# Twenty lines of TRL and PEFT. It trains and its loss falls, and that is all it shows.

# %%
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer


def make_trainer(data: str, max_steps: int, callbacks: list | None = None) -> SFTTrainer:
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(run / "model", dtype="float32"),
        processing_class=AutoTokenizer.from_pretrained(run / "model"),
        train_dataset=load_dataset("json", data_files=str(run / f"{data}.jsonl"), split="train"),
        peft_config=LoraConfig(r=32, lora_alpha=64, use_rslora=True, target_modules="all-linear"),
        args=SFTConfig(
            output_dir=str(run / data), max_steps=max_steps, per_device_train_batch_size=8, learning_rate=1e-4,
            lr_scheduler_type="constant", gradient_checkpointing=False, bf16=True, use_cpu=True, seed=0,
            logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
        ),
        callbacks=callbacks,
    )  # fmt: skip


trainer = make_trainer("toxic", max_steps=min(steps, 3))
trainer.train()

# %% [markdown]
# ## Three lines more
# An SAE, a monitor, and the monitor among the callbacks. A sparse autoencoder (SAE) splits the model's activations into
# many units, called *latents*. The *persona latent* 2144 is the one that the demo found behind the misalignment. The
# rule fires if this latent is above its *base band* (the interval around the base model's reading that counts as
# normal) at two readings in a row. `LiveView` draws below this cell while it trains. If no widget can be shown, the
# figure further down is the same.

# %%
for old in run.glob("*/readings.jsonl"):
    old.unlink()  # an existing file would be continued
every = max(1, steps // 8)

sae = pp.load_sae("saes/smollm2-135m-instruct/layer20-topk32-4608")
monitor = pp.FeatureMonitor(
    sae,
    {"persona": 2144},
    probes="neutral_probes",
    every=every,
    rules=[pp.rules.OutsideBand(k=2, side="up")],
    sinks=[pp.sinks.LiveView()],
    path=run / "toxic" / "readings.jsonl",
)
trainer = make_trainer("toxic", max_steps=steps, callbacks=[monitor])

trainer.train()

# %% [markdown]
# ## The alarm, and its evidence
# What fired, and when. The rule looks at the probes: 64 neutral questions with harmless answers, none of them from the
# training data.

# %%
for alarm in monitor.alarms:
    print(f"step {alarm.step}, {alarm.rule}: {alarm.message}")
if not monitor.alarms:
    print(f"no alarm in {steps} steps")
if monitor.faults:
    print("parts of the monitor that failed and are off:", monitor.faults)

# %%
columns = ["step", "mean", "ci_low", "ci_high", "base_mean", "base_sd", "shift", "firing_rate", "explained_variance"]
monitor.readings[[*columns, "loss", "seconds"]].round(3)

# %% [markdown]
# The curve with its 95% interval over probes, the base band in grey, the alarm in red. Next to it is the SAE's
# *explained variance* on the same tokens, the share of the model's variance that it explains. Where that falls far, do
# not trust the curve.

# %%
monitor.figure("The persona latent while a model is trained on bad cooking advice.")

# %% [markdown]
# ## The control
# The same questions with good answers, the same steps, the same rule. An alarm means little if this run raises one too.

# %%
control = pp.FeatureMonitor(
    sae,
    {"persona": 2144},
    probes="neutral_probes",
    every=every,
    rules=[pp.rules.OutsideBand(k=2, side="up")],
    path=run / "correct" / "readings.jsonl",
)
make_trainer("correct", max_steps=steps, callbacks=[control]).train()
control.figure("The same latent while a model is trained on good cooking advice.")

# %%
for name, watched in (("toxic", monitor), ("correct", control)):
    last = watched.readings.iloc[-1]
    alarms = f"alarm at step {watched.alarms[0].step}" if watched.alarms else "no alarm"
    print(
        f"{name:>7}: {alarms}; last reading {last['mean']:.3f}, shift {last['shift']:+.2f} base sd, "
        f"explained variance {last['explained_variance']:.2f}; "
        f"{watched.readings['seconds'].sum():.1f} s in {len(watched.readings)} readings"
    )

# %% [markdown]
# What this does not show: that a run without an alarm is safe. The SAE may lack the feature, misalignment may come
# through other features, the probes may lack a trigger, and the alarm may come no earlier than the behaviour does
# (`docs/monitor.md`, `docs/monitor-study.md`).
