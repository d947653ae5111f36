"""Checks that a run may continue from its checkpoints, or start from another run or an export."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.common.errors import UserError
from data_prep.packs import Manifest
from data_prep.text.tokenizer import Tokenizer
from pipeline.checkpoints.checkpoint import Checkpoint, checkpoint_folders, open_checkpoint
from pipeline.config.schema import ConfigError, RunConfig
from pipeline.model.export_files import check_files
from pipeline.model.hub import folder_of
from pipeline.model.spec import ModelSpec
from pipeline.planning.changes import check_allowed_keys, leaves, refuse_changes, settings_changed

# Keys of a model's description that do not change what it computes: how it was saved, and what trains.
_NOT_THE_FUNCTION = ("dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache", "vision_frozen",
                     "architectures", "attn_implementation", "_attn_implementation", "pad_token_id", "bos_token_id",
                     "eos_token_id", "id2label", "label2id", "max_position_embeddings")  # fmt: skip


def is_export(path: str) -> bool:
    """Whether ``init_from`` names an export folder rather than a run or a checkpoint."""
    return (Path(path) / "config.json").is_file()


def check_same_model(origin: str, theirs: Mapping[str, Any], spec: ModelSpec, *, new_gates: bool = False) -> None:
    """Refuse weights of a model that computes something different with equal shapes.

    Args:
        origin: of the weights, for messages.
        theirs: the description of their model.
        spec: the model of the run.
        new_gates: the run may add gates (``model.gate``) to a model without them; they start at zero.

    Raises:
        ConfigError: naming the first difference.
    """
    theirs = {"gate": {"kind": "none"}, **theirs}  # a description older than gates has none
    old, new = (dict(leaves(json.loads(json.dumps(tree)))) for tree in (theirs, spec.to_dict()))
    if new_gates and old["gate.kind"] == "none":
        old = {key: value for key, value in old.items() if not key.startswith("gate.")}
    for key in sorted(old.keys() & new.keys()):
        if key.startswith("media."):  # other sizes of images: the same function of each view
            continue
        if old[key] != new[key] and key.rpartition(".")[2] not in _NOT_THE_FUNCTION:
            raise ConfigError(
                f"{origin} was trained with {key}={old[key]!r}, but it is {new[key]!r} now: keep the model section"
            )


def check_resume(
    config: RunConfig, manifest: Manifest, spec: ModelSpec, *, dtype: str | None, allowed: Sequence[str] = ()
) -> None:
    """Refuse to resume a run with changes of its result that ``allowed`` does not name. Raises ConfigError."""
    check_allowed_keys(allowed)
    for folder in checkpoint_folders(Path(config.run_dir)):
        try:
            saved = Checkpoint(folder).manifest
        except UserError:  # damaged: reported when the run looks for an intact one
            continue
        changes = settings_changed(saved, config, plan_sha256=manifest.plan_sha256, dtype=dtype)
        refuse_changes(str(folder), changes, allowed)
        if not any(name.partition(".")[0] == "model" for name in allowed):
            check_same_model(str(folder), saved.model["spec"], spec)
        return


def check_init_from(config: RunConfig, manifest: Manifest, spec: ModelSpec) -> None:
    """Refuse weights of another model, or trained with a different tokenizer than the packs. Raises UserError.

    A run with checkpoints of its own no longer reads ``init_from``, which may have been removed.
    """
    source = config.init_from
    if not source or checkpoint_folders(Path(config.run_dir)):
        return
    if is_export(source):
        check_files(Path(source))
        theirs = Tokenizer.load(Path(source) / "tokenizer").sha256
    else:
        meta = open_checkpoint(source).meta
        theirs = str(meta["tokenizer_sha256"])
        check_same_model(f"init_from={source}", meta["spec"], spec, new_gates=True)
    if theirs != manifest.tokenizer_sha256:
        raise ConfigError(
            f"init_from={source} was trained with a different tokenizer than the packs in {config.data.packs}: "
            "build the packs with its tokenizer (tokenizer: path in the data recipe)"
        )


def initial_policy(config: RunConfig) -> str | None:
    """Return the mask policy that the weights of ``init_from`` were trained under; None for a run that resumes."""
    source = config.init_from
    if not source or checkpoint_folders(Path(config.run_dir)):
        return None
    if not is_export(source):
        return str(open_checkpoint(source).meta["policy"])
    return str(json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))["mma"]["policy"])


def check_tokenizer(config: RunConfig, packs_tokenizer: Path) -> None:
    """Compare the vocabulary of the model's source with the packs' tokenizer. Raises ConfigError where ids differ.

    The packs' tokenizer may have more tokens (markers added at the end), but shared tokens must have equal ids.
    Models built from a config have no tokenizer of their own and use that of the packs.
    """
    key, given = ("model", config.model.source) if config.model.source else ("model.llm", config.model.llm.source)
    source = folder_of(key, given) / "tokenizer.json"
    if not given or not source.is_file():
        return
    own, packed = read_vocabulary(source), read_vocabulary(packs_tokenizer / "tokenizer.json")
    wrong = next((token for token, number in own.items() if packed.get(token) != number), None)
    if wrong is not None:
        raise ConfigError(
            f"the packs in {config.data.packs} were built with a different tokenizer than {key}.source="
            f"{given} has (token {wrong!r} is {packed.get(wrong)} there, {own[wrong]} here): "
            "rebuild the packs with the model's tokenizer"
        )


def check_image_token(spec: ModelSpec, packs_tokenizer: Path) -> None:
    """Compare the token at image positions of the packs with that of ``model.source``. Raises ConfigError."""
    if spec.start is None:
        return
    packed, own = Tokenizer.load(packs_tokenizer).image_id, spec.start.family.image_id(spec.start.config)
    if packed != own:
        raise ConfigError(
            f"the packs hold token {packed} at image positions, but model.source={spec.start.source} has {own}: name "
            "the same folder in the data recipe (model: FOLDER) and rebuild the packs"
        )


def read_vocabulary(path: Path) -> dict[str, int]:
    """Return token -> id of a Hugging Face tokenizer.json, added tokens included. Raises ConfigError if unreadable."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = raw["model"]["vocab"]
        pairs = vocabulary.items() if isinstance(vocabulary, dict) else ((e[0], i) for i, e in enumerate(vocabulary))
        return {**dict(pairs), **{added["content"]: added["id"] for added in raw.get("added_tokens", [])}}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a readable tokenizer.json ({error})") from error
