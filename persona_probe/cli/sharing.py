"""`push` and `pull`: share a run on the Hugging Face hub or as a W&B artifact, and take one that others shared."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from persona_probe.cli.options import Common, command, echo, echo_json, json_option, many, run_argument
from persona_probe.errors import InputError

if TYPE_CHECKING:
    from persona_probe.hub.contents import Contents


@command(
    example="persona-probe push runs/demo OWNER/NAME --dry-run",
    out="Write what would be uploaded into this new folder, and upload nothing.",
)
@run_argument
@click.argument("repo", required=False, metavar="[REPO]", help="A model repository, owner/name; it may be new.")
@many("--parts", help="Of adapters sae records report neuronpedia (default all).")
@click.option("--steps", type=click.Choice(["last", "all"]), default="last", help="Checkpoints of each organism.")
@click.option("--public", is_flag=True, help="A public repository (default: private).")
@click.option("--revision", help="A branch of the repository (default: the main one).")
@click.option("--wandb", metavar="PROJECT", help="Log it as an artifact of this W&B project instead.")
@click.option("--dry-run", is_flag=True, help="List what would be uploaded, and upload nothing.")
@json_option
def push(
    run: str,
    repo: str | None,
    parts: tuple[str, ...],
    steps: str,
    public: bool,
    revision: str | None,
    wandb: str | None,
    dry_run: bool,
    as_json: bool,
    common: Common,
) -> None:
    """Upload a run to the Hugging Face hub.

    Adapters with their cards, SAEs in SAELens' layout, records, report, and the latents' cards in Neuronpedia's upload
    format. The access token is the one of `hf auth login` or HF_TOKEN.
    """
    if repo is not None and wandb is not None:
        raise InputError("REPO and --wandb are two places: name one of them")
    local = dry_run or common.out is not None
    if repo is None and wandb is None and not local:
        raise InputError("where to? name a repository (owner/name), --wandb PROJECT, --out FOLDER, or --dry-run")
    if local:
        from persona_probe.hub.contents import contents
        from persona_probe.hub.push import write_contents

        shared = contents(run, parts, steps, repo or "OWNER/NAME")
        _show(shared, as_json, {})
        if common.out is not None and not dry_run:
            echo(f"written: {write_contents(shared, common.out)}")
    elif wandb is not None:
        from persona_probe.hub.wandb_artifact import log_artifact

        echo(f"artifact: {log_artifact(run, parts, steps, wandb)}")
    else:
        from persona_probe.hub.push import push as upload

        pushed = upload(run, str(repo), parts=parts, steps=steps, public=public, revision=revision)
        _show(pushed.contents, as_json, {"url": pushed.url, "private": pushed.private})


def _show(shared: "Contents", as_json: bool, more: dict[str, Any]) -> None:
    files = [{"file": item.place, "part": item.part, "bytes": item.size} for item in shared.items]
    if as_json:
        echo_json({"run": shared.run, **more, "bytes": shared.size, "notes": shared.notes, "files": files})
        return
    for part in dict.fromkeys(row["part"] for row in files):
        those = [row for row in files if row["part"] == part]
        echo(f"{part}: {len(those)} files, {_amount(sum(int(row['bytes']) for row in those))}")
        for row in those[:SHOWN]:
            echo(f"  {row['file']}  {_amount(int(row['bytes']))}")
        if len(those) > SHOWN:
            echo(f"  and {len(those) - SHOWN} more (--json lists all)")
    for note in shared.notes:
        echo(f"note: {note}")
    if more:
        echo(f"{'private' if more['private'] else 'public'}: {more['url']}")
    else:
        echo(f"in all {len(files)} files, {_amount(shared.size)}; nothing was uploaded")


SHOWN = 8
"""Files of a part that are listed."""


def _amount(size: int) -> str:
    if size < 1000:
        return f"{size} bytes"
    return f"{size / 1e3:.0f} kB" if size < 1e6 else f"{size / 1e6:.1f} MB"


@command(example="persona-probe pull OWNER/NAME --out runs/theirs", out="The new run folder (default runs/NAME).")
@click.argument("repo", metavar="REPO", help="A repository that `push` made, owner/name.")
@click.option("--revision", help="A branch, tag or commit.")
def pull(repo: str, revision: str | None, common: Common) -> None:
    """Download a run that somebody shared on the Hugging Face hub.

    Its pages are left out, since those of others could run scripts: `persona-probe report RUN` draws them again.
    """
    from persona_probe.hub.pull import pull as download

    run = download(repo, common.out or Path("runs") / repo.rpartition("/")[2], revision)
    echo(f"run: {run.path}")
