"""Runs lmms-eval with the plug-in on an export whose answers are scripted: ``python -m ... EXPORT flags of lmms-eval``.

The export is loaded and asked; its answer is then replaced by one that follows from the prompt's ids and pixels, so
equal scores mean equal prompts and equal pictures.
"""

from __future__ import annotations

import hashlib
import runpy
import sys
from collections.abc import Sequence
from typing import Any

from pipeline.serving.model import MultimodalModel, load_model
from pipeline.serving.prompt import Prompt


class Scripted(MultimodalModel):
    """An export that answers yes or no, a number, or a letter."""

    @classmethod
    def load(cls, folder: Any, **options: Any) -> Scripted:
        own = load_model(folder)
        return cls(own.export_config, own.stage, own.tokenizer)

    def generate(self, prompts: Sequence[Prompt], *, max_new_tokens: int = 64, **options: Any) -> list[str]:
        super().generate(prompts, max_new_tokens=2)
        return [self._answer(prompt) for prompt in prompts]

    def _answer(self, prompt: Prompt) -> str:
        text, digest = self.tokenizer.decode(prompt.encoded.ids.tolist()), hashlib.sha256(prompt.encoded.ids.tobytes())
        for image in prompt.images:
            digest.update(image.tobytes())
        choices = (
            ("Yes", "No") if "single word or phrase" in text else ("3", "4") if "number" in text else ("A", "B", "C")
        )
        return choices[digest.digest()[0] % len(choices)]


if __name__ == "__main__":
    from pipeline.serving import lmms_eval

    lmms_eval.load_model = Scripted.load  # type: ignore[assignment]
    sys.argv = ["lmms_eval", *sys.argv[1:]]
    runpy.run_module("lmms_eval", run_name="__main__")
