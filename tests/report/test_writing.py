from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from rheostat.errors import SettingError
from rheostat.report.schema import read
from rheostat.report.writing import PICTURES, base_key, carried, model_key, write
from tests.report.sample import old_sample, put, sample


def test_files(written: list[Path]):
    assert written[0].name == "report.json"
    assert sorted(written) == sorted(written[0].parent.iterdir())
    assert len(written) == 11
    assert read(written[0]) == sample()


def test_the_same_report_is_the_same_bytes(written: list[Path], tmp_path: Path):
    """Page and pictures too."""
    again = write(tmp_path, sample())
    assert [path.name for path in again] == [path.name for path in written]
    for one, other in zip(written, again, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name


def test_pictures_of_an_older_report_go(tmp_path: Path):
    for name in (*PICTURES, "mine"):
        (tmp_path / f"{name}.png").write_bytes(b"")
    write(tmp_path, old_sample())
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["mine.png", "pareto.png"]
    assert json.loads((tmp_path / "report.json").read_text()).get("format") is None


def test_what_is_no_report_is_not_written(tmp_path: Path):
    with pytest.raises(SettingError, match="seed='x'"):
        write(tmp_path, sample() | {"seed": "x"})
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_place(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingError, match="a file that can be written"):
        write(tmp_path / "file", old_sample())


def test_other_measurements_of_the_same_model_are_carried_over(tmp_path: Path):
    assert carried(tmp_path, sample()) == {}
    put(tmp_path, sample())
    new = copy.deepcopy(sample())
    for key in ("bench", "bench_provenance", "tasks"):
        del new[key]
    kept = carried(tmp_path, new)
    assert kept == {
        "bench": sample()["bench"],
        "bench_provenance": sample()["bench_provenance"],
        "tasks": sample()["tasks"],
        "tasks_provenance": sample()["provenance"],
    }
    assert "tasks" not in carried(tmp_path, new | {"tasks": []})
    new["provenance"]["artifact_digest"] = "another"
    assert carried(tmp_path, new) == {}


def test_keys():
    assert (model_key(sample()), base_key(sample())) == ("a of models/dial", "b" * 64)
    plain = {"provenance": {"model_digest": "m"}}
    assert (model_key(plain), base_key(plain)) == ("m", "m")
    assert (model_key({}), base_key({"provenance": None})) == (None, None)
