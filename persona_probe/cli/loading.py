"""Options of the commands that load a model by its name: how its weights are kept, and where."""

import functools
from collections.abc import Callable
from typing import Any

import click

from persona_probe.config import DTYPES, QUANTIZATIONS, Loading


def loading_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a command with these options; its function receives them as `loading`."""

    @functools.wraps(function)
    def with_loading(
        *args: Any,
        weights: str,
        quantization: str,
        device_map: str | None,
        attn_implementation: str | None,
        **settings: Any,
    ) -> Any:
        return function(*args, loading=Loading(weights, quantization, device_map, attn_implementation), **settings)

    options = (
        click.option(
            "--weights", type=click.Choice(DTYPES), default="float32", help="Precision of the model's weights."
        ),
        click.option(
            "--quantization", type=click.Choice(QUANTIZATIONS), default="none", help="Keep linear layers in fewer bits."
        ),
        click.option("--device-map", help="Spread the model over several GPUs: auto."),
        click.option("--attn-implementation", help="Attention kernel: eager, sdpa, flash_attention_2."),
    )
    decorated: Callable[..., Any] = with_loading
    for option in reversed(options):
        decorated = option(decorated)
    return decorated
