"""Tiny networks of every kind that transformers has and people adapt, made from their configurations."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

VOCABULARY = 64
PAD, EOS = 0, 2
ENCODER = {
    "vocab_size": VOCABULARY,
    "pad_token_id": PAD,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
DECODER = {
    **ENCODER,
    "eos_token_id": EOS,
    "bos_token_id": 1,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 48,
}
PICTURES = {"image_size": 8, "patch_size": 4, "num_channels": 3}


@dataclass(frozen=True)
class Architecture:
    """A kind of network.

    Attributes:
        config: Class of its configuration.
        options: What makes it tiny.
        task: Which ``AutoModelFor...`` class makes the network.
        lacking: Beginnings of the names of weights that its checkpoint lacks: a new head, and what belongs to it.
        inputs: ``"text"``, ``"image"``, ``"audio"`` (a waveform) or ``"spectrogram"``.
        picture_size: Pixels of a picture's side.
        refused: What the refusal says, where the default configuration cannot adapt it.
    """

    config: str
    options: dict[str, Any] = field(default_factory=dict)
    task: str = "SequenceClassification"
    lacking: tuple[str, ...] = ("classifier",)
    inputs: str = "text"
    picture_size: int = 8
    refused: str | None = None

    def configuration(self, **changes: Any) -> Any:
        return getattr(transformers, self.config)(**{"num_labels": 3, **self.options, **changes})

    def network(self, *, seed: int = 0, **changes: Any) -> Any:
        """A network with random weights, in evaluation mode."""
        torch.manual_seed(seed)
        return self._auto.from_config(self.configuration(**changes)).eval()

    def save_base(self, folder: Path, *, seed: int = 0, **changes: Any) -> None:
        """Write a checkpoint of a network as pretraining leaves it: without what ``lacking`` names."""
        self.network(seed=seed, **changes).save_pretrained(folder)
        file = folder / "model.safetensors"
        kept = {name: value for name, value in load_file(file).items() if not name.startswith(self.lacking)}
        save_file(kept, file, metadata={"format": "pt"})

    def load(self, folder: Path, *, seed: int, **options: Any) -> Any:
        """The network on that checkpoint; ``seed`` decides what the checkpoint lacks."""
        torch.manual_seed(seed)
        return self._auto.from_pretrained(folder, num_labels=3, **options).eval()

    @property
    def _auto(self) -> Any:
        return getattr(transformers, f"AutoModelFor{self.task}")

    def examples(self, count: int = 6, *, seed: int = 0) -> list[dict[str, Any]]:
        """Random labelled examples of differing length (pictures and spectrograms: of one size), as lists."""
        generator = torch.Generator().manual_seed(seed)
        return [{**self._input(5 + index % 3, generator), "labels": index % 3} for index in range(count)]

    def _input(self, length: int, generator: torch.Generator) -> dict[str, Any]:
        if self.inputs == "image":
            return {"pixel_values": torch.randn(3, self.picture_size, self.picture_size, generator=generator)}
        if self.inputs == "spectrogram":
            return {"input_features": torch.randn(8, 16, generator=generator)}
        if self.inputs == "audio":
            return {"input_values": torch.randn(400 * length, generator=generator).tolist()}
        tokens = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        return {"input_ids": [*tokens, EOS], "attention_mask": [1] * (length + 1)}


ARCHITECTURES: dict[str, Architecture] = {
    "bert": Architecture("BertConfig", {**ENCODER, "max_position_embeddings": 40}),
    "bert_without_pooler": Architecture(
        "BertConfig", {**ENCODER, "max_position_embeddings": 40}, lacking=("classifier", "bert.pooler")
    ),
    "roberta": Architecture("RobertaConfig", {**ENCODER, "max_position_embeddings": 40}),
    "distilbert": Architecture(
        "DistilBertConfig",
        {
            "vocab_size": VOCABULARY,
            "pad_token_id": PAD,
            "dim": 16,
            "n_layers": 2,
            "n_heads": 2,
            "hidden_dim": 24,
            "max_position_embeddings": 40,
        },
        lacking=("classifier", "pre_classifier"),
    ),
    "albert": Architecture("AlbertConfig", {**ENCODER, "embedding_size": 8, "max_position_embeddings": 40}),
    "deberta_v2": Architecture(
        "DebertaV2Config",
        {
            **ENCODER,
            "max_position_embeddings": 40,
            "relative_attention": True,
            "position_buckets": 4,
            "pos_att_type": ["p2c", "c2p"],
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
        },
        lacking=("classifier", "pooler"),
    ),
    "electra": Architecture("ElectraConfig", {**ENCODER, "embedding_size": 8, "max_position_embeddings": 40}),
    "mpnet": Architecture("MPNetConfig", {**ENCODER, "max_position_embeddings": 40}),
    "xlnet": Architecture(
        "XLNetConfig",
        {"vocab_size": VOCABULARY, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24, "pad_token_id": PAD},
        lacking=("logits_proj", "sequence_summary"),
    ),
    "modernbert": Architecture(
        "ModernBertConfig",
        {
            **ENCODER,
            "max_position_embeddings": 40,
            "local_attention": 8,
            "cls_token_id": 1,
            "sep_token_id": EOS,
            "bos_token_id": 1,
            "eos_token_id": EOS,
        },
        lacking=("classifier", "head"),
    ),
    "longformer": Architecture("LongformerConfig", {**ENCODER, "max_position_embeddings": 40, "attention_window": 4}),
    "t5": Architecture(
        "T5Config",
        {
            "vocab_size": VOCABULARY,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 24,
            "num_layers": 2,
            "num_heads": 2,
            "pad_token_id": PAD,
            "eos_token_id": EOS,
            "decoder_start_token_id": PAD,
        },
        lacking=("classification_head",),
    ),
    "bart": Architecture(
        "BartConfig",
        {
            "vocab_size": VOCABULARY,
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "max_position_embeddings": 40,
            "pad_token_id": PAD,
            "bos_token_id": 1,
            "eos_token_id": EOS,
            "decoder_start_token_id": EOS,
        },
        lacking=("classification_head",),
    ),
    "gpt2": Architecture(
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 48,
            "pad_token_id": PAD,
            "bos_token_id": 1,
            "eos_token_id": EOS,
        },
        lacking=("score",),
    ),
    "gpt_neox": Architecture("GPTNeoXConfig", {**DECODER}, lacking=("score",)),
    "llama": Architecture("LlamaConfig", {**DECODER}, lacking=("score",)),
    "mistral": Architecture("MistralConfig", {**DECODER}, lacking=("score",)),
    "qwen2": Architecture("Qwen2Config", {**DECODER}, lacking=("score",)),
    "qwen3": Architecture("Qwen3Config", {**DECODER}, lacking=("score",)),
    "gemma": Architecture("GemmaConfig", {**DECODER}, lacking=("score",)),
    "phi": Architecture("PhiConfig", {**DECODER}, lacking=("score",)),
    "opt": Architecture(
        "OPTConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "word_embed_proj_dim": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "ffn_dim": 24,
            "max_position_embeddings": 48,
            "pad_token_id": PAD,
            "bos_token_id": 1,
            "eos_token_id": EOS,
        },
        lacking=("score",),
    ),
    "falcon": Architecture(
        "FalconConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "pad_token_id": PAD,
            "bos_token_id": 1,
            "eos_token_id": EOS,
        },
        lacking=("score",),
    ),
    "mixtral": Architecture(
        "MixtralConfig",
        {**DECODER, "num_local_experts": 2, "num_experts_per_tok": 1},
        lacking=("score",),
        refused="mixtures of experts",
    ),
    "vit": Architecture("ViTConfig", {**ENCODER, **PICTURES}, "ImageClassification", inputs="image"),
    "swin": Architecture(
        "SwinConfig",
        {"image_size": 8, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2},
        "ImageClassification",
        inputs="image",
    ),
    "convnext": Architecture(
        "ConvNextConfig",
        {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "image_size": 32},
        "ImageClassification",
        inputs="image",
        picture_size=32,
    ),
    "wav2vec2": Architecture(
        "Wav2Vec2Config",
        {
            **{k: v for k, v in ENCODER.items() if k != "pad_token_id"},
            "conv_dim": [8, 8],
            "conv_stride": [10, 8],
            "conv_kernel": [10, 8],
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
            "classifier_proj_size": 8,
            "mask_time_prob": 0.0,
        },
        "AudioClassification",
        lacking=("classifier", "projector"),
        inputs="audio",
    ),
    "whisper": Architecture(
        "WhisperConfig",
        {
            "vocab_size": VOCABULARY,
            "d_model": 16,
            "encoder_layers": 2,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "num_mel_bins": 8,
            "max_source_positions": 8,
            "classifier_proj_size": 8,
            "pad_token_id": PAD,
            "bos_token_id": 1,
            "eos_token_id": EOS,
            "decoder_start_token_id": 1,
        },
        "AudioClassification",
        lacking=("classifier", "projector"),
        inputs="spectrogram",
    ),
    "clip": Architecture(
        "CLIPConfig",
        {
            "text_config": {**ENCODER, "max_position_embeddings": 16},
            "vision_config": {**ENCODER, **PICTURES},
            "projection_dim": 8,
        },
        "ImageClassification",
        inputs="image",
    ),
}
