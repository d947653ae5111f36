"""``mma-prep init``: from the user's files to a recipe that runs."""

from __future__ import annotations

import glob
import math
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.common.errors import UserError
from data_prep.common.files import temporary_beside
from data_prep.corpora import build_corpus
from data_prep.example import Example
from data_prep.init.draft import Draft
from data_prep.init.look import Found, Wishes, look
from data_prep.init.samples import SHOWN, Looked, longest, look_at_samples, show
from data_prep.recipe import load_recipe
from data_prep.text.chat_template import chat_format_of
from data_prep.text.template import OWN, Template

MAX_SEQ_LEN = 8192
SMALL_VOCAB, LARGE_VOCAB = 1024, 8192
_ROUND = 64
MAX_BAD_FRACTION = 0.02
_PATTERNS = ("data", "tars")
"""Options that are glob patterns."""


IMAGE_TOKENS = 144
"""Tokens per image by default, as the recipe ``own_sft`` has them."""


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    paths: Sequence[Path]
    recipe: Path | None = None
    """File to write; default: named after the data, in the working folder."""
    out: str | None = None
    """Output folder of the recipe."""
    tokenizer: Path | None = None
    """Existing tokenizer; default: train one."""
    held_out: float | None = None
    """Share of the images to hold out."""
    image_tokens: int = IMAGE_TOKENS
    force: bool = False
    """Overwrite the recipe."""
    wishes: Wishes = field(default_factory=Wishes)
    words: Sequence[str] = ()
    """The command line, for the head of the recipe."""


def init(request: Request, say: Callable[[str], None]) -> Path:
    """Look at the data, say what it is, show samples, and write a recipe. Returns the recipe's file.

    Raises:
        UserError: nothing usable was found, a flag is wrong, or the recipe exists already.
    """
    found = [one for path in request.paths for one in look(path, request.wishes)]
    if all(one.held_out for one in found):
        for one in found:
            one.held_out = False
    names = _unique([one.name for one in found])
    recipe = request.recipe or Path(f"{names[0]}.yaml")
    if recipe.exists() and not request.force:
        raise UserError(f"{recipe}: exists already; overwrite it with --force, or write another file with --recipe")
    root = _common_root(found)
    corpora = {name: _settings(one, root) for name, one in zip(names, found, strict=True)}
    seen = [_introduce(one, corpora[name], root, say) for name, one in zip(names, found, strict=True)]
    draft = _draft(request, recipe, root, dict(zip(names, found, strict=True)), corpora, seen, say)
    _write(recipe, draft)
    say("\n".join([f"wrote {recipe}; next:", *(f"  {shlex.join(words)}" for words in next_commands(recipe, draft))]))
    return recipe


def next_commands(recipe: Path, draft: Draft) -> list[list[str]]:
    """Return what to type after a recipe was written: pack, train a small model, ask it."""
    run_dir = f"runs/{recipe.stem}"
    train = ["mma", "train", "--recipe", "own_sft", "--data.packs", f"{draft.out}/packs/{draft.pack}"]
    train += ["--run-dir", run_dir]
    if draft.image_tokens != IMAGE_TOKENS:
        train += ["--model.connector.latents", str(draft.image_tokens)]
    return [["mma-prep", "run", str(recipe)], train, ["mma", "generate", "IMAGE", "QUESTION", "--model", run_dir]]


def _unique(names: Sequence[str]) -> list[str]:
    found = list[str]()
    for name in names:
        number, other = 2, name
        while other in found:
            number, other = number + 1, f"{name}_{number}"
        found.append(other)
    return found


def _common_root(found: Sequence[Found]) -> Path:
    """Return the deepest folder that holds all files of all corpora."""
    folders = [
        path if path.is_dir() and key == "images" else path.parent for one in found for key, path in one.files.items()
    ]
    return Path(os.path.commonpath(folders))


def _settings(found: Found, root: Path) -> dict[str, Any]:
    """Return a corpus as the recipe writes it, with paths relative to the root."""
    paths = {}
    for key, path in found.files.items():
        below = path.relative_to(root)
        folder = path.is_dir()  # of save_to_disk: no pattern
        paths[key] = below.as_posix() if key not in _PATTERNS or folder else _pattern(below, literal=path.is_file())
    return {"type": found.kind, **paths, **found.options}


def _pattern(path: Path, *, literal: bool) -> str:
    """Return a path as a glob pattern; a literal one matches that file alone, else parts with a star are patterns."""
    parts = (part if "*" in part and not literal else glob.escape(part) for part in path.parts)
    return "/".join(parts)


def _introduce(found: Found, settings: dict[str, Any], root: Path, say: Callable[[str], None]) -> Looked:
    """Say what a corpus is, and show its first samples."""
    say(f"{_short(found.place)}: {found.what} (type {found.kind})")
    for note in found.notes:
        say(f"  note: {note}")
    options = {key: value for key, value in settings.items() if key != "type"}
    try:
        looked = look_at_samples(found.kind, options, root)
    except UserError as error:
        raise UserError(f"{found.place}: {error}") from error
    for example in looked.examples[:SHOWN]:
        for line in show(example):
            say(line)
    rejected = looked.total - len(looked.examples)
    first = f"; the first: {looked.first_reject}" if rejected else ""
    say(f"  samples looked at: {looked.total:,}, rejected: {rejected:,}{first}")
    return looked


def _draft(
    request: Request,
    recipe: Path,
    root: Path,
    found: dict[str, Found],
    corpora: dict[str, dict[str, Any]],
    seen: Sequence[Looked],
    say: Callable[[str], None],
) -> Draft:
    examples = [example for looked in seen for example in looked.examples]
    template, own = _template(request.tokenizer, documents=all(one.documents for one in found.values()), say=say)
    small = all(looked.complete for looked in seen)
    vocab_size = SMALL_VOCAB if small else LARGE_VOCAB
    written = Template(template, own=own)
    tokens, problems = longest(examples, written, request.tokenizer, vocab_size, request.image_tokens)
    if problems:
        say(f"  note: the template {template} cannot write {len(problems)} of {len(examples)} samples; {problems[0]}")
    wanted = _rounded(max(256, tokens * 5 // 4, request.image_tokens * 2))
    seq_len = min(wanted, MAX_SEQ_LEN)
    say(f"the longest of {len(examples):,} samples has {tokens:,} tokens, images included: seq_len {seq_len}")
    if tokens > MAX_SEQ_LEN:
        say(f"  note: longer samples are truncated to {MAX_SEQ_LEN} tokens (too_long, seq_len)")
    bad, allowed = _bad(seen)
    if bad:
        say(f"  note: {bad}: max_bad_fraction is raised to {allowed}")
    comments = {name: one.what for name, one in found.items()}
    training = [name for name, one in found.items() if not one.held_out]
    evaluation = [name for name, one in found.items() if one.held_out]
    if request.held_out is not None:
        evaluation += _hold_out(request.held_out, training, corpora, comments, root)
    return Draft(
        command=shlex.join(["mma-prep", *request.words]),
        root=_short(root),
        out=request.out or f"prepared/{recipe.stem}",
        tokenizer=_below(request.tokenizer, root) if request.tokenizer else "",
        vocab_size=vocab_size,
        image_tokens=request.image_tokens,
        corpora=corpora,
        comments=comments,
        training=training,
        evaluation=evaluation,
        pack="pt" if template == "caption" else "sft",
        template=template,
        seq_len=seq_len,
        longest=tokens,
        too_long="truncate" if tokens > MAX_SEQ_LEN else "reject",
        max_bad_fraction=allowed,
        bad=bad,
    )


def _bad(seen: Sequence[Looked]) -> tuple[str, float]:
    """Return the rejects of the worst corpus, if they are more than usual, and a fraction that allows them."""
    worst = max(seen, key=lambda looked: looked.bad_fraction)
    if worst.bad_fraction <= MAX_BAD_FRACTION:
        return "", MAX_BAD_FRACTION
    codes = ", ".join(f"{count} x {code}" for code, count in worst.rejects.most_common())
    return f"rejected among {worst.total} samples: {codes}", math.ceil(worst.bad_fraction * 150) / 100


def _rounded(tokens: int) -> int:
    return math.ceil(tokens / _ROUND) * _ROUND


def _template(tokenizer: Path | None, *, documents: bool, say: Callable[[str], None]) -> tuple[str, str]:
    """Return the template of the pack set and, for the tokenizer's own, its chat format."""
    if documents:
        return "caption", ""
    if tokenizer is None:
        return "plain", ""
    folder = tokenizer if tokenizer.is_dir() else tokenizer.parent
    try:
        return OWN, chat_format_of(folder, "")
    except UserError as reason:
        say(f"note: template plain is used, because {reason}")
        return "plain", ""


def _hold_out(
    share: float, training: Sequence[str], corpora: dict[str, dict[str, Any]], comments: dict[str, str], root: Path
) -> list[str]:
    """Split every training corpus into a training and a held-out part; return the names of the latter.

    Raises UserError where a part of a small corpus would be empty.
    """
    made = []
    for name in training:
        options = {**corpora[name], "hold_out": share}
        corpora[name] = {**options, "part": "train"}
        other = f"{name}_held_out"
        corpora[other] = {**options, "part": "held_out"}
        comments[other] = f"the {share:.0%} of the images that {name} leaves out"
        for part in (name, other):
            if not _has_samples(corpora[part], root):
                raise UserError(f"--held-out {share:g}: {part} would hold no sample: choose another share")
        made.append(other)
    return made


def _has_samples(settings: dict[str, Any], root: Path) -> bool:
    corpus = build_corpus(settings["type"], {key: value for key, value in settings.items() if key != "type"}, root)
    return any(isinstance(item, Example) for shard in corpus.shards() for item in corpus.examples(shard))


def _short(path: Path) -> str:
    """Return a path relative to the working folder, if it is below it."""
    here = Path.cwd().resolve()
    return path.relative_to(here).as_posix() if path.is_relative_to(here) else str(path)


def _below(tokenizer: Path, root: Path) -> str:
    """Return a tokenizer's path as the recipe means it: relative to the root, or absolute."""
    place = tokenizer.expanduser().resolve()
    return place.relative_to(root).as_posix() if place.is_relative_to(root) else str(place)


def _write(recipe: Path, draft: Draft) -> None:
    """Write the recipe, once it has been read back without an error."""
    temporary = temporary_beside(recipe)
    try:
        temporary.write_text(draft.text(), encoding="utf-8")
        load_recipe(str(temporary))
        temporary.replace(recipe)
    finally:
        temporary.unlink(missing_ok=True)
