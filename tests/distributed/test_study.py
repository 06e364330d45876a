"""A study from its file to its report, through a kill, with the launcher, engines and a browser."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distributed_lm.study.measures import Measures
from distributed_lm.study.report.content import study_content
from distributed_lm.study.schema import Study, load_study
from tests.support.browser import look_at
from tests.support.studies import IN_ITS_TIME, LONG, SHORT, tiny_study, write_study

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PATIENCE_SECONDS = 240.0


def start(path: Path, log: Path, *arguments: str) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "distributed_lm", "study", str(path), *arguments],
            stdout=output,
            stderr=output,
        )


def run(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "distributed_lm", "study", str(path), *arguments],
        capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS,
    )  # fmt: skip


def processes_of(folder: Path) -> list[str]:
    """Command lines of live processes that name the folder."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(folder) in command and entry.name != str(os.getpid()):
            found.append(command)
    return found


def is_finished(run_dir: Path) -> bool:
    return (run_dir / "checkpoints" / "step_00000012").exists()


def wait_until(condition: object, what: str) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < until, f"never: {what}"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, demo_data: Path) -> Study:
    """Killed while it trains, then started again."""
    folder = tmp_path_factory.mktemp("study")
    path = write_study(folder / "tiny.yaml", tiny_study(folder / "runs", demo_data))
    study = load_study(path)
    first = start(path, folder / "log")
    try:
        wait_until(
            lambda: is_finished(study.folder / f"{SHORT}-seed1") or first.poll() is not None,
            "the first training run is finished",
        )
        assert first.poll() is None, (folder / "log").read_text()[-2000:]
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    wait_until(lambda: not processes_of(folder / "runs"), "what a killed study started ends, too")
    kept = {
        file: file.stat().st_mtime_ns
        for file in study.folder.glob("*/metrics.jsonl")
        if file.parent.name.startswith(("tune-", "speed-")) or is_finished(file.parent)
    }
    again = run(path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert len(kept) >= 4 + 4 + 1
    assert {file: file.stat().st_mtime_ns for file in kept} == kept, "done runs were done again"
    return study


def test_every_run_is_finished_and_scored(finished: Study) -> None:
    measures = Measures(finished)
    for arm in (SHORT, LONG, IN_ITS_TIME):
        for seed in (1, 2):
            for length in (16, 32, 64):
                result = measures.result(arm, seed, length)
                assert result is not None
                assert result.tokens_scored == 4096


def test_arms_saw_the_same_tokens(finished: Study) -> None:
    """With one seed the same in each update, whatever the length; with another seed others."""
    measures = Measures(finished)
    short, long = measures.curve(SHORT, 1).digests, measures.curve(LONG, 1).digests
    assert short == long
    assert len(short) == 6
    assert measures.curve(SHORT, 2).digests != short
    assert "the same in all arms of a seed" in str(study_content(finished).setup)


def test_choice_follows_the_measurements(finished: Study) -> None:
    choice = Measures(finished).choice
    # 6 steps of either: the ten times larger rate is far ahead.
    assert {arm: tuned.rate for arm, tuned in choice.tuned.items()} == {SHORT: 1e-2, LONG: 1e-2}
    assert choice.steps[IN_ITS_TIME] == max(1, round(12 * choice.time_ratios[f"{SHORT}/{LONG}"]))


def test_verdicts(finished: Study) -> None:
    content = study_content(finished)
    assert content.claims is not None
    states = {row[0]: row[-1] for row in content.claims.rows}
    assert states["no worse"] == "✓ holds"
    assert states["false on purpose"] == "✗ does not hold"
    # An arm against itself: no difference, so none greater than 0.
    assert states["too small to tell"] == "? cannot tell"
    assert states["memory"] == "✗ does not hold"


def test_report_in_a_browser(finished: Study, tmp_path: Path) -> None:
    seen = look_at(finished.folder / "report.html", tmp_path / "report.png")
    assert seen.console == []
    assert seen.requests == []
    assert len(seen.images) == 3
    assert all(width > 300 and height > 200 for width, height in seen.images)
    assert "false on purpose" in seen.text
    assert "does not hold" in seen.text
    narrow = look_at(finished.folder / "report.html", tmp_path / "narrow.png", width=420)
    assert narrow.overflow == 0


def test_a_finished_study_only_reports(finished: Study) -> None:
    before = sorted(finished.folder.glob("logs/*"))
    stamps = [path.stat().st_mtime_ns for path in before]
    again = run(finished.path)
    assert again.returncode == 0
    assert [path.stat().st_mtime_ns for path in before] == stamps


def test_report_of_any_runs(finished: Study, tmp_path: Path) -> None:
    runs = [str(finished.folder / f"{arm}-seed{seed}") for arm in (SHORT, LONG) for seed in (1, 2)]
    command = [sys.executable, "-m", "distributed_lm", "report", *runs, "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "report.md").read_text()
    assert "| alibi-16 | 16 |" in text
    assert "| sinusoidal-32 | 32 |" in text


def test_failure_names_the_run_and_its_log(tmp_path: Path, demo_data: Path) -> None:
    # One seed: of two at once, either may be the first to fail.
    values = tiny_study(tmp_path / "runs", demo_data, tuning=None, speed=None, claims=[], seeds=[1])
    values["arms"] = [{"name": "wrong", "position": "nonsense", "length": 16}]
    path = write_study(tmp_path / "s.yaml", values)
    done = run(path)
    assert done.returncode == 1
    assert "wrong-seed1 ended with exit code 2" in done.stderr
    assert "model.position=nonsense: no such method" in done.stderr
    assert "Traceback" not in done.stderr
