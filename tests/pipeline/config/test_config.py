"""Recipes, flags and their errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from data_prep.common.errors import UserError
from data_prep.common.yaml_files import read_mapping
from pipeline.config.flags import build_parser, flag_name, parse
from pipeline.config.recipes import RECIPES, load_config, read_recipe, to_yaml
from pipeline.config.schema import RunConfig, known_keys
from pipeline.config.shipped import ds_config_path, shipped_folder
from pipeline.model.connectors import read_connector

SHIPPED = sorted(path.stem for path in RECIPES.glob("*.yaml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_is_valid(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("LLM_DIR", "VISION_DIR", "SMOLLM2_DIR"):
        monkeypatch.setenv(variable, "/models/x")
    config = load_config(name)
    assert config.run_dir == f"runs/{name}"
    read_connector(config.model.connector)
    assert yaml.safe_load(to_yaml(config)) == config.model_dump(mode="json")


def test_a_printed_config_is_a_recipe(tmp_path: Path) -> None:
    config = load_config("demo_sft", [("train.lr", "1e-4")])
    path = tmp_path / "printed.yaml"
    path.write_text(to_yaml(config))
    assert load_config(str(path)) == config


def test_every_key_has_a_flag_and_a_help_text() -> None:
    flags = {option for action in build_parser()._actions for option in action.option_strings}
    for key, section in known_keys().items():
        if section is None and not key.endswith(".config"):
            assert flag_name(key) in flags
    for section in [RunConfig, *[s for s in known_keys().values() if s]]:
        assert all(info.description for info in section.model_fields.values()), section


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        pytest.param(["--train.lrr", "1"], ["--train.lrr", "did you mean '--train.lr'"], id="unknown flag"),
        pytest.param(["--recipe", "demo_stf"], ["demo_stf", "did you mean 'demo_sft'"], id="unknown recipe"),
        pytest.param(["--recipe", "nowhere.yaml"], ["nowhere.yaml"], id="missing file"),
        pytest.param(["--train.beta2", "1"], ["train.beta2", "less than 1"], id="Adam would divide by 0"),
        pytest.param(["--train.lr", "fast"], ["train.lr", "number", "fast"], id="not a number"),
        pytest.param(
            ["--train.global-batch-size", "0"], ["train.global_batch_size", "greater than 0"], id="out of range"
        ),
        pytest.param(["--parallel.schedule", "zigzag"], ["parallel.schedule", "1f1b"], id="not a choice"),
        pytest.param(
            ["--parallel.pp", "2", "--parallel.virtual-stages", "2"],
            ["virtual_stages=2 needs schedule=interleaved"],
            id="virtual stages alone",
        ),
        pytest.param(
            ["--parallel.schedule", "interleaved", "--parallel.virtual-stages", "2"],
            ["set pp to 2 or more"],
            id="one stage",
        ),
        pytest.param(
            ["--parallel.schedule", "interleaved", "--parallel.pp", "2"],
            ["set virtual_stages to 2 or more"],
            id="one virtual stage",
        ),
        pytest.param(["--train.lr", "1e-9"], ["train", "min_lr=0.0001 is above lr=1e-09"], id="floor above peak"),
        pytest.param(["--model.llm.config.hidden_size"], ["hidden_size", "expected a value"], id="no value"),
        pytest.param(["--model.llm.config.hidden_size="], ["hidden_size", "expected a value"], id="empty value"),
        pytest.param(["--model.llm.config.hidden_size", "[1"], ["hidden_size", "not valid YAML"], id="bad YAML"),
    ],
)
def test_wrong_flags_are_named(argv: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse(argv)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param(
            "train: {global_batch_sise: 4}",
            ["key train.global_batch_sise", "global_batch_size"],
            id="unknown key",
        ),
        pytest.param("train: [1", ["not valid YAML"], id="bad YAML"),
        pytest.param("- a", ["mapping"], id="not a mapping"),
        pytest.param("data: {packs: '${NO_SUCH_VARIABLE}'}", ["NO_SUCH_VARIABLE"], id="unset variable"),
        pytest.param("extends: nothing", ["nothing"], id="unknown parent"),
        pytest.param("extends: r", ["unknown recipe 'r'"], id="its own parent"),
        pytest.param("extends: other.yaml", ["r.yaml", "forms a cycle"], id="a cycle of parents"),
    ],
)
def test_wrong_recipes_are_named(text: str, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    (tmp_path / "other.yaml").write_text("extends: r")
    with pytest.raises(UserError) as caught:
        load_config(str(path))
    assert all(word in str(caught.value) for word in words), caught.value


def test_an_empty_run_dir_is_named_after_the_recipe() -> None:
    assert parse(["--recipe", "demo_pt", "--run-dir", ""]).config.run_dir == "runs/demo_pt"


def test_flags_accept_the_underscores_of_keys() -> None:
    words = ["--train.global_batch_size", "4", "--parallel.micro_batches=2", "--train.lr", "1e-3"]
    assert parse(words).config == parse([word.replace("_", "-") for word in words]).config


def test_another_model_type_replaces_the_parents_config(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("extends: demo_sft\nmodel: {llm: {config: {model_type: llama, hidden_size: 32}}}")
    assert read_recipe(str(path))["model"]["llm"]["config"] == {"model_type": "llama", "hidden_size": 32}
    config = parse(["--model.llm.config.hidden_size", "48", "--model.llm.config.rope_theta=1e4"]).config
    assert config.model.llm.config["hidden_size"] == 48
    assert config.model.llm.config["rope_theta"] == 10_000.0, "a number, although YAML 1.1 requires a dot"


def test_a_recipe_may_have_the_name_of_the_shipped_one_it_extends(tmp_path: Path) -> None:
    path = tmp_path / "demo_sft.yaml"
    path.write_text("extends: demo_sft\ntrain: {lr: 5e-3}")
    config = load_config(str(path))
    assert (config.train.lr, config.data.packs) == (5e-3, "data/demo/packs/sft")


def test_a_folder_is_not_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_mapping(tmp_path)


def test_a_flag_makes_the_variable_it_overrides_unnecessary(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("LLM_DIR", "VISION_DIR", "SMOLLM2_DIR"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(UserError, match="LLM_DIR"):
        load_config("aki_4b_pt", [("model.vision.source", "/models/v")])
    config = load_config("aki_4b_pt", [("model.vision.source", "/models/v"), ("model.llm.source", "/models/l")])
    assert (config.model.llm.source, config.data.packs) == ("/models/l", "data/aki_pt/packs/pt")


def test_a_changed_model_type_names_the_inherited_keys_it_drops(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("extends: demo_sft\nmodel: {llm: {config: {model_type: llama, hidden_size: 32}}}")
    (note,) = parse(["--recipe", str(path)]).notes
    assert note.startswith("model.llm.config.model_type changes from qwen3 to llama, which drops the inherited ")
    assert "intermediate_size" in note and "num_hidden_layers" in note and " hidden_size" not in note
    assert "\n" not in note
    assert parse(["--recipe", "demo_sft", "--model.llm.config.hidden_size", "48"]).notes == ()


def test_another_connector_replaces_the_parents_options(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("extends: cc12m_pt\nmodel: {connector: {kind: mlp}}")
    invocation = parse(["--recipe", str(path)])
    assert invocation.config.model.connector.model_dump() == {"kind": "mlp"}
    (note,) = invocation.notes
    assert note.startswith(
        "model.connector.kind changes from perceiver to mlp, which drops the inherited depth, head_dim"
    )
    flags = ["--model.connector.latents", "16", "--model.connector.head-dim=8", "--model.connector.kind", "perceiver"]
    wanted = {"kind": "perceiver", "latents": 16, "head_dim": 8}
    assert parse(["--recipe", "demo_pt", *flags]).config.model.connector.model_dump() == wanted, "in any order"
    assert parse(["--recipe", "cc12m_pt", *flags]).config.model.connector.model_dump() == {
        **wanted,
        "depth": 2,
        "heads": 4,
    }


def test_shipped_deepspeed_files_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ds_config_path("zero3") == shipped_folder("ds_configs") / "zero3.json"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zero3").mkdir()  # a folder of that name changes nothing
    assert ds_config_path("zero3").is_file()
    (tmp_path / "own.json").write_text("{}")
    assert ds_config_path("own.json") == Path("own.json")
    for name, words in {
        "zero33": "did you mean 'zero3'",
        "ds_configs/zero3.json": "shipped as 'zero3'",
        "ds_configs/": "no such file",
        "/dev/zero": "no such file",
        "": "unknown DeepSpeed file",
    }.items():
        with pytest.raises(UserError, match=words):
            ds_config_path(name)


@pytest.mark.parametrize(("stage", "paper_row"), [("pt", 2048), ("sft", 1024)])
def test_recipes_for_8_gpus_scale_the_papers_rate_with_the_root_of_the_batch(
    stage: str, paper_row: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLM_DIR", "l")
    monkeypatch.setenv("VISION_DIR", "v")
    paper, large = (load_config(f"aki_4b_{stage}{more}") for more in ("", "_8gpu"))
    times = large.train.global_batch_size * 8192 / (paper.train.global_batch_size * paper_row)
    assert large.train.lr == pytest.approx(paper.train.lr * times**0.5, rel=0.01)
    assert large.train.min_lr == pytest.approx(paper.train.min_lr * times**0.5, rel=0.01)
    same = {"global_batch_size", "lr", "min_lr"}
    assert large.train.model_dump(exclude=same) == paper.train.model_dump(exclude=same)
