"""All commands below `persona-probe`, in the order of a study."""

import click

from persona_probe import __version__
from persona_probe.cli import (
    PROGRAM,
    adopt,
    auto,
    completion,
    data,
    doctor,
    judge_commands,
    labels,
    loop,
    merge,
    precision,
    presets,
    reinforcement,
    runs,
    saes,
    serve,
    sharing,
    studies,
    thoughts,
    world,
)
from persona_probe.cli.options import Group

root = Group(
    PROGRAM,
    commands=[
        *(
            loop.demo,
            loop.run,
            auto.auto,
            loop.induce,
            adopt.adopt,
            loop.locate,
            labels.label,
            loop.track,
            loop.realign,
        ),
        *(studies.mitigate, judge_commands.evaluate, precision.precision, thoughts.thoughts),
        *(reinforcement.reinforcement, loop.report),
        *(
            runs.figures,
            runs.compare,
            merge.merge,
            runs.verify,
            runs.cite,
            sharing.push,
            sharing.pull,
            runs.watch,
            serve.serve,
            serve.incidents,
            doctor.doctor,
            completion.completion,
        ),
        *(presets.presets, saes.saes, data.data, judge_commands.judge, studies.monitor, studies.bench),
        world.world,
    ],
    aliases={"sae": "saes"},
    help="Induce a misaligned persona, locate it, watch it, undo it, and show the evidence.\n\nExample:\n\n\b\n"
    "    persona-probe demo",
)
root = click.version_option(__version__, prog_name=PROGRAM, message="%(prog)s %(version)s")(root)
