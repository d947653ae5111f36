"""What a vision-language model's folder says, apart from its numbers: the descriptor of one ``model_type``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

Config = Mapping[str, Any]
"""The content of a ``config.json``."""
Marks = Sequence[tuple[str, bool]]
"""Pieces of text around an image: (text, whether it is the name of a special token)."""


PROCESSOR, IMAGE_PROCESSOR = "processor_config.json", "preprocessor_config.json"
"""Files of a processor; transformers 5 keeps the settings of the image processor in the first, as a section."""


class Names(NamedTuple):
    """Prefixes of the tensors of a model's parts in its folder."""

    vision: str
    connector: str
    text: str
    head: str = "lm_head."


PUBLISHED = Names("vision_tower.", "multi_modal_projector.", "language_model.model.", "language_model.lm_head.")
"""Names of most published folders, and of those that transformers 5 saves."""
MODULES = Names("model.vision_tower.", "model.multi_modal_projector.", "model.language_model.")
"""Names of the modules in transformers 5."""


class Vlm:
    """One ``model_type``: how its config describes the parts, and what its tensors are called.

    The defaults fit models with the layout of LLaVA. A subclass changes what differs.
    """

    text_defaults: ClassVar[Config] = {"model_type": "llama"}
    """What ``text_config`` leaves out, beyond the defaults of its own class."""
    vision_defaults: ClassVar[Config] = {}
    """What ``vision_config`` leaves out."""
    layouts: ClassVar[tuple[Names, ...]] = (PUBLISHED, MODULES)
    """Known layouts of weights; exports use the first."""
    connector_names: ClassVar[Mapping[str, str]] = {}
    """Names of the connector's parameters: this project's -> the folder's, after its prefix."""
    tied: ClassVar[bool] = False
    """Whether head and embedding are one weight where the config does not say."""
    template: ClassVar[str] = "tokenizer"
    """Template of its conversations: ``tokenizer`` follows the folder's own chat template."""
    stock_policy: ClassVar[str] = "causal"
    """The mask policy under which the stock class runs a prompt."""

    def __init__(self, model_type: str, model_class: str) -> None:
        """Describe a model.

        Args:
            model_type: of its ``config.json``.
            model_class: the transformers class that loads it.
        """
        self.model_type, self.model_class = model_type, model_class

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.model_type!r})"

    # ---- config

    def problem(self, config: Config) -> str:
        """Return why a model of this config would not be computed exactly, naming the key; ``""`` if it is."""
        return ""

    def text(self, config: Config) -> dict[str, Any]:
        """Return the config of the language model."""
        own = {**self.text_defaults, **(config.get("text_config") or {})}
        return {**own, "tie_word_embeddings": config.get("tie_word_embeddings", self.tied)}

    def vision(self, config: Config) -> dict[str, Any]:
        """Return the config of the vision tower."""
        return {**self.vision_defaults, **(config.get("vision_config") or {})}

    def connector(self, config: Config) -> dict[str, Any]:
        """Return the section ``model.connector``."""
        raise NotImplementedError

    # ---- images

    def image_tokens(self, config: Config) -> int:
        """Return the tokens of one image, without the marks around it."""
        raise NotImplementedError

    def image_id(self, config: Config) -> int:
        """Return the id of the token that stands at every position of an image. Raises KeyError."""
        return int(config["image_token_id"] if "image_token_id" in config else config["image_token_index"])

    def written(self, image_token: str) -> str:
        """Return what the chat template writes for one image."""
        return image_token

    def marks(self) -> tuple[Marks, Marks]:
        """Return what the processor writes before and after the tokens of an image."""
        return (), ()

    def one_square(self, side_px: int) -> dict[str, Any]:
        """Return the image processor's settings that squash every image to one square, as training does."""
        return {"do_resize": True, "size": {"height": side_px, "width": side_px}}

    # ---- weights

    def connector_name(self, name: str) -> str:
        """Return the folder's name of a connector parameter, without prefix."""
        for ours, theirs in self.connector_names.items():
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)
        return name

    def files(self) -> Iterator[str]:
        """Yield the names of its processor's files, which exports keep."""
        yield from (IMAGE_PROCESSOR, PROCESSOR, "chat_template.json")


def side_px(vision: Config) -> int:
    """Return the side of the tower's images in pixels; configs write one number or two equal ones."""
    return _one(vision["image_size"])


def patches_per_side(vision: Config) -> int:
    """Return the patches along a side of the tower's images."""
    return side_px(vision) // _one(vision["patch_size"])


def _one(value: Any) -> int:
    return int(value[0] if isinstance(value, list | tuple) else value)
