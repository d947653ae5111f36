"""How far the states of image tokens move when the question changes, layer by layer.

N image tokens, L decoder layers, T tokens of the padded prompts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from data_prep.common.errors import UserError
from pipeline.attention import AttentionPlan, build_plan
from pipeline.masks import Policy, Sidecars, get_policy
from pipeline.model.inputs import StageInputs
from pipeline.report.history import FloatArray
from pipeline.serving.model import MultimodalModel
from pipeline.serving.prompt import Prompt, stage_inputs


@dataclass(frozen=True)
class Movement:
    """The same picture under two questions and one mask policy."""

    policy: str
    values_LN: FloatArray
    """1 - cosine between the two states of each image token: float64[L + 1, N], 0..2. Row 0 is the input of the first
    layer. 0 where both states are equal to the bit."""


def movements(model: MultimodalModel, first: Prompt, second: Prompt) -> list[Movement]:
    """Compare two prompts that show the same pictures, under the model's own policy and then under a causal mask.

    The weights and positions are those of the model in both cases. Both prompts are padded to one length and attend
    under dense masks, so that a state that does not depend on the question is computed by the same operations.

    Raises:
        UserError: the prompts hold no picture, their image tokens stand at different places, or the question stands
            before the picture.
    """
    if len(first.sidecars.instance) == 0 or not (first.sidecars.instance >= 0).any():
        raise UserError("there is no picture in the prompt, so no image state can move: give one")
    tokens = max(len(prompt.encoded) for prompt in (first, second))
    model.check_length(tokens, 0)
    places = [(prompt.sidecars.instance >= 0).nonzero().squeeze(1) for prompt in (first, second)]
    if not places[0].equal(places[1]):
        raise UserError("the picture stands at different places in the two prompts: put it before the question in both")
    start = int(places[0][-1])
    if list(first.encoded.ids[:start]) != list(second.encoded.ids[:start]):
        raise UserError("the model's template writes the question before the picture: any mask lets it move the image")
    policies = {model.policy.name: model.policy}
    policies.setdefault("causal", get_policy("causal"))
    return [
        Movement(name, _compare(_states(model, first, policy, tokens), _states(model, second, policy, tokens)))
        for name, policy in policies.items()
    ]


def _compare(first: Iterator[torch.Tensor], second: Iterator[torch.Tensor]) -> FloatArray:
    """Return 1 - cosine as half the squared distance of the unit vectors, which is 0 for equal states."""
    pairs = (
        (F.normalize(a.double(), dim=-1), F.normalize(b.double(), dim=-1)) for a, b in zip(first, second, strict=True)
    )
    return torch.stack([(a - b).square().sum(-1) / 2 for a, b in pairs]).cpu().numpy()


@torch.inference_mode()
def _states(model: MultimodalModel, prompt: Prompt, policy: Policy, tokens: int) -> Iterator[torch.Tensor]:
    """Yield the states of the image tokens [N, D]: the input of the first layer, then the output of each layer."""
    inputs = _padded(
        stage_inputs(model.spec, model.policy, prompt, mask=policy, device=model.device), prompt, policy, tokens
    )
    hidden = model.stage.embed(inputs)
    yield hidden[0, inputs.image_positions]
    for layer in range(model.spec.layers):
        hidden = model.stage.decode(hidden, inputs, range(layer, layer + 1))
        yield hidden[0, inputs.image_positions]


def _padded(inputs: StageInputs, prompt: Prompt, policy: Policy, tokens: int) -> StageInputs:
    """Return the inputs of a prompt padded at its end to T tokens, with a dense mask."""
    gap, own = tokens - len(prompt.encoded), prompt.sidecars
    fills = {"segment": 0, "modality": 0, "instance": -1, "generated": 0}
    sidecars = Sidecars(**{name: F.pad(getattr(own, name), (0, gap), value=fill) for name, fill in fills.items()})
    return replace(
        inputs,
        input_ids=F.pad(inputs.input_ids, (0, gap)),
        position_ids=F.pad(inputs.position_ids, (0, gap)),
        labels=F.pad(inputs.labels, (0, gap)),
        plan=_dense(build_plan(policy, sidecars)).to(inputs.plan.device),
    )


def _dense(plan: AttentionPlan) -> AttentionPlan:
    return replace(plan, backend="dense", others=tuple(_dense(other) for other in plan.others))
