"""The 86 transformers families that planish is tried on, as tiny models with random weights.

A family is a row of data: its kind, what its configuration sets beyond ``SIZES``, and the inputs it takes. Importing
this module loads torch, but not transformers, which is imported when a model is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch

from planish.errors import MissingPackageError, UnknownNameError
from planish.models.base import Batch
from planish.models.seeded import configuration, randomize, transformer
from planish.program import Dim

VOCABULARY = 128
"""Token ids are below this in every family."""

SIZES: Mapping[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size"), 32),
    **dict.fromkeys(("word_embed_proj_dim", "projection_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_key_value_heads", "num_experts_per_tok"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("intermediate_size", "hidden_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim"), 64),
    **dict.fromkeys(("d_kv", "head_dim"), 8),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("vocab_size",), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 128),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
    "image_size": 64,
}
"""Configuration fields that every family gets, where its own configuration has them as one value."""

_SET_WHERE_NONE = ("num_key_value_heads", "head_dim", "image_size")
"""Fields of ``SIZES`` that are set where the default is None; in others None switches a part of the model off."""

DIMS: Mapping[str, Dim] = {
    "batch": Dim("batch", 1, 16),
    "seq": Dim("seq", 1, 64),
    "target": Dim("target", 1, 32),
    "frames": Dim("frames", 5, 256),
    "samples": Dim("samples", 720, 16000),
}
"""The sizes that can vary. ``batch`` is the batch, all others are lengths of a sequence: of text, of target text, of a
spectrogram, of sound; the last two from what their convolutions need."""


@dataclass(frozen=True)
class Input:
    """One tensor argument: its name, its shape (a str is a size of ``DIMS``), and the function that fills it."""

    name: str
    shape: tuple[int | str, ...]
    fill: Callable[[tuple[int, ...], torch.Generator], torch.Tensor]


def _tokens(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=generator)  # 0 to 2 are the special tokens of SIZES


def _noise(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


def _ones(shape: tuple[int, ...], _: torch.Generator) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.int64)


def _zeros(shape: tuple[int, ...], _: torch.Generator) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def _padded(shape: tuple[int, ...], _: torch.Generator) -> torch.Tensor:
    """A mask whose first row ends with two padding tokens."""
    mask = torch.ones(shape, dtype=torch.int64)
    mask[0, -2:] = 0
    return mask


IDS = Input("input_ids", ("batch", "seq"), _tokens)
PADDED = Input("attention_mask", ("batch", "seq"), _padded)
ALL = Input("attention_mask", ("batch", "seq"), _ones)
TARGET = Input("decoder_input_ids", ("batch", "target"), _tokens)
BOXES = Input("bbox", ("batch", "seq", 4), _zeros)
PIXELS = Input("pixel_values", ("batch", 3, 64, 64), _noise)
LARGE_PIXELS = Input("pixel_values", ("batch", 3, 224, 224), _noise)
SAMPLES = Input("input_values", ("batch", "samples"), _noise)
SPECTROGRAM = Input("input_values", ("batch", 64, 32), _noise)
FRAMES = Input("input_features", ("batch", "frames", 16), _noise)
MELS = Input("input_features", ("batch", 16, 64), _noise)


@dataclass(frozen=True)
class Kind:
    """What the families of a kind share: transformers' auto class, and the inputs."""

    auto: str
    inputs: tuple[Input, ...]


KINDS: Mapping[str, Kind] = {
    "encoder": Kind("AutoModelForMaskedLM", (IDS, PADDED)),
    "decoder": Kind("AutoModelForCausalLM", (IDS, ALL)),
    "moe": Kind("AutoModelForCausalLM", (IDS, ALL)),
    "seq2seq": Kind("AutoModelForSeq2SeqLM", (IDS, ALL, TARGET)),
    "audio": Kind("AutoModel", (SAMPLES,)),
    "multimodal": Kind("AutoModel", (IDS, ALL, PIXELS)),
    "vision": Kind("AutoModelForImageClassification", (PIXELS,)),
}


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        name: what users write.
        kind: a key of ``KINDS``.
        config: fields of its configuration, set after ``SIZES``.
        inputs: where they differ from the kind's.
        auto: where it differs from the kind's auto class.
        model_type: transformers' name of it, where that differs.
        own_sizes: keep the configuration's own widths and depths, which are lists by stage; only the image is small.
    """

    name: str
    kind: str
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    inputs: tuple[Input, ...] = ()
    auto: str = ""
    model_type: str = ""
    own_sizes: bool = False

    def arguments(self) -> tuple[Input, ...]:
        """The tensors its ``forward`` is called with."""
        return self.inputs or KINDS[self.kind].inputs


def _stages(name: str, **options: Any) -> Family:
    return Family(name, "vision", own_sizes=True, **options)


_WINDOWS = {"embed_dim": 16, "depths": [1, 1, 2], "num_heads": [2, 2, 4], "window_size": 4}
_WAVES = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "conv_dim": (16,) * 7}
_LATENT = {
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
    **{"num_key_value_heads": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1},
}

_ROWS = (
    *(Family(n, "encoder") for n in ("bert", "distilbert", "albert", "roberta", "xlm-roberta", "electra", "mpnet")),
    *(Family(n, "encoder") for n in ("modernbert", "deberta-v2", "convbert", "squeezebert")),
    Family("layoutlm", "encoder", inputs=(IDS, PADDED, BOXES)),
    Family(
        "esm",
        "encoder",
        {"vocab_size": VOCABULARY, "pad_token_id": 0, "mask_token_id": 3, "position_embedding_type": "rotary"},
    ),
    *(Family(n, "decoder") for n in ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "opt")),
    *(Family(n, "decoder") for n in ("bloom", "mpt", "gpt_neox", "lfm2")),
    Family("gemma3", "decoder", model_type="gemma3_text"),
    Family("phi", "decoder", {"num_key_value_heads": 4}),
    Family("falcon", "decoder", {"num_kv_heads": 2, "new_decoder_architecture": True}),
    Family("gptj", "decoder", {"rotary_dim": 4}),
    Family("gpt_neo", "decoder", {"attention_types": [[["global", "local"], 1]], "window_size": 8}),
    Family("mamba", "decoder", {"state_size": 8}, inputs=(IDS,)),
    Family(
        "mamba2",
        "decoder",
        {"num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 1, "state_size": 8, "chunk_size": 8},
        inputs=(IDS,),
    ),
    *(Family(n, "moe") for n in ("mixtral", "qwen2_moe", "qwen3_moe")),
    Family("gpt_oss", "moe", {"experts_per_token": 2}),
    Family("deepseek_v2", "moe", {**_LATENT, "topk_method": "greedy", "num_experts_per_tok": 2}),
    Family("deepseek_v3", "moe", _LATENT),
    Family(
        "jamba",
        "moe",
        {
            **{"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
            **{"use_mamba_kernels": False, "mamba_d_state": 8, "mamba_dt_rank": 4},
        },
    ),
    Family(
        "qwen3_next",
        "moe",
        {
            **{"linear_num_value_heads": 4, "linear_num_key_heads": 2},
            **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
        },
    ),
    *(Family(n, "seq2seq") for n in ("t5", "bart", "marian", "m2m_100", "led")),
    # Two layers make none of its layers sparse. A sparse one calls `.to()` on its router in forward, which torch.export
    # cannot trace.
    Family("switch_transformers", "seq2seq"),
    Family("wav2vec2", "audio", _WAVES),
    Family("hubert", "audio", _WAVES),
    Family("audio-spectrogram-transformer", "audio", {"max_length": 64, "num_mel_bins": 32}, inputs=(SPECTROGRAM,)),
    Family(
        "whisper",
        "audio",
        {"num_mel_bins": 16, "max_source_positions": 32, "max_target_positions": 32, "decoder_start_token_id": 1},
        inputs=(MELS, TARGET),
    ),
    Family(
        "speech_to_text",
        "audio",
        {
            **{"input_feat_per_channel": 16, "conv_channels": 16, "decoder_start_token_id": 1},
            **{"max_source_positions": 64, "max_target_positions": 64},
        },
        inputs=(FRAMES, TARGET),
    ),
    *(Family(n, "multimodal") for n in ("clip", "blip", "vilt")),
    Family("siglip", "multimodal", inputs=(IDS, PIXELS)),
    *(Family(n, "vision") for n in ("beit", "dinov2", "vit_msn", "data2vec-vision")),
    Family("deit", "vision", {"architectures": ["DeiTForImageClassification"]}),  # two classes: it tells which
    Family("vit", "vision", {"patch_size": 16}),
    Family("dinov3", "vision", auto="AutoModel", model_type="dinov3_vit"),
    Family(
        "dpt", "vision", {"backbone_out_indices": [0, 1, 1, 1], "neck_hidden_sizes": [8, 8, 8, 8]}, auto="AutoModel"
    ),
    *(_stages(n) for n in ("resnet", "regnet", "bit", "convnext", "convnextv2", "efficientnet", "focalnet")),
    *(_stages(n) for n in ("mobilenet_v1", "mobilenet_v2", "mobilevit", "mobilevitv2", "poolformer", "pvt_v2")),
    _stages("segformer"),
    _stages("swin", config=_WINDOWS),
    _stages("swinv2", config=_WINDOWS),
    *(_stages(n, inputs=(LARGE_PIXELS,)) for n in ("cvt", "hiera")),
    _stages("swiftformer", config={"image_size": 224}, inputs=(LARGE_PIXELS,)),
    _stages(
        "levit",
        config={"image_size": 224, "architectures": ["LevitForImageClassification"]},
        inputs=(LARGE_PIXELS,),
    ),
    Family("yolos", "vision", {"image_size": [64, 64]}, auto="AutoModel"),
    Family(
        "detr",
        "vision",
        {
            "use_timm_backbone": False,
            "backbone_config": {"model_type": "resnet", "out_features": ["stage4"]},
        },
        auto="AutoModel",
    ),
)

FAMILIES: Mapping[str, Family] = {row.name: row for row in _ROWS}
"""Every family by name, by kind and size of kind."""


def family(name: str) -> Family:
    """The row of a family.

    Raises:
        UnknownNameError: there is none of that name; the message lists those that exist.
    """
    if name not in FAMILIES:
        raise UnknownNameError(f"unknown family {name!r}", fix="use one of: " + ", ".join(FAMILIES))
    return FAMILIES[name]


def build(name: str) -> torch.nn.Module:
    """The family's model in eval mode, with the same random weights every time.

    A model with batch norms gets weights and statistics that keep its activations of order one: as it starts training,
    some of them come out as denormal numbers, which prove nothing.

    Raises:
        UnknownNameError: there is no such family.
        MissingPackageError: transformers is not installed.
    """
    row = family(name)
    if find_spec("transformers") is None:
        raise MissingPackageError(f"family {name!r} needs transformers", fix='pip install "planish[models]"')
    model_type = row.model_type or row.name
    model = transformer(row.auto or KINDS[row.kind].auto, model_type, {**_small(row, model_type), **row.config})
    if any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules()):
        randomize(model, seed=0)
    return model


def _small(row: Family, model_type: str) -> dict[str, Any]:
    """The fields that make a configuration small; one made of a text and a vision part gets both made small."""
    default = configuration(model_type)
    parts = {name: getattr(default, name) for name in ("text_config", "vision_config") if hasattr(default, name)}
    small = {name: {**part.to_dict(), **_sizes(part.to_dict())} for name, part in parts.items()}
    if not small:
        small = _sizes(default.to_dict())
    if row.own_sizes:
        small = {name: value for name, value in small.items() if name == "image_size"}
    return small


def _sizes(known: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ``SIZES`` that a configuration has as one value."""
    return {
        name: value
        for name, value in SIZES.items()
        if name in known
        and not isinstance(known[name], (list, tuple))
        and (known[name] is not None or name in _SET_WHERE_NONE)
    }


def inputs(name: str, batch: int, seq: int, seed: int = 0) -> Batch:
    """Arguments for a family's model.

    Args:
        name: the family.
        batch: size of the batch.
        seq: length of the text in tokens, at least 3; lengths of the target text, of the sound and of the spectrogram
            grow with it.
        seed: of the random values; masks and boxes have none.

    Returns:
        Argument name to tensor: token ids and masks int64, images, sound and spectrograms float32.
    """
    sizes = {"batch": batch, "seq": seq, "target": seq - 2, "frames": 4 * seq, "samples": 320 * seq + 400}
    return fill(family(name).arguments(), sizes, seed)


def fill(arguments: Iterable[Input], sizes: Mapping[str, int], seed: int) -> Batch:
    """Seeded values for arguments whose named sizes are ``sizes``."""
    generator = torch.Generator().manual_seed(seed)
    made: Batch = {}
    for argument in arguments:
        shape = tuple(sizes[size] if isinstance(size, str) else size for size in argument.shape)
        made[argument.name] = argument.fill(shape, generator)
    return made


def dynamic(name: str, *, sequences: bool = True) -> dict[str, dict[int, Dim]]:
    """Which axes vary, for ``planish.compile(..., dynamic=...)``: the batch and, with ``sequences``, every length."""
    dims = DIMS if sequences else {"batch": DIMS["batch"]}
    return axes(family(name).arguments(), dims)


def axes(arguments: Iterable[Input], dims: Mapping[str, Dim]) -> dict[str, dict[int, Dim]]:
    """Argument name to the axes whose size is a key of ``dims``."""
    return {
        argument.name: {
            axis: dims[size] for axis, size in enumerate(argument.shape) if isinstance(size, str) and size in dims
        }
        for argument in arguments
    }
