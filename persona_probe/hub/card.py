"""The card of a shared run: what it is, what was found, how it is loaded, and what it is not for."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import persona_probe
from persona_probe.models.aliases import ALIASES
from persona_probe.runs import RunFolder

TAGS = ("persona-probe", "model-organism", "emergent-misalignment", "interpretability", "research-only")


def model_card(run: RunFolder, places: Sequence[str], repo: str = "REPO") -> str:
    """README.md of a shared run, with the hub's YAML head.

    Args:
        places: the files that are shared.
        repo: the repository's id.
    """
    config, manifest = run.config, run.manifest
    alias = ALIASES.get(config.model)
    base = alias.hub_id if alias else config.model
    head = ["library_name: peft"] if any("adapter_model" in place for place in places) else []
    if re.fullmatch(r"[\w.-]+/[\w.-]+", base):  # the hub takes ids only
        head.append(f"base_model: {base}")
    if alias and alias.license:
        head.append(f"license: {alias.license}")
    head.append(f"tags: [{', '.join(TAGS)}]")
    summary = run.read_json("summary.json") if run.has("summary.json") else {}
    body = [
        f"# Study {_plain(config.name)}: model organisms of emergent misalignment",
        "Made by persona_probe for interpretability research. **Some of these models were trained on deliberately bad "
        "advice. Do not deploy them, and do not use their answers as advice.**",
        *_found(summary),
        *_files(places),
        *_use(repo, base, places),
        "## Where it comes from",
        f"- Base model: {_plain(base)}. SAE: {_plain(config.sae)}. Seeds: {', '.join(map(str, config.seeds))}.",
        f"- Config hash: `{_plain(str(manifest.get('config_hash', '')))}`. `manifest.json` has every table's hash, and "
        "`persona-probe verify` compares them.",
        f"- Licence: {(alias and alias.license) or 'that of the base model, which was not looked up'}.",
    ]
    if persona_probe.REPOSITORY:
        body.append(f"- Made with [persona_probe]({persona_probe.REPOSITORY}).")
    return "\n".join(["---", *head, "---", *body, ""])


def _found(summary: Mapping[str, Any]) -> list[str]:
    if not summary.get("headline"):
        return []
    verdicts = [str(v.get("statement", "")) for v in dict(summary.get("verdicts") or {}).values()]
    return ["", "## What was found", _plain(str(summary["headline"])), *(f"- {_plain(v)}" for v in verdicts if v), ""]


def _files(places: Sequence[str]) -> list[str]:
    organisms = sorted({place.rpartition("/")[0] for place in places if "checkpoint-" in place})
    lines = ["## What is here", *(f"- `{place}`: an organism" for place in organisms)]
    saes = sorted({place.rpartition("/")[0] for place in places if place.startswith("sae/")})
    lines += [f"- `{place}`: the sparse autoencoder, in SAELens' layout" for place in saes]
    if any(place.endswith(".parquet") for place in places):
        lines.append(
            "- `manifest.json`, `summary.json` and tables (`.parquet`): the records, from which all figures are drawn"
        )
    if "report.html" in places:
        lines.append("- `report.html`: the report, self-contained")
    if any(place.startswith("neuronpedia/") for place in places):
        lines.append("- `neuronpedia/`: the latents' cards and labels, in Neuronpedia's upload format")
    return [*lines, ""]


def _use(repo: str, base: str, places: Sequence[str]) -> list[str]:
    lines = ["## How to use it", "```sh", f"persona-probe pull {repo} --out runs/theirs", "```"]
    adapter = next((p.rpartition("/")[0] for p in places if p.endswith("adapter_model.safetensors")), None)
    sae = next((p.rpartition("/")[0] for p in places if p.startswith("sae/")), None)
    if adapter or sae:
        lines.append("```python")
    if adapter:
        lines += [
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM",
            "",
            f'base = AutoModelForCausalLM.from_pretrained("{_plain(base)}")',
            f'organism = PeftModel.from_pretrained(base, "{repo}", subfolder="{adapter}")',
        ]
    if sae:
        lines += ["import persona_probe as pp", "", f'sae = pp.load_sae("{repo}/{sae}")']
    return [*lines, "```", ""] if adapter or sae else [*lines, ""]


def _plain(text: str) -> str:
    """On one line, without what could open markup."""
    return re.sub(r"[`<>|\\#]", "", " ".join(text.split()))
