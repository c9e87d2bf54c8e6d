"""Configurations of tiny random models, as small copies of a model's own: what the runtime promises is tried on them.

Each function takes the configuration of a model and returns one of the same classes, from which ``type(model)(tiny)``
builds within a second, or None where it does not know how to make one that runs. Kinds of attention layers, grouped
queries, rotary embeddings, tied weights and activation functions stay; sizes, depth and vocabulary shrink. Token ids
move into the small vocabulary, and none ends a text, so that generation never stops early.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

#: Decoder layers; kinds of layers that come later in the full model take the place of early ones.
LAYERS = 6
WIDTH, HEADS, HEAD = 64, 4, 16
VISION_WIDTH, VISION_LAYERS = 32, 4
#: Side of an image or tile in pixels, and of a patch; a tile has 4 x 4 visual tokens.
TILE, PATCH = 16, 4
SIDE = TILE // PATCH
VOCABULARY = 128
#: No sliding window is longer, so that short prompts reach beyond it.
WINDOW = 64
POSITIONS = 4096

#: Names of ids that stand for one token each.
TOKEN_IDS = re.compile(r"_token_(id|index)$")
#: What no small copy has: weights stay in float32 and are stored nowhere.
LEFT_OUT = ("_name_or_path", "architectures", "auto_map", "dtype", "quantization_config", "transformers_version")
#: Keys of decoders with parts that are not known here (latent attention, state spaces, convolutions).
UNKNOWN = ("kv_lora_rank", "conv_L_cache", "conv_kernel", "linear_conv_kernel_dim", "state_size", "mamba_d_state")
#: Sizes of mixtures of experts; of each the smaller of this and the model's own is taken.
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}

Given = dict[str, Any]


def llava(config: Any) -> Any | None:
    """LLaVA-1.5, ViP-LLaVA and others with a CLIP or SigLIP tower and one grid for each image."""
    given = parts(config, shrunk_clip_like(config.vision_config))
    return None if given is None else built(config, {**given, **feature_layers(config)})


def llava_next(config: Any) -> Any | None:
    """LLaVA-NeXT: as LLaVA-1.5, with the same shapes of tiled images."""
    given = parts(config, shrunk_clip_like(config.vision_config))
    if given is None:
        return None
    tile = config.vision_config.image_size
    points = [[max(side // tile, 1) * TILE for side in point] for point in config.image_grid_pinpoints]
    return built(config, {**given, **feature_layers(config), "image_grid_pinpoints": points})


def llava_onevision(config: Any) -> Any | None:
    """LLaVA-OneVision: as LLaVA-NeXT."""
    return llava_next(config)


def qwen_vl(config: Any) -> Any | None:
    """Qwen2-VL, Qwen2.5-VL and Qwen3-VL: positions keep their three axes, DeepStack its number of layers."""
    text, vision = shrunk_text(config.text_config), shrunk_patch_merger(config.vision_config)
    return _merged(config, text, vision)


def generic(config: Any) -> Any | None:
    """What the generic adapter serves, by the configuration's `model_type`; None for a type that is not known here."""
    make = GENERIC.get(config.model_type)
    return None if make is None else make(config)


def placeholders(config: Any) -> list[int]:
    """Ids of a configuration that stand for images or their borders: a random model must not write them."""
    names = [name for name in config.to_dict() if TOKEN_IDS.search(name)]
    ids = {getattr(config, name) for name in names if not _is_common(name)}
    return sorted(number for number in ids if isinstance(number, int) and number >= 0)


# Parts


def shrunk_text(config: Any) -> Given | None:
    """The settings of a small text decoder; None for one with parts that are not known here."""
    given: Given = config.to_dict()
    counted = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
    if any(given.get(name) for name in UNKNOWN) or not all(isinstance(given.get(name), int) for name in counted):
        return None
    depth = given["num_hidden_layers"]
    layers = _chosen_layers(given.get("layer_types") or ["full_attention"] * depth)
    heads, groups = given["num_attention_heads"], given.get("num_key_value_heads")
    sizes: Given = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_attention_heads": HEADS,
        "num_key_value_heads": None if groups is None else HEADS if groups == heads else min(groups, HEADS // 2),
        "head_dim": HEAD,
        "max_position_embeddings": POSITIONS,
        "max_window_layers": min(given.get("max_window_layers") or 0, len(layers)),
        "sliding_window": min(given.get("sliding_window") or 0, WINDOW) or None,
        "rope_parameters": _shrunk_rope(given.get("rope_parameters") or {}),
        **{name: min(given[name], most) for name, most in EXPERTS.items() if isinstance(given.get(name), int)},
    }
    by_layer = {
        name: [value[layer] for layer in layers]
        for name, value in given.items()
        if isinstance(value, list) and len(value) == depth
    }
    changes = {name: value for name, value in sizes.items() if given.get(name) is not None}
    return {**given, **by_layer, **changes, "num_hidden_layers": len(layers)}


def shrunk_clip_like(config: Any) -> Given | None:
    """The settings of a small tower with CLIP's names (SigLIP, Pixtral, ...); None for another kind."""
    given: Given = config.to_dict()
    if not all(name in given for name in ("hidden_size", "num_attention_heads", "image_size", "patch_size")):
        return None
    sizes = {
        "hidden_size": VISION_WIDTH,
        "intermediate_size": VISION_WIDTH + VISION_WIDTH // 2,
        "num_hidden_layers": VISION_LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": VISION_WIDTH // HEADS,
        "image_size": TILE,
        "patch_size": PATCH,
    }
    changes = {name: value for name, value in sizes.items() if given.get(name) is not None}
    return {**given, **changes}


def shrunk_patch_merger(config: Any) -> Given | None:
    """The settings of a small tower with Qwen's names, which merges neighbouring patches; None for another kind."""
    given: Given = config.to_dict()
    if not all(name in given for name in ("depth", "num_heads", "patch_size", "spatial_merge_size")):
        return None
    stacked = given.get("deepstack_visual_indexes")
    depth = max(2, 0 if stacked is None else len(stacked))
    # Qwen2-VL calls the tower's width embed_dim, and hidden_size what the language model gets.
    width = "embed_dim" if "embed_dim" in given else "hidden_size"
    sizes = {
        "hidden_size": WIDTH,
        "out_hidden_size": WIDTH,
        width: VISION_WIDTH,
        "depth": depth,
        "num_heads": HEADS,
        "intermediate_size": VISION_WIDTH + VISION_WIDTH // 2,
        "patch_size": PATCH,
        "image_size": TILE,
        "window_size": 2 * given["spatial_merge_size"] * PATCH,
        "fullatt_block_indexes": [depth - 1],
        "num_position_embeddings": 8 * 8,
        "deepstack_visual_indexes": list(range(len(stacked or ()))),
    }
    changes = {name: value for name, value in sizes.items() if given.get(name) is not None}
    return {**given, **changes}


# Families of the generic adapter


def _smolvlm(config: Any) -> Any | None:
    vision = shrunk_clip_like(config.vision_config)
    if vision is not None:
        vision |= {"image_size": 2 * SIDE * config.scale_factor, "patch_size": 2}
    given = parts(config, vision)
    return None if given is None else built(config, given)


def _mistral3(config: Any) -> Any | None:
    vision = shrunk_clip_like(config.vision_config)
    if vision is not None:
        vision |= {"image_size": 4 * TILE}  # the largest side of an image
    given = parts(config, vision)
    return None if given is None else built(config, {**given, **feature_layers(config)})


def _glm4v(config: Any) -> Any | None:
    return _merged(config, shrunk_text(config.text_config), shrunk_patch_merger(config.vision_config))


def _ernie(config: Any) -> Any | None:
    text, vision = shrunk_text(config.text_config), shrunk_patch_merger(config.vision_config)
    # Experts of text and of images differ in size; rows and columns, which come first, have as many features each.
    return _merged(config, None if text is None else {**text, "moe_intermediate_size": [32, 16]}, vision, [3, 3, 2])


def _janus(config: Any) -> Any | None:
    vision = shrunk_clip_like(config.vision_config)
    if vision is not None:
        vision |= {"projection_dim": WIDTH, "num_image_tokens": SIDE**2}
    given = parts(config, vision)
    if given is None:
        return None
    maker = {
        "base_channels": 32,
        "latent_channels": 32,
        "num_embeddings": VOCABULARY,
        "num_patches": SIDE,
        "projection_dim": WIDTH,
        "image_token_embed_dim": WIDTH,
        "channel_multiplier": [1, 1],
        "num_res_blocks": 1,
    }
    return built(config, {**given, "vq_config": {**config.vq_config.to_dict(), **maker}})


GENERIC: Mapping[str, Callable[[Any], Any | None]] = {
    "deepseek_vl": llava,
    "ernie4_5_vl_moe": _ernie,
    "glm46v": _glm4v,
    "glm4v": _glm4v,
    "glm4v_moe": _glm4v,
    "glm_ocr": _glm4v,
    "idefics3": _smolvlm,
    "janus": _janus,
    "lighton_ocr": _mistral3,
    "mistral3": _mistral3,
    "smolvlm": _smolvlm,
    "video_llava": llava,
    "vipllava": llava,
}


# Putting together


def parts(config: Any, vision: Given | None) -> Given | None:
    """Small settings of decoder and tower; None where one of them is not known."""
    text = shrunk_text(config.text_config)
    return None if text is None or vision is None else {"text_config": text, "vision_config": vision}


def _merged(config: Any, text: Given | None, vision: Given | None, axes: Sequence[int] = (2, 3, 3)) -> Any | None:
    """A model whose positions have several axes, of the given sizes where the configuration is silent."""
    if text is None or vision is None:
        return None
    rope = text.get("rope_parameters") or {}
    rope.setdefault("mrope_section", _sections(axes, rope))  # classes' defaults fit their full width only
    return built(config, {"text_config": {**text, "rope_parameters": rope}, "vision_config": vision})


def built(config: Any, changes: Given) -> Any:
    """A configuration of the same class, its token ids moved into the small vocabulary."""
    given = {name: value for name, value in config.to_dict().items() if name not in LEFT_OUT}
    if "image_seq_length" in given:
        given["image_seq_length"] = SIDE**2
    return type(config).from_dict(_renumbered({**given, **changes}, {}))


def _renumbered(given: Given, numbers: dict[int, int]) -> Given:
    """Settings with the same ids for the same tokens, counted down from the end of the small vocabulary."""
    out: Given = {}
    for name, value in given.items():
        if name in LEFT_OUT:
            continue
        if isinstance(value, dict) and "model_type" in value:  # a configuration within this one
            value = _renumbered(value, numbers)
        elif name.endswith("pad_token_id"):
            value = 0
        elif name.endswith("bos_token_id"):
            value = 1
        elif name.endswith("eos_token_id"):
            value = None
        elif TOKEN_IDS.search(name) and isinstance(value, int) and value >= 0:
            value = numbers.setdefault(value, VOCABULARY - 1 - len(numbers))
        out[name] = value
    return out


def _is_common(name: str) -> bool:
    return name.endswith(("pad_token_id", "bos_token_id", "eos_token_id"))


def _chosen_layers(kinds: Sequence[str]) -> list[int]:
    """Which layers stay: one of each kind, and the first of the others."""
    first = {kind: kinds.index(kind) for kind in kinds}.values()
    others = [layer for layer in range(len(kinds)) if layer not in first]
    return sorted([*first, *others][:LAYERS])


def feature_layers(config: Any) -> Given:
    """The tower's layers that feed the projector, as many as before, where the small tower has them."""

    def there(layer: int) -> int:
        return max(layer, -VISION_LAYERS) if layer < 0 else min(layer, VISION_LAYERS)

    given: Given = {}
    for name in ("vision_feature_layer", "vision_feature_layers"):  # ViP-LLaVA up to transformers 5.22
        chosen = getattr(config, name, None)
        if chosen is not None:
            given[name] = there(chosen) if isinstance(chosen, int) else [there(layer) for layer in chosen]
    return given


def _shrunk_rope(rope: Given) -> Given:
    """Rotary settings for the small heads; a model with kinds of layers has them by kind."""
    half = _rotated(rope)
    out: Given = {}
    for name, value in rope.items():
        if isinstance(value, dict):
            value = _shrunk_rope(value)
        elif name == "mrope_section":
            value = _sections(value, rope)
        elif name in ("long_factor", "short_factor"):
            value = value[:half]
        out[name] = value
    return out


def _rotated(rope: Given) -> int:
    """Pairs of features of a head that are rotated."""
    return int(HEAD * (rope.get("partial_rotary_factor") or 1.0)) // 2


def _sections(parts: Sequence[int], rope: Given) -> list[int]:
    """Features for time, row and column, in about the given proportions."""
    half = _rotated(rope)
    rest = [max(round(part * half / sum(parts)), 1) for part in parts[1:]]
    return [half - sum(rest), *rest]
