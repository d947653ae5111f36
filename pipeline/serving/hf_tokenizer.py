"""The tokenizer of an export as Hugging Face tools read it: ``tokenizer.json`` and its config at the root.

SentencePiece models are rewritten as ``tokenizer.json``, so no library beside transformers is needed. The result is
compared with the original on texts made of the model's own pieces, and refused where it differs.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as FastTokenizer
from transformers import PreTrainedTokenizerFast

from data_prep.common.errors import UserError, short_repr
from data_prep.text.encoding import Ids, PieceEncoder
from data_prep.text.template import EOS, Text
from data_prep.text.tokenizer import PAD, Tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER, _BYTE = 1, 2, 3, 4, 6
"""Types of pieces in a SentencePiece model."""
_UNIGRAM, _BPE = 1, 2
_PROBES = 400
_SPACE = "\u2581"


def save_hf_tokenizer(tokenizer: Tokenizer, folder: Path, *, chat_template: str, longest: int | None) -> None:
    """Write the tokenizer's Hugging Face files and ``chat_template.jinja``.

    Args:
        tokenizer: the model's tokenizer.
        folder: root of an export.
        chat_template: Jinja source.
        longest: tokens that the model supports; None: any number.

    Raises:
        UserError: a SentencePiece model cannot be rewritten exactly.
    """
    names = tokenizer.markers.reserved
    fast = PreTrainedTokenizerFast(
        tokenizer_object=fast_tokenizer(tokenizer),
        eos_token=names[tokenizer.markers.tokens[EOS]] if EOS in tokenizer.markers.tokens else None,
        pad_token=names[tokenizer.markers.tokens[PAD]],
        extra_special_tokens={"image_token": names[tokenizer.image_id]},
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **({} if longest is None else {"model_max_length": longest}),
    )
    fast.chat_template = chat_template
    fast.save_pretrained(folder)


def fast_tokenizer(tokenizer: Tokenizer) -> FastTokenizer:
    """Return the tokenizer as one of the tokenizers library. Raises UserError where it would encode differently."""
    name, payload = tokenizer.payload
    if name == "tokenizer.json":
        raw = json.loads(payload)
        raw["post_processor"] = None  # templates write the first token themselves; another one would be added to it
        return FastTokenizer.from_str(json.dumps(raw))
    fast = _rewritten(payload, tokenizer)
    _check_equal(fast, tokenizer)
    return fast


def _rewritten(payload: bytes, tokenizer: Tokenizer) -> FastTokenizer:
    """Rewrite a SentencePiece model for the tokenizers library."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(payload)
    fast = FastTokenizer(_model(proto))
    spec = proto.normalizer_spec
    steps: list[Any] = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(_regex(" {2,}"), " ")]
    steps += [normalizers.Prepend(_SPACE)] if spec.add_dummy_prefix else []
    fast.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    ends = [decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []
    fast.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *ends])
    users = [AddedToken(one.piece, normalized=False) for one in proto.pieces if one.type == _USER]
    fast.add_tokens(users)
    marks = sorted(tokenizer.markers.reserved.items())
    fast.add_special_tokens([AddedToken(name, special=True, normalized=False) for _, name in marks])
    return fast


def _regex(pattern: str) -> Any:
    from tokenizers import Regex

    return Regex(pattern)


def _model(proto: Any) -> Any:
    kind, unknown = proto.trainer_spec.model_type, proto.trainer_spec.unk_id
    if kind == _UNIGRAM:
        vocabulary = [(one.piece, one.score) for one in proto.pieces]
        return models.Unigram(vocabulary, unk_id=unknown, byte_fallback=proto.trainer_spec.byte_fallback)
    if kind != _BPE:
        raise UserError("the SentencePiece tokenizer is neither BPE nor unigram: transformers cannot read it")
    ids = {one.piece: index for index, one in enumerate(proto.pieces)}
    return models.BPE(
        ids,
        _merges(proto, ids),
        unk_token=proto.pieces[unknown].piece,
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )


def _merges(proto: Any, ids: dict[str, int]) -> list[tuple[str, str]]:
    """Return the pairs that merge into a piece, best score first, as SentencePiece merges them."""
    found = []
    for one in proto.pieces:
        if one.type == _NORMAL:
            pairs = [(one.piece[:cut], one.piece[cut:]) for cut in range(1, len(one.piece))]
            found += [(-one.score, ids[a], ids[b], (a, b)) for a, b in pairs if a in ids and b in ids]
    return [pair for *_, pair in sorted(found)]


def _check_equal(fast: FastTokenizer, tokenizer: Tokenizer) -> None:
    plain = FastTokenizer.from_str(fast.to_str())
    plain.encode_special_tokens = True

    def encode(text: str) -> Ids:
        return np.array(plain.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    theirs = PieceEncoder(encode, tokenizer.markers)
    for text in _probes(tokenizer):
        if theirs.encode([Text(text)], 1).ids.tolist() != tokenizer.encode([Text(text)], 1).ids.tolist():
            raise UserError(
                f"the SentencePiece tokenizer encodes {short_repr(text)} differently as tokenizer.json: it cannot be "
                "exported for transformers; train with a tokenizer.json"
            )


def _probes(tokenizer: Tokenizer) -> Iterator[str]:
    """Yield texts of random pieces, spaces, line breaks, capitals and letters that the vocabulary may lack."""
    chance = random.Random(0)
    pieces = [tokenizer.decode([index]) for index in range(len(tokenizer)) if not tokenizer.is_special(index)]
    others = [" ", "  ", "\n", "\n\n", ".", "?", "Ä", "é", "日本", "🙂", "\t", "0", "12", "A", "<image>", "</s>"]
    for _ in range(_PROBES):
        words = chance.choices([*pieces, *others], k=chance.randint(1, 12))
        yield "".join(word + chance.choice(["", " "]) for word in words)
