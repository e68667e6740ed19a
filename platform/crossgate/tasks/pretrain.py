"""Pretraining: contrast of all pairs of modalities and of each with the fusion of the others, and pretext tasks."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor, nn

from crossgate.batch import ClipBatch
from crossgate.config import Recipe
from crossgate.errors import UserError
from crossgate.model.contrastive import ContrastiveModel
from crossgate.model.network import MultimodalNetwork
from crossgate.objectives.agreement import agreement
from crossgate.objectives.infonce import Contrast, Views, infonce
from crossgate.objectives.siglip import siglip
from crossgate.objectives.vicreg import vicreg
from crossgate.tasks.encoded import Encoded
from crossgate.tasks.pretext import Pretext
from crossgate.tasks.task import Prediction, Report, Task, gate_measures, global_means


class PretrainTask(Task):
    """Cross-modal contrast by the recipe's objective; the fused contrast trains gate and fusion. Pretext tasks beside
    it, where the recipe names some.

    Args:
        recipe: `model`, `data.clip`, `pretrain`, `run.seed`.

    Raises:
        UserError: for a backbone or fusion that cannot be used, a core modality that is not there, or a pretext task
            that the recipe's clips cannot be asked.
    """

    model: ContrastiveModel

    def __init__(self, recipe: Recipe) -> None:
        config = recipe.pretrain
        network = MultimodalNetwork(recipe.model, recipe.data.clip)
        ranked = config.objective != "vicreg"  # which has no temperature
        super().__init__(recipe, ContrastiveModel(network, config.temperature, config.learn_temperature and ranked))
        self.fused_weight, self.exclude_group = config.fused_weight, config.exclude_group
        self.objective, self.tile, self.contrast = config.objective, config.tile, config.contrast
        self.agreement, self.agreement_weight = config.agreement, config.agreement_weight
        if config.objective == "siglip":
            self.bias = nn.Parameter(torch.tensor([-10.0]))  # of the loss, not of the model that is kept
        count = len(self.modalities)
        self.pairs = [pair for pair in combinations(range(count), 2) if self._wanted(pair, config.core)]
        self.fused_pairs = [(m, count + m) for m in range(count)]  # views: M modalities, then their M targets
        self.pretext_weight = config.pretext.weight
        self.pretext = Pretext(config.pretext, recipe.data.clip, recipe.model.dim) if config.pretext.tasks else None

    def forward(self, batch: ClipBatch) -> tuple[Tensor, Report]:
        return self.score(self.encode(batch))

    def encode(self, batch: ClipBatch) -> Encoded:
        """Returns what the objective needs of the clips: a row a clip, which no other clip has a part in."""
        step = self.step  # of this forward pass, which `draws` counts
        output = self.model(batch.streams, batch.present, self.draws(batch))
        rows = {
            "embeddings": torch.cat([output.embeddings, output.targets], dim=1),  # (B, 2M, E)
            "weights": output.weights,
            "routing": output.routing,
        }
        scalars = {"scale": output.scale} | ({"bias": self.bias.squeeze(0)} if self.objective == "siglip" else {})
        facts = {
            "there": torch.cat([output.present, output.target_present], dim=1),  # (B, 2M)
            "present": output.present,
            "visible": output.visible,
            "group": batch.group if self.exclude_group else batch.clip,  # a clip drawn twice is no negative either way
        }
        if self.pretext is not None:
            answers = self.pretext.ask(self.model.network, batch, output.features, self.seed, step)
            rows, facts = rows | answers.rows, facts | {"pretext": answers.labels}
        return Encoded({name: value for name, value in rows.items() if value is not None}, scalars, facts)

    def score(self, encoded: Encoded) -> tuple[Tensor, Report]:
        """Returns loss and report of the global batch whose share of this rank was encoded; uses no weights."""
        rows, facts = encoded.rows, encoded.facts
        weights, routing = rows.get("weights"), rows.get("routing")
        views = Views(rows["embeddings"], facts["there"], facts["group"])
        everywhere = views.gathered()
        pairs = self._contrast(views, everywhere, self.pairs, encoded.scalars)
        fused = self._contrast(views, everywhere, self.fused_pairs, encoded.scalars)
        contrast, alike = pairs.loss + self.fused_weight * fused.loss, {}
        if self.agreement:
            found = agreement(
                views, everywhere, self.pairs, encoded.scalars["scale"], positives=self.agreement, tile=self.tile
            )
            contrast, alike["loss/agreement"] = contrast + self.agreement_weight * found, found.detach()
        loss, gate = self.regularised(contrast, weights, routing, facts["visible"])
        loss = self.contrast * loss
        measured = gate_measures(self.modalities, weights, facts["visible"])
        if self.pretext is not None:
            mixed, asked = self.pretext.score(rows, facts["pretext"], facts["present"])
            loss, gate["loss/pretext"] = loss + self.pretext_weight * mixed, mixed.detach()
            measured |= asked
        return loss, self._report(loss, pairs, fused, encoded, everywhere) | alike | gate | global_means(measured)

    def _wanted(self, pair: tuple[int, int], core: str) -> bool:
        if core and core not in self.modalities:
            raise UserError(f"no modality '{core}' here", where="pretrain.core", expected=", ".join(self.modalities))
        return not core or self.modalities.index(core) in pair

    def _contrast(
        self, views: Views, everywhere: Views, pairs: list[tuple[int, int]], scalars: dict[str, Tensor]
    ) -> Contrast:
        if self.objective == "vicreg":
            return vicreg(everywhere, pairs)
        if self.objective == "siglip":
            return siglip(views, everywhere, pairs, scalars["scale"], scalars["bias"], tile=self.tile)
        return infonce(views, everywhere, pairs, scalars["scale"], tile=self.tile)

    def _report(self, loss: Tensor, pairs: Contrast, fused: Contrast, encoded: Encoded, everywhere: Views) -> Report:
        names = self.modalities
        report = {
            "loss/total": loss.detach(),
            "loss/contrast": pairs.loss.detach(),
            "loss/fused": fused.loss.detach(),
            "contrast/top1": pairs.top1,
            "contrast/fused_top1": fused.top1,
            "contrast/logit_scale": encoded.scalars["scale"].detach(),
        }
        for (a, b), value in zip(self.pairs, pairs.pair_losses):
            report[f"loss/pair_{names[a]}_{names[b]}"] = value
        for name, value in zip(names, fused.pair_losses):
            report[f"loss/fused_{name}"] = value
        for m, name in enumerate(names):
            report[f"embedding/std_{name}"] = spread(everywhere.embeddings[:, m], everywhere.present[:, m])
        return report

    def _predict(self, batch: ClipBatch) -> Prediction:
        output = self.model(batch.streams, batch.present)
        return Prediction(
            features=output.features,
            present=output.present,
            fused=output.fused,
            weights=output.weights,
            embeddings=output.embeddings,
            fused_embedding=output.fused_embedding,
        )


def spread(embeddings: Tensor, present: Tensor) -> Tensor:
    """Returns how far unit vectors ``(N, E)`` spread: 1 for all directions alike, 0 when they have collapsed.

    The root of the total variance over the present rows; NaN without any.
    """
    embeddings = embeddings.detach().float()
    share = present.float() / present.sum()
    mean = (embeddings.masked_fill(~present.unsqueeze(1), 0) * share.unsqueeze(1)).sum(0)  # (E,)
    return (1 - mean.square().sum()).clamp(min=0).sqrt()
