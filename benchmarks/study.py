"""The whole study of docs/gates.md by one command: what gating, fusion and pretraining are worth, in one page.

    python benchmarks/study.py [--out study] [--corpus violence=V.csv --corpus action=A.csv] [--seeds 5]
                               [--demo demo] [--short]

On generated clips: every gate on frozen encoders (half of the clips spoiled, action and violence; none spoiled), then
encoders trained end to end, from scratch and from a pretraining of every seed, with all labels and with few, every
gate again on the frozen encoders of each of these pretrainings, and each self-supervised task alone and mixed
(`pretext.py`). With manifests of real clips: pretraining and every gate on them, and a few of the ways end to end, from
a pretraining of each of three seeds. Everything runs through the commands that a user would type, which are printed;
what is finished is not run again, nor a demo that is there. Some hours on two cores; `--short` takes minutes, shows
that all of it works, and measures nothing. Tables go to OUT/study.md, figures stay beside each run. The last line is
one JSON object: for each study the points of the fusion that validation chose over uniform averaging, with their
interval; the same over pretrainings, with the interval by seeds; and for each way end to end its accuracy, a mean over
seeds.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from crossgate.evaluation import read_results
from crossgate.evaluation.intervals import over_runs

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "jobs" / "recipes"
REAL_EPOCHS = {"violence": 40, "action": 12}
MEASURES = {"violence": "average_precision", "action": "accuracy"}
REAL_MODALITIES = {"violence": "[rgb,flow,audio]", "action": "[rgb,flow]"}
BASELINE = "averaging, from scratch"
ENDS = {  # way -> (pretraining, settings)
    BASELINE: ("", "model.fusion.name=average_probabilities"),
    "mean of features, from scratch": ("", "model.fusion.name=mean"),
    "sigmoid gate, from scratch": ("", "model.fusion.name=sigmoid"),
    "averaging, pretrained": ("contrast", "model.fusion.name=average_probabilities"),
    "mean of features, pretrained": ("contrast", "model.fusion.name=mean"),
    "sigmoid gate, pretrained": ("contrast", "model.fusion.name=sigmoid"),
    "sigmoid gate and MMTM, pretrained": ("contrast", "model.fusion.name=sigmoid model.exchange.name=mmtm"),
    "sigmoid gate, pretrained with agreement": ("agreement", "model.fusion.name=sigmoid"),
}
REAL_ENDS = {
    **{way: ENDS[way] for way in (BASELINE, "averaging, pretrained", "sigmoid gate, pretrained")},
    "GMU, pretrained": ("contrast", "model.fusion.name=gmu"),
}
REAL_STEPS, REAL_SEEDS = 120, 3
PRETRAININGS = {"contrast": "", "agreement": "pretrain.agreement=8"}
FEW = {"1 %": 0.01, "10 %": 0.1}
FEW_STEPS = 80  # about as many as six epochs of all clips
FEW_LABELS = (
    f"Averaging, from few labels (in every seed the same clips, {FEW_STEPS} steps of 12) and from all, as above:"
)
REAL_LABEL = (
    f"{REAL_STEPS} steps of 32 clips, 64 pixels; intervals are Student's over the seeds, on the same test clips:"
)


@dataclass
class Study:
    """Where everything goes, and how much of it is done.

    Attributes:
        out: folder of clips, shards, runs and the page.
        demo: folder of `crossgate demo`, which is run where it is not finished.
        seeds: of heads and gates, and of everything end to end.
        short: next to nothing is trained.
    """

    out: Path
    demo: Path
    seeds: int
    short: bool

    @property
    def clips(self) -> int:
        return 96 if self.short else 960

    def call(self, *words: object) -> None:
        """Runs a command of crossgate and says how long it took; its output goes to OUT/log.txt."""
        command = [sys.executable, "-m", "crossgate", *map(str, words)]
        self._timed(command, "crossgate " + " ".join(map(str, words)))

    def script(self, name: str, *words: object) -> None:
        """Runs another benchmark."""
        self._timed([sys.executable, str(ROOT / "benchmarks" / name), *map(str, words)], f"python benchmarks/{name}")

    def _timed(self, command: list[str], shown: str) -> None:
        begun = time.monotonic()
        print(shown, file=sys.stderr, flush=True)
        with (self.out / "log.txt").open("a") as log:
            ended = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
        if ended:
            sys.exit(f"it ended with {ended}; see {log.name}")
        print(f"    {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)

    def run(self, kind: str, recipe: Path, name: str, *settings: object) -> Path:
        """Runs a recipe under a name, unless it is finished, and returns the run's folder."""
        folder = self.out / "runs" / name
        if not (folder / "results.json").exists():
            where = [f"run.output={folder.parent}", f"run.name={name}", "tracking.enabled=false"]
            self.call(kind, "--config", recipe, *where, *settings)
        return folder

    # ---- data ------------------------------------------------------------------------------------------------

    def shards(self, name: str, *how: object) -> Path:
        """Returns packed generated clips of scenes that the demo does not have."""
        if not (self.out / name / "shards" / "index.json").exists():
            self.call("synth", self.out / name, "--clips", self.clips, "--seed", 1, *how)
            self.call("pack", self.out / name / "manifest.csv", self.out / name / "shards")
        return self.out / name / "shards"

    def of_demo(self, name: str) -> Path:
        """Returns a folder of the demo's: its runs, its recipes, its shards."""
        if not (self.demo / "results.json").exists():
            self.call("demo", "--out", self.demo, *(["--quick"] if self.short else []))
        return self.demo / name

    # ---- studies ---------------------------------------------------------------------------------------------

    def gates(
        self, name: str, index: Path, encoders: Path, task: str, *settings: object, last: Sequence[object] = ()
    ) -> Path:
        """Runs every gate on frozen encoders; `last` settings overrule the size of the study."""
        size = [f"study.seeds={self.seeds}", f"finetune.features={self.out / 'features'}"]
        if self.short:
            size += ["study.seeds=2", "study.steps=6", "study.eval_every=3", "study.noise=[1.0]", "study.labels=[1.0]"]
        data = [f"data.index={index}", f"finetune.init={encoders}", f"finetune.task={task}"]
        return self.run("study", RECIPES / "study.yaml", name, *data, *settings, *size, *last)

    def generated(self) -> dict[str, Path]:
        """The generated clips: half of them spoiled, and none."""
        encoders = next(self.of_demo("runs").glob("pretrain-*"))
        half, clean = self.shards("half-spoiled"), self.shards("clean", "--degraded", 0)
        few = ["study.steps=150", "study.eval_every=15"]
        half_action = self.gates("half-action", half, encoders, "action", *few)
        clean_action = self.gates("clean-action", clean, encoders, "action", *few)
        half_violence = self.gates("half-violence", half, encoders, "violence", *few)
        return {
            "Generated clips, half of them spoiled: action": half_action,
            "The same clips, none spoiled: action": clean_action,
            "Generated clips, half of them spoiled: violence": half_violence,
        }

    def real(self, task: str, manifest: Path) -> Path:
        """Every gate on real clips, on the encoders of the first seed's pretraining."""
        index = self.out / f"real-{task}"
        if not (index / "index.json").exists():
            self.call("pack", manifest, index)
        return self.gates(f"real-{task}-study", index, self.pretrained(task, 0), task)

    def pretrained(self, task: str, seed: int) -> Path:
        """Returns a pretraining on all training clips of a real task, with or without labels."""
        index = self.out / f"real-{task}"
        splits = json.loads((index / "index.json").read_text())["splits"]
        names = "[train,unlabelled]" if "unlabelled" in splits else "[train]"
        epochs = 1 if self.short else REAL_EPOCHS[task]
        settings = [f"data.index={index}", f"data.train={names}", f"training.epochs={epochs}", f"run.seed={seed}"]
        modalities = f"data.clip.modalities={REAL_MODALITIES[task]}"
        return self.run("pretrain", RECIPES / "small-pretrain.yaml", f"pretrain-{task}-{seed}", *settings, modalities)

    def real_ends(self, task: str) -> dict[str, list[float]]:
        """Returns what every way of `REAL_ENDS` reaches on real test clips, one a seed, for which all is drawn anew."""
        found: dict[str, list[float]] = {way: [] for way in REAL_ENDS}
        index = self.out / f"real-{task}"
        for seed in range(1 if self.short else min(self.seeds, REAL_SEEDS)):
            encoders = self.pretrained(task, seed)
            for way, (pretraining, settings) in REAL_ENDS.items():
                chosen = [f"data.index={index}", f"data.clip.modalities={REAL_MODALITIES[task]}"]
                chosen += [f"finetune.task={task}", f"run.seed={seed}", settings]
                chosen += [f"training.steps={2 if self.short else REAL_STEPS}", "training.eval_every=20"]
                chosen += [f"finetune.init={encoders}"] if pretraining else []
                done = self.run("finetune", RECIPES / "small-finetune.yaml", named(f"end-{task}", way, seed), *chosen)
                found[way].append(read_results(done / "results.json")[0][f"test/{MEASURES[task]}"])
        return found

    def small(self, length: str) -> list[str]:
        """Returns the settings that every run end to end has."""
        size = ["data.clip.size=32", "data.clip.mels=32", "cluster.workers=1", "cluster.launcher=local"]
        return [*size, length, "evaluation.bootstrap=200"]

    def end_to_end(self) -> dict[str, list[float]]:
        """Returns the test accuracies of every way, one a seed: everything about a run is drawn anew."""
        recipes, index = self.of_demo("recipes"), self.shards("half-spoiled")
        small = self.small("training.epochs=1" if self.short else "training.epochs=6")
        ways = dict(list(ENDS.items())[::3]) if self.short else ENDS
        found: dict[str, list[float]] = {way: [] for way in ways}
        for seed in range(2 if self.short else self.seeds):
            encoders = {"": ""}
            for name in {pretraining for pretraining, _ in ways.values() if pretraining}:
                folder = f"pretrain-{name}-{seed}"
                chosen = [
                    *small,
                    f"data.index={self.of_demo('shards')}",
                    f"run.seed={seed}",
                    *PRETRAININGS[name].split(),
                ]
                encoders[name] = str(self.run("pretrain", recipes / "pretrain.yaml", folder, *chosen))
            for way, (pretraining, settings) in ways.items():
                chosen = [*small, f"data.index={index}", f"run.seed={seed}", f'finetune.init="{encoders[pretraining]}"']
                chosen += ["optim.lr=1e-3", *settings.split()]
                done = self.run("finetune", recipes / "finetune-action.yaml", named("end", way, seed), *chosen)
                found[way].append(read_results(done / "results.json")[0]["test/accuracy"])
        return found

    def few_labels(self) -> dict[tuple[str, str], list[float]]:
        """Returns (share of labels, way) -> test accuracies, one a seed, of averaging trained end to end.

        The pretrained encoders are those of `end_to_end`; from scratch, nothing has been seen but the few clips.
        """
        recipe, clips = self.of_demo("recipes") / "finetune-action.yaml", self.shards("half-spoiled").parent
        found: dict[tuple[str, str], list[float]] = {}
        for name, share in FEW.items():
            shards = clips / f"few-{share}"
            if not (shards / "index.json").exists():
                self.call("pack", with_few(clips / "manifest.csv", share), shards)
            for seed in range(2 if self.short else self.seeds):
                for way in ("from scratch", "pretrained"):
                    encoders = self.out / "runs" / f"pretrain-contrast-{seed}" if way == "pretrained" else ""
                    chosen = self.small(f"training.steps={2 if self.short else FEW_STEPS}")
                    chosen += [f"data.index={shards}", "data.global_batch=12"]
                    chosen += [f"run.seed={seed}", "optim.lr=1e-3", "training.eval_every=20"]
                    chosen += ["model.fusion.name=average_probabilities", f'finetune.init="{encoders}"']
                    done = self.run("finetune", recipe, f"few-{share}-{way[:4]}-{seed}", *chosen)
                    accuracy = read_results(done / "results.json")[0]["test/accuracy"]
                    found.setdefault((name, way), []).append(accuracy)
        return found

    def gates_by_pretraining(self) -> list[dict[str, float]]:
        """Returns the metrics of one study for each pretraining of `end_to_end`: encoders, folds, heads, gates anew."""
        index, found = self.shards("half-spoiled"), []
        for seed in range(2 if self.short else self.seeds):
            encoders = self.out / "runs" / f"pretrain-contrast-{seed}"
            once = ["study.seeds=1", "study.noise=[]", "study.labels=[]", f"run.seed={seed}"]
            once += [] if self.short else ["study.steps=150", "study.eval_every=15"]
            done = self.gates(f"gates-of-{seed}", index, encoders, "action", last=once)
            found.append(read_results(done / "results.json")[0])
        return found

    def pretext(self) -> Path:
        """Each self-supervised task alone and mixed."""
        page = self.out / "pretext.md"
        if not page.exists():
            short = ["--clips", self.clips, "--steps", 2, "--head-steps", 15, "--seeds", 1]
            long = ["--index", self.of_demo("shards"), "--seeds", self.seeds]
            self.script("pretext.py", "--out", page, *(short if self.short else long))
        return page


def named(kind: str, way: str, seed: int) -> str:
    """Returns the name of a way's run."""
    return f"{kind}-{way.replace(',', '').replace(' ', '-')}-{seed}"


def with_few(manifest: Path, share: float) -> Path:
    """Writes the manifest without all but a share of its labelled training clips, and returns the path.

    They are drawn class by class in turn, so that each class has one at least; a larger share holds the smaller one.
    """
    with manifest.open(newline="") as file:
        rows = list(csv.DictReader(file))
    train = [row for row in rows if row["split"] == "train" and row["action"]]
    random.Random(0).shuffle(train)
    turn: Counter[str] = Counter()
    by_turn = []
    for row in train:
        by_turn.append((turn[row["action"]], row["path"]))
        turn[row["action"]] += 1
    by_turn.sort(key=lambda one: one[0])
    kept = {path for _, path in by_turn[: max(len(turn), round(share * len(train)))]}
    written = manifest.with_name(f"manifest-{share}.csv")
    with written.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(row for row in rows if row["split"] in ("val", "test") or row["path"] in kept)
    return written


def spread(values: list[float], base: list[float] | None = None) -> str:
    """Returns the mean over seeds in per cent, or the paired difference in points, with Student's 95 % interval."""
    own = over_runs(100 * (np.array(values) - (0 if base is None else np.array(base))))
    sign = "" if base is None else "+"
    return f"{own.value:{sign}.1f} ({own.low:{sign}.1f} to {own.high:{sign}.1f})"


def ends_table(found: dict[str, list[float]], measure: str = "accuracy") -> list[str]:
    """Returns the table of what was trained end to end."""
    lines = [
        f"| trained end to end | {measure.replace('_', ' ')}, % | points over averaging from scratch |",
        "| --- | ---: | ---: |",
    ]
    base = found[BASELINE]
    for way, values in found.items():
        over = "" if way == BASELINE else spread(values, base)
        lines.append(f"| {way} | {spread(values)} | {over} |")
    return lines


def few_table(few: dict[tuple[str, str], list[float]], found: dict[str, list[float]]) -> list[str]:
    """Returns the table of few labels; that of all labels is `found`, of `Study.end_to_end`."""
    whole = {"from scratch": found[BASELINE], "pretrained": found["averaging, pretrained"]}
    both = few | {("100 %", way): values for way, values in whole.items()}
    lines = ["| labels | from scratch, accuracy, % | pretrained | points |", "| --- | ---: | ---: | ---: |"]
    for share in (*FEW, "100 %"):
        scratch, pretrained = both[share, "from scratch"], both[share, "pretrained"]
        lines.append(f"| {share} | {spread(scratch)} | {spread(pretrained)} | {spread(pretrained, scratch)} |")
    return lines


def chosen_fusions(runs: list[dict[str, float]]) -> list[float]:
    """Returns for each pretraining the points over averaging of the fusion that validation chose there."""
    return [100 * one["test/study/over_uniform"] for one in runs if "test/study/over_uniform" in one]


def gates_table(runs: list[dict[str, float]]) -> list[str]:
    """Returns the table of fusions over pretrainings: accuracy, paired points over averaging and over the mean."""
    start, end = "test/study/", "/accuracy"
    keys = [key for key in runs[0] if key.startswith(start) and key.endswith(end) and all(key in one for one in runs)]
    accuracy = {key[len(start) : -len(end)]: [one[key] for one in runs] for key in keys}
    lines = [
        "| on frozen encoders | accuracy, % | points over the uniform mean | over the mean of features |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name in sorted(accuracy, key=lambda name: -sum(accuracy[name])):
        cells = []
        for base in ("over_uniform", "over_mean_of_features"):
            over = [one[f"{start}{name}/{base}"] for one in runs if f"{start}{name}/{base}" in one]
            cells.append(spread(over, [0.0] * len(over)) if len(over) == len(runs) else "")  # nothing is over itself
        lines.append(f"| {name.replace('_', ' ')} | {spread(accuracy[name])} | {' | '.join(cells)} |")
    by_seed = over_runs(np.array(chosen_fusions(runs)))
    shown = f"{by_seed.value:+.1f} ({by_seed.low:+.1f} to {by_seed.high:+.1f})"
    return [*lines, f"| the fusion that validation chose for each | | {shown} | |"]


def page(
    study: Study,
    studies: dict[str, Path],
    found: dict[str, list[float]],
    real: dict[str, dict[str, list[float]]],
    few: dict[tuple[str, str], list[float]],
    gates: list[dict[str, float]],
    pretext: Path,
) -> str:
    """Returns all tables."""
    lines = [f"# The study ({datetime.date.today()}{', a short one, which measures nothing' * study.short})", ""]
    for title, folder in studies.items():
        lines += [f"## {title}", "", (folder / "study.md").read_text().strip(), ""]
    lines += [
        "## Trained end to end",
        "",
        f"Action, half of the clips spoiled, 32 pixels. {study.seeds} seeds of everything:",
    ]
    lines += ["pretraining, heads, order of clips. Intervals are Student's over the seeds, on the same test clips.", ""]
    lines += [*ends_table(found), "", FEW_LABELS, ""]
    lines += [*few_table(few, found), ""]
    for task, ends in real.items():
        lines += [f"## Trained end to end on real clips: {task}", "", REAL_LABEL, ""]
        lines += [*ends_table(ends, MEASURES[task]), ""]
    lines += ["## Every gate on frozen encoders of each pretraining", ""]
    lines += [
        "The same clips. Encoders, folds, heads and gates anew for each seed; intervals are Student's over them.",
        "",
    ]
    lines += [*gates_table(gates), "", "## Each self-supervised task alone and mixed", "", pretext.read_text().strip()]
    return "\n".join(lines) + "\n"


def figures(
    studies: dict[str, Path], found: dict[str, list[float]], gates: list[dict[str, float]]
) -> dict[str, list[float] | float]:
    """Returns the few numbers that matter: points of what each study chose, with interval, accuracies end to end."""
    few: dict[str, list[float] | float] = {}
    for title, folder in studies.items():
        metrics, _ = read_results(folder / "results.json")
        names = [f"test/study/over_uniform{end}" for end in ("", "_low", "_high")]
        few[title] = [round(100 * metrics[name], 1) for name in names if name in metrics]  # few groups: no interval
    by_seed = over_runs(np.array(chosen_fusions(gates)))
    few["Chosen fusions by pretraining"] = [round(one, 1) for one in (by_seed.value, by_seed.low, by_seed.high)]
    return few | {way: round(100 * float(np.mean(values)), 1) for way, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("study"), help="folder for everything")
    parser.add_argument("--demo", type=Path, help="folder of a demo (default: in OUT)")
    parser.add_argument("--corpus", action="append", default=[], metavar="TASK=MANIFEST", help="real clips of a task")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--short", action="store_true", help="next to no training: does all of it work?")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    study = Study(options.out.resolve(), (options.demo or options.out / "demo").resolve(), options.seeds, options.short)
    studies, corpora = study.generated(), dict(one.split("=", 1) for one in options.corpus)
    for task, manifest in corpora.items():
        studies[f"Real clips: {task}"] = study.real(task, Path(manifest).resolve())
    found = study.end_to_end()
    few = study.few_labels()
    gates = study.gates_by_pretraining()
    real = {task: study.real_ends(task) for task in corpora}
    written = options.out / "study.md"
    written.write_text(page(study, studies, found, real, few, gates, study.pretext()))
    print(written.read_text())
    print(json.dumps(figures(studies, found, gates)))


if __name__ == "__main__":
    main()
