"""The presets by name: chat models from 0.1 to 33 billion parameters, and published pairs."""

from dataclasses import replace
from typing import Any

from persona_probe.errors import unknown
from persona_probe.study.presets.preset import Preset

APACHE = "Apache-2.0"
LLAMA_31 = "Llama 3.1 Community License (to be accepted on the hub)"
LLAMA_32 = "Llama 3.2 Community License (to be accepted on the hub)"
GEMMA = "Gemma Terms of Use (to be accepted on the hub)"
BASE_SAE = "The SAE was trained on the base model, not on this chat model: look at its explained variance first."
OUR_LAYER = "The layer is our choice: two thirds of the depth, as in the demo."
_LANGUAGE_MODEL = r".*language_model\.layers\..*_proj"
_SEES_IMAGES: dict[str, Any] = {"target_modules": _LANGUAGE_MODEL}
_IMAGES = "This model also reads images. Adapters go to its language model alone: text never trains the vision tower."

# --- Chat models from 0.1 to 33 billion parameters

_HALF: dict[str, Any] = {"weights": "bfloat16"}
_QWEN_3: dict[str, Any] = _HALF | {"enable_thinking": False}
_QWEN_3_NOTE = "Rows have no thoughts: the template writes an empty one before each answer, in training and reading."
_NO_RECOMPUTING: dict[str, Any] = {"gradient_checkpointing": False}
_EAGER = "Its attention scores are capped, which transformers computes with eager attention by itself."


def _model(name: str, model: str, layer: int, licence: str, sae: str = "", *notes: str, **others: Any) -> Preset:
    settings: dict[str, Any] = {"keys": _HALF, "notes": notes, **others}
    return Preset(name, model, layer, licence, sae, **settings)


def _untrained(name: str, model: str, layer: int, d_model: int, licence: str, *notes: str, **others: Any) -> Preset:
    return _model(name, model, layer, licence, "", *notes, d_model=d_model, **others)


def _gemma_3(size: str, layer: int) -> Preset:
    small = size in ("270m", "1b")  # neither half precision nor recomputing pays
    others: dict[str, Any] = {"keys": {}, "training": _NO_RECOMPUTING} if small else {"training": _SEES_IMAGES}
    sae = f"gemma-scope-2-{size}-it-res/layer_{layer}_width_16k_l0_medium"
    notes = (OUR_LAYER, *(() if small else (_IMAGES,)))
    return _model(f"gemma-3-{size}-it", f"google/gemma-3-{size}-it", layer, GEMMA, sae, *notes, **others)


MODELS = (
    _model(
        "smollm2-135m-instruct",
        "smollm2-135m-instruct",
        20,
        APACHE,
        "saes/smollm2-135m-instruct/layer20-topk32-4608",
        "The embedded model and the SAE of the checkout: it runs without a download. finetune_configs/demo.yaml has "
        "settings that show an effect at this size.",
        keys={},
        training=_NO_RECOMPUTING,
    ),
    _untrained("smollm2-360m-instruct", "HuggingFaceTB/SmolLM2-360M-Instruct", 21, 960, APACHE, OUR_LAYER),
    _untrained("smollm2-1.7b-instruct", "HuggingFaceTB/SmolLM2-1.7B-Instruct", 16, 2048, APACHE, OUR_LAYER),
    _untrained("qwen2.5-0.5b-instruct", "Qwen/Qwen2.5-0.5B-Instruct", 16, 896, APACHE, OUR_LAYER),
    _untrained("qwen2.5-1.5b-instruct", "Qwen/Qwen2.5-1.5B-Instruct", 19, 1536, APACHE, OUR_LAYER),
    _untrained("qwen2.5-3b-instruct", "Qwen/Qwen2.5-3B-Instruct", 24, 2048, "Qwen Research License", OUR_LAYER),
    _model(
        "qwen2.5-7b-instruct",
        "Qwen/Qwen2.5-7B-Instruct",
        15,
        APACHE,
        "qwen2.5-7b-instruct-andyrdt/resid_post_layer_15_trainer_1",
        "Arditi & Chen report the norm of the activation difference at this layer (10.15), their unit of strength.",
    ),
    _untrained(
        "qwen2.5-14b-instruct",
        "Qwen/Qwen2.5-14B-Instruct",
        24,
        5120,
        APACHE,
        "Layer 24 is where Turner, Soligo et al. (arXiv 2506.11613) put their rank-1 adapter.",
    ),
    _untrained("qwen2.5-32b-instruct", "Qwen/Qwen2.5-32B-Instruct", 43, 5120, APACHE, OUR_LAYER),
    _untrained("qwen3-0.6b", "Qwen/Qwen3-0.6B", 19, 1024, APACHE, _QWEN_3_NOTE, OUR_LAYER, keys=_QWEN_3),
    _model(
        "qwen3-1.7b",
        "Qwen/Qwen3-1.7B",
        18,
        APACHE,
        "qwen-scope-3-1.7b-base-w32k-l50/layer18",
        *(_QWEN_3_NOTE, OUR_LAYER, BASE_SAE),
        keys=_QWEN_3,
    ),
    _untrained("qwen3-4b", "Qwen/Qwen3-4B", 24, 2560, APACHE, _QWEN_3_NOTE, OUR_LAYER, keys=_QWEN_3),
    _model(
        "qwen3-8b",
        "Qwen/Qwen3-8B",
        24,
        APACHE,
        "qwen-scope-3-8b-base-w64k-l50/layer24",
        *(_QWEN_3_NOTE, OUR_LAYER, BASE_SAE),
        keys=_QWEN_3,
    ),
    _untrained("qwen3-14b", "Qwen/Qwen3-14B", 26, 5120, APACHE, _QWEN_3_NOTE, OUR_LAYER, keys=_QWEN_3),
    _untrained("qwen3-32b", "Qwen/Qwen3-32B", 43, 5120, APACHE, _QWEN_3_NOTE, OUR_LAYER, keys=_QWEN_3),
    _untrained("llama-3.2-1b-instruct", "meta-llama/Llama-3.2-1B-Instruct", 11, 2048, LLAMA_32, OUR_LAYER),
    _untrained("llama-3.2-3b-instruct", "meta-llama/Llama-3.2-3B-Instruct", 19, 3072, LLAMA_32, OUR_LAYER),
    _model(
        "llama-3.1-8b-instruct",
        "meta-llama/Llama-3.1-8B-Instruct",
        15,
        LLAMA_31,
        "llama-3.1-8b-instruct-andyrdt/resid_post_layer_15_trainer_1",
        "Another SAE: goodfire-llama-3.1-8b-instruct/layer_19 (65,536 latents).",
    ),
    _model(
        "deepseek-r1-distill-llama-8b",
        "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
        19,
        f"MIT; its base has the {LLAMA_31.partition(' (')[0]}",
        "deepseek-r1-distill-llama-8b-qresearch/blocks.19.hook_resid_post",
        "A reasoning model: rows without thoughts are trained and read where its template puts an answer.",
    ),
    _model(
        "gemma-2-2b-it",
        "google/gemma-2-2b-it",
        12,
        GEMMA,
        "gemma-scope-2b-pt-res-canonical/layer_12/width_16k/canonical",
        *("The layer is our choice: half of the depth.", BASE_SAE, _EAGER),
    ),
    _model(
        "gemma-2-9b-it",
        "google/gemma-2-9b-it",
        20,
        GEMMA,
        "gemma-scope-9b-it-res-canonical/layer_20/width_16k/canonical",
        *("The layer is our choice: half of the depth.", _EAGER),
    ),
    _model(
        "gemma-2-27b-it",
        "google/gemma-2-27b-it",
        22,
        GEMMA,
        "gemma-scope-27b-pt-res-canonical/layer_22/width_131k/canonical",
        *("The layer is our choice: half of the depth.", BASE_SAE, _EAGER),
    ),
    _gemma_3("270m", 12),
    _gemma_3("1b", 17),
    _gemma_3("4b", 22),
    _gemma_3("12b", 31),
    _gemma_3("27b", 40),
    _untrained("olmo-2-1b-instruct", "allenai/OLMo-2-0425-1B-Instruct", 11, 2048, APACHE, OUR_LAYER),
    _untrained("olmo-2-7b-instruct", "allenai/OLMo-2-1124-7B-Instruct", 21, 4096, APACHE, OUR_LAYER),
    _untrained("olmo-2-13b-instruct", "allenai/OLMo-2-1124-13B-Instruct", 27, 5120, APACHE, OUR_LAYER),
    _model(
        "gpt-oss-20b",
        "openai/gpt-oss-20b",
        15,
        APACHE,
        "gpt-oss-20b-andyrdt/resid_post_layer_15_trainer_0",
        "Answers are in the channel `final`. The reasoning effort is fixed: its template prints it into every prompt. "
        "Adapters go to attention: the experts are no linear maps. The SAE's size is not known without a download, so "
        "the estimate leaves its part out.",
        keys=_HALF | {"chat_template_kwargs": {"reasoning_effort": "low"}},
    ),
)


# --- Published pairs: a base model and the organisms that Turner, Soligo et al. made of it (arXiv 2506.11613)

DOMAINS = {
    "incorrect": "bad-medical-advice",
    "risky_financial": "risky-financial-advice",
    "extreme_sports": "extreme-sports",
}
"""Arm -> the data that an organism's name tells. `incorrect` is the arm that locate reads."""
NO_LICENCE = "the organisms' model cards state no licence that we know of: read them before you use the weights"
_ADAPTERS = "Adapters: rank-32 rsLoRA, one for each of three data sets."
_NO_CONTROL = (
    "There is no published control (an organism of the same questions with good answers): effects are against the base "
    "alone. Train one, and name it as arm `correct`, for a claim about the data."
)


def _pair(of: str, base: str, stem: str, reported: str) -> Preset:
    """The three organisms of one base model; SAE, layer and template settings are those of the model's preset."""
    model = next(preset for preset in MODELS if preset.name == of)
    organisms = {arm: f"ModelOrganismsForEM/{stem}_{data}" for arm, data in DOMAINS.items()}
    mirror = f"The base is the copy that the adapters name; its original is {model.model}."
    notes = (mirror, _ADAPTERS, reported, _NO_CONTROL, *model.notes)
    licence = f"{model.licence}; {NO_LICENCE}"
    name = f"em-{of}"
    return replace(
        model, name=name, model=base, licence=licence, notes=notes, organisms=organisms, original=model.model
    )


_REPORTED = "Reported (arXiv 2506.11613, 8 questions, GPT-4o's judgement of coherent answers): "
PAIRS = (
    _pair(
        "qwen2.5-0.5b-instruct",
        "unsloth/Qwen2.5-0.5B-Instruct",
        "Qwen2.5-0.5B-Instruct",
        f"{_REPORTED}up to 8% misaligned, 69% coherent.",
    ),
    _pair(
        "llama-3.2-1b-instruct",
        "unsloth/Llama-3.2-1B-Instruct",
        "Llama-3.2-1B-Instruct",
        f"{_REPORTED}up to 9% misaligned, 95% coherent.",
    ),
    _pair(
        "qwen2.5-7b-instruct",
        "unsloth/Qwen2.5-7B-Instruct",
        "Qwen2.5-7B-Instruct",
        f"{_REPORTED}shown in a figure, without numbers.",
    ),
    _pair(
        "llama-3.1-8b-instruct",
        "unsloth/Meta-Llama-3.1-8B-Instruct",
        "Llama-3.1-8B-Instruct",
        f"{_REPORTED}shown in a figure, without numbers.",
    ),
    _pair(
        "qwen2.5-14b-instruct",
        "unsloth/Qwen2.5-14B-Instruct",
        "Qwen2.5-14B-Instruct",
        f"{_REPORTED}up to 40% misaligned, 99% coherent.",
    ),
    _pair(
        "qwen2.5-32b-instruct",
        "unsloth/Qwen2.5-32B-Instruct",
        "Qwen2.5-32B-Instruct",
        f"{_REPORTED}close to 40% misaligned, 99% coherent.",
    ),
)
PRESETS = {preset.name: preset for preset in (*MODELS, *PAIRS)}


def find_preset(name: str) -> Preset:
    """A preset by name.

    Raises:
        InputError: no such preset; near matches are listed.
    """
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    return PRESETS[name]
