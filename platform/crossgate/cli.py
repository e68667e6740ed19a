"""The `crossgate` command: reads arguments, calls a room, prints what a person wants to see."""

from __future__ import annotations

import logging
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from crossgate import __version__
from crossgate.environment import calm_threads
from crossgate.errors import UserError

app = typer.Typer(
    name="crossgate",
    help="Pretrain, gate, search, release and serve multimodal video models (rgb, flow, audio, depth).",
    epilog="Start with `crossgate demo`: generated clips, every step, a report, in some minutes on a CPU.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

INTERRUPTED = 128 + signal.SIGINT
DATA, RUNS, MODELS, CLUSTER = "Clips and shards", "Runs", "Models", "Kubernetes"

RecipeFile = Annotated[Path, typer.Option("--config", "-c", help="Recipe (YAML); see jobs/recipes.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings over the recipe's, e.g. optim.lr=3e-4")
]


# ---- clips and shards ------------------------------------------------------------------------------------------


@app.command(rich_help_panel=DATA)
def synth(
    out: Annotated[Path, typer.Argument(help="Folder for the videos and their manifest.csv.")],
    clips: Annotated[int, typer.Option(help="Number of clips.", min=1)] = 600,
    seed: Annotated[int, typer.Option(help="Clip i depends on (seed, i) only.")] = 0,
    degraded: Annotated[float, typer.Option(help="Share of clips with degraded modalities.", min=0, max=1)] = 0.5,
    unlabelled: Annotated[float, typer.Option(help="Share of clips without labels, for pretraining.", min=0)] = 0.0,
    workers: Annotated[int, typer.Option(help="Processes (0: one a core).", min=0)] = 0,
) -> None:
    """Generate labelled clips: articulated figures, sound, true depth, known degradations."""
    from crossgate.clips.synth import generate
    from crossgate.progress import progress_bar

    with progress_bar("clips") as step:
        manifest = generate(
            out, clips=clips, seed=seed, degraded=degraded, unlabelled=unlabelled, workers=workers, progress=step
        )
    typer.echo(f"wrote {manifest}\nnext: crossgate pack {manifest} {out}/shards")


@app.command(rich_help_panel=DATA)
def pack(
    manifest: Annotated[Path, typer.Argument(help="CSV with path, label (or action, violence), split, group.")],
    out: Annotated[str, typer.Argument(help="Folder or URL for the shards (local path or s3://).")],
    task: Annotated[
        str, typer.Option(help="Task that the `label` column belongs to (default: told by the labels).")
    ] = "",
    classes: Annotated[str, typer.Option(help="Valid labels, comma-separated (default: those that occur).")] = "",
    seconds: Annotated[float, typer.Option(help="Length of a clip.")] = 2.0,
    fps: Annotated[float, typer.Option(help="Stored frames a second, at most.")] = 12.0,
    short_side: Annotated[int, typer.Option(help="Stored short side in pixels.")] = 128,
    modalities: Annotated[str, typer.Option(help="Comma-separated (default: all that there are).")] = "",
    val_fraction: Annotated[float, typer.Option(help="Share of training groups made `val` if there is none.")] = 0.15,
    workers: Annotated[int, typer.Option(help="Processes (0: one a core).", min=0)] = 0,
    estimator: Annotated[str, typer.Option(help="Depth model for videos without a sensor (needs transformers).")] = "",
    skip_bad: Annotated[
        bool, typer.Option(help="Name and skip clips that cannot be read instead of stopping.")
    ] = False,
    ray: Annotated[bool, typer.Option("--ray", help="Spread over the running Ray cluster.")] = False,
) -> None:
    """Turn a manifest of videos into WebDataset shards with an index; continues where it was stopped."""
    from pydantic import ValidationError

    from crossgate.cluster.pack import pack as pack_over_ray
    from crossgate.progress import progress_bar
    from crossgate.recipe import explained
    from crossgate.runs.pack import PackSettings
    from crossgate.runs.pack import pack as pack_here

    try:
        settings = PackSettings(
            task=task,
            classes=_names(classes),
            seconds=seconds,
            fps=fps,
            short_side=short_side,
            modalities=_names(modalities),
            val_fraction=val_fraction,
            workers=workers,
            estimator=estimator,
            skip_bad=skip_bad,
        )
    except ValidationError as error:
        raise explained(error, "crossgate pack", cure="see `crossgate pack --help`") from None
    with progress_bar("videos") as step:
        index = (pack_over_ray if ray else pack_here)(manifest, out, settings, step)
    typer.echo(index.summary())
    typer.echo(f"next: crossgate check {out}; crossgate preview {out}")


@app.command(rich_help_panel=DATA)
def check(
    url: Annotated[str, typer.Argument(help="Folder or URL of shards.")],
    fast: Annotated[bool, typer.Option(help="Sizes, digests and counts only; decode nothing.")] = False,
    workers: Annotated[int, typer.Option(help="Processes (0: one a core).", min=0)] = 0,
) -> None:
    """Verify every shard and clip against the index and name what is broken."""
    from crossgate.progress import progress_bar
    from crossgate.stream.check import check as check_shards

    with progress_bar("shards") as step:
        report = check_shards(url, fast=fast, workers=workers, progress=step)
    for problem in report.problems:
        typer.echo(str(problem), err=True)
    typer.echo(report.summary())
    if report.problems:
        raise typer.Exit(1)


@app.command(rich_help_panel=DATA)
def preview(
    url: Annotated[str, typer.Argument(help="Folder or URL of shards.")],
    out: Annotated[Path, typer.Option(help="Picture to write.")] = Path("preview.png"),
    clips: Annotated[int, typer.Option(help="Clips shown.", min=1, max=64)] = 6,
    split: Annotated[str, typer.Option(help="Split to draw from (default: train).")] = "",
    seed: Annotated[int, typer.Option(help="Which clips.")] = 0,
) -> None:
    """Draw a contact sheet: frames, flow, log-mel spectrogram, depth."""
    from crossgate.runs.preview import preview as draw

    typer.echo(f"wrote {draw(url, out, clips=clips, split=split, seed=seed)}")


# ---- runs ------------------------------------------------------------------------------------------------------


@app.command(rich_help_panel=RUNS)
def pretrain(config: RecipeFile, overrides: Overrides = None) -> None:
    """Pretrain encoders, gate and fusion by cross-modal contrast. Resumes by run name."""
    _run("pretrain", config, overrides)


@app.command(rich_help_panel=RUNS)
def finetune(config: RecipeFile, overrides: Overrides = None) -> None:
    """Fine-tune a classifier from a pretrained run (finetune.freeze=true: on frozen encoders)."""
    _run("finetune", config, overrides)


@app.command(rich_help_panel=RUNS)
def search(config: RecipeFile, overrides: Overrides = None) -> None:
    """Search gating variants (successive halving) or schedules (population based) with Ray Tune, on validation groups.

    What ended is kept: the same command goes on where a kill left it. See `crossgate explain search`.
    """
    _run("search", config, overrides)


@app.command(rich_help_panel=RUNS)
def evaluate(config: RecipeFile, overrides: Overrides = None) -> None:
    """Measure a trained model on the test split and write its report."""
    _run("evaluate", config, overrides)


@app.command(rich_help_panel=RUNS)
def study(config: RecipeFile, overrides: Overrides = None) -> None:
    """Compare every gate with uniform averaging on the same frozen encoders: seeds, intervals, controls, noise."""
    _run("study", config, overrides)


@app.command(rich_help_panel=RUNS)
def estimate(
    config: RecipeFile,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(help="Ranks, a GPU each.", min=1)] = 1,
    memory: Annotated[
        float | None,
        typer.Option(help="GiB of a rank's device (default: 80, or without GPUs its share of this machine).", min=0),
    ] = None,
) -> None:
    """Estimate the memory of each rank under every ZeRO stage, and say what fits; exit 1 if nothing does."""
    from crossgate.recipe import load_recipe
    from crossgate.runs.estimate import device_memory, short_of_clips
    from crossgate.runs.estimate import estimate as estimate_memory

    recipe = load_recipe(config, overrides or ())
    room = device_memory(recipe, gpus) if memory is None else memory
    found = estimate_memory(recipe, gpus)
    typer.echo(found.table(recipe.engine.stage(gpus), room))
    if said := short_of_clips(recipe):
        typer.echo(said, err=True)
    if not found.fits(room):
        raise typer.Exit(1)


@app.command(rich_help_panel=RUNS)
def checkpoints(config: RecipeFile, overrides: Overrides = None) -> None:
    """List the checkpoints of a recipe's run, here and in its store, whole or damaged; exit 1 if one is damaged."""
    from crossgate.cluster.paths import with_absolute_paths
    from crossgate.recipe import load_recipe
    from crossgate.runs.checkpoints import find_checkpoints, table
    from crossgate.runs.context import run_directory

    recipe = with_absolute_paths(load_recipe(config, overrides or ()))
    found = find_checkpoints(recipe)
    typer.echo(f"{run_directory(recipe)}\n{table(found)}" if found else f"no checkpoint yet in {run_directory(recipe)}")
    if any(one.damage for one in found):
        raise typer.Exit(1)


@app.command(rich_help_panel=RUNS)
def trace(
    run: Annotated[Path, typer.Argument(help="Directory of a run that was trained with training.trace.")],
    out: Annotated[Path | None, typer.Option(help="Picture to write (default: RUN/trace/timeline.png).")] = None,
) -> None:
    """Draw what every rank did in the steps that a run traced, phase by phase."""
    from crossgate.runs.trace import trace_picture

    typer.echo(f"wrote {trace_picture(run, out)}")


@app.command(rich_help_panel=RUNS)
def blend(run: Annotated[Path, typer.Argument(help="Directory of a fine-tuning.")]) -> None:
    """Estimate by Gradient-Blending how much the loss of each head should count, from a finished fine-tuning."""
    from crossgate.runs.blend import estimate_blend

    weights = estimate_blend(run)
    for head, weight in weights.items():
        typer.echo(f"{head:<8} {weight:.3f}")
    typer.echo(f"finetune.blend=[{','.join(f'{weight:.3f}' for weight in weights.values())}]")


@app.command(rich_help_panel=RUNS)
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything that the demo makes.")] = Path("demo"),
    corpus: Annotated[Path | None, typer.Option(help="A manifest of real videos instead of generated ones.")] = None,
    quick: Annotated[bool, typer.Option(help="A tiny run that shows the road, not the numbers.")] = False,
) -> None:
    """Drive the whole road: clips, shards, pretraining, search, two models in a registry, a prediction."""
    from crossgate import environment
    from crossgate.cluster.ray_train import launch
    from crossgate.cluster.ray_tune import search
    from crossgate.cluster.session import LOCAL, ray_session
    from crossgate.config import ClusterConfig
    from crossgate.runs.demo import Demo

    # One Ray for all steps, of the demo's own where none is named: one that happens to run here may end at any time.
    with ray_session(ClusterConfig(address=environment.ray_address() or LOCAL), cpus=1):
        Demo(out, launch, search, typer.echo, corpus=corpus, quick=quick).run()


# ---- models ----------------------------------------------------------------------------------------------------


@app.command(rich_help_panel=MODELS)
def release(
    run: Annotated[Path | None, typer.Argument(help="Directory of a fine-tuning run.")] = None,
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[release.KEY=VALUE]...", help="Over the run's recipe.")
    ] = None,
    name: Annotated[str, typer.Option(help="Registered model (default: crossgate-TASK).")] = "",
    alias: Annotated[str, typer.Option(help="Alias to compete for (`challenger`: register only).")] = "champion",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the gate's decision; register nothing.")] = False,
    rollback: Annotated[str, typer.Option(metavar="NAME", help="Give the alias back to the version before.")] = "",
    to: Annotated[int, typer.Option(help="With --rollback: to this version instead.", min=0)] = 0,
    new_evaluation_set: Annotated[
        bool, typer.Option("--new-evaluation-set", help="Judge on this run's set from now on, not the name's.")
    ] = False,
    tracking_uri: Annotated[str, typer.Option(help="MLflow server (default: the run's own).")] = "",
) -> None:
    """Register a fine-tuned model in MLflow; it becomes champion if it is not worse than the present one."""
    if rollback:
        if dry_run or run is not None or settings:
            raise UserError(
                "it gives the alias back at once, and knows neither a run nor --dry-run",
                where="--rollback",
                cure="mlflow's page of the model shows its versions and aliases",
            )
        from crossgate.config import TrackingConfig
        from crossgate.registry.aliases import rollback as roll_back

        before, now = roll_back(rollback, TrackingConfig(uri=tracking_uri), alias=alias, to=to)
        typer.echo(f"{rollback}: {alias} was version {before or 'none'} and is version {now}")
        return
    if run is None:
        raise UserError("no run given", expected="crossgate release RUN, or --rollback NAME")
    from crossgate.cluster.paths import read
    from crossgate.recipe import redacted
    from crossgate.runs.release import decide_on_run, release_run

    run = Path(read(str(run)))  # in a Ray job runs lie elsewhere
    ask = {"name": name, "alias": alias, "tracking_uri": tracking_uri}
    over, renew = tuple(settings or ()), new_evaluation_set
    if dry_run:
        decision = decide_on_run(run, settings=over, new_evaluation_set=renew, **ask)
        typer.echo(decision.text())
        raise typer.Exit(0 if decision.passed else 1)
    released = release_run(run, settings=over, new_evaluation_set=renew, **ask)
    if released.decision is not None:
        typer.echo(released.decision.text())
    typer.echo(f"registered {released.name} version {released.version} as {released.uri}")
    typer.echo(f"next: crossgate predict {released.uri} VIDEO --tracking-uri {redacted(released.tracking_uri)}")


@app.command(rich_help_panel=MODELS)
def predict(
    model: Annotated[str, typer.Argument(help="models:/NAME@ALIAS, a run directory or a model directory.")],
    videos: Annotated[list[str], typer.Argument(help="Paths or URLs; with --out a folder or s3:// prefix.")],
    depth: Annotated[list[str] | None, typer.Option(help="Depth file of each video, in the same order.")] = None,
    depth_unit: Annotated[
        str, typer.Option(help="What one step of a depth file means: mm, cm, m or relative_8bit.")
    ] = "mm",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a clip.")] = False,
    out: Annotated[
        str, typer.Option(help="Score all videos below into Parquet in this folder or s3:// URL; goes on after a kill.")
    ] = "",
    unit: Annotated[int, typer.Option(help="With --out: videos in a part of the table.", min=1)] = 64,
    megabytes: Annotated[int | None, typer.Option(help="Largest video that is scored (default: 256).", min=1)] = None,
    seconds: Annotated[int | None, typer.Option(help="Longest video that is scored (default: 600).", min=1)] = None,
    ray: Annotated[bool, typer.Option("--ray", help="With --out: spread over the running Ray cluster.")] = False,
    tracking_uri: Annotated[str, typer.Option(help="MLflow server of a models:/ address.")] = "",
) -> None:
    """Label videos: scores, gate weights and the modalities that were used, one row a clip; exit 1 if one failed.

    The label of a task with a positive class is that class from the model's threshold on, which was chosen on
    validation clips; of any other task it is the likeliest class.
    """
    from crossgate.clips.depth import MILLIMETRES
    from crossgate.cluster.paths import read

    bounds = {key: value for key, value in (("megabytes", megabytes), ("seconds", seconds)) if value is not None}
    if out:
        if len(videos) != 1 or depth or as_json:
            raise UserError("takes one folder or prefix, and no --depth or --json", where="--out")
        _score(model, videos[0], out, unit, bounds, ray, tracking_uri)
        return
    if ray:
        raise UserError("spreads a table over a cluster", where="--ray", cure="add --out FOLDER")
    from crossgate.runs.predict import format_rows, json_rows, predict_videos

    if depth_unit not in MILLIMETRES:
        raise UserError(f"unknown depth unit '{depth_unit}'", where="--depth-unit", expected=" or ".join(MILLIMETRES))
    units = [depth_unit] * len(videos)
    model = model if model.startswith("models:/") else read(model)
    frame = predict_videos(model, videos, depth=depth, units=units, tracking_uri=tracking_uri, bounds=bounds)
    if as_json:
        typer.echo("\n".join(json_rows(frame)))
    else:
        typer.echo(format_rows(frame))
    if frame["error"].astype(bool).any():
        raise typer.Exit(1)


def _score(model: str, source: str, out: str, unit: int, bounds: dict[str, int], ray: bool, tracking_uri: str) -> None:
    from crossgate.cluster import score as over_ray
    from crossgate.progress import progress_bar

    scored = over_ray.score if ray else over_ray.score_here
    with progress_bar("videos") as step:
        done = scored(model, source, out, unit=unit, tracking_uri=tracking_uri, bounds=bounds, progress=step)
    typer.echo(f"{done.rows} rows of {done.videos} videos in {out}, {done.errors} of them with an error")
    typer.echo(f"scored by {done.model}")


# ---- Kubernetes ------------------------------------------------------------------------------------------------


@app.command(rich_help_panel=CLUSTER)
def deploy(
    settings: Annotated[Path, typer.Argument(help="Settings (YAML); see k8s/deploy.example.yaml.")],
    manifests: Annotated[Path, typer.Option(help="The folder k8s of a clone.")] = Path("k8s"),
    write: Annotated[bool, typer.Option("--write", help="Write the overlay instead of showing the diff.")] = False,
) -> None:
    """Make an overlay of k8s/ for your bucket, images and nodes; refuses what cannot work."""
    from crossgate.deploy import build, load_settings
    from crossgate.runs.estimate import refuse_too_large

    wanted = load_settings(settings)
    overlay = build(wanted, manifests, beside=settings.parent)
    for job, recipe in overlay.trainings():
        refuse_too_large(recipe, wanted.gpu_memory_gib, where=f"recipe of {job}")
    typer.echo(overlay.diff() or f"{overlay.folder} is as it should be")
    if write:
        overlay.write()
        typer.echo(f"wrote {overlay.folder}\nnext: kubectl apply -k {overlay.folder}")
    else:
        typer.echo("nothing was written: add --write")


@app.command(rich_help_panel=MODELS)
def watch(
    model: Annotated[str, typer.Argument(help="models:/NAME@ALIAS, a run directory or a model directory.")],
    video: Annotated[
        str, typer.Argument(help="Path, URL of a file, or of a live stream (rtsp://, rtmp://, srt:// ...).")
    ],
    label: Annotated[str, typer.Option(help="Class to watch for (default: the positive one).")] = "",
    stride: Annotated[int, typer.Option(help="Windows that begin in one window's length.", min=1, max=16)] = 2,
    on: Annotated[
        float | None, typer.Option(help="Score from which the alarm rings (default: the model's).", min=0, max=1)
    ] = None,
    off: Annotated[
        float | None, typer.Option(help="Score below which it stops (default: 0.7 of --on).", min=0, max=1)
    ] = None,
    after: Annotated[int, typer.Option(help="Windows in a row that must reach it.", min=1)] = 2,
    figure: Annotated[Path | None, typer.Option(help="PNG of scores, gate weights and pictures over time.")] = None,
    live: Annotated[
        bool, typer.Option("--live", help="An http(s) URL is a live stream: read on, fetch nothing.")
    ] = False,
    tracking_uri: Annotated[str, typer.Option(help="MLflow server of a models:/ address.")] = "",
) -> None:
    """Slide a window over a long video: a JSON line a window as it comes, an alarm, a timeline."""
    import json

    from crossgate.runs.watch import Course, Watch, watched

    if figure is not None and not (figure.suffix == ".png" and figure.absolute().parent.is_dir()):
        raise UserError("no timeline can be written here", where=figure, expected="a .png in a folder that is there")
    watching = Watch(
        model, video, stride=stride, label=label, on=on, off=off, after=after, tracking_uri=tracking_uri, live=live
    )
    course = Course()

    def end() -> None:
        if watching.seconds:
            typer.echo(f"{watching.seconds:.0f} s of video at {watching.speed:.1f} times real time", err=True)
        if figure is not None and course.moments:
            typer.echo(f"wrote {watched(figure, course.moments, watching)}", err=True)

    try:
        with suppress(KeyboardInterrupt):  # which is how one stops watching what never ends
            for moment in watching:
                course.add(moment)
                typer.echo(json.dumps(moment.row()))
    except Exception:  # a stream that breaks off is a usual end, too
        try:
            end()
        except Exception as error:  # the stream's own is the one to end with
            typer.echo(f"no timeline: {error}", err=True)
        raise
    end()


# ---- help ------------------------------------------------------------------------------------------------------


@app.command()
def explain(
    section: Annotated[
        str, typer.Argument(help="A section or key such as optim, data.clip or optim.lr, or `fusion`.")
    ] = "",
) -> None:
    """Explain the settings of a recipe, with types and defaults."""
    from crossgate.explain import explain as explain_section

    typer.echo(explain_section(section))


@app.command()
def doctor() -> None:
    """Check this machine: packages, decoders, DeepSpeed, Ray, MLflow, disk, memory."""
    from crossgate.cluster.doctor import diagnose

    if not diagnose(typer.echo):
        raise typer.Exit(1)


def _version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


def _run(kind: str, config: Path, overrides: list[str] | None) -> None:
    from crossgate.recipe import load_recipe

    recipe = load_recipe(config, overrides or ())
    if recipe.kind != kind:
        raise UserError(
            f"this is a recipe of kind '{recipe.kind}'",
            where=config,
            expected=f"kind '{kind}'",
            cure=f"run `crossgate {recipe.kind} --config {config}`",
        )
    from crossgate.cluster.paths import with_absolute_paths
    from crossgate.runs.summary import describe, describe_search

    if kind == "search":
        from crossgate.cluster.ray_tune import search as run_search

        recipe = with_absolute_paths(recipe)
        result = run_search(recipe)
        typer.echo(result.table())
        result.best()  # a search without a winner has failed, and says why
        typer.echo(describe_search(recipe, Path(result.trials[0].directory)))
        return
    from crossgate.cluster.ray_train import launch

    recipe = with_absolute_paths(recipe)  # in a Ray job relative ones start elsewhere
    ended = describe(recipe, launch(recipe))
    if ended:
        typer.echo(ended)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def run_job(*words: str) -> None:
    """Entry point of the scripts in jobs/ and shards/: the words stand before the script's own arguments."""
    sys.argv[1:1] = words
    main()


def main() -> None:
    """Runs the command line; a `UserError` becomes one line and exit status 2, Ctrl-C one and 130."""
    calm_threads()
    # What other libraries warn of looks as it would without this.
    logging.basicConfig(format="%(message)s")
    logging.getLogger("crossgate").setLevel(logging.INFO)
    try:
        app()
    except UserError as error:
        typer.echo(f"crossgate: {error}", err=True)
        raise SystemExit(2) from None
    except (KeyboardInterrupt, SystemExit) as ended:  # the library of the command line turns the one into the other
        if isinstance(ended, SystemExit) and ended.code != INTERRUPTED:
            raise
        typer.echo("crossgate: stopped", err=True)
        raise SystemExit(INTERRUPTED) from None
