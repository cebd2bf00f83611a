"""Benchmarks: our way of doing something beside the usual one, in one process, set up like a command's.

What a command asks of the process (`cli.process.loads_models`) is asked before anything loads torch.
"""

from persona_probe.cli.process import keep_freed_memory, wait_passively

wait_passively()
keep_freed_memory()
