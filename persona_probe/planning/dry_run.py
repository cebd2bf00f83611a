"""The dry run: resolve a study without downloading, check that its parts fit, and estimate what it will take."""

from dataclasses import replace

from persona_probe.config import StudyConfig
from persona_probe.errors import InputError
from persona_probe.locate.registry import check_rankers
from persona_probe.planning.adapters import adapted
from persona_probe.planning.estimate import estimate
from persona_probe.planning.notes import notes_of
from persona_probe.planning.plan import Plan
from persona_probe.planning.row_sets import find_tokenizer, read_row_sets
from persona_probe.planning.sae_shape import SaeShape, find_sae
from persona_probe.planning.shapes import Shapes
from persona_probe.planning.skeleton import Skeleton, find_skeleton
from persona_probe.planning.throughput import throughput


def dry_run(config: StudyConfig, tflops: float | None = None, device: str | None = None) -> Plan:
    """Resolve a study without downloading anything, check that model, SAE, layer and data fit, and estimate its cost.

    Args:
        tflops: sustained speed that times are computed with, in 1e12 operations per second; None measures a product
            on the device (under 1 s) and takes a share of it.
        device: None takes the config's.

    Raises:
        InputError: something does not exist or does not fit; says what to change.
    """
    if tflops is not None and not tflops > 0:
        raise InputError(f"tflops must be positive, not {tflops}")
    check_rankers(config.locate.rankers)
    skeleton, sae = find_skeleton(config.model, config.revision), find_sae(config.sae)
    layer = check_shapes(config, skeleton, sae)
    tokenizer = find_tokenizer(config.model, config.revision)
    rows = read_row_sets(config, tokenizer)
    stages, speed = (), None
    if skeleton is not None:
        if config.training.method == "lora" and not adapted(skeleton, config.training):
            raise InputError("training.target_modules and training.layers choose no module: name at least one")
        if layer is not None:
            stages = estimate(Shapes(config, skeleton, layer, sae.d_sae or 0, rows))
            speed = throughput(device or config.device, config.bf16, tflops)
    plan = Plan(config, skeleton, sae, layer, rows, stages, speed, counted=tokenizer is not None)
    return replace(plan, notes=notes_of(plan))


def check_shapes(config: StudyConfig, skeleton: Skeleton | None, sae: SaeShape) -> int | None:
    """The layer that the study reads, after checking that model, SAE and layer fit; None where nothing tells it.

    Raises:
        InputError: says which does not fit.
    """
    layer = sae.layer if config.layer is None else config.layer
    if layer is None and sae.source == "cfg.json":
        raise InputError(f"SAE {config.sae!r} names no decoder layer: write `layer:` in the config")
    if None not in (layer, sae.layer) and layer != sae.layer:
        raise InputError(
            f"layer is {layer} but SAE {config.sae!r} reads layer {sae.layer}: leave layer out, or change it"
        )
    if skeleton is None:
        return layer
    if sae.d_in is not None and sae.d_in != skeleton.d_model:
        raise InputError(
            f"the SAE reads width {sae.d_in} but the residual stream of {config.model} has {skeleton.d_model}: "
            "choose an SAE of this model"
        )
    if layer is not None and not 0 <= layer < skeleton.layers:
        raise InputError(f"the SAE reads layer {layer} but {config.model} has layers 0 to {skeleton.layers - 1}")
    return layer
