"""For notebooks: quiet libraries, and the demo's study to look at."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from persona_probe.study.study import Study

RUN = "PERSONA_PROBE_NOTEBOOK_RUN"
"""Environment variable with another run folder than `runs/demo`."""
CONFIG = "finetune_configs/demo.yaml"


def setup() -> None:
    """Silence other libraries' progress bars and warnings, and work from the checkout's top folder.

    Call it once, in a notebook's first cell. Outside a checkout the working folder stays as it is.
    """
    from persona_probe.models.quiet import quiet_libraries

    quiet_libraries()
    here = Path.cwd()
    top = next((folder for folder in (here, *here.parents) if (folder / CONFIG).is_file()), None)
    if top is not None:
        os.chdir(top)


def demo() -> "Study":
    """The demo's study in `runs/demo`; if there is none yet, its stages make it when they are called.

    `PERSONA_PROBE_NOTEBOOK_RUN` names another run folder.
    """
    from persona_probe.study.study import Study

    run = Path(os.environ.get(RUN, "runs/demo"))
    return Study.open(run) if run.is_dir() else Study.from_yaml(CONFIG, out=run)
