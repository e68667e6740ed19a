"""Recipes: defaults, overrides, digests, and errors that name the key."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from crossgate.errors import UserError
from crossgate.recipe import (
    differences,
    dump_recipe,
    flat_recipe,
    load_recipe,
    parse_recipe,
    recipe_digest,
    redacted,
    with_overrides,
)
from crossgate.yaml_file import StrictLoader


def write(tmp_path: Path, text: str, name: str = "mine.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def test_defaults_round_trip_through_yaml() -> None:
    recipe = parse_recipe({"kind": "pretrain"})
    again = parse_recipe(yaml.safe_load(dump_recipe(recipe)))
    assert again == recipe


def test_modalities_take_their_one_order() -> None:
    recipe = parse_recipe({"kind": "pretrain", "data": {"clip": {"modalities": ["depth", "rgb"]}}})
    assert recipe.data.clip.modalities == ("rgb", "depth")


def test_overrides_are_typed(tmp_path: Path) -> None:
    path = write(tmp_path, "kind: pretrain\n")
    recipe = load_recipe(path, ["training.epochs=3", "data.clip.modalities=[rgb, audio]", "optim.lr=1e-3"])
    assert recipe.training.epochs == 3
    assert recipe.data.clip.modalities == ("rgb", "audio")
    assert recipe.optim.lr == pytest.approx(1e-3)


def test_a_wrong_override_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "kind: pretrain\noptim:\n  lr: 0.1\n")
    for override in ("optim.lr=fast", "optim.lrr=1"):
        with pytest.raises(UserError) as raised:
            load_recipe(path, ["training.epochs=3", override])
        assert raised.value.where == f"command line, {override}"
        assert str(raised.value).count("optim.lr") == 1 or override == "optim.lrr=1", "the key is named once"
    wrong = write(tmp_path, "kind: pretrain\noptim:\n  lr: fast\n", "wrong.yaml")
    with pytest.raises(UserError) as raised:
        load_recipe(wrong, ["optim.betas=[0.9, 0.95]"])
    assert raised.value.where == str(wrong)


@pytest.mark.parametrize(
    ("tree", "fragments"),
    [
        ({"kind": "pretrain", "optmi": {}}, ["optmi", "did you mean 'optim'"]),
        ({"kind": "pretrain", "optim": {"lrr": 1}}, ["optim.lrr", "did you mean 'lr'"]),
        ({"kind": "pretrain", "model": {"encoders": {"rgb": {"backbon": "x"}}}}, ["did you mean 'backbone'"]),
        ({"kind": "pretrain", "model": {"encoders": {"rbg": {}}}}, ["unknown modality 'rbg'; did you mean 'rgb'?"]),
        ({"kind": "pretrain", "optim": {"lr": "fast"}}, ["optim.lr", "valid number", "'fast'"]),
        ({"kind": "pretraining"}, ["kind", "'pretraining'"]),
        ({}, ["'kind' is missing"]),
        ({"kind": "pretrain", "data": {"clip": {"modalities": ["rgb"]}}}, ["two or more"]),
        (
            {"kind": "pretrain", "data": {"global_batch": 6}, "cluster": {"workers": 4}},
            ["global_batch", "divisible"],
        ),
        (
            {"kind": "pretrain", "training": {"profile": [105, 100]}},
            ["training.profile", "begins after its end", "100"],
        ),
        ({"kind": "pretrain", "training": {"trace": [2, 1]}}, ["training.trace", "give [first step, last step]"]),
        ({"kind": "pretrain", "training": {"trace": [0, 1]}}, ["training.trace.0", "greater than or equal to 1"]),
        ({"kind": "finetune", "engine": {"precision": "bf16", "zero_stage": 0}}, ["bf16", "zero_stage"]),
    ],
)
def test_bad_recipes_get_one_line_that_names_the_key(tree: dict, fragments: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse_recipe(tree, where="mine.yaml")
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith("mine.yaml: ")
    for fragment in fragments:
        assert fragment in line


@pytest.mark.parametrize("text", ["- a list\n", "kind: [unclosed\n", ""])
def test_files_that_are_no_recipe(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match="mine.yaml"):
        load_recipe(write(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kind: pretrain\noptim:\n  lr: 1\n  lr: 2\n", ", line 4: key 'lr' is in line 3 already; remove one of them"),
        ("kind: pretrain\noptim: {}\nmodel: {}\noptim: {}\n", ", line 4: key 'optim' is in line 2 already"),
        ("kind: pretrain\noptim: {lr: 1, lr: 1}\n", ", line 2: key 'lr' is in line 2 already"),
        ("kind: pretrain\noptim:\n\tlr: 1\n", ", line 3: cannot be read as YAML (found character '\\t'"),
        ("kind: pretrain\n  optim: 1\n", ", line 2: cannot be read as YAML (mapping values are not allowed here)"),
        ("kind: [unclosed\n", ", line 2: cannot be read as YAML (expected ',' or ']'"),
        ("kind: !!python/object:os.system x\n", ", line 1: could not determine a constructor for the tag"),
        ("kind: \x01\n", ": cannot be read as YAML (unacceptable character"),
        ("- a list\n", ": holds no mapping; expected a YAML mapping that begins with `kind:`"),
    ],
)
def test_what_is_wrong_in_a_file_is_told_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}{said}")
    assert "\n" not in str(caught.value)


def test_other_files_that_are_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"kind: \xff")
    with pytest.raises(UserError, match=r"binary\.yaml: is no text \(byte 6 is not UTF-8\)"):
        load_recipe(tmp_path / "binary.yaml")
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"):
        load_recipe(tmp_path)


def test_what_a_merge_brings_may_be_set_again(tmp_path: Path) -> None:
    text = "kind: pretrain\noptim: &one {lr: 0.1, warmup: 0.2}\nmodel: {}\n"
    tree = yaml.load(text + "again: {<<: *one, lr: 0.3}\n", StrictLoader)
    assert tree["again"] == {"lr": 0.3, "warmup": 0.2}


def test_missing_recipe_is_named() -> None:
    with pytest.raises(UserError, match="nowhere.yaml"):
        load_recipe("nowhere.yaml")


def test_name_is_the_same_for_the_same_settings_only(tmp_path: Path) -> None:
    path = write(tmp_path, "kind: pretrain\ndata: {index: shards}\n")
    name = load_recipe(path).run.name
    assert name.startswith("pretrain-mine-")
    assert load_recipe(path, ["cluster.workers=2", "training.log_every=1"]).run.name == name
    assert load_recipe(path, ["optim.lr=0.5"]).run.name != name


def test_what_makes_two_digests_differ_is_named(tmp_path: Path) -> None:
    before = parse_recipe({"kind": "finetune", "optim": {"lr": 0.1}, "finetune": {"init": "runs/a"}})
    same = with_overrides(before, {"data.loader_workers": 3, "run.name": "other", "training.keep": 9})
    assert differences(before, same) == []
    changed = {
        "optim.lr": 0.2,
        "data.train": ["train", "more"],
        "finetune.init": "runs/b",
        "data.mix": [{"index": "x"}],
    }
    assert differences(before, with_overrides(before, changed)) == [
        'data.mix was [], is [{"index": "x", "weight": 1.0, "train": []}]',
        'data.train was ["train"], is ["train", "more"]',
        "optim.lr was 0.1, is 0.2",
        'finetune.init was "runs/a", is "runs/b"',
    ]
    encoder = with_overrides(before, {"model.encoders": {"rgb": {"backbone": "test_vit"}}})
    assert 'model.encoders.rgb.backbone was null, is "test_vit"' in differences(before, encoder)
    engine = tmp_path / "engine.json"
    engine.write_text("{}")
    named = with_overrides(before, {"engine.deepspeed": str(engine)})
    assert differences(before, named) == [f'engine.deepspeed was "", is "{engine}"']


def test_digest_ignores_places_and_workers_but_no_number() -> None:
    recipe = parse_recipe({"kind": "finetune"})
    same = with_overrides(recipe, {"data.loader_workers": 3, "run.output": "elsewhere", "cluster.workers": 2})
    assert recipe_digest(same) == recipe_digest(recipe)
    for key, value in {"data.global_batch": 32, "finetune.task": "violence", "engine.accumulation": 2}.items():
        assert recipe_digest(with_overrides(recipe, {key: value})) != recipe_digest(recipe)


def test_a_copy_of_a_corpus_elsewhere_does_not_count_and_its_weight_does() -> None:
    def digest(**corpus: object) -> str:
        return recipe_digest(parse_recipe({"kind": "pretrain", "data": {"mix": [{"index": "a"}, corpus]}}))

    assert digest(index="b") == digest(index="s3://bucket/b")
    assert digest(index="b") != digest(index="b", weight=0.5) != digest(index="b", train=["train"])
    one = recipe_digest(parse_recipe({"kind": "pretrain", "data": {"mix": [{"index": "a"}]}}))
    assert len({one, digest(index="b"), recipe_digest(parse_recipe({"kind": "pretrain"}))}) == 3


@pytest.mark.parametrize(("kind", "another"), [("evaluate", True), ("search", True), ("pretrain", False)])
def test_another_index_is_another_run_where_nothing_else_would_tell(tmp_path: Path, kind: str, another: bool) -> None:
    path = write(tmp_path, f"kind: {kind}\ndata: {{index: a}}\n")
    for key, same, other in (("index", "a", "b"), ("mix", "[{index: x}]", "[{index: y}]")):
        changes = ([f"data.{key}={value}"] for value in (same, same, other))
        assert len({load_recipe(path, change).run.name for change in changes}) == (2 if another else 1)


def test_a_deepspeed_json_counts_by_its_content(tmp_path: Path) -> None:
    one, same, other = (tmp_path / name for name in ("one.json", "same.json", "other.json"))
    one.write_text("{}")
    same.write_text("{}")
    other.write_text('{"wall_clock_breakdown": true}')
    recipes = [parse_recipe({"kind": "pretrain", "engine": {"deepspeed": str(path)}}) for path in (one, same, other)]
    digests = [recipe_digest(recipe) for recipe in recipes]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(("section", "key"), [("finetune", "init"), ("evaluation", "model")])
def test_the_folder_that_a_job_is_unpacked_into_does_not_count(section: str, key: str) -> None:
    def digest(path: str) -> str:
        return recipe_digest(parse_recipe({"kind": "finetune", section: {key: path}}))

    unpacked = "/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_{}/runs/a"
    assert digest(unpacked.format("1f")) == digest(unpacked.format("2e")) == digest("runs/a")
    assert digest("/mnt/one/runs/a") != digest("/mnt/two/runs/a")


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://ann:s3cret@host:5000/path", "http://***@host:5000/path"),
        ("mysql://host/db?user=ann&password=s3cret&ssl=on", "mysql://host/db?user=***&password=***&ssl=on"),
        ("sqlite:///runs/mlflow.db", "sqlite:///runs/mlflow.db"),
        ("", ""),
    ],
)
def test_what_is_shown_and_stored_holds_no_password(uri: str, shown: str) -> None:
    recipe = parse_recipe({"kind": "pretrain", "tracking": {"uri": uri}})
    assert redacted(uri) == redacted(shown) == shown
    assert yaml.safe_load(dump_recipe(recipe))["tracking"]["uri"] == shown
    assert flat_recipe(recipe)["tracking.uri"] == shown
    assert recipe.tracking.uri == uri  # the live run still has it


@pytest.mark.parametrize(
    "override",
    [
        "data.index=https://ann:s3cret@host/shards",
        "data.mix=[{index: 's3://KEY:s3cret@bucket/shards'}]",
        "release.index=https://s3cret@host/shards",
        "training.checkpoint_url=s3://KEY:s3cret/9@bucket",
    ],
)
def test_credentials_in_a_url_are_refused_and_not_repeated(tmp_path: Path, override: str) -> None:
    key = override.partition("=")[0]
    with pytest.raises(UserError, match=rf"command line, {key}.*; put credentials into the environment") as caught:
        load_recipe(write(tmp_path, "kind: pretrain\n"), [override])
    assert "s3cret" not in str(caught.value)
    section, name = key.split(".")
    text = f"kind: pretrain\n{section}:\n  {name}: {override.partition('=')[2]}\n"
    with pytest.raises(UserError, match=key) as caught:
        load_recipe(write(tmp_path, text))
    assert "s3cret" not in str(caught.value)


def test_flat_recipe_has_dotted_keys() -> None:
    flat = flat_recipe(parse_recipe({"kind": "pretrain"}))
    assert flat["optim.lr"] == "0.001"
    assert flat["data.clip.modalities"] == "['rgb', 'flow', 'audio', 'depth']"


def test_every_setting_is_documented() -> None:
    from pydantic import BaseModel

    from crossgate.config import Recipe

    def walk(model: type[BaseModel]) -> None:
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name} has no docstring"
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                walk(field.annotation)

    walk(Recipe)


RECIPES = sorted((Path(__file__).resolve().parents[1] / "jobs" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_shipped_recipe_loads_and_says_how_to_run_it(path: Path) -> None:
    recipe = load_recipe(path)
    text = path.read_text()
    assert f"--config jobs/recipes/{path.name}" in text
    assert f"{recipe.kind}" in text.splitlines()[1]


def test_the_digest_counts_what_differs_from_the_defaults_only() -> None:
    plain = parse_recipe({"kind": "pretrain"})
    spelt_out = parse_recipe({"kind": "pretrain", "optim": {"lr": plain.optim.lr}, "model": plain.model.model_dump()})
    assert recipe_digest(spelt_out) == recipe_digest(plain)
    other = parse_recipe({"kind": "pretrain", "optim": {"lr": 0.5}})
    assert recipe_digest(other) != recipe_digest(plain)
    # What a version without the newest settings computed: a new one must not change it.
    assert set(parse_recipe({"kind": "pretrain"}).model_dump(exclude_defaults=True)) == {"kind"}
