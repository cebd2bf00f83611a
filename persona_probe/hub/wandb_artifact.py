"""A run as an artifact of Weights & Biases."""

import re
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from persona_probe.errors import InputError
from persona_probe.hub.contents import contents
from persona_probe.runs import RunFolder

KIND = "persona-probe-run"


def log_artifact(run: str | Path, parts: Sequence[str] = (), steps: str = "last", project: str | None = None) -> str:
    """Log what `push` would upload as an artifact of the active W&B run, or of a run of its own.

    With WANDB_MODE=offline it is kept on disk, and `wandb sync` uploads it.

    Args:
        project: of a run of its own; None takes W&B's default.

    Returns:
        The artifact's name.

    Raises:
        InputError: wandb is not installed, or nothing to share.
    """
    try:
        import wandb
    except ImportError as error:
        raise InputError("W&B artifacts need wandb: pip install wandb") from error
    shared, folder = contents(run, parts, steps), RunFolder.open(run)
    name = re.sub(r"[^\w.-]", "-", folder.config.name)[:128]
    description = "Model organisms trained on deliberately bad advice, for research only."
    metadata: dict[str, Any] = {"config_hash": folder.manifest.get("config_hash"), "base_model": folder.config.model}
    artifact = wandb.Artifact(name, KIND, description, metadata)
    with TemporaryDirectory() as scratch:
        for number, item in enumerate(shared.items):
            source = item.content
            if isinstance(source, bytes):
                source = Path(scratch) / str(number)
                source.write_bytes(item.read())
            artifact.add_file(
                str(source), item.place, policy="mutable" if isinstance(item.content, bytes) else "immutable"
            )
        active = wandb.run
        if active is not None:
            active.log_artifact(artifact)
        else:
            with wandb.init(project=project, job_type="share") as own:
                own.log_artifact(artifact)
    return name
