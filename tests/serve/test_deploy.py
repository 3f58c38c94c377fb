"""The files in deploy/ speak of settings and metrics that exist."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest

from rheostat.commands.serve import Config
from rheostat.serve.jobs import Bill
from rheostat.serve.metrics import Metrics

DEPLOY = Path(__file__).parents[2] / "deploy"
FLAGS = {"--" + one.name.replace("_", "-") for one in fields(Config)}
BILL = Bill(
    asked={"prefill": 1.0, "decode": 1.0},
    target=0.75,
    is_held=True,
    compute=0.8,
    compute_with_context=0.8,
    ffn_fraction=0.7,
    flops=8,
    dense_flops=10,
    tokens_by_width={"0.5": 1},
    num_prompt_tokens=1,
    num_new_tokens=2,
    num_draft_tokens=0,
    num_accepted_tokens=0,
    is_lowered=False,
    lowest=1.0,
    queue_seconds=0.1,
    prefill_seconds=0.1,
    first_token_seconds=0.2,
    decode_seconds=0.1,
    total_seconds=0.3,
)


def test_the_dashboard_asks_for_metrics_that_there_are():
    metrics = Metrics("tiny")
    metrics.finished("stop", BILL)
    metrics.token(0.1)
    metrics.refused(429)
    metrics.watch(None)  # type: ignore[arg-type]
    known = set(metrics.registry._names_to_collectors)
    dashboard = (DEPLOY / "grafana.json").read_text()
    json.loads(dashboard)
    asked = set(re.findall(r"rheostat_\w+", dashboard))
    assert len(asked) > 10
    assert asked <= known, asked - known


def test_the_unit_and_the_image_use_settings_that_there_are():
    unit = (DEPLOY / "rheostat.service").read_text()
    command = next(line for line in unit.splitlines() if line.startswith("ExecStart="))
    image = (DEPLOY / "Dockerfile").read_text()
    used = [word for word in shlex.split(command) if word.startswith("--")] + re.findall(r'"(--[\w-]+)"', image)
    assert set(used) <= FLAGS
    assert len(used) >= 4


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd")
def test_systemd_understands_the_unit(tmp_path: Path):
    unit = tmp_path / "rheostat.service"
    unit.write_text((DEPLOY / "rheostat.service").read_text().replace("/opt/rheostat/bin/rheostat", "/bin/true"))
    found = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert found.returncode == 0
    assert "rheostat" not in found.stderr  # of a setting that it does not know, too


def test_the_image_copies_what_its_context_holds():
    image = (DEPLOY / "Dockerfile").read_text()
    copied = {word for line in re.findall(r"^COPY (.+) \S+$", image, re.M) for word in line.split()}
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert copied == {line[1:] for line in ignored if line.startswith("!")}
    assert all((DEPLOY.parent / name).exists() for name in copied)
