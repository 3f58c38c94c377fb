"""Every fact that is needed to make a figure again is there, and is JSON."""

from __future__ import annotations

import datetime
import json
import re
import subprocess
import sys

import torch

import rheostat
from rheostat import provenance as module
from rheostat.provenance import hardware, provenance


def test_facts_are_there_and_are_json(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/rheostat", "eval", "--compute", "0.6"])
    facts = provenance(seed=7, base_digest="abc")
    assert json.loads(json.dumps(facts)) == facts
    assert facts["command"] == "rheostat eval --compute 0.6"
    assert facts["rheostat"] == rheostat.__version__
    assert facts["torch"] == torch.__version__
    assert facts["seed"] == 7
    assert facts["base_digest"] == "abc"
    assert datetime.datetime.fromisoformat(facts["time"]).utcoffset() == datetime.timedelta(0)
    assert facts["hardware"] == hardware()
    assert facts["hardware"]["cores"] >= 1
    assert facts["hardware"]["processor"]


def test_a_seed_that_was_not_given_is_left_out():
    assert "seed" not in provenance()


def test_a_changed_tree_is_marked(monkeypatch):
    answers = {"rev-parse": "0123456789ab\n", "status": ""}

    def run(command, **kwargs):
        return subprocess.CompletedProcess(command, 0, stdout=answers[command[3]])

    monkeypatch.setattr(module.subprocess, "run", run)
    monkeypatch.setattr(module.Path, "exists", lambda self: True)
    assert provenance()["commit"] == "0123456789ab"
    answers["status"] = " M file\n"
    assert provenance()["commit"] == "0123456789ab+"


def test_without_git_there_is_no_commit(monkeypatch):
    def run(command, **kwargs):
        raise FileNotFoundError("git")

    monkeypatch.setattr(module.subprocess, "run", run)
    assert provenance()["commit"] is None
    monkeypatch.undo()
    monkeypatch.setattr(module.Path, "exists", lambda self: False)
    assert provenance()["commit"] is None


def test_the_commit_is_that_of_this_tree():
    commit = provenance()["commit"]
    assert commit is None or re.fullmatch(r"[0-9a-f]{12}\+?", commit)


def test_a_machine_that_does_not_name_its_processor(monkeypatch):
    def unreadable(self):
        raise PermissionError(self)

    monkeypatch.setattr(module.Path, "read_text", unreadable)
    assert hardware()["processor"]
