"""The recipe: one strict YAML file that defines which raw corpora become which packs.

Unknown keys are errors with their dotted path. Values may use ``${VAR}`` and ``${VAR:-default}``. ``root`` and ``out``
are relative to the working directory; the tokenizer and the corpora are relative to ``root``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from data_prep.common.errors import UserError, did_you_mean
from data_prep.common.validation import Place, problems, report
from data_prep.common.yaml_files import expand, read_mapping
from data_prep.corpora import corpus_problems
from data_prep.images.augment import Augment, allowed
from data_prep.media.spec import MediaSpec
from data_prep.text.template import AKI_CHUNK_END, OWN, ImageMarks, Order, Template
from data_prep.text.turns import Turns

if TYPE_CHECKING:
    from data_prep.text.vlm_folder import VlmFolder

SHIPPED = Path(__file__).parent / "recipes"


AKI_TEMPLATES = ("caption", "phi3")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class TrainTokenizer(_Strict):
    """Train a SentencePiece model on the corpora's own text."""

    vocab_size: int = Field(1024, ge=300)
    """Maximum number of tokens, including special tokens and 256 byte tokens."""
    samples: int = Field(50_000, ge=1)
    """Number of samples to train on, spread evenly over the corpora."""


class TokenizerConfig(_Strict):
    """An existing tokenizer, or the training of a new one; a plain text means ``path``."""

    path: str = ""
    """Folder or file with ``tokenizer.json`` or ``tokenizer.model``, relative to ``root`` (give this or ``train``)."""
    train: TrainTokenizer | None = None
    """Train a new tokenizer on the text of the corpora (give this or ``path``)."""

    @model_validator(mode="after")
    def _one_of_two(self) -> TokenizerConfig:
        if bool(self.path) == (self.train is not None):
            raise ValueError("name either a path or train: {vocab_size: ...}")
        return self


class CorpusConfig(BaseModel):
    """A raw corpus: its ``type`` and the options of that reader."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)
    type: str
    """Raw format, such as webdataset, llava, vqav2, chat or parquet; all other keys are options of its reader."""
    augment: Augment | None = None
    """Mirror or crop images in training, where the text of a sample allows it: {flip: 0.5, crop: 0.8}."""

    @property
    def options(self) -> dict[str, Any]:
        """Options of the reader, checked by the reader itself."""
        return dict(self.model_extra or {})


class PackConfig(_Strict):
    """One pack set: which corpora are blended, how samples are encoded, and how many are drawn."""

    corpora: dict[str, float] = Field(min_length=1)
    """Corpus -> weight: its share of ``draws``. With ``epochs``, every weight is 1; a list of names means that, too."""
    template: str
    """How text is written: caption, plain, phi3, llama3, qwen, or tokenizer for the chat template of the tokenizer."""
    chat_format: str = ""
    """How ``template: tokenizer`` writes turns; filled in from the tokenizer, leave it out."""
    image_marks: ImageMarks = ()
    """What stands around an image; filled in from ``model``, leave it out."""
    seq_len: int = Field(ge=8, le=1 << 24)
    """Tokens per row."""
    draws: int | None = Field(None, ge=1, le=10**9)
    """Number of samples in the run, over all corpora (give this or ``epochs``)."""
    epochs: int | None = Field(None, ge=1, le=10_000)
    """How often every sample is drawn (give this or ``draws``)."""
    shuffle: bool = True
    """Shuffle samples; false keeps the order of the corpora (for held-out sets)."""
    system: str = ""
    """System turn for conversations without one."""
    prompts: tuple[str, ...] = ()
    """Given texts beside the image of a caption, one drawn at random for every draw: a list, or a text file with one
    per line. A line end is added to a text that does not end in white space."""
    order: Order = "image_first"
    """Position of images beside the text of their user turn or the prompt: image_first, text_first or as_written."""
    turns: Turns = "every"
    """Samples of a conversation: one with all turns (every), its first exchange (first), or one per answer (expand)."""
    aki_parity: bool = False
    """Write samples as the released AKI does, without its faults: ``<|endofchunk|>`` after a caption, and only the
    first exchange of a conversation. Readers with an option ``aki_parity`` (A-OKVQA, ScienceQA, VSR) use its prompts,
    and multiple-choice questions come in ``orders`` of their options. Needs template caption or phi3."""
    max_text_tokens: int | None = Field(None, ge=1)
    """Maximum tokens of the text of a sample, including the template, without its images."""
    max_images: int | None = Field(None, ge=1)
    """Maximum images in one row, which bounds shapes in training; unset: no limit."""
    max_image_tokens: int | None = Field(None, ge=1)
    """Maximum image tokens in one row, for images of different sizes; instead of ``max_images``."""
    too_long: Literal["reject", "truncate"] = "reject"
    """A sample above the limits is rejected, or truncated in its generated tail and left without an end token."""

    @field_validator("corpora", mode="before")
    @classmethod
    def _list_means_weight_one(cls, value: Any) -> Any:
        return dict.fromkeys(value, 1.0) if isinstance(value, list) else value

    @field_validator("prompts", mode="before")
    @classmethod
    def _text_means_file(cls, value: Any) -> Any:
        return read_prompts(value) if isinstance(value, str) else value

    @field_validator("prompts")
    @classmethod
    def _end_with_white_space(cls, prompts: tuple[str, ...]) -> tuple[str, ...]:
        """Add a line end, as lines of a file have, to a prompt that does not end in white space."""
        return tuple(text if text[-1:].isspace() else f"{text}\n" for text in prompts)

    @model_validator(mode="after")
    def _consistent(self) -> PackConfig:
        if lines := list(self._contradictions()):
            raise ValueError("\n".join(lines))
        if self.template != OWN or self.chat_format:  # otherwise the chat format is still to be read from the tokenizer
            self.to_template()
        return self

    def _contradictions(self) -> Iterator[str]:
        """Yield every conflict between settings."""
        if (self.draws is None) == (self.epochs is None):
            yield "give either draws or epochs"
        if any(not 0 < weight < math.inf for weight in self.corpora.values()):
            yield "corpora: every weight must be a number above 0; leave a corpus out to drop it"
        elif self.epochs is not None and self.draws is None and any(weight != 1 for weight in self.corpora.values()):
            yield "corpora: weights need draws; with epochs every corpus is drawn in full"
        if any(not prompt.strip() or "\x00" in prompt for prompt in self.prompts):
            yield "prompts: every prompt must hold text, and no NUL"
        if self.aki_parity and (self.template not in AKI_TEMPLATES or self.prompts or self.order != "image_first"):
            yield (
                f"aki_parity=true needs template {' or '.join(AKI_TEMPLATES)}, order=image_first and no prompts: "
                "the released AKI has no other"
            )
        if self.aki_parity and self.turns == "expand":
            yield "aki_parity=true truncates conversations after their first exchange: remove turns=expand"
        if self.max_images is not None and self.max_image_tokens is not None:
            yield "give either max_images or max_image_tokens"
        if self.chat_format and self.template != OWN:
            yield f"chat_format belongs to template={OWN}: remove it"

    def to_template(self) -> Template:
        """Return the template with the settings of this pack set. Raises UserError if they conflict."""
        plain = Template(
            self.template,
            system=self.system,
            prompts=self.prompts,
            order=self.order,
            turns=self.turns,
            own=self.chat_format,
            image_marks=self.image_marks,
        )
        if not self.aki_parity:
            return plain
        return replace(plain, turns="first" if plain.chat_format else "every", chunk_end=AKI_CHUNK_END)


class Recipe(_Strict):
    """All of data preparation for one output folder."""

    root: str
    """Folder of the raw data."""
    out: str
    """Output folder: tokenizer, image store, packs, rejects and events."""
    model: str = ""
    """Folder of an existing Hugging Face vision-language model, relative to ``root``: gives the tokenizer, the tokens
    of an image with what stands around them, and the templates, where the recipe does not (docs/starting-points.md)."""
    tokenizer: TokenizerConfig
    """The tokenizer of all pack sets: its path, or ``train`` to train one."""
    image_tokens: int | None = Field(None, ge=1)
    """Token positions of one image; the model's connector must produce as many (give this or ``media``)."""
    media: MediaSpec | None = None
    """How images of any size become tokens, where they differ: tiles or native resolution (instead of
    ``image_tokens``)."""
    corpora: dict[str, CorpusConfig] = Field(min_length=1)
    """Name -> raw corpus."""
    packs: dict[str, PackConfig] = Field(min_length=1)
    """Name -> pack set; each becomes a folder ``packs/NAME``."""
    seed: int = Field(0, ge=0)
    """Seed of the order of samples, of prompts and of augmentation."""
    max_bad_fraction: float = Field(0.02, ge=0, le=1)
    """Maximum share of a corpus that may be rejected; above it, the command fails."""

    @field_validator("tokenizer", mode="before")
    @classmethod
    def _text_means_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @field_validator("root", "out")
    @classmethod
    def _names_a_folder(cls, value: str) -> str:
        if not value.strip():  # an unset shell variable would mean the working folder
            raise ValueError("is empty: name a folder (. for the working folder)")
        return value

    @field_validator("corpora", "packs")
    @classmethod
    def _names_are_file_names(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", name):
                raise ValueError(f"name {name!r} must be made of letters, digits and _.+-")
        return value

    @model_validator(mode="after")
    def _one_media_spec(self) -> Recipe:
        if (self.image_tokens is None) == (self.media is None):
            raise ValueError("give either image_tokens, for images of one size, or media")
        return self

    @property
    def media_spec(self) -> MediaSpec:
        """How media become tokens."""
        return self.media if self.media is not None else MediaSpec.fixed(self.image_tokens or 0)

    @model_validator(mode="after")
    def _packs_fit(self) -> Recipe:
        lines = _undefined_corpora(self.corpora, {name: pack.corpora for name, pack in self.packs.items()})
        for name, pack in self.packs.items():
            if self.image_tokens is not None and pack.seq_len <= self.image_tokens:
                lines.append(
                    f"packs.{name}.seq_len={pack.seq_len} cannot hold one image of image_tokens={self.image_tokens} "
                    "and any text: raise seq_len or lower image_tokens"
                )
            elif pack.seq_len <= self.media_spec.image.most_tokens:
                lines.append(
                    f"packs.{name}.seq_len={pack.seq_len} cannot hold one image of up to "
                    f"{self.media_spec.image.most_tokens} tokens and any text: raise seq_len or lower media.image"
                )
            lines += self._disabled_augmentations(name, pack)
        if lines:
            raise ValueError("\n".join(lines))
        return self

    def _disabled_augmentations(self, name: str, pack: PackConfig) -> Iterator[str]:
        """Yield the prompts that would disable the augmentation of a corpus."""
        for text in (*pack.prompts, pack.system):
            for corpus, augment in self.augments(pack).items():
                if augment.bits & ~allowed(text):
                    yield (
                        f"packs.{name}: {text.strip()!r} mentions sides, places, counts or written text, so "
                        f"corpora.{corpus}.augment would never apply: change the text or remove augment"
                    )

    def augments(self, pack: PackConfig) -> dict[str, Augment]:
        """Return the augmentation settings of the corpora of a pack set."""
        known = {corpus: self.corpora[corpus] for corpus in pack.corpora if corpus in self.corpora}
        return {corpus: config.augment for corpus, config in known.items() if config.augment}

    @property
    def root_dir(self) -> Path:
        """Folder of the raw data."""
        return Path(self.root).expanduser()

    @property
    def out_dir(self) -> Path:
        """Folder of the output."""
        return Path(self.out).expanduser()

    @property
    def tokenizer_path(self) -> Path | None:
        """The existing tokenizer's folder or file; None if one is trained."""
        return self.root_dir / Path(self.tokenizer.path).expanduser() if self.tokenizer.path else None

    @property
    def vlm(self) -> VlmFolder | None:
        """The folder ``model``. Raises UserError if it is unusable."""
        from data_prep.text.vlm_folder import VlmFolder

        return VlmFolder.open(self.root_dir / Path(self.model).expanduser()) if self.model else None

    def specials(self) -> list[str]:
        """Return the special tokens of all templates, sorted."""
        return sorted({token for pack in self.packs.values() for token in pack.to_template().specials})


_LEVELS: Mapping[int, Mapping[str, type[BaseModel]]] = {
    1: {"": Recipe},
    2: {"tokenizer": TokenizerConfig, "media": MediaSpec},
    3: {"tokenizer": TrainTokenizer, "packs": PackConfig},
    4: {"corpora": Augment},
}
"""Models by depth of a key and its first component, for "did you mean"."""


def shipped_recipes() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """Return the file of a recipe given as a path or a shipped name. Raises UserError if it does not exist."""
    for candidate in (Path(name), SHIPPED / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    names = shipped_recipes()
    raise UserError(
        f"recipe {name!r} is neither a file nor a shipped name{did_you_mean(name, names)}: {', '.join(names)}"
    )


def read_prompts(name: str) -> tuple[str, ...]:
    """Read prompts from a text file (a path or a shipped name), one per line, with the line end; none for "".

    Raises UserError if the file does not exist, or is not UTF-8 text with at least one line.
    """
    if not name:
        return ()
    path = next((file for file in (Path(name), SHIPPED / name) if file.is_file()), None)
    if path is None:
        shipped = ", ".join(sorted(file.name for file in SHIPPED.glob("*.txt")))
        raise UserError(f"prompts={name!r} is neither a text file nor a shipped one ({shipped}); or give a list")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts: {path} cannot be read ({error})") from error
    prompts = tuple(f"{line.strip()}\n" for line in lines if line.strip())
    if not prompts:
        raise UserError(f"prompts: {path} holds no line of text")
    return prompts


def load_recipe(name: str, overrides: Mapping[str, str] | None = None, *, check_files: bool = False) -> Recipe:
    """Read and check a recipe; everything that is wrong with it is reported at once.

    Args:
        name: path of a YAML file, or the name of a shipped recipe.
        overrides: top-level keys to replace, such as ``out`` and ``root``.
        check_files: whether the raw files and the tokenizer must exist.

    Raises:
        UserError: the file is missing, not YAML, or a key or value is wrong; the message names each.
    """
    path = find_recipe(name)
    raw = _with_model(expand({**read_mapping(path), **(overrides or {})}, path.name))
    recipe, lines = None, list[str]()
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        lines = problems(error, _known_at)
    lines += [line for line in _problems_beside(raw, recipe, check_files=check_files) if line not in lines]
    if recipe is None or lines:
        raise UserError(report(path.name, lines))
    return _with_chat_formats(recipe)


def _problems_beside(raw: Mapping[str, Any], recipe: Recipe | None, *, check_files: bool) -> Iterator[str]:
    """Yield what the recipe's own model does not find: in the corpora's options, and in the files.

    Args:
        raw: content of the file.
        recipe: None if the model refused the content; its checks between sections did not all run then.
        check_files: whether files must exist.
    """
    corpora, packs = (value if isinstance(value := raw.get(key), dict) else {} for key in ("corpora", "packs"))
    blends = {name: pack["corpora"] for name, pack in packs.items() if isinstance(pack, dict) and "corpora" in pack}
    blends = {name: blend for name, blend in blends.items() if isinstance(blend, dict | list)}
    if recipe is None:
        yield from _undefined_corpora(corpora, blends)
    root = Path(str(raw.get("root") or "")).expanduser()
    if check_files and raw.get("root") and not root.is_dir():
        yield f"root: folder {root} does not exist; the raw data must be there, or pass --root"
        check_files = False
    used = {str(corpus) for blend in blends.values() for corpus in blend}
    for name, config in corpora.items():
        if isinstance(config, dict) and isinstance(config.get("type"), str):
            options = {key: value for key, value in config.items() if key not in CorpusConfig.model_fields}
            lines = corpus_problems(config["type"], options, root, check_files=check_files and name in used)
            yield from (f"corpora.{name}: {line}" for line in lines)
    if check_files and recipe is not None and recipe.tokenizer_path and not recipe.tokenizer_path.exists():
        yield f"tokenizer: {recipe.tokenizer_path} does not exist{_elsewhere(recipe.tokenizer.path)}"


def _undefined_corpora(corpora: Collection[str], blends: Mapping[str, Collection[str]]) -> list[str]:
    """Return the corpora of pack sets that are not defined."""
    return [
        f"packs.{name}.corpora.{corpus} is not defined under corpora{did_you_mean(str(corpus), map(str, corpora))}"
        for name, blend in blends.items()
        for corpus in blend
        if corpus not in corpora
    ]


def _elsewhere(path: str) -> str:
    """Return a hint if a path exists relative to the working folder, but not to the root."""
    here = Path(path).absolute()
    return f"; paths are relative to root, so write {here}" if here.exists() else "; paths are relative to root"


def _with_model(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a recipe with what the folder ``model`` gives. Raises UserError for an unusable folder."""
    given = raw.get("model")
    if not isinstance(given, str) or not given:
        return dict(raw)
    from data_prep.text.vlm_folder import VlmFolder

    folder = VlmFolder.open(Path(str(raw.get("root") or "")).expanduser() / Path(given).expanduser())
    own: dict[str, Any] = {"tokenizer": given}
    if "image_tokens" not in raw and "media" not in raw:
        own["image_tokens"] = folder.image_tokens
    packs = raw.get("packs")
    if isinstance(packs, dict):
        marks = {"template": folder.family.template, "image_marks": folder.image_marks}
        own["packs"] = {name: {**marks, **pack} if isinstance(pack, dict) else pack for name, pack in packs.items()}
    return {**own, **raw, **({"packs": own["packs"]} if "packs" in own else {})}


def _with_chat_formats(recipe: Recipe) -> Recipe:
    """Return a recipe with the chat format filled in for every pack set with ``template: tokenizer``."""
    waiting = {name: pack for name, pack in recipe.packs.items() if pack.template == OWN and not pack.chat_format}
    if not waiting:
        return recipe
    from data_prep.text.chat_template import chat_format_of

    folder, model = recipe.tokenizer_path, recipe.vlm
    if folder is None:
        raise UserError(f"packs.{min(waiting)}.template={OWN}: a trained tokenizer has no chat template")
    filled = {
        name: pack.model_copy(
            update={"chat_format": model.chat_format(pack.system) if model else chat_format_of(folder, pack.system)}
        )
        for name, pack in waiting.items()
    }
    return recipe.model_copy(update={"packs": {**recipe.packs, **filled}})


def _known_at(place: Place) -> Iterable[str]:
    """Return the keys that are allowed at the place of a misspelt one."""
    models = _LEVELS.get(len(place), {})
    model = models.get(str(place[0])) or models.get("")
    return model.model_fields if model else ()
