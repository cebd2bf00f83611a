"""Corrections beyond the demo's two arms: sets by dose and choice, three methods, a grid, one's own organism."""
