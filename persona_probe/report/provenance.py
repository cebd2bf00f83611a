"""Where a figure's or a report's numbers come from, as its footer and its file's metadata say it."""

from collections.abc import Mapping
from typing import Any

from persona_probe.report.select import mapping

PACKAGES = ("persona-probe", "torch", "transformers", "sae-lens", "trl", "peft")
"""Packages that the footer names; the metadata names all that the manifest holds."""
SHORT = 12
"""Digits of a hash in a page's footer."""
FOOTER = 8
"""The same in an image's, which is one column wide."""
UNKNOWN = "not recorded"


def provenance(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Everything that a manifest says of a run's origin: name to text; `not recorded` where it says nothing.

    Keys: run, config, revision, model, SAE, data, seeds, versions, and `hash <file>` for every hash on record.
    """
    config = mapping(manifest.get("config"))
    versions = mapping(manifest.get("versions"))
    said = {
        "run": config.get("name"),
        "config": manifest.get("config_hash"),
        "revision": manifest.get("git_revision"),
        "model": config.get("model"),
        "SAE": config.get("sae"),
        "data": ", ".join(_data(config)),
        "seeds": ", ".join(str(seed) for seed in _seeds(manifest, config)),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    return {name: str(value or UNKNOWN) for name, value in said.items()} | _hashes(manifest)


def _hashes(manifest: Mapping[str, Any]) -> dict[str, str]:
    """`hash <input or file>` to sha256: what the run was made from first, then what it wrote."""
    parts = (mapping(manifest.get(key)) for key in ("input_hashes", "table_hashes", "hashes"))
    return {f"hash {name}": str(value) for part in parts for name, value in sorted(part.items())}


def provenance_line(manifest: Mapping[str, Any]) -> str:
    """One line for a footer: run, config hash, revision, model, SAE, data with their hashes, seeds, main packages."""
    full = provenance(manifest)
    versions = mapping(manifest.get("versions"))
    named = ", ".join(f"{name} {versions[name]}" for name in PACKAGES if name in versions)
    inputs = [f"{name} {str(value)[:8]}" for name, value in mapping(manifest.get("input_hashes")).items()]
    parts = [
        f"run {full['run']}",
        f"config {full['config'][:SHORT]}",
        f"revision {full['revision'][:SHORT]}",
        f"model {full['model']}",
        f"SAE {full['SAE']}",
        f"data {full['data']}",
        f"hashes of inputs: {', '.join(inputs) or UNKNOWN}",
        f"seeds {full['seeds']}",
        named or f"versions {UNKNOWN}",
    ]
    return "; ".join(parts)


def short_provenance(manifest: Mapping[str, Any]) -> str:
    """The footer of an image one column wide: run, config hash, revision, version; the rest is in its metadata."""
    full = provenance(manifest)
    version = mapping(manifest.get("versions")).get("persona-probe")
    parts = [f"persona-probe {version}" if version else "persona-probe"]
    shown = {"run": full["run"], "config": full["config"][:FOOTER], "revision": full["revision"][:FOOTER]}
    parts += [f"{key} {value}" for key, value in shown.items() if full[key] != UNKNOWN]
    return "; ".join(parts)


def _data(config: Mapping[str, Any]) -> list[str]:
    """Names of the data sets of a config, each once."""
    parts = (config.get("arms"), mapping(config.get("realign")).get("arms"))
    arms = [mapping(arm) for part in parts for arm in mapping(part).values()]
    named = [str(arm[key]) for arm in arms for key in ("data", "mix_with") if arm.get(key)]
    return list(dict.fromkeys([*named, *(str(config[key]) for key in ("contrast", "probes") if config.get(key))]))


def _seeds(manifest: Mapping[str, Any], config: Mapping[str, Any]) -> list[Any]:
    """The manifest's seeds; those of its runs where it is a study of many."""
    if stated := manifest.get("seeds"):
        return list(stated)
    return sorted({mapping(run).get("seed", 0) for run in mapping(config.get("runs")).values()})
