"""Benchmarks: ratios measured in one run on the same work. `make bench`, `make bench-locate`, `persona-probe bench`."""
