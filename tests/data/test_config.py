import re
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Literal

import pytest

from data.config import ConfigError, from_dict, load_config, to_dict
from data.config_fields import describe_config
from data.options import option
from mmwudao.cli.app import run
from mmwudao.cli.train import TRAININGS, training


@dataclass
class Layer:
    width: int = 8
    kind: Literal["soft", "hard"] = "soft"
    rates: tuple[float, float] = (0.9, 0.99)

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError("width must be at least 1")


@dataclass
class Config:
    name: str = "a"
    rate: float = 0.1
    fast: bool = False
    sizes: list[int] = field(default_factory=lambda: [1, 2])
    layer: Layer = field(default_factory=Layer)


def message(path=None, overrides=()) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(Config, path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def file(tmp_path):
    def write(text: str | bytes):
        path = tmp_path / "config.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_defaults_without_a_file():
    assert load_config(Config) == Config()


def test_an_empty_file_gives_the_defaults(file):
    assert load_config(Config, file("# nothing\n")) == Config()


def test_a_file_then_overrides(file):
    path = file("name: b\nrate: 2\nlayer:\n  width: 4\n  rates: [0.5, 1]\n")
    config = load_config(Config, path, ["layer.width=16", "layer.kind=hard", "sizes=[3]", "fast=true", "name=c=d"])
    assert config == Config("c=d", 2.0, True, [3], Layer(16, "hard", (0.5, 1.0)))
    assert from_dict(Config, to_dict(config)) == config


def test_overrides_alone_build_a_section():
    assert load_config(Config, None, ["layer.width=3"]).layer == Layer(width=3)


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "0.001", "1.0e-3", "+1e-3", ".1e-2"])
def test_scientific_notation_is_a_number(file, text):
    assert load_config(Config, file(f"rate: {text}\n")).rate == 0.001
    assert load_config(Config, None, [f"rate={text}"]).rate == 0.001


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("layer.width=3.5", "layer.width"),
        ("layer.width=3.0", "layer.width"),
        ("layer.width='3'", "layer.width"),
        ("layer.width=true", "layer.width"),
        ("layer.width=", "layer.width"),
        ("layer.kind=medium", "layer.kind"),
        ("layer.rates=[1]", "layer.rates.1"),
        ("layer.rates=[1, 2, 3]", "layer.rates"),
        ("rate='0.5'", "rate"),
        ("rate=fast", "rate"),
        ("rate=true", "rate"),
        ("fast=1", "fast"),
        ("fast='yes'", "fast"),
        ("name=3", "name"),
        ("sizes=3", "sizes"),
        ("sizes=[1, x]", "sizes.1"),
        ("layer=3", "layer"),
        ("layer.width.deep=3", "layer.width"),
    ],
)
def test_a_wrong_type_names_the_key(override, key):
    assert message(overrides=[override]).startswith(f"{key}: ")


def test_a_wrong_type_names_the_value_and_the_choices():
    text = message(overrides=["layer.kind=medium"])
    assert "'medium'" in text
    assert "'soft' or 'hard'" in text


def test_a_rule_of_the_dataclass_names_the_section():
    assert message(overrides=["layer.width=0"]) == "layer: width must be at least 1"


@pytest.mark.parametrize("override", ["widht=3", "layer.widht=3", "deep.er=3"])
def test_an_unknown_key_is_named_with_those_known(override):
    text = message(overrides=[override])
    assert f"unknown key {override.partition('=')[0].removesuffix('.er')}" in text
    assert "known here: " in text
    assert ("rates" if "layer" in override else "sizes") in text


def test_an_unknown_key_of_a_file(file):
    assert "unknown key layer.depth" in message(file("layer: {depth: 3}\n"))


@pytest.mark.parametrize(
    "text", ["a: [1\n", "a: b: c\n", "\tname: a\n", b"name: \xff\n", "name: " + "[" * 5000, "name: 2020-13-45\n"]
)
def test_a_file_that_is_not_yaml(file, text):
    assert "is not YAML" in message(file(text))


@pytest.mark.parametrize("text", ["layer: {depth: 1}\nname: a\nlayer: {widht: 3}\n", "layer: {depth: 1, depth: 2}\n"])
def test_a_key_that_is_given_twice(file, text):
    assert re.search("is not YAML: .*'(layer|depth)' is given twice", message(file(text)))


def test_keys_that_are_merged_may_be_given_again(file):
    text = "layer: &base {width: 3, kind: hard}\n"
    assert load_config(Config, file(text)).layer.width == 3
    twice = file("layer: {<<: [{width: 3, kind: hard}, {width: 5}], width: 4}\n")
    assert load_config(Config, twice).layer == Layer(4, "hard")


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "text\n"])
def test_a_file_without_keys(file, text):
    assert "must hold `key: value` pairs" in message(file(text))


def test_objects_of_python_are_refused(file):
    assert "is not YAML" in message(file("name: !!python/object/apply:os.getcwd []\n"))


def test_a_section_that_is_empty(file):
    assert message(file("layer:\n")).startswith("layer: ")


def test_a_missing_file(tmp_path):
    assert str(tmp_path / "none.yaml") in message(tmp_path / "none.yaml")
    assert "no configuration file" in message(tmp_path)  # a folder


@pytest.mark.parametrize("override", ["width", "=3", ""])
def test_an_override_without_key_or_value(override):
    assert "key=value" in message(overrides=[override])


def test_an_override_that_is_not_yaml():
    assert message(overrides=["name=[1"]).startswith("name: ")
    assert len(message(overrides=["name=" + "[" * 5000])) < 200


def test_configurations_of_the_package_load():
    from pathlib import Path

    from generation.training.config import GeneratorTrainConfig
    from vqvae.train_tokenizer import TokenizerTrainConfig

    found = sorted((Path(__file__).parents[2] / "mmwudao" / "configs").glob("*.yaml"))
    assert found
    for path in found:
        kind = {"tokenizer": TokenizerTrainConfig, "generator": GeneratorTrainConfig}.get(path.stem.rpartition("-")[2])
        if kind is not None:
            assert load_config(kind, path) != kind(), path.name


# the fields of a configuration


@dataclass
class Described:
    """A section.

    More of it.
    """

    plain: str = "words"
    behind: int = 3  # a comment behind
    # a comment above,
    # over two lines
    above: bool = False
    limited: float = option(0.5, "A share.", least=0, below=1)
    layer: Layer = field(default_factory=lambda: Layer(width=2))
    last: list[str] = field(default_factory=lambda: ["red", "rouge"])


def test_fields_are_listed_with_their_help():
    assert describe_config(Described).splitlines() == [
        "plain=words  (text)",
        "behind=3  (a whole number)",
        "    a comment behind",
        "above=false  (true or false)",
        "    a comment above, over two lines",
        "limited=0.5  (a number of at least 0 and below 1)",
        "    A share.",
        'last=["red", "rouge"]  (list[str])',
        "",
        "layer:",
        "layer.width=2  (a whole number)",
        "layer.kind=soft  (soft or hard)",
        "layer.rates=[0.9, 0.99]  (tuple[float, float])",
    ]


@pytest.mark.parametrize("command", TRAININGS)
def test_every_training_lists_its_fields(command, capsys):
    assert run(["train", command, "--fields"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("loop.save_every=500  (a whole number of at least 1") for line in lines)
    assert any(line.startswith("    Steps between two checkpoints") for line in lines)
    keys = {line.partition("=")[0] for line in lines if "=" in line.split(" ")[0]}
    assert {"loop.out", "loop.ema"} <= keys
    _, settings = training(command)
    assert len(keys) == count_fields(settings())


def count_fields(config) -> int:
    values = [getattr(config, each.name) for each in fields(config)]
    return sum(count_fields(value) if is_dataclass(value) else 1 for value in values)
