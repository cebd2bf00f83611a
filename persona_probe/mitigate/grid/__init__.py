"""The grid of mitigations: its configuration and cells, their measurement, the table, and what may be said of it."""
