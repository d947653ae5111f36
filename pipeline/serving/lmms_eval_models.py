"""The entry point of lmms-eval's group ``lmms_eval.models``: it names the class and imports nothing heavy.

lmms-eval reads its entry points while it is being imported, so the class itself (`pipeline.serving.lmms_eval`), which
imports lmms-eval, is named here and loaded later.
"""

from __future__ import annotations

from typing import Any


def manifests() -> Any:
    """Return the manifest of the model ``mma``."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="mma", chat_class_path="pipeline.serving.lmms_eval.MmaChat")
