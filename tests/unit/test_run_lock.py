"""The second process on one run folder is told who holds it; a dead holder loses it."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distributed_lm.errors import ConfigError
from distributed_lm.run_lock import LOCK_FILE, STALE_SECONDS, run_lock


def test_second_holder_is_refused_by_name_and_first_releases(tmp_path: Path) -> None:
    with run_lock(tmp_path, job="4711") as taken_over:
        assert taken_over is None
        with pytest.raises(ConfigError) as caught, run_lock(tmp_path, job=None):
            pass
        message = str(caught.value)
        assert f"process {os.getpid()} on {socket.gethostname()}, job 4711, since 20" in message
    with run_lock(tmp_path, job=None):
        pass
    assert list(tmp_path.iterdir()) == []


def test_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    program = (
        "import os, signal; from pathlib import Path\n"
        "from distributed_lm.run_lock import run_lock\n"
        f"with run_lock(Path({str(tmp_path)!r}), None): os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == -9
    assert (tmp_path / LOCK_FILE).exists()
    with run_lock(tmp_path, job=None) as taken_over:
        assert taken_over is not None
        assert "took over the lock of a dead run" in taken_over


def test_reused_process_number_is_not_the_holder(tmp_path: Path) -> None:
    with run_lock(tmp_path, job=None):
        content = json.loads((tmp_path / LOCK_FILE).read_text())
    (tmp_path / LOCK_FILE).write_text(json.dumps({**content, "started": "1"}))
    with run_lock(tmp_path, job=None) as taken_over:
        assert taken_over is not None


def test_holder_on_another_host_lives_while_it_touches_the_file(tmp_path: Path) -> None:
    holder = {"host": "elsewhere", "pid": 1, "started": "1", "job": None, "since": "yesterday"}
    path = tmp_path / LOCK_FILE
    path.write_text(json.dumps(holder))
    with pytest.raises(ConfigError, match="process 1 on elsewhere"), run_lock(tmp_path, None):
        pass
    long_ago = time.time() - STALE_SECONDS - 1
    os.utime(path, (long_ago, long_ago))
    with run_lock(tmp_path, None) as taken_over:
        assert taken_over is not None


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"), run_lock(tmp_path / "file", None):
        pass
