from __future__ import annotations

import json

import pytest

from fastbert.errors import InputError
from fastbert.training.run_folder import RUN_FILE, check_run, claim_run

SETTINGS = {"command": "pretrain", "learning_rate": 1e-3, "sources": ["a.txt"], "max_steps": None}


def tree(folder) -> dict[str, bytes]:
    """Every file's content by its path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_claiming_a_new_folder(tmp_path):
    out = tmp_path / "runs" / "first"
    check_run(out, SETTINGS, resume=False)
    assert not out.exists()
    assert claim_run(out, SETTINGS, resume=False) == out
    assert json.loads((out / RUN_FILE).read_text()) == SETTINGS
    empty = tmp_path / "empty"
    empty.mkdir()
    claim_run(empty, SETTINGS, resume=False)


def test_resuming_with_the_same_settings(tmp_path):
    claim_run(tmp_path / "run", SETTINGS, resume=False)
    before = tree(tmp_path)
    assert claim_run(tmp_path / "run", dict(SETTINGS), resume=True) == tmp_path / "run"
    # tuples become lists in JSON
    check_run(tmp_path / "run", {**SETTINGS, "sources": ("a.txt",)}, resume=True)
    assert tree(tmp_path) == before


def test_a_run_may_have_moved(tmp_path):
    claim_run(tmp_path / "run", SETTINGS | {"out": "run"}, resume=False)
    (tmp_path / "run").rename(tmp_path / "archive")
    check_run(tmp_path / "archive", SETTINGS | {"out": "./archive/"}, resume=True)


def make_run(folder):
    claim_run(folder, SETTINGS, resume=False)


def make_file(folder):
    folder.write_text("precious")


def make_other_files(folder):
    folder.mkdir()
    (folder / "thesis.txt").write_text("precious")


def make_broken_run(content):
    def make(folder):
        folder.mkdir()
        (folder / RUN_FILE).write_text(content)

    return make


@pytest.mark.parametrize(
    "make, resume, changed, message",
    [
        (make_run, False, {}, r"holds a run already \(run.json\); --resume goes on with it"),
        (make_file, False, {}, "is no folder"),
        (make_other_files, False, {}, "is not empty; name a new folder"),
        (make_other_files, True, {}, r"holds no run \(run.json is missing\)"),
        (make_file, True, {}, "unreadable"),
        (lambda folder: None, True, {}, "holds no run"),
        (
            make_run,
            True,
            {"learning_rate": 2e-3},
            "started with other settings: learning_rate was 0.001, now 0.002",
        ),
        (make_run, True, {"command": "finetune"}, "command was 'pretrain', now 'finetune'"),
        (make_run, True, {"new_flag": 3}, "new_flag was None, now 3"),
        (make_broken_run("{"), True, {}, "unreadable"),
        (make_broken_run("[]"), True, {}, "unreadable"),
    ],
)
@pytest.mark.parametrize("function", [check_run, claim_run])
def test_refusals_touch_nothing(function, make, resume, changed, message, tmp_path):
    make(tmp_path / "run")
    before = tree(tmp_path)
    with pytest.raises(InputError, match=message) as failure:
        function(tmp_path / "run", SETTINGS | changed, resume=resume)
    assert str(tmp_path / "run") in str(failure.value) and "\n" not in str(failure.value)
    assert tree(tmp_path) == before


def test_a_folder_that_cannot_be_made(tmp_path):
    make_file(tmp_path / "file")
    with pytest.raises(InputError, match="cannot write"):
        claim_run(tmp_path / "file" / "run", SETTINGS, resume=False)
