"""A model split into pipeline stages: the decoder layers of each, and the cost of each part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.config.schema import RunConfig
from pipeline.model.counts import Cost, ParamCounts
from pipeline.model.spec import ModelSpec
from pipeline.model.trainable import Trainable
from pipeline.model.weights import parameter_shapes
from pipeline.parallel.partition import VirtualStages, joined, split_stages


@dataclass(frozen=True)
class StageSplit:
    """The stages of a model; the same for a run and for an estimate without packs."""

    counts: ParamCounts
    trainable: Trainable
    """What of the model is trained."""
    scales: Mapping[str, float]
    """Learning rates as multiples of ``train.lr``, see `Trainable.scales`."""
    costs: Sequence[Cost]
    """FLOPs of the model's parts per packed token, see `ParamCounts.part_costs`."""
    stage_layers: tuple[VirtualStages, ...]
    """Decoder layers of each pipeline stage, by virtual stage."""

    @classmethod
    def of(cls, spec: ModelSpec, config: RunConfig, *, image_share: float, target_share: float) -> StageSplit:
        """Split a model by cost, or as ``parallel.layers_per_stage`` says.

        Args:
            spec: The model.
            config: Its run.
            image_share: Images per packed token.
            target_share: Supervised tokens per packed token.

        Raises:
            ConfigError: There are more stages than layers, ``layers_per_stage`` does not fit, or ``train.freeze`` or
                ``train.lr_of`` names nothing.
        """
        shapes, parallel = dict(parameter_shapes(spec)), config.parallel
        trainable = Trainable.of(spec, config.train, shapes)
        counts = ParamCounts.of(spec, trainable.trains, shapes.items())
        costs = counts.part_costs(
            image_share=image_share, target_share=target_share, recomputed=config.train.recomputed_layers
        )
        stage_layers = split_stages(
            spec.layers, parallel.pp, parallel.virtual_stages,
            layers_per_stage=parallel.layers_per_stage, costs=[*map(sum, costs)],
        )  # fmt: skip
        return cls(counts, trainable, trainable.scales(shapes), costs, stage_layers)

    def parameters(self, stage: int) -> tuple[int, int]:
        """Return (trained, frozen) parameters of one stage."""
        layers = joined(self.stage_layers[stage])
        return self.counts.of_stage(layers, first=stage == 0, last=stage == len(self.stage_layers) - 1)

    def work(self, stage: int, virtual_stage: int) -> Cost:
        """Return the FLOPs of one virtual stage per packed token."""
        before, *layers, after = self.costs
        parts = [layers[layer] for layer in self.stage_layers[stage][virtual_stage]]
        parts += [before] if (stage, virtual_stage) == (0, 0) else []
        is_last = (stage + 1, virtual_stage + 1) == (len(self.stage_layers), len(self.stage_layers[-1]))
        parts += [after] if is_last else []
        return Cost(sum(part.forward for part in parts), sum(part.backward for part in parts))
