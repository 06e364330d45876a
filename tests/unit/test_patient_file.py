"""A disk that is full or hangs holds nobody up, and loses nothing."""

import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from distributed_lm.errors import TrainingError
from distributed_lm.tracking import patient_file
from distributed_lm.tracking.patient_file import PatientFile

LINES = [f'{{"line": {number}}}\n'.encode() for number in range(9)]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patient_file, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(patient_file, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(patient_file, "CLOSE_SECONDS", 1.0)


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file may grow beyond 40 bytes: three lines and a piece of the fourth."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def make_room() -> None:
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def test_a_line_is_on_disk_when_write_returns(tmp_path: Path) -> None:
    file = PatientFile(tmp_path / "log")
    for number, line in enumerate(LINES):
        file.write(line)
        assert (tmp_path / "log").read_bytes() == b"".join(LINES[: number + 1])
    file.close()


@pytest.mark.usefixtures("full_disk")
def test_what_a_full_disk_refused_comes_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = PatientFile(tmp_path / "log")
    started = time.monotonic()
    for line in LINES:
        file.write(line)
    assert time.monotonic() - started < 1.0
    assert (tmp_path / "log").stat().st_size <= 40
    make_room()
    file.close()
    assert (tmp_path / "log").read_bytes() == b"".join(LINES)
    assert capsys.readouterr().err.count("cannot be written (File too large); going on") == 1


@pytest.mark.usefixtures("full_disk")
def test_what_never_got_there_is_said_at_the_end(tmp_path: Path) -> None:
    file = PatientFile(tmp_path / "log")
    for line in LINES:
        file.write(line)
    with pytest.raises(TrainingError, match="lines cannot be written"):
        file.close()


def test_a_disk_that_hangs_holds_nobody_up(tmp_path: Path) -> None:
    """A pipe that nobody empties."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    file = PatientFile(path)
    line = b"x" * 4000 + b"\n"
    started = time.monotonic()
    for _ in range(40):
        file.write(line)
    assert time.monotonic() - started < 1.0
    os.set_blocking(reader, True)
    received = b""
    while len(received) < 40 * len(line):
        received += os.read(reader, 1 << 16)
    file.close()
    assert received == 40 * line
    os.close(reader)
