"""Tiny base models, made offline: real architectures, real tokenisers, random weights from a fixed seed."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

_WORDS = (
    "the a of and to in is my card was charged twice parcel has not arrived screen broke refund login app crashes rude staff size "
    "small cancel contract sold out please help order invoice courier machine red blue green one two three four five good bad fast slow"
).split()


def _tokenizer(folder: Path, specials: list[str], bert: bool) -> int:
    letters = [chr(c) for c in range(33, 127)]
    pieces = [*specials, *letters, *(f"##{c}" for c in letters), *_WORDS]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=specials[1], max_input_chars_per_word=40))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if bert:
        ids = [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": specials[0],
        "unk_token": specials[1],
        "model_max_length": 128,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return len(vocabulary)


def make_tiny_bert(folder: Path, seed: int = 0) -> Path:
    """Writes a BERT with 2 layers, hidden 32, into ``folder``."""
    size = _tokenizer(folder, ["[PAD]", "[UNK]", "[CLS]", "[SEP]"], bert=True)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    BertModel(config).save_pretrained(str(folder), safe_serialization=True)
    return folder


def make_tiny_gpt2(folder: Path, seed: int = 0) -> Path:
    """Writes a GPT-2 with 2 layers, width 32, into ``folder``."""
    size = _tokenizer(folder, ["<pad>", "<unk>"], bert=False)
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=size,
        n_positions=128,
        n_embd=32,
        initializer_range=0.3,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(str(folder), safe_serialization=True)
    return folder
