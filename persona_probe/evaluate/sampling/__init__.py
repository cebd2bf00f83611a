"""Answers from a model: what is asked (`protocol`), engines that answer, and `sample`, which keeps them in a file.

The engines are `transformers_engine`, `vllm_engine` and `openai_engine`; import the one that is wanted.
"""

from persona_probe.evaluate.sampling.requests import Engine, Prompt, Request, Sample, SamplingConfig
from persona_probe.evaluate.sampling.sample import sample

__all__ = ["Engine", "Prompt", "Request", "Sample", "SamplingConfig", "sample"]
