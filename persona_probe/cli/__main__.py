"""`python -m persona_probe.cli`."""

from persona_probe.cli import main

main()
