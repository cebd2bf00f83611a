"""The kinds of SAE that a recipe trains, each by SAELens' own training class; and the frozen random decoder."""

from collections.abc import Callable
from typing import Any

import torch

from persona_probe.saes.stream import SaeConfig


def training_sae(config: SaeConfig, d_in: int, device: str, **notes: Any) -> Any:
    """A SAELens training SAE of the recipe's kind; it is saved as TopK, JumpReLU or standard.

    Args:
        notes: further keys of the SAE's metadata.
    """
    from sae_lens.saes.sae import SAEMetadata

    metadata = SAEMetadata(
        model_name=config.model,
        hook_name=f"blocks.{config.layer}.hook_resid_post",
        hf_hook_name=f"model.layers.{config.layer}",
        prepend_bos=False,
        context_size=config.max_length,
        recipe="recipe.json",
        **notes,
    )
    shared: dict[str, Any] = {"d_in": d_in, "d_sae": config.d_sae, "device": device, "metadata": metadata}
    shared["normalize_activations"] = "expected_average_only_in"
    if config.frozen_decoder:
        shared["decoder_init_norm"] = 1.0
    builders: dict[str, Callable[[SaeConfig, dict[str, Any]], Any]] = {
        "topk": _topk,
        "batchtopk": _batchtopk,
        "matryoshka": _matryoshka,
        "jumprelu": _jumprelu,
        "standard": _standard,
    }
    sae = builders[config.architecture](config, shared)
    if config.frozen_decoder:
        freeze_decoder(sae, config.seed)
    return sae


def freeze_decoder(sae: Any, seed: int) -> None:
    """Make the decoder's rows random unit vectors that no step changes; encoder and biases are trained.

    The baseline of arXiv 2602.14111: what a dictionary finds that was never learned.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(sae.W_dec.shape, generator=generator)
    rows /= rows.norm(dim=1, keepdim=True)
    with torch.no_grad():
        sae.W_dec.copy_(rows)
        sae.W_enc.copy_(rows.T)
    sae.W_dec.requires_grad_(False)


def _topk(config: SaeConfig, shared: dict[str, Any]) -> Any:
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig

    return TopKTrainingSAE(TopKTrainingSAEConfig(**shared, k=config.k, aux_loss_coefficient=config.aux_loss))


def _batchtopk(config: SaeConfig, shared: dict[str, Any]) -> Any:
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig

    settings = {**shared, "k": float(config.k), "aux_loss_coefficient": config.aux_loss}
    return BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**settings, topk_threshold_lr=config.threshold_lr))


def _matryoshka(config: SaeConfig, shared: dict[str, Any]) -> Any:
    from sae_lens import MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig

    settings = {**shared, "k": float(config.k), "aux_loss_coefficient": config.aux_loss}
    settings |= {"topk_threshold_lr": config.threshold_lr, "matryoshka_widths": list(config.matryoshka_widths)}
    return MatryoshkaBatchTopKTrainingSAE(MatryoshkaBatchTopKTrainingSAEConfig(**settings))


def _jumprelu(config: SaeConfig, shared: dict[str, Any]) -> Any:
    from sae_lens import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig

    # Gemma Scope 2's loss: the squared distance of the mean number of active latents from k.
    settings = {**shared, "jumprelu_sparsity_loss_mode": "quadratic", "target_l0": float(config.k)}
    settings |= {"l0_coefficient": config.sparsity, "l0_warm_up_steps": config.steps // 10}
    return JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(**settings))


def _standard(config: SaeConfig, shared: dict[str, Any]) -> Any:
    from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig

    settings = {**shared, "l1_coefficient": config.sparsity, "l1_warm_up_steps": config.steps // 10}
    return StandardTrainingSAE(StandardTrainingSAEConfig(**settings))
