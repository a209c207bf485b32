"""Tiny transformers models with targets made up here: a language model, an image classifier."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, ViTConfig, ViTModel

LETTERS = "abcdefgh "
SIZE = 8


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(LETTERS) + 1, n_positions=24, n_embd=16, n_layer=1, n_head=2,
            bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def save_tokenizer(folder: Path) -> None:
    """One token a letter; token 0 is for padding and what is no letter."""
    vocabulary = {"<pad>": 0} | {letter: i for i, letter in enumerate(LETTERS, start=1)}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>", unk_token="<pad>")
    fast.save_pretrained(folder)


def text(number: int) -> str:
    """The alphabet from some letter on, over and over: foretold by what came before."""
    start, length = number % 8, 10 + number % 7
    return "".join(LETTERS[(start + i) % 8] for i in range(length))


def moved(model: torch.nn.Module, *, seed: int, step: float = 0.1) -> torch.nn.Module:
    """The model with noise on its weights: what a fine-tuned source looks like to a merge."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Tied and embedded tensors stay the base's, as merging leaves them.
            if parameter.dim() == 2 and "wte" not in name and "wpe" not in name:
                parameter.add_(step * torch.randn_like(parameter))
    return model


def vit() -> ViTModel:
    return ViTModel(
        ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
            image_size=SIZE, patch_size=4,
        )
    )  # fmt: skip


def picture(label: int, *, seed: int) -> Image.Image:
    """Class 0: bright above; class 1: bright to the left; noise all over; of a size of its own."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 120, size=(12 + seed % 3, 12, 3))
    half = (slice(0, 6), slice(None)) if label == 0 else (slice(None), slice(0, 6))
    pixels[half] += 90
    return Image.fromarray(pixels.astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()
