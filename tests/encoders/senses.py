"""Tiny random models of sound and video, with their own extractors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VIDEO: dict[str, Any] = {**SIZES, "image_size": 16, "patch_size": 8, "num_frames": 4}


def made(kind: str) -> Any:
    """A tiny random model."""
    torch.manual_seed(0)
    config: Any = {
        "ast": lambda: transformers.ASTConfig(
            **SIZES, num_mel_bins=16, max_length=40, patch_size=8, time_stride=8, frequency_stride=8
        ),
        "whisper": lambda: transformers.WhisperConfig(
            d_model=16, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=24, decoder_ffn_dim=24, num_mel_bins=16, max_source_positions=50, vocab_size=40,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        ),
        "clap": lambda: transformers.ClapAudioConfig(
            window_size=4, num_mel_bins=16, spec_size=64, patch_size=4, patch_stride=[4, 4], patch_embeds_hidden_size=8,
            depths=[1, 1], num_attention_heads=[2, 2], hidden_size=16, projection_dim=12, enable_fusion=False,
        ),
        "videomae": lambda: transformers.VideoMAEConfig(**VIDEO, tubelet_size=2),
        "vjepa2": lambda: transformers.VJEPA2Config(
            patch_size=8, crop_size=16, frames_per_clip=4, hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
            mlp_ratio=2, pred_hidden_size=24, pred_num_attention_heads=2, pred_num_hidden_layers=1,
        ),
    }[kind]()  # fmt: skip
    name = {"clap": "ClapAudioModelWithProjection", "whisper": "WhisperModel", "vjepa2": "VJEPA2Model"}.get(kind)
    return (getattr(transformers, name)(config) if name else transformers.AutoModel.from_config(config)).eval()


def saved(kind: str, folder: Path) -> Path:
    """The model with its own extractor."""
    made(kind).save_pretrained(folder)
    processor: Any = {
        "ast": lambda: transformers.ASTFeatureExtractor(num_mel_bins=16, max_length=40),
        "whisper": lambda: transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1),
        "clap": lambda: transformers.ClapFeatureExtractor(
            feature_size=16, fft_window_size=256, hop_length=480, max_length_s=1, truncation="rand_trunc"
        ),
        "videomae": lambda: transformers.VideoMAEVideoProcessor(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
        ),
        "vjepa2": lambda: transformers.VJEPA2VideoProcessor(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
        ),
    }[kind]()
    processor.save_pretrained(folder)
    return folder
