from persona_probe.cli import main

main()
