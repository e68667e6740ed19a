"""A study: every gate on the same frozen encoders, several seeds, by groups, the test clips scored once.

The streams' outputs are computed once and kept (see `runs.features`: named by the encoders' weights, the index, the
splits and the clip's shape). On them heads and gates train in seconds, from memory, in one process.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crossgate.batch import ClipBatch
from crossgate.clips.spoil import SOUNDS, SWEEPS, kinds, spoil
from crossgate.clips.tensors import clip_tensors
from crossgate.config import ExchangeConfig, FusionConfig, Recipe
from crossgate.errors import UserError, writing
from crossgate.evaluation import gates as measures
from crossgate.evaluation.classification import choose_thresholds, softmax
from crossgate.evaluation.comparison import REFERENCE, main_metric, positive_class, statistic
from crossgate.evaluation.intervals import Bootstrap
from crossgate.evaluation.study import Answer, chosen, log_loss, right_of, subsets
from crossgate.evaluation.study_findings import Findings, LowLabels, Sweep
from crossgate.evaluation.study_report import present_study, study_markdown
from crossgate.model.classifier import Classifier
from crossgate.model.fusion import FUSIONS, check_name
from crossgate.model.network import MultimodalNetwork
from crossgate.model.store import load_encoders, model_directory, read_card, save_model
from crossgate.progress import Step, progress_bar
from crossgate.runs.context import PARTS, Part, RunContext, check_labels, check_task, open_run
from crossgate.runs.features import BATCH, keep_features
from crossgate.runs.finetune import card_of
from crossgate.stream.collate import Decode
from crossgate.stream.loader import sequential
from crossgate.tasks.gates import (
    Clips,
    Gate,
    Heads,
    Setting,
    frozen_random,
    out_of_fold,
    scored,
    train_gate,
    train_heads,
)
from crossgate.tasks.staged import staged
from crossgate.training.checkpoint import store_recipe

Array = NDArray[Any]
log = logging.getLogger("crossgate.runs")


def run(recipe: Recipe) -> dict[str, float]:
    """Trains heads and gates on kept features and compares them; returns the metrics.

    Writes report.html, results.json, figures, ``study.md`` and the chosen fusion's model into the run's directory.

    Raises:
        UserError: for an index, a recipe or a model that cannot do it.
    """
    if recipe.cluster.workers > 1:
        raise UserError("a study runs in one process", where="cluster.workers", cure="set it to 1")
    recipe = _adopted(recipe)
    with open_run(recipe, required=PARTS) as context:
        check_labels(context.index, recipe, "train", "val", "test")
        store_recipe(context.directory, recipe)
        study = Study(context)
        found = study.findings()
        done = present_study(found)
        _save(study, found, context)
        with writing("the study", context.directory):
            (context.directory / "study.md").write_text(study_markdown(found))
        context.publish(done, f"Study: {context.directory.name}", step=0)
        return done.metrics


def _save(study: Study, found: Findings, context: RunContext) -> None:
    """Saves the chosen fusion with its heads and encoders: a classifier trained in stages."""
    model, threshold = study.model_of(next(one for one in found.answers if one.name == found.chosen))
    card = card_of(context, study.classes, model.network.config).model_copy(update={"threshold": threshold})
    folder = context.directory / "model"
    save_model(folder, model, card)
    context.tracker.log_artifact(folder, "model")


def _adopted(recipe: Recipe) -> Recipe:
    """The recipe with the encoders and the clip of the model to start from, and a folder for its features."""
    update: dict[str, Any] = {}
    if recipe.finetune.init:
        card = read_card(model_directory(recipe.finetune.init))
        # Without what passes between its encoders: the features are of one modality each.
        bare = {"fusion": recipe.model.fusion, "exchange": ExchangeConfig()}
        update["model"] = card.model.from_scratch().model_copy(update=bare)
        update["data"] = recipe.data.model_copy(update={"clip": card.clip})
    else:
        log.warning("finetune.init is empty, so the encoders are random ones; name a pretraining run to study its own")
    folder = recipe.finetune.features or f"{recipe.run.output}/features"
    update["finetune"] = recipe.finetune.model_copy(update={"freeze": True, "features": folder})
    return recipe.model_copy(update=update)


class Study:
    """Everything that one corpus, task and set of encoders is asked.

    Args:
        run: open, with train, validation and test splits.
    """

    def __init__(self, run: RunContext) -> None:
        recipe = run.recipe
        self.run, self.recipe = run, recipe
        self.names, self.task = recipe.data.clip.modalities, recipe.finetune.task
        check_task(run.index, self.task)
        self.classes = tuple(run.index.vocabularies[self.task])
        self.positive = positive_class(self.classes, recipe.finetune.positive)
        self.setting = Setting(recipe.study, recipe.optim, recipe.model.fusion, len(self.classes))
        self.seeds = range(recipe.run.seed, recipe.run.seed + recipe.study.seeds)
        self.gates = self._gates()

    def findings(self) -> Findings:
        """Returns all that was found out; the order of the steps is that of the report."""
        self.network = self._network(self.recipe.finetune.init)
        data = self._features(self.network)
        self.train, self.val, self.test = (data[part] for part in PARTS)
        table = self.run.kept["test"]
        self.rows = torch.nonzero(table.labels[self.task] >= 0).squeeze(1)
        self.raw, self.degraded = table.select(self.rows), table.degraded[self.rows].numpy()
        self.labels, self.present = self.test.labels.numpy(), self.test.present.numpy()
        counts = np.bincount(self.train.labels.numpy(), minlength=len(self.classes))
        self.prior = counts / counts.sum()
        self.heads: list[Heads] = []
        self.trained: dict[str, list[Gate]] = {}
        with progress_bar("gates") as step:
            answers = [*self._answers(step)]
        best, weighted = chosen(answers), self._weighted(answers)
        answers += self._controls(weighted)
        shown = list(dict.fromkeys([REFERENCE, best.name, weighted]))
        return Findings(
            task=self.task,
            names=self.names,
            classes=self.classes,
            positive=self.positive,
            labels=self.labels,
            present=self.present,
            degraded=self.degraded,
            unimodal=[self._scores(self.test, heads) for heads in self.heads],
            clips={part: len(data[part]) for part in PARTS},
            groups={part: len(data[part].group.unique()) for part in PARTS},
            bootstrap=Bootstrap(self.test.group.numpy(), self.recipe.evaluation.bootstrap, self.recipe.run.seed),
            answers=answers,
            chosen=best.name,
            weighted=weighted,
            subsets=self._subsets(shown),
            sweeps=[*self._sweeps(shown, weighted)],
            low_labels=[*self._low_labels()],
            seeds=len(self.seeds),
            encoders=self.recipe.finetune.init,
        )

    def model_of(self, gate: Answer) -> tuple[Classifier, float]:
        """Returns a gate of `findings` as a model, of the seed that validation likes best, and its threshold."""
        number = int(np.argmin(gate.val_loss))
        model = staged(self.network, self.heads[number], self.trained[gate.name][number], self.classes)
        if self.positive is None:
            return model, 0.5
        scores = self._of(gate.name, number, self.val)[:, self.positive]
        truth = self.val.labels.numpy() == self.positive
        return model, choose_thresholds(scores, truth, self.recipe.evaluation.fixed_fpr).decision

    # ---- streams ----------------------------------------------------------------------------------------------

    def _gates(self) -> tuple[str, ...]:
        for name in self.recipe.study.gates:
            check_name(name, "study.gates")
        wanted = self.recipe.study.gates or tuple(
            name for name, one in FUSIONS.items() if set(one.needs_modalities) <= set(self.names)
        )
        # Equal and validation-tuned weights stand among the averages already.
        left = tuple(name for name in wanted if not name.startswith(("average_", "fixed_")))
        if not left:
            raise UserError(
                "only averages are named, which every study measures",
                where="study.gates",
                expected="a fusion that learns, or an empty list for all of them",
            )
        return left

    def _network(self, init: str) -> MultimodalNetwork:
        plain = self.recipe.model.model_copy(update={"fusion": FusionConfig(name="mean")})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.recipe.run.seed)
            network = MultimodalNetwork(plain, self.recipe.data.clip)
        if init:
            log.info("from %s: %s", init, load_encoders(network, init))
        network.freeze_encoders()
        return network.to(self.run.world.device).eval()

    def _features(self, network: MultimodalNetwork) -> dict[Part, Clips]:
        keep_features(network, self.run, PARTS)
        train = self.run.kept["train"]
        raw = torch.stack([train.streams[name] for name in self.names], dim=1)
        network.standardise(raw, train.present)
        network = network.cpu()
        found: dict[Part, Clips] = {}
        for part in PARTS:
            table = self.run.kept[part]
            table = table.select(torch.nonzero(table.labels[self.task] >= 0).squeeze(1))
            with torch.no_grad():
                features = network.encode(table.streams, table.present)
            found[part] = Clips(features, table.present, table.labels[self.task], table.group)
        return found

    # ---- heads and gates --------------------------------------------------------------------------------------

    def _answers(self, step: Step) -> Iterator[Answer]:
        """Single modalities, averages, every gate; test clips are scored by what validation kept."""
        gates = {name: Answer(name, FUSIONS[name].kind, []) for name in self.gates}
        alone = [Answer(f"{name} alone", "modality", []) for name in self.names]
        uniform, logits = Answer(REFERENCE, "average", []), Answer("uniform mean of logits", "average", [])
        fixed = Answer("fixed weights, tuned on validation", "average", [])
        self.trained = {name: [] for name in self.gates}
        metric = partial(statistic, main_metric(self.positive), positive=self.positive)
        for number, seed in enumerate(self.seeds):
            heads = train_heads(self.train, self.val, self.setting, seed)
            self.heads.append(heads)
            folded = out_of_fold(self.train, self.val, self.setting, seed)
            val, test = scored(heads, self.val), scored(heads, self.test)
            assert val.scores is not None and test.scores is not None
            of_val, of_test, here = val.scores.numpy(), test.scores.numpy(), self.present
            for m, answer in enumerate(alone):
                answer.test.append(measures.single(of_test, here, m, self.prior))
            uniform.test.append(measures.uniform_probabilities(of_test, here))
            logits.test.append(measures.uniform_logits(of_test, here))
            best, _ = measures.fixed_weights(of_val, val.present.numpy(), val.labels.numpy(), metric)
            shared = measures.shares(np.tile(best, (len(here), 1)), here)
            fixed.test.append(measures.mix_probabilities(shared, of_test))
            for done, (name, answer) in enumerate(gates.items()):
                step(number * len(gates) + done, len(self.seeds) * len(gates))
                gate = train_gate(name, self.names, folded, val, self.setting, seed)
                self.trained[name].append(gate)
                seen, _ = _asked(gate, val)
                probabilities, weights = _asked(gate, test)
                answer.val_loss.append(float(log_loss(seen, val.labels.numpy()).mean()))
                answer.test.append(probabilities)
                if weights is not None:
                    answer.weights.append(weights)
        step(len(self.seeds) * len(gates), len(self.seeds) * len(gates))
        averages = [uniform, logits, fixed] if len(self.names) > 1 else [uniform]
        yield from (*alone, *averages, *gates.values())

    def _weighted(self, answers: list[Answer]) -> str:
        """The gate of the lowest log loss on validation among those whose weights vary with the clip."""
        candidates = [one for one in answers if any(measures.varies(w, self.present) for w in one.weights)]
        # Those that are nothing but their weights, so that shuffling these is shuffling the gate.
        mixing = [one for one in candidates if one.name.endswith("_probabilities") and "classwise" not in one.name]
        return chosen(mixing or candidates or answers).name

    def _controls(self, weighted: str) -> Iterator[Answer]:
        """Oracle, shuffled gate, a gate that was never trained, mask only, and the truth of degradation."""
        scores = [self._scores(self.test, heads) for heads in self.heads]
        shuffled = Answer("shuffled gate", "control", [], note=f"{weighted} with another clip's weights")
        random = Answer("frozen random gate", "control", [])
        for seed, heads, seen, gate in zip(self.seeds, self.heads, scores, self.trained[weighted]):
            test = scored(heads, self.test)
            _, weights = _asked(gate, test)
            if weights is not None:
                shuffled.test.append(measures.shuffled(weights, seen, self.present, seed))
            untrained = frozen_random(self.names, test.features.shape[2], self.setting, seed)
            random.test.append(_asked(untrained, test)[0])
        yield from (one for one in (shuffled, random) if one.test)
        train = self.train.present.numpy(), self.train.labels.numpy()
        yield Answer("mask only", "control", [measures.mask_only(*train, self.present, len(self.classes))])
        clean = self.present & ~(np.nan_to_num(self.degraded) > 0)
        if (clean != self.present).any():
            kept = np.where(clean.any(axis=1, keepdims=True), clean, self.present)
            shared = measures.uniform(kept)
            note = "the mean of the modalities known to be clean"
            told = [measures.mix_probabilities(shared, seen) for seen in scores]
            yield Answer("truth of degradation", "control", told, note=note)
        best = [measures.oracle(seen, self.present, self.labels) for seen in scores]
        yield Answer("oracle", "control", best, note="right where any single head is")

    # ---- what if -----------------------------------------------------------------------------------------------

    def _subsets(self, shown: list[str]) -> dict[str, dict[tuple[int, ...], Array]]:
        """Competitor -> subset of modalities -> ``(N,)`` share of seeds that are right with no others there."""
        found: dict[str, dict[tuple[int, ...], Array]] = {}
        nothing = (self.prior.argmax() == self.labels).astype(float)
        for name in shown:
            found[name] = {(): nothing}
            for subset in subsets(len(self.names)):
                hidden = torch.tensor([m not in subset for m in range(len(self.names))])
                left = self.test.without(hidden)
                probabilities = [self._of(name, number, left) for number in range(len(self.seeds))]
                empty = ~left.present.any(1).numpy()
                found[name][subset] = np.where(empty, nothing, right_of(probabilities, self.labels))
        return found

    def _sweeps(self, shown: list[str], weighted: str) -> Iterator[Sweep]:
        """Each modality of the test clips spoiled in turn, by kind and severity."""
        levels = self.recipe.study.noise
        spoiled = self._spoiled() if levels else {}
        for m, name in enumerate(self.names) if levels else ():
            for kind in kinds(name):
                sweep = Sweep(name, kind, (0.0, *levels), {one: [] for one in shown}, weighted, [])
                for severity in sweep.severities:
                    clips = self.test if severity == 0 else self._with(name, spoiled[name, kind, severity])
                    for one in shown:
                        own = [self._of(one, number, clips) for number in range(len(self.seeds))]
                        sweep.right[one].append(right_of(own, self.labels))
                    asked = [
                        _asked(gate, scored(heads, clips))[1] for gate, heads in zip(self.trained[weighted], self.heads)
                    ]
                    known = [one[:, m] for one in asked if one is not None]
                    mean = np.mean(known, axis=0) if known else np.full(len(self.labels), np.nan)
                    sweep.weight.append(np.where(self.present[:, m], mean, np.nan))
                yield sweep

    def _with(self, name: str, feature: Tensor) -> Clips:
        """The test clips with another raw feature ``(N, D)`` of one modality."""
        with torch.no_grad():
            streams = self.raw.streams | {name: feature}
            return replace(self.test, features=self.network.encode(streams, self.raw.present))

    def _spoiled(self) -> dict[tuple[str, str, float], Tensor]:
        """Raw features of the test clips under every (modality, kind, severity).

        Each clip is decoded once, and once more for each severity of a kind that changes the sound itself.
        """
        levels, device = self.recipe.study.noise, self.run.world.device
        found: defaultdict[tuple[str, str, float], list[Tensor]] = defaultdict(list)
        network = self.network.to(device)

        def see(name: str, kind: str, level: float, stream: Tensor) -> None:
            with torch.no_grad():
                found[name, kind, level].append(network.encoders[name](stream.to(device)).float().cpu())

        tensors = [(name, kind, level) for name in self.names for kind in SWEEPS.get(name, {}) for level in levels]
        for batch in self._test_batches():
            for name, kind, level in tensors:
                see(name, kind, level, self._noisy(batch, name, kind, level))
        sounds = [(name, kind, level) for name in self.names for kind in SOUNDS.get(name, {}) for level in levels]
        for name, kind, level in sounds:
            heard = partial(SOUNDS[name][kind], severity=level)
            for batch in self._test_batches(partial(clip_tensors, heard=heard)):
                see(name, kind, level, batch.streams[name])
        self.network = network.cpu()
        return {one: torch.cat(features) for one, features in found.items()}

    def _test_batches(self, decode: Decode | None = None) -> Iterator[ClipBatch]:
        """The labelled test clips, in the order of their features."""
        for batch in sequential(
            self.run.index, self.run.splits("test"), self.recipe.data, batch_size=BATCH, decode=decode
        ):
            yield batch.select(torch.nonzero(batch.labels[self.task] >= 0).squeeze(1))

    def _noisy(self, batch: ClipBatch, name: str, kind: str, level: float) -> Tensor:
        stream, here = batch.streams[name].clone(), batch.present[:, self.names.index(name)]
        for row in torch.nonzero(here).squeeze(1).tolist():
            rng = np.random.default_rng([self.recipe.run.seed, int(batch.clip[row]), round(1000 * level)])
            stream[row] = torch.from_numpy(spoil(stream[row].numpy(), name, kind, level, rng))
        return stream

    def _low_labels(self) -> Iterator[LowLabels]:
        """Uniform averaging of heads on these encoders and on random ones, from few labels and from all."""
        shares = self.recipe.study.labels
        if not shares or not self.recipe.finetune.init:
            return
        kept = dict(self.run.kept)
        random = self._features(self._network(""))
        self.run.kept = kept
        both = {"pretrained": (self.train, self.val, self.test), "random": tuple(random[part] for part in PARTS)}
        for share in shares:
            for which, (train, val, test) in both.items():
                answers, clips = [], 0
                for seed in self.seeds:
                    part = train.select(few(train.labels, share, len(self.classes), seed))
                    clips = len(part)
                    heads = train_heads(part, val, self.setting, seed)
                    answers.append(measures.uniform_probabilities(self._scores(test, heads), self.present))
                yield LowLabels(which, share, clips, answers)

    # ---- asking ------------------------------------------------------------------------------------------------

    def _of(self, name: str, number: int, clips: Clips) -> Array:
        """What the competitor of one seed says of some clips, ``(N, K)``."""
        heads = self.heads[number]
        if name == REFERENCE:
            return measures.uniform_probabilities(self._scores(clips, heads), clips.present.numpy())
        return _asked(self.trained[name][number], scored(heads, clips))[0]

    @staticmethod
    def _scores(clips: Clips, heads: Heads) -> Array:
        scores = scored(heads, clips).scores
        assert scores is not None
        return scores.numpy()


def few(labels: Tensor, share: float, classes: int, seed: int) -> Tensor:
    """Returns the places of a share of the clips, drawn class by class in turn, so that each class has one at least."""
    if share >= 1:
        return torch.arange(len(labels))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    seen, rank = [0] * classes, []
    for row in order.tolist():
        rank.append(seen[int(labels[row])])
        seen[int(labels[row])] += 1
    by_turn = order[torch.tensor(rank).argsort(stable=True)]
    there = sum(1 for count in seen if count)
    return by_turn[: max(there, round(share * len(labels)))]


def _asked(gate: Gate, clips: Clips) -> tuple[Array, Array | None]:
    """Probabilities ``(N, K)`` and weights ``(N, M)`` of a trained gate."""
    with torch.no_grad():
        logits, weights, _ = gate(clips)
    return softmax(logits.numpy()), None if weights is None else weights.numpy()
