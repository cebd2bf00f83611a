"""`make bench-gpu`: every costly step on one large GPU, next to the naive way of doing it, without downloaded weights.

`shapes` builds random models and SAEs on the device, `parts` measures, `values` compares with the CPU.
"""
