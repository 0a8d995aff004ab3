"""The command line: what it prints, what it refuses, and how it ends."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastbert.cli import main
from fastbert.tokenizer import Tokenizer

TEXT = "\n\n".join(
    f"The ship number {n} left the harbour.\nIt carried {n} barrels of oil.\nNobody saw it again."
    for n in range(60)
)
SMALL = ["--size", "tiny", "--max-steps", "3", "--token-budget", "256", "--max-seq-len", "32"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "ships.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer(text: Path) -> Path:
    folder = text.parent / "tok"
    arguments = ["tokenizer", "train", str(text), "--vocab-size", "200", "--out", str(folder)]
    assert main(arguments) == 0
    return folder


@pytest.fixture(scope="module")
def run(text: Path, tokenizer: Path) -> Path:
    folder = text.parent / "run"
    arguments = ["pretrain", str(text), "--tokenizer", str(tokenizer), *SMALL]
    assert main([*arguments, "--objective", "mlm+nsp", "--out", str(folder)]) == 0
    return folder


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of an error, with exit status 2."""
    assert main(list(arguments)) == 2
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("fastbert: error: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


def test_pretrain_leaves_a_model_and_a_report(run: Path) -> None:
    assert sorted(p.name for p in (run / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
        "pretraining.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
    ]
    report = json.loads((run / "report.json").read_text())
    assert report["steps"] == 3
    assert 0 < report["mlm_loss_heldout"] < 2 * report["unigram_loss_heldout"]
    assert 0 <= report["pair_accuracy_heldout"] <= 1
    assert 0.9 < report["packing_efficiency"] <= 1
    assert not (run / "checkpoints").exists()


def test_pretraining_goes_on_from_a_model_with_replay(
    run: Path, text: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "trains.txt"
    other.write_text(TEXT.replace("ship", "train").replace("harbour", "station"))
    arguments = ["pretrain", str(other), "--tokenizer", str(tokenizer), *SMALL]
    arguments += ["--model", str(run), "--replay", str(text), "--objective", "mlm"]
    assert main([*arguments, "--out", str(tmp_path / "more")]) == 0
    shown = capsys.readouterr()
    report = json.loads((tmp_path / "more" / "report.json").read_text())
    assert report["replay_mlm_loss_heldout"] > 0 and report["mlm_loss_heldout"] > 0
    assert "held out of --replay: masked-LM loss" in shown.out
    # scored before the first step, side by side
    assert "pretrain: step 0: mlm_loss" in shown.err and "replay_mlm_loss" in shown.err
    line = refused(capsys, *arguments, "--max-seq-len", "64", "--out", str(tmp_path / "longer"))
    assert "--max-seq-len must be at most 32" in line
    assert "must be in [0, 1)" in refused(
        capsys, *arguments, "--replay-share", "1", "--out", str(tmp_path / "x")
    )


def test_evaluate_prints_the_scores_of_the_models_own_objective(
    run: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "--model", str(run), str(text)]) == 0
    printed = capsys.readouterr().out
    names = [line.split()[0] for line in printed.splitlines()[-4:]]
    assert names == ["mlm_loss", "masked_accuracy", "pair_accuracy", "unigram_loss"]


def test_fill_mask_prints_the_top_words_with_probabilities(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sentence = "The [MASK] left the [MASK]."
    assert main(["fill-mask", "--model", str(run / "model"), sentence, "--top", "3"]) == 0
    first, *blanks = capsys.readouterr().out.splitlines()
    assert first == sentence
    assert len(blanks) == 2
    assert all(blank.count("%") == 3 for blank in blanks)


def test_doctor_says_which_path_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for name in ("fastbert", "python", "torch", "compiler", "path", "cpu bf16"):
        assert any(line.startswith(name) for line in printed.splitlines()), name


def test_version_and_help_end_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--version"], ["--help"], ["pretrain", "--help"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0
    assert "fastbert 0." in capsys.readouterr().out


def test_a_run_interrupted_by_a_signal_is_saved_and_resumes(
    text: Path, tokenizer: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = [
        *(sys.executable, "-m", "fastbert", "pretrain", str(text), "--tokenizer", str(tokenizer)),
        *("--size", "tiny", "--max-minutes", "0.4", "--token-budget", "256"),
        *("--max-seq-len", "32", "--out", str(out)),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stderr is not None
    # the first line of the log comes with the first step
    assert "step 1" in process.stderr.readline()
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "--resume" in output
    # what is printed last goes on when it is typed
    assert output.splitlines()[-1].strip().startswith("fastbert pretrain ")
    assert len(list((out / "checkpoints").iterdir())) == 1
    clock = json.loads(next((out / "checkpoints").glob("*/state.json")).read_text())["seconds"]
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    # the clock went on: both parts together took the 24 seconds
    assert 24 <= json.loads((out / "report.json").read_text())["seconds"] < 24 + clock + 15


def test_resume_refuses_other_settings_and_leaves_the_run_alone(
    run: Path, text: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / "report.json").read_bytes()
    arguments = ["pretrain", str(text), "--tokenizer", str(tokenizer), *SMALL, "--out", str(run)]
    assert "holds a run already" in refused(capsys, *arguments)
    assert "objective was 'mlm+nsp'" in refused(capsys, *arguments, "--resume")
    assert (run / "report.json").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--objective", "nsp"], "--objective must be"),
        (["--size", "huge"], "size must be one of tiny"),
        (["--dtype", "fp8"], "--dtype must be one of"),
        (["--optimizer", "sgd"], "--optimizer must be one of"),
        (["--schedule", "step"], "--schedule must be one of"),
        (["--mask-probability", "1.5"], "--mask-probability must be in (0, 1)"),
        (["--token-budget", "16"], "--token-budget must be at least"),
        (["--max-steps", "0"], "--max-steps must be more than 0"),
        (["--heldout", "2"], "--heldout must be in"),
        (["--dropout", "1"], "--dropout must be in [0, 1)"),
        (["--warmup", "1"], "--warmup must be in [0, 1)"),
        (["--accumulation", "0"], "--accumulation must be at least 1"),
        (["--learning-rate", "-1"], "--learning-rate must be more than 0"),
        (["--learning-rate", "nan"], "--learning-rate must be a finite number"),
        (["--max-minutes", "inf"], "--max-minutes must be a finite number"),
        (["--evaluate-minutes", "-1"], "--evaluate-minutes must be more than 0"),
        (["--weight-decay", "-1"], "--weight-decay must be at least 0"),
        (["--seed", "-1"], "--seed must be 0 to"),
        (["--seed", str(10**30)], "--seed must be 0 to"),
        (["--token-budget", str(10**12)], "--token-budget must be at most"),
        (["--seed", "abc"], "argument --seed: invalid int value: 'abc'"),
        (["--no-such-flag", "1"], "unrecognized arguments: --no-such-flag"),
    ],
)
def test_settings_out_of_range_are_refused_before_anything_is_written(
    flags: list[str],
    expected: str,
    text: Path,
    tokenizer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    arguments = ["pretrain", str(text), "--tokenizer", str(tokenizer), *SMALL, "--out", str(out)]
    assert expected in refused(capsys, *arguments, *flags)
    assert not out.exists()


def test_a_finished_run_is_not_trained_again(
    run: Path, text: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / "model" / "model.safetensors").read_bytes()
    arguments = ["pretrain", str(text), "--tokenizer", str(tokenizer), *SMALL, "--out", str(run)]
    assert main([*arguments, "--objective", "mlm+nsp", "--resume"]) == 0
    assert "nothing to resume" in capsys.readouterr().out
    assert (run / "model" / "model.safetensors").read_bytes() == before


def test_what_is_there_is_not_overwritten(
    run: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = run / "model"
    before = (model / "vocab.txt").read_bytes()
    line = refused(capsys, "tokenizer", "train", str(text), "--out", str(model))
    assert "holds a tokenizer already" in line
    assert (model / "vocab.txt").read_bytes() == before
    there = tmp_path / "there.jsonl"
    there.write_text("mine")
    for out in (there, tmp_path, tmp_path / "missing" / "docs.jsonl"):
        assert "name a new file" in refused(capsys, "corpus", "python-docs", "--out", str(out))
    assert there.read_text() == "mine"
    arguments = ["pretrain", str(text), "--tokenizer", str(model), *SMALL]
    assert "is no folder" in refused(capsys, *arguments, "--out", "/dev/null")


def test_next_sentences_of_one_document_are_refused_before_a_folder_is_made(
    tokenizer: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    arguments = ["pretrain", str(text), "--tokenizer", str(tokenizer), *SMALL, "--out", str(out)]
    line = refused(capsys, *arguments, "--objective", "mlm+nsp", "--doc-sep", "file")
    assert "at least 2 documents" in line
    assert not out.exists()


def test_a_run_without_an_end_is_refused(
    text: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(
        capsys, "pretrain", str(text), "--tokenizer", str(tokenizer), "--out", str(tmp_path / "r")
    )
    assert "--max-steps or --max-minutes" in line


def test_bad_text_is_refused_by_file_and_place(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.txt"
    empty = tmp_path / "empty.txt"
    broken = tmp_path / "broken.jsonl.gz"
    bad.write_bytes(b"fine so far \xff and no further")
    empty.touch()
    broken.write_bytes(gzip.compress(b'{"title": "no text"}\n'))
    end = ["--tokenizer", str(tokenizer), *SMALL, "--out", str(tmp_path / "run")]
    line = refused(capsys, "pretrain", str(bad), *end)
    assert str(bad) in line and "12" in line
    assert str(empty) in refused(capsys, "pretrain", str(empty), *end)
    assert f"{broken}:1" in refused(capsys, "pretrain", str(broken), *end)
    assert "missing.txt" in refused(capsys, "pretrain", str(tmp_path / "missing.txt"), *end)
    assert not (tmp_path / "run").exists()


def test_foreign_and_broken_models_are_refused(
    run: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = refused(capsys, "fill-mask", "--model", str(tmp_path), "a [MASK]")
    assert "no model here" in nowhere
    assert "[MASK]" in refused(capsys, "fill-mask", "--model", str(run), "no blank")
    long = "ship " * 40 + "[MASK]"
    assert "positions for 32" in refused(capsys, "fill-mask", "--model", str(run), long)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (tmp_path / name).write_bytes((run / "model" / name).read_bytes())
    (tmp_path / "model.safetensors").write_bytes(
        (run / "model" / "model.safetensors").read_bytes()[:5000]
    )
    assert "damaged" in refused(capsys, "fill-mask", "--model", str(tmp_path), "a [MASK]")
    assert "--max-seq-len must be at most 32" in refused(
        capsys, "evaluate", "--model", str(run), str(text), "--max-seq-len", "64"
    )


def test_a_vocabulary_without_special_tokens_is_refused(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("[PAD]\n[UNK]\nship\n")
    line = refused(
        *(capsys, "pretrain", str(text), "--tokenizer", str(vocabulary), *SMALL),
        *("--out", str(tmp_path / "run")),
    )
    assert "[CLS], [SEP], [MASK]" in line


@pytest.mark.skipif(
    not os.path.ismount("/dev/shm") or os.geteuid() != 0, reason="mounting a small disk needs root"
)
def test_a_full_disk_is_one_line_and_leaves_no_half_written_model(
    run: Path, text: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk]).returncode:
        pytest.skip("this machine does not let a test mount a disk")
    try:
        arguments = ["pretrain", str(text), "--tokenizer", str(tokenizer), *SMALL]
        line = refused(capsys, *arguments, "--out", str(disk / "run"))
        assert "no space left on the device" in line
        assert not list((disk / "run").rglob("*.safetensors"))
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


def test_chinese_vocabulary_trains_with_the_right_ids(data: Path, tmp_path: Path) -> None:
    vocabulary = data / "vocab" / "bert-base-chinese"
    text = tmp_path / "text.txt"
    text.write_text("今天天气很好。我们去公园散步。\n\n他在图书馆看书。书很有意思。\n" * 30)
    arguments = ["pretrain", str(text), "--tokenizer", str(vocabulary), *SMALL]
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 0
    saved = Tokenizer.from_pretrained(tmp_path / "run" / "model")
    assert saved.vocab_size == 21_128
    assert saved.id_to_token(343) == "\u2028"
    assert saved.id_to_token(13502) == "##\u2028"


@pytest.mark.parametrize("words", [["bench", "tasks", "--list"], ["doctor"]])
def test_a_reader_that_goes_leaves_no_traceback(words):
    started = subprocess.Popen(
        [sys.executable, "-m", "fastbert", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    started.stdout.close()
    told = started.stderr.read()
    assert "Traceback" not in told and started.wait() == 0, told
