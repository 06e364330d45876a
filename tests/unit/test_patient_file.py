"""A disk that is full or hangs holds nobody up, and loses nothing."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distributed_lm.tracking import patient_file
from distributed_lm.tracking.patient_file import PatientFile

LINES = [f'{{"line": {number}}}\n'.encode() for number in range(9)]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patient_file, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(patient_file, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(patient_file, "CLOSE_SECONDS", 1.0)


# In a process of its own: its limit would cut pytest's own files off, too.
FULL_DISK = """
import resource, sys
from pathlib import Path
from distributed_lm.errors import TrainingError
from distributed_lm.tracking import patient_file

patient_file.PATIENCE_SECONDS, patient_file.RETRY_SECONDS = 0.2, 0.05
patient_file.CLOSE_SECONDS = 1.0
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
# No file may grow beyond 40 bytes: three lines and a piece of the fourth.
resource.setrlimit(resource.RLIMIT_FSIZE, (40, hard))
path = Path(sys.argv[1])
file = patient_file.PatientFile(path)
for number in range(9):
    file.write(b'{"line": %d}\\n' % number)
assert path.stat().st_size <= 40
if sys.argv[2] == "heals":
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
try:
    file.close()
except TrainingError as error:
    print(error)
"""


def fill_disk(path: Path, fate: str) -> subprocess.CompletedProcess[str]:
    """Write ``LINES`` to a disk that is full after 40 bytes, and then heals or does not."""
    return subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path), fate],
        capture_output=True, text=True, check=True, timeout=30,
    )  # fmt: skip


def test_a_line_is_on_disk_when_write_returns(tmp_path: Path) -> None:
    file = PatientFile(tmp_path / "log")
    for number, line in enumerate(LINES):
        file.write(line)
        assert (tmp_path / "log").read_bytes() == b"".join(LINES[: number + 1])
    file.close()


def test_what_a_full_disk_refused_comes_later(tmp_path: Path) -> None:
    said = fill_disk(tmp_path / "log", "heals")
    assert (tmp_path / "log").read_bytes() == b"".join(LINES)
    assert said.stdout == ""
    assert said.stderr.count("cannot be written (File too large); going on") == 1


def test_what_never_got_there_is_said_at_the_end(tmp_path: Path) -> None:
    said = fill_disk(tmp_path / "log", "stays full")
    assert "6 lines cannot be written (File too large)" in said.stdout


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
