"""Records reach the file whole and the terminal readable. ``test_wandb_sync.py`` has W&B."""

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb

from distributed_lm.config import RunConfig, load_config
from distributed_lm.errors import ConfigError, TrainingError
from distributed_lm.tracking import NullTracker, open_tracker, patient_file, wandb_run
from distributed_lm.tracking.console import Console
from distributed_lm.tracking.metrics_file import MetricsFile, decode, encode
from distributed_lm.tracking.online import choose_mode
from distributed_lm.tracking.points import wandb_metrics
from distributed_lm.tracking.wandb_run import run_id

SMOKE = Path(__file__).parents[2] / "configs" / "runs" / "smoke.yaml"
TRAIN = {
    "step": 12,
    "tokens": 6144,
    "loss": 5.1234,
    "grad_norm": 0.51,
    "learning_rate": 1e-3,
    "tokens_per_second": 12_345.0,
    "mfu": 0.012,
    "step_seconds": 0.625,
    "data_digest": "ab12",
}
EVALUATION = {
    "step": 20,
    "split": "valid",
    "protocol": "nonoverlapping",
    "length": 128,
    "loss": 2.0,
    "perplexity": 7.389,
    "tokens_scored": 16384,
}


def smoke(tmp_path: Path, mode: str) -> RunConfig:
    return load_config(SMOKE, [f"output_dir={tmp_path}", f"tracking.wandb={mode}"])


def lines_of(path: Path) -> list[dict[str, Any]]:
    text = path.read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def write_records(path: Path, *records: dict[str, Any], resumed_at_step: int = 0) -> None:
    """One life of a run."""
    metrics = MetricsFile(path, resumed_at_step)
    try:
        for record in records:
            metrics.log("train", record)
    finally:
        metrics.finish()


@pytest.fixture
def no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """A home without W&B keys or settings, forgotten by W&B afterwards."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb_config"))
    wandb.teardown()
    yield monkeypatch
    wandb.teardown()


class TestMetricsFile:
    def test_one_line_per_record(self, tmp_path: Path) -> None:
        path = tmp_path / "new" / "metrics.jsonl"
        metrics = MetricsFile(path)
        metrics.log("train", TRAIN)
        metrics.log("evaluation", EVALUATION)
        first, second = lines_of(path)  # before finish: each line is on disk at once
        metrics.finish()
        assert first == {"kind": "train", "time": first["time"], **TRAIN}
        assert second["kind"] == "evaluation"
        assert abs(second["time"] - path.stat().st_mtime) < 5

    def test_resume_keeps_the_earlier_life_and_marks_the_rewind(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        write_records(path, TRAIN)
        write_records(path, TRAIN | {"step": 11}, resumed_at_step=10)
        records = lines_of(path)
        assert [record["step"] for record in records] == [12, 10, 11]
        assert (records[1]["kind"], records[1]["event"]) == ("event", "resume")

    @pytest.mark.parametrize(
        ("torn", "kept"),
        [
            ('{"kind": "train", "st', 1),
            ('{"kind": "train", "step": 2}', 2),
            ("\0" * 100_000, 1),
            ("\ufffd", 1),
        ],
        ids=["half a record", "no line end", "zeros of a lost page", "garbage"],
    )
    def test_torn_last_line_is_repaired(self, torn: str, kept: int, tmp_path: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        path.write_text('{"kind": "train", "step": 1}\n' + torn)
        write_records(path, resumed_at_step=1)
        records = lines_of(path)
        assert [record.get("event") for record in records] == [None] * kept + ["resume"]

    def test_file_of_one_torn_line(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        path.write_text('{"kind"')
        write_records(path)
        assert lines_of(path) == []

    def test_not_finite_is_valid_json(self) -> None:
        import numpy

        record = json.loads(
            encode(
                {
                    "loss": float("nan"),
                    "norm": numpy.float32("-inf"),
                    "by_rank": [1.0, float("nan")],
                }
            )
        )
        assert record == {
            "loss": None,
            "loss_text": "nan",
            "norm": None,
            "norm_text": "-inf",
            "by_rank": [1.0, None],
        }

    def test_a_line_gives_its_record_back(self) -> None:
        record = {"kind": "train", "loss": float("inf"), "mfu": None, "step": 3, "by_rank": [1.0]}
        assert decode(encode(record)) == record

    def test_unwritable_folder_is_one_sentence(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(ConfigError, match=r"metrics\.jsonl: cannot be written .*output_dir"):
            MetricsFile(tmp_path / "file" / "metrics.jsonl")

    def test_full_disk_is_one_sentence(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(patient_file, "CLOSE_SECONDS", 0.1)
        with pytest.raises(TrainingError, match="No space left on device"):
            write_records(Path("/dev/full"), TRAIN)


class TestConsole:
    def test_plain_lines_without_a_terminal(self, capsys: pytest.CaptureFixture[str]) -> None:
        console = Console(total_steps=20)
        console.log("train", TRAIN)
        console.log("evaluation", EVALUATION)
        console.log("event", {"event": "spike", "step": 13, "message": "loss [+2.0] above median"})
        console.finish()
        assert capsys.readouterr().out.splitlines() == [
            "step 12/20 loss 5.1234 grad 0.51 lr 1.0e-03 12.3k tok/s mfu 1.2% eta 0:00:05",
            "step 20 evaluation valid length 128: perplexity 7.389 loss 2.0000 "
            "(16,384 tokens, nonoverlapping)",
            "step 13 spike: loss [+2.0] above median",
        ]

    def test_numbers_a_run_does_not_have_are_left_out(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        Console(total_steps=2).log("train", {"step": 1, "loss": float("nan"), "mfu": None})
        assert capsys.readouterr().out == "step 1/2 loss nan\n"

    def test_progress_line_on_a_terminal_of_80_columns(self) -> None:
        output = run_on_terminal(
            "from distributed_lm.tracking.console import Console\n"
            "console = Console(total_steps=50000)\n"
            f"console.log('train', {TRAIN})\n"
            "console.log('event', {'event': 'note', 'step': 12, 'message': 'kept'})\n"
            "console.finish()\n"
        )
        assert "12.3k tok/s mfu 1.2% eta 8:40:42" in output
        assert "grad" not in output  # no room
        assert "step 12 note: kept" in output
        assert "\x1b[2K" in output  # the line is redrawn in place


class TestWandb:
    @pytest.mark.parametrize("mode", ["auto", "offline"])
    def test_offline_is_one_line_that_says_what_to_do(
        self, mode: str, tmp_path: Path, no_credentials: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        tracker = open_tracker(smoke(tmp_path, mode), {}, 0, enabled=True)
        tracker.log("event", {"event": "note", "step": 0, "message": "hello"})
        tracker.finish()
        tracker.finish()
        run_dir = tmp_path / "smoke"
        assert capsys.readouterr() == (
            f"W&B: offline; `python -m launch sync {run_dir}` brings metrics.jsonl there\n"
            "step 0 note: hello\n",
            "",
        )
        assert [path.name for path in run_dir.iterdir()] == ["metrics.jsonl"]

    def test_failure_does_not_stop_training(
        self,
        tmp_path: Path,
        no_credentials: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        no_credentials.setenv("WANDB_API_KEY", "k" * 40)
        (tmp_path / "smoke").mkdir()
        (tmp_path / "smoke" / "wandb_run_id").write_text("a/b")  # W&B refuses such an id
        tracker = open_tracker(smoke(tmp_path, "online"), {}, 0, enabled=True)
        tracker.log("train", TRAIN)
        tracker.finish()
        assert capsys.readouterr().out.count("W&B: start failed (UsageError: ") == 1
        assert len(lines_of(tmp_path / "smoke" / "metrics.jsonl")) == 1

    def test_no_way_out_of_the_node(
        self,
        tmp_path: Path,
        no_credentials: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        no_credentials.setenv("WANDB_API_KEY", "k" * 40)
        no_credentials.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # discard: nobody listens
        no_credentials.setattr(wandb_run, "INIT_TIMEOUT_SECONDS", 1)
        tracker = open_tracker(smoke(tmp_path, "auto"), {}, 0, enabled=True)
        tracker.log("train", TRAIN)
        tracker.finish()
        first = capsys.readouterr().out.splitlines()[0]
        assert first.startswith("W&B: start failed (")
        assert first.endswith("brings metrics.jsonl there")
        assert not (tmp_path / "smoke" / "wandb" / "training" / "lock.json").exists()
        assert not any("kkkk" in text for text in texts_below(tmp_path))

    def test_id_is_the_run_folders(self, tmp_path: Path) -> None:
        first = run_id(tmp_path / "a")
        assert run_id(tmp_path / "a") == run_id(tmp_path / "x" / ".." / "a") == first
        assert run_id(tmp_path / "b") != first
        (tmp_path / "a" / "wandb_run_id").unlink()
        assert run_id(tmp_path / "a") != first  # a new run in an old place is a new run

    def test_auto_is_online_where_a_key_is(
        self,
        tmp_path: Path,
        no_credentials: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        assert choose_mode("auto") == "offline"
        (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {'k' * 40}\n")
        assert choose_mode("auto") == "online"
        assert capsys.readouterr() == ("", "")
        no_credentials.setenv("WANDB_MODE", "disabled")
        assert choose_mode("auto") == "disabled"
        assert choose_mode("offline") == "offline"

    def test_names(self) -> None:
        assert wandb_metrics("train", {"step": 1, "loss": 2.0, "data_digest": "ab"}) == {
            "train/loss": 2.0
        }
        sliding = EVALUATION | {"protocol": "sliding_512"}
        assert "evaluation/valid/L128/sliding_512/loss" in wandb_metrics("evaluation", sliding)
        assert wandb_metrics("event", {"event": "spike", "step": 3}) == {"event/spike": 1}


def test_other_ranks_report_nothing(tmp_path: Path) -> None:
    tracker = open_tracker(smoke(tmp_path, "offline"), {}, 0, enabled=False)
    assert isinstance(tracker, NullTracker)
    tracker.log("train", TRAIN)
    tracker.finish(exit_code=1)
    assert list(tmp_path.iterdir()) == []


def texts_below(folder: Path) -> Iterator[str]:
    return (path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file())


def run_on_terminal(script: str) -> str:
    """What a script writes to a terminal of 80 columns."""
    master, terminal = pty.openpty()
    environment = {"TERM": "xterm", "COLUMNS": "80", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=terminal, env=environment, cwd=SMOKE.parents[2]
    )
    os.close(terminal)
    assert done.returncode == 0
    text = b""
    try:
        while chunk := os.read(master, 65536):
            text += chunk
    except OSError:  # Linux says so when the other side is closed
        os.close(master)
    return text.decode()
