from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from rheostat.errors import SettingError
from rheostat.report.schema import read
from rheostat.report.writing import base_key, carried, model_key, write
from tests.report.sample import old_sample, sample


def test_files_and_their_bytes(tmp_path: Path):
    files = write(tmp_path / "one", sample())
    assert files[0] == tmp_path / "one" / "report.json"
    assert sorted(path.name for path in files) == sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(files) == 11
    assert read(files[0]) == sample()
    again = write(tmp_path / "two", sample())
    assert [path.read_bytes() for path in files] == [path.read_bytes() for path in again]


def test_pictures_of_an_older_report_go(tmp_path: Path):
    write(tmp_path, sample())
    (tmp_path / "mine.png").write_bytes(b"")
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
    write(tmp_path, sample())
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
