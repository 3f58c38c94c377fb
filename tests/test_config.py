"""One dataclass, three ways to fill it: defaults, a YAML file, flags."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rheostat.config import Common, add_flags, from_mapping, resolve, setting
from rheostat.errors import SettingError


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
    with pytest.raises(SettingError, match="must be KEY=VALUE"):
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
