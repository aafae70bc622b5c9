"""Tiny random encoders with byte tokenizers: RoBERTa's layout of special tokens, and BERT's with token types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, RobertaConfig, RobertaModel

SPECIALS = ["<s>", "<pad>", "</s>", "<unk>"]


def encoder_tokenizer(kind: str = "roberta", *, trim: bool = True, **options: Any) -> PreTrainedTokenizerFast:
    """One token per byte. ``trim``: offsets without the white space before a word."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIALS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind == "roberta":
        tokenizer.post_processor = processors.RobertaProcessing(
            ("</s>", 2), ("<s>", 0), trim_offsets=trim, add_prefix_space=False
        )
    else:
        tokenizer.post_processor = processors.BertProcessing(("</s>", 2), ("<s>", 0))
    inputs = ["input_ids", "attention_mask", *(["token_type_ids"] if kind == "bert" else [])]
    names = {"cls_token": "<s>", "bos_token": "<s>", "sep_token": "</s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{**names, "pad_token": "<pad>", "unk_token": "<unk>", "clean_up_tokenization_spaces": False, **options},
        model_input_names=inputs,
    )


def tiny_encoder(kind: str = "roberta", *, seed: int = 0, positions: int = 302) -> RobertaModel | BertModel:
    """Two layers of width 32, without dropout, so that its results repeat."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": 260,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": positions,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    if kind == "roberta":
        return RobertaModel(RobertaConfig(type_vocab_size=1, **settings), add_pooling_layer=False).eval()
    return BertModel(BertConfig(**settings), add_pooling_layer=False).eval()


def save_tiny_encoder(folder: Path, kind: str = "roberta") -> Path:
    """Model and tokenizer in transformers' format."""
    tiny_encoder(kind).save_pretrained(folder)
    encoder_tokenizer(kind).save_pretrained(folder)
    return folder
