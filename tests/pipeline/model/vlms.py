"""Tiny random models of stock vision-language classes with real tokenizers and processors, saved as folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers as hf
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

SIDE = 16
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2,
}  # fmt: skip
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
WORDS = [
    "what colour is the circle", "how many squares are there", "Red. Two. A blue ring.", "user assistant system model",
    "USER: ASSISTANT: User: Assistant: System:",
]  # fmt: skip
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n'}}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{'<|im_end|>\\n'}}{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\\n' }}{% endif %}"
)
IDEFICS = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}{%- if messages[0]['content'] is string -%}"
    "{%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}{%- else -%}"
    "{%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}{%- endif -%}"
    "{%- set loop_messages = messages[1:] -%}{%- else -%}{%- set first_user_prefix = '' -%}"
    "{%- set loop_messages = messages -%}{%- endif -%}{%- for message in loop_messages -%}"
    "{%- if (message['role'] == 'assistant') -%}{%- set role = 'model' -%}{%- else -%}"
    "{%- set role = message['role'] -%}{%- endif -%}"
    "{{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else '') }}"
    "{%- if message['content'] is string -%}{{ message['content'] | trim }}"
    "{%- elif message['content'] is iterable -%}{%- for item in message['content'] -%}"
    "{%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}{%- elif item['type'] == 'text' -%}"
    "{{ item['text'] | trim }}{%- endif -%}{%- endfor -%}{%- endif -%}{{ '<end_of_turn>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)
LLAVA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{% generation %}"
    "{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@dataclass(frozen=True)
class TinyVlm:
    """One stock class at a few thousand parameters."""

    name: str
    config: type[Any]
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    tokens: int
    """Tokens of one image."""
    image: str
    """Name of its image token."""
    specials: tuple[str, ...]
    """The first begins a sequence, the second ends an answer."""
    template: str
    own: Mapping[str, Any] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)
    """Attributes of the tokenizer that name special tokens."""
    adds_first: bool = False
    """The tokenizer begins every sequence with the first special token."""

    @property
    def tokenizer(self) -> Any:
        fast = _bpe(self.specials, self.image, self.adds_first)
        first, end = self.specials[:2]
        extra = {**self.roles, "image_token": self.image}
        made = hf.PreTrainedTokenizerFast(
            tokenizer_object=fast, bos_token=first, eos_token=end, pad_token="<pad>", extra_special_tokens=extra
        )
        made.chat_template = self.template
        return made

    def model(self) -> Any:
        """A seeded model in evaluation mode."""
        torch.manual_seed(0)
        tokenizer = self.tokenizer
        image_id = tokenizer.convert_tokens_to_ids(self.image)
        key = "image_token_index" if self.name in ("llava", "gemma3") else "image_token_id"
        config = self.config(
            text_config={**TEXT, "vocab_size": len(tokenizer) + 3, **self.text},
            vision_config={**SMALL, **self.vision}, **{key: image_id}, **self.own,
        )  # fmt: skip
        made = hf.AutoModelForImageTextToText.from_config(config)
        for parameter in made.parameters():  # zeros of fresh norms and projections would hide mistakes
            parameter.data += 0.05 * torch.randn_like(parameter)
        return made.eval()

    def processor(self) -> Any:
        """The stock processor: one square image of its own tokens."""
        tokenizer, size = self.tokenizer, {"height": SIDE, "width": SIDE}
        if self.name == "llava":
            image = hf.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=size)
            return hf.LlavaProcessor(
                image_processor=image, tokenizer=tokenizer, chat_template=self.template, patch_size=8,
                vision_feature_select_strategy="default", num_additional_image_tokens=1, image_token=self.image,
            )  # fmt: skip
        if self.name == "gemma3":
            image = hf.Gemma3ImageProcessor(size=size)
            return hf.Gemma3Processor(image, tokenizer, chat_template=self.template, image_seq_length=self.tokens)
        if self.name == "internvl":
            return None  # its processor needs torchvision
        edge = {"longest_edge": SIDE}
        image = hf.Idefics3ImageProcessor(size=edge, max_image_size=edge, do_image_splitting=False)
        # SmolVLM's own class is the same without videos, and needs another package.
        return hf.Idefics3Processor(image, tokenizer, image_seq_len=self.tokens, chat_template=self.template)

    def save(self, folder: Path) -> Path:
        """Write model, tokenizer and processor as published folders hold them."""
        self.model().save_pretrained(folder)
        if (processor := self.processor()) is not None:
            processor.save_pretrained(folder)
            return folder
        self.tokenizer.save_pretrained(folder)
        size = {"height": SIDE, "width": SIDE}
        hf.GotOcr2ImageProcessor(size=size, crop_to_patches=False).save_pretrained(folder)
        return folder


@lru_cache
def _bpe_json(specials: tuple[str, ...], image: str) -> str:
    fast = tokenizers.Tokenizer(models.BPE())
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(WORDS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    names = dict.fromkeys([*specials, "<pad>", image])
    fast.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return str(fast.to_str())


def _bpe(specials: tuple[str, ...], image: str, adds_first: bool) -> tokenizers.Tokenizer:
    fast = tokenizers.Tokenizer.from_str(_bpe_json(specials, image))
    if adds_first:
        first = specials[0]
        fast.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, fast.token_to_id(first))]
        )
    return fast


_IDEFICS = {
    "tokens": 4, "image": "<image>", "template": IDEFICS, "own": {"scale_factor": 2},
    "vision": {"image_size": SIDE, "patch_size": 4}, "text": {"model_type": "llama"},
    "specials": ("<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<global-img>"),
}  # fmt: skip
TINY = {
    one.name: one
    for one in (
        TinyVlm(
            "llava", hf.LlavaConfig, {"model_type": "llama"},
            {"model_type": "clip_vision_model", "image_size": SIDE, "patch_size": 8}, 4, "<image>", ("<s>", "</s>"),
            LLAVA, own={"image_seq_length": 4}, adds_first=True,
        ),
        TinyVlm(
            "gemma3", hf.Gemma3Config,
            {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 128,
             "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
            {"image_size": SIDE, "patch_size": 4, "vision_use_head": False}, 4, "<image_soft_token>",
            ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>"), GEMMA,
            own={"mm_tokens_per_image": 4}, roles={"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
            adds_first=True,
        ),
        TinyVlm("idefics3", hf.Idefics3Config, **_IDEFICS),
        TinyVlm("smolvlm", hf.SmolVLMConfig, **_IDEFICS),
        TinyVlm(
            "internvl", hf.InternVLConfig, {"model_type": "qwen2"},
            {"image_size": [SIDE, SIDE], "patch_size": [4, 4], "use_qk_norm": True}, 4, "<IMG_CONTEXT>",
            ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<video>"), CHATML,
            own={"downsample_ratio": 0.5, "image_seq_length": 4, "tie_word_embeddings": False},
            roles={"start_image_token": "<img>", "end_image_token": "</img>", "video_token": "<video>",
                   "context_image_token": "<IMG_CONTEXT>"},
        ),
    )
}  # fmt: skip
"""By ``model_type``."""
