"""One dataclass, three ways to fill it: defaults, a YAML file, flags."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rheostat.config import Common, add_flags, from_mapping, resolve, setting
from rheostat.errors import SettingError, bad_setting, check_text, renamed


@dataclass(frozen=True, kw_only=True)
class Settings(Common):
    model: str = setting(help="the model", flag=False)
    compute: tuple[float, ...] = setting((1.0,), help="at most 100 % of dense")
    files: tuple[str, ...] = setting((), help="some files")
    rate: float = setting(0.5, help="a rate")
    out: str | None = setting(None, help="a folder")
    chat: bool | None = setting(None, help="three states")
    baselines: bool = setting(True, help="yes or no")
    settings: Mapping[str, Any] = setting({}, help="pairs", flag="--set")


def parse(*arguments: str) -> Settings:
    parser = argparse.ArgumentParser()
    add_flags(parser, Settings)
    return resolve(Settings, parser.parse_intermixed_args(list(arguments)))


def test_defaults():
    config = parse("m")
    assert config == Settings(model="m")
    assert (config.seed, config.compute, config.chat, config.settings) == (0, (1.0,), None, {})


def test_flags():
    config = parse(
        "--compute",
        "1.0, 0.8,",
        "m",
        "--files",
        "a,b",
        "--no-chat",
        "--no-baselines",
        "--set",
        "k=4",
        "--set",
        "r=1e-3",
    )
    assert config == Settings(
        model="m",
        compute=(1.0, 0.8),
        files=("a", "b"),
        chat=False,
        baselines=False,
        settings={"k": 4, "r": 1e-3},
    )


@dataclass(frozen=True, kw_only=True)
class Many(Common):
    sources: tuple[str, ...] = setting(help="several", flag=False)


def test_several_positional_arguments(tmp_path: Path):
    def parse_many(*arguments: str) -> Many:
        parser = argparse.ArgumentParser()
        add_flags(parser, Many)
        return resolve(Many, parser.parse_intermixed_args(list(arguments)))

    assert parse_many("a", "--seed", "1", "b,c").sources == ("a", "b,c")
    file = tmp_path / "c.yaml"
    file.write_text("sources: [x, y]")
    assert parse_many("--config", str(file)).sources == ("x", "y")
    with pytest.raises(SettingError, match="sources: must be given"):
        parse_many()


def test_flags_win_over_the_file(tmp_path: Path):
    file = tmp_path / "c.yaml"
    file.write_text("model: m\nrate: 1e-3\ncompute: 0.5\nseed: 3\nsettings: {k: 1, ridge: 2E-4}\n")
    config = parse("--config", str(file), "--seed", "4", "--set", "k=2")
    assert config == Settings(model="m", rate=1e-3, compute=(0.5,), seed=4, settings={"k": 2, "ridge": 2e-4})


def test_keys_of_a_file_may_be_the_names_of_flags(tmp_path: Path):
    @dataclass(frozen=True, kw_only=True)
    class Dashed(Settings):
        max_new_tokens: int = setting(1, help="tokens")

    values = {"model": "m", "set": {"k": 1}, "max-new-tokens": 3}
    assert from_mapping(Dashed, values) == Dashed(model="m", settings={"k": 1}, max_new_tokens=3)
    (tmp_path / "c.yaml").write_text("{model: m, set: {k: 1, j: 2}}")
    assert parse("--config", str(tmp_path / "c.yaml"), "--set", "k=3").settings == {"k": 3, "j": 2}


@dataclass(frozen=True, kw_only=True)
class Asking(Common):
    model: str = setting(help="the model", flag=False)
    prompt: str | None = setting(None, help="what to answer", flag=False)


@pytest.mark.parametrize(
    ("content", "arguments", "found"),
    [
        ("model: m", ["Hi"], ("m", "Hi")),
        ("model: m", ["n", "Hi"], ("n", "Hi")),
        ("{model: m, prompt: p}", ["n"], ("n", "p")),
        ("prompt: p", ["n"], ("n", "p")),
        ("model: m", [], ("m", None)),
        ("seed: 1", ["n", "Hi"], ("n", "Hi")),
    ],
)
def test_arguments_are_those_that_the_file_does_not_give(tmp_path: Path, content, arguments, found):
    (tmp_path / "c.yaml").write_text(content)
    parser = argparse.ArgumentParser()
    add_flags(parser, Asking)
    args = parser.parse_intermixed_args(["--config", str(tmp_path / "c.yaml"), *arguments])
    config = resolve(Asking, args)
    assert (config.model, config.prompt) == found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("modle: m", "modle='m': must be one of the settings"),
        ("model: 3", "model=3: must be of type str"),
        ("{model: m, rate: fast}", "rate='fast': must be of type float"),
        ("{model: m, seed: true}", "seed=True: must be of type int"),
        ("{model: m, settings: [1]}", r"settings=\[1\]: must be a mapping"),
        ("{model: m, compute: [1, a]}", "compute='a': must be of type float"),
        ("model:", "model=None: must be given"),
        ("seed: 1", "model: must be given"),
        ("- a", "must be a YAML mapping"),
        ("model: m\nrate: 1\nrate: 2", "rate is given twice, the second time in line 3"),
        ("{model: m, settings: {k: 1, k: 2}}", "k is given twice"),
        ("{model: m, set: {k: 1}, settings: {k: 1}}", "settings={'k': 1}: must be given once"),
        ("{model: m, seed: -1}", "seed=-1: must be from 0 to 4294967295"),
        ("a: [", "not valid YAML"),
    ],
)
def test_bad_files(tmp_path: Path, content: str, message: str):
    file = tmp_path / "c.yaml"
    file.write_text(content)
    with pytest.raises(SettingError, match=message) as caught:
        parse("--config", str(file))
    assert "\n" not in str(caught.value)


def test_unreadable_files(tmp_path: Path):
    with pytest.raises(SettingError, match="cannot be read"):
        parse("--config", str(tmp_path / "none.yaml"))
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingError, match="not UTF-8"):
        parse("--config", str(tmp_path / "b.yaml"))


@pytest.mark.parametrize("pair", ["k", "=1", "k=[1"])
def test_bad_pairs(pair: str):
    with pytest.raises(SettingError, match=r"^set=.*must be KEY=VALUE"):
        parse("m", "--set", pair)


def test_pairs_over_a_file_that_has_no_mapping(tmp_path: Path):
    (tmp_path / "c.yaml").write_text("{model: m, settings: 3}")
    with pytest.raises(SettingError, match="settings=3: must be a mapping"):
        parse("--config", str(tmp_path / "c.yaml"), "--set", "k=1")


def test_a_prefix_comes_before_names():
    with pytest.raises(SettingError, match=r"^fit\.rate='x'"):
        from_mapping(Settings, {"model": "m", "rate": "x"}, "fit.")
    with pytest.raises(SettingError, match=r"^fit\.model: must be given"):
        from_mapping(Settings, {}, "fit.")


def test_help_shows_defaults():
    parser = argparse.ArgumentParser()
    add_flags(parser, Settings)
    text = " ".join(parser.format_help().split())
    for wanted in (
        "at most 100 % of dense (default: 1.0)",
        "(default: 0)",
        "(default: yes)",
        "--set KEY=VALUE",
        "[MODEL]",
    ):
        assert wanted in text
    assert "None" not in text


def test_an_error_speaks_of_the_name_that_was_given():
    with pytest.raises(SettingError, match="^draft_risk=2: must be less than 1=one$"), renamed(risk="draft_risk"):
        raise bad_setting("risk", 2, "less than 1=one")
    with pytest.raises(SettingError, match="^other=2: must"), renamed(risk="draft_risk"):
        raise bad_setting("other", 2, "less")
    with pytest.raises(SettingError, match="^risk$"), renamed(risk="draft_risk"):
        raise SettingError("risk")


def test_half_a_surrogate_pair_is_no_text():
    check_text("Zürich 🏔")
    with pytest.raises(SettingError, match="prompt: must be Unicode text"):
        check_text("half \ud83d")
