"""The bench of mitigations: every one of them against the same inducing data, in one table; see docs/mitigations.md."""
