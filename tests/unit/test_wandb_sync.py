"""Every point of a run is at W&B once, whatever happens: the real client against a stand-in."""

import base64
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb

from distributed_lm.config import RunConfig, load_config
from distributed_lm.errors import ConfigError
from distributed_lm.run_lock import LOCK_FILE
from distributed_lm.tracking import open_tracker, sync, wandb_run
from distributed_lm.tracking.metrics_file import MetricsFile
from distributed_lm.tracking.points import Points
from distributed_lm.tracking.report import send_report
from distributed_lm.tracking.wandb_run import WandbError
from tests.support.wandb_server import KEY, StoredRun, WandbServer, wandb_server

# One grey pixel.
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)

ROOT = Path(__file__).parents[2]
STEPS = 20
EVALUATION = {"split": "valid", "length": 128, "protocol": "nonoverlapping", "perplexity": 7.4}


class Run:
    """A run folder with a config, and what its lives write."""

    def __init__(self, output_dir: Path) -> None:
        smoke = ROOT / "configs" / "runs" / "smoke.yaml"
        overrides = [f"output_dir={output_dir}", f"train.steps={STEPS}"]
        config = load_config(smoke, overrides)
        self.folder = config.run_dir
        self.folder.mkdir()
        (self.folder / "config.yaml").write_text(config.to_yaml())
        self.path = self.folder / "metrics.jsonl"
        self.said: list[str] = []

    def in_mode(self, mode: str) -> RunConfig:
        return load_config(self.folder, [f"tracking.wandb={mode}"])

    def life(self, first: int, last: int, loss: float = 5.0, **start: Any) -> None:
        """Train from step ``first`` to ``last``, both done; then the node dies."""
        metrics = MetricsFile(self.path, first - 1)
        if start:
            metrics.log("event", {"event": "start", "step": first - 1, "message": "", **start})
        for step in range(first, last + 1):
            metrics.log("train", train(step, loss))
        metrics.finish()

    def add(self, kind: str, **values: Any) -> None:
        """One line, as the process that is training writes it."""
        with self.path.open("a") as file:
            file.write(wandb_line(kind, values))

    def sync(self, watch: bool = False) -> list[str]:
        """What the command says."""
        self.said.clear()
        sync.sync(self.folder, watch, 0.1, self.said.append)
        return self.said

    @property
    def losses(self) -> list[tuple[int, float]]:
        """The curve as it should be: each step once."""
        return [(step, 5.0 - step / 100) for step in range(1, STEPS + 1)]


def train(step: int, loss: float = 5.0) -> dict[str, Any]:
    return {"step": step, "loss": loss - step / 100, "data_digest": f"digest {step}"}


def wandb_line(kind: str, values: dict[str, Any]) -> str:
    from distributed_lm.tracking.metrics_file import encode

    return encode({"kind": kind, "time": time.time(), **values}) + "\n"


def check_numbering(stored: StoredRun) -> None:
    assert [row["_step"] for row in stored.history] == list(range(len(stored.history)))


def num_losses(server: WandbServer) -> int:
    return sum(len(stored.values("train/loss")) for stored in server.runs.values())


def process_of_the_client(user: int) -> int:
    """W&B's client works in a child of the process that uses it."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        pid, name, _, parent, *_ = stat.read_text().split()
        if name == "(wandb-core)" and int(parent) == user:
            return int(pid)
    raise AssertionError("no such process")


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with wandb_server() as started:
        yield started


@pytest.fixture(autouse=True)
def user(
    server: WandbServer, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[pytest.MonkeyPatch]:
    """A user of the stand-in, with a home of their own."""
    home = tmp_path_factory.mktemp("home")
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(home / "wandb_config"))
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    for wait in ("MIN", "MAX"):
        monkeypatch.setenv(f"WANDB__FILE_STREAM_RETRY_WAIT_{wait}_SECONDS", "1")
    monkeypatch.setattr(sync, "ASK_AGAIN_SECONDS", 0.05)
    wandb.teardown()
    yield monkeypatch
    server.fault = lambda path: None
    server.released.set()
    wandb.teardown()


@pytest.fixture
def impatient(user: pytest.MonkeyPatch) -> None:
    """Failures are final after a second or two."""
    user.setattr(sync, "STALL_SECONDS", 2.0)
    user.setattr(wandb_run, "SYNC_FINISH_TIMEOUT_SECONDS", 1)
    user.setattr(wandb_run, "INIT_TIMEOUT_SECONDS", 2)
    user.setattr(wandb_run, "QUERY_TIMEOUT_SECONDS", 2)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


class TestOneRun:
    def test_arrives_as_it_was_written(
        self, run: Run, server: WandbServer, capfd: pytest.CaptureFixture[str]
    ) -> None:
        run.life(1, 12, job="77", restart=0, nodes=["n1", "n2"], layout="TP 1")
        run.add("train", **train(13) | {"loss": float("nan")})
        run.add("evaluation", step=13, **EVALUATION)
        run.add("evaluation", step=13, **EVALUATION | {"length": 256})
        run.add("event", event="spike", step=13, message="a peak")
        said = run.sync()
        stored = server.run
        check_numbering(stored)
        *finite, (step, loss) = stored.values("train/loss")
        assert finite == run.losses[:12]
        assert (step, str(loss)) == (13, "nan")
        assert stored.values("evaluation/valid/L128/perplexity") == [(13, 7.4)]
        assert stored.values("evaluation/valid/L256/perplexity") == [(13, 7.4)]
        assert stored.values("event/spike") == [(13, 1)]
        times = [row["_timestamp"] for row in stored.history]
        assert times == sorted(times)
        assert times[-1] < run.path.stat().st_mtime + 0.1
        assert stored.summary["data_digest"] == "digest 13"
        assert stored.user_config()["train"]["steps"] == STEPS
        assert stored.user_config()["details"] == {"layout": "TP 1"}
        assert stored.exit_codes == [1]
        assert stored.preempting  # it will go on
        assert said[-1] == "W&B: 17 points sent; it has all 17, up to step 13"
        assert capfd.readouterr() == ("", "")

    def test_a_second_sync_sends_what_is_new(self, run: Run, server: WandbServer) -> None:
        run.life(1, 7)
        run.sync()
        assert run.sync()[-1] == "W&B: 0 points sent; it has all 7, up to step 7"
        for step in range(8, STEPS + 1):
            run.add("train", **train(step))
        run.add("evaluation", step=STEPS, **EVALUATION)
        run.sync()
        check_numbering(server.run)
        assert server.run.values("train/loss") == run.losses
        assert server.run.exit_codes == [1, 1, 0]  # finished

    def test_steps_done_again_after_they_were_sent(self, run: Run, server: WandbServer) -> None:
        run.life(1, 15)
        run.add("evaluation", step=15, **EVALUATION)
        run.sync()
        run.life(11, 12, loss=6.0)
        run.add("evaluation", step=12, **EVALUATION)  # the first life had none here
        for step in range(13, STEPS + 1):
            run.add("train", **train(step))
        run.add("evaluation", step=15, **EVALUATION | {"perplexity": 9.9})
        run.sync()
        check_numbering(server.run)
        assert server.run.values("train/loss") == run.losses
        assert server.run.values("evaluation/valid/L128/perplexity") == [(15, 7.4), (12, 7.4)]
        assert server.run.values("event/resume") == [(10, 1)]

    def test_steps_done_again_before_they_were_sent(self, run: Run, server: WandbServer) -> None:
        run.life(1, 15, loss=6.0)
        run.life(1, STEPS)
        run.sync()
        assert server.run.values("train/loss") == run.losses

    def test_lives_are_recorded(self, run: Run, server: WandbServer) -> None:
        run.life(1, 10, job="77", restart=0, nodes=["n1", "n2"], layout="old")
        run.sync()
        run.life(9, 12, job="77", restart=1, nodes=["n3"], layout="new")
        run.life(11, 14, job="80", restart=0, nodes=["n1"], layout="newest")
        run.sync()
        assert server.run.user_config()["slurm"] == [
            {"step": 0, "job": "77", "restart": 0, "nodes": ["n1", "n2"]},
            {"step": 8, "job": "77", "restart": 1, "nodes": ["n3"]},
            {"step": 10, "job": "80", "restart": 0, "nodes": ["n1"]},
        ]
        assert server.run.user_config()["details"] == {"layout": "newest"}
        assert server.run.values("event/start") == [(0, 1), (8, 1), (10, 1)]

    def test_a_run_that_failed_is_shown_so(self, run: Run, server: WandbServer) -> None:
        run.life(1, 3)
        run.add("event", event="non_finite", step=3, message="stopped before the update")
        run.sync()
        assert (server.run.exit_codes, server.run.preempting) == ([1], False)

    def test_wandb_mode_is_that_of_the_jobs(
        self, run: Run, server: WandbServer, user: pytest.MonkeyPatch
    ) -> None:
        user.setenv("WANDB_MODE", "offline")
        run.life(1, 3)
        run.sync()
        assert server.run.values("train/loss") == run.losses[:3]


class TestFailures:
    def test_what_passes_is_not_even_noticed(self, run: Run, server: WandbServer) -> None:
        run.life(1, STEPS)
        server.fail_next(429, "drop", "lose")
        run.sync()
        assert len([path for path in server.paths if path.endswith("file_stream")]) >= 5
        check_numbering(server.run)
        assert server.run.values("train/loss") == run.losses

    def test_what_does_not_pass(self, run: Run, server: WandbServer, impatient: None) -> None:
        run.life(1, 10)
        run.sync()
        run.life(9, STEPS)
        # One that the client does not try again: it goes on as if nothing were.
        server.fault = lambda path: 400 if path.endswith("file_stream") else None
        with pytest.raises(WandbError, match=r"11 of 21 points in .*metrics\.jsonl are missing"):
            run.sync()
        server.fault = lambda path: None
        run.sync()
        check_numbering(server.run)
        assert server.run.values("train/loss") == run.losses

    def test_no_way_to_wandb(self, run: Run, server: WandbServer, impatient: None) -> None:
        run.life(1, 5)
        server.fault = lambda path: 500
        with pytest.raises(WandbError) as caught:
            run.sync()
        assert "start failed" in str(caught.value)
        assert "nothing was sent of the 5 points" in str(caught.value)
        assert KEY not in str(caught.value)

    def test_killed_in_the_middle(self, run: Run, server: WandbServer) -> None:
        run.life(1, 10)
        command = [sys.executable, "-m", "launch", "sync", run.folder, "--watch", "--every", "1"]
        watching = subprocess.Popen(command, cwd=ROOT)
        wait_until(lambda: bool(server.runs) and len(server.run.lines) == 10)
        requests = len(server.paths)
        server.fault = lambda path: "hang" if path.endswith("file_stream") else None
        run.life(9, STEPS)
        wait_until(lambda: any(path.endswith("file_stream") for path in server.paths[requests:]))
        watching.kill()
        watching.wait()
        server.fault = lambda path: None
        # What was on its way arrives while the next sync is at work.
        threading.Timer(0.5, server.released.set).start()
        run.sync()
        check_numbering(server.run)
        assert server.run.values("train/loss") == run.losses


class TestWatch:
    @pytest.mark.timeout(60)
    def test_sees_the_run_through(self, run: Run, server: WandbServer, impatient: None) -> None:
        lock = run.folder / LOCK_FILE
        lock.touch()
        server.fail_next(500, path="/graphql")

        def train_on() -> None:
            run.life(1, 8)
            wait_until(lambda: num_losses(server) == 8)
            # One that the client does not try again: it goes on as if nothing were.
            # One that the client does not try again: it goes on as if nothing were.
            server.fault = lambda path: 500 if path.endswith("file_stream") else None
            run.life(7, 12)
            wait_until(lambda: "nothing has arrived" in run.said[-1])
            server.fault = lambda path: None
            wait_until(lambda: num_losses(server) == 12)
            run.life(13, STEPS)
            wait_until(lambda: num_losses(server) == STEPS)
            run.add("evaluation", step=STEPS, **EVALUATION)
            lock.unlink()

        training = threading.Thread(target=train_on)
        training.start()
        run.sync(watch=True)
        training.join()
        check_numbering(server.run)
        assert server.run.values("train/loss") == run.losses
        assert server.run.values("evaluation/valid/L128/perplexity") == [(STEPS, 7.4)]
        assert server.run.exit_codes[-1] == 0

    def test_is_not_over_while_its_last_evaluation_is_due(self, run: Run) -> None:
        run.life(1, STEPS)
        run.add("event", event="stop", step=STEPS, message="stopped as asked")
        points = Points(run.path)
        points.read()
        assert not points.are_all(STEPS)
        run.add("evaluation", step=STEPS, **EVALUATION)
        points.read()
        assert points.are_all(STEPS)


class TestOnline:
    def test_online_and_offline_lives_are_one_run(
        self, run: Run, server: WandbServer, user: pytest.MonkeyPatch
    ) -> None:
        run.life(1, 4)  # offline
        live(run, 3, 9, "online")
        live(run, 8, 12, "offline")
        run.life(11, 14)
        live(run, 13, STEPS, "online")
        check_numbering(server.run)
        assert server.run.values("train/loss") == run.losses
        assert server.run.exit_codes == [1, 0]
        before = len(server.run.lines)
        run.sync()
        assert len(server.run.lines) == before

    def test_one_sends_at_a_time(
        self, run: Run, server: WandbServer, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = run.in_mode("online")
        tracker = open_tracker(config, {}, 0, enabled=True)
        tracker.log("train", train(1))
        with pytest.raises(ConfigError, match="training is in use: process"):
            run.sync()
        tracker.finish()
        run.sync()
        assert capsys.readouterr().out.count("W&B: http://127.0.0.1") == 1
        with sync.sole_uploader(run.folder, is_training=False):
            tracker = open_tracker(config, {}, 0, enabled=True)
            tracker.finish()
        assert "sync is in use: process" in capsys.readouterr().out

    def test_a_dead_life_does_not_keep_the_next_from_sending(
        self, run: Run, server: WandbServer
    ) -> None:
        lock = run.folder / "wandb" / "training" / LOCK_FILE
        lock.parent.mkdir(parents=True)
        lock.write_text('{"token": "x", "host": "elsewhere", "pid": 1}')
        live(run, 1, STEPS, "online")
        assert server.run.values("train/loss") == run.losses

    def test_a_failure_is_said_and_training_goes_on(
        self,
        run: Run,
        server: WandbServer,
        user: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        user.setattr(wandb_run, "FINISH_TIMEOUT_SECONDS", 1)
        server.fault = lambda path: 500 if path.endswith("file_stream") else None
        live(run, 1, STEPS, "online")
        said = capsys.readouterr().out
        assert f"`python -m launch sync {run.folder}` brings metrics.jsonl there" in said
        server.fault = lambda path: None
        run.sync()
        assert server.run.values("train/loss") == run.losses


def live(run: Run, first: int, last: int, mode: str) -> None:
    """A life of the run with the real tracker."""
    tracker = open_tracker(run.in_mode(mode), {}, first - 1, enabled=True)
    for step in range(first, last + 1):
        tracker.log("train", train(step))
    tracker.finish()


class TestCommand:
    def test_no_key(self, run: Run, user: pytest.MonkeyPatch) -> None:
        user.delenv("WANDB_API_KEY")
        run.life(1, 3)
        done = launch_sync(run.folder)
        assert done.returncode == 2
        assert done.stderr == (
            "error: W&B has no API key here; run `wandb login`, or set WANDB_API_KEY\n"
        )
        assert done.stdout == ""

    def test_the_key_stays_secret(self, run: Run, server: WandbServer) -> None:
        run.life(1, STEPS)
        done = launch_sync(run.folder)
        assert done.returncode == 0
        assert done.stderr == ""
        assert server.run.values("train/loss") == run.losses
        texts = [done.stdout, *(p.read_text() for p in run.folder.rglob("*") if p.is_file())]
        assert not any(KEY in text for text in texts)
        assert not list(run.folder.glob("wandb/*run*"))

    def test_run_that_has_not_started(self, run: Run) -> None:
        with pytest.raises(ConfigError, match=r"metrics\.jsonl: nothing there yet"):
            run.sync()

    def test_file_that_was_replaced(self, run: Run, server: WandbServer) -> None:
        run.life(1, 5)
        run.sync()
        run.path.unlink()
        run.life(1, 3)
        with pytest.raises(WandbError, match=r"W&B has 5 points .* only 3.* delete wandb_run_id"):
            run.sync()
        assert len(server.run.lines) == 5

    def test_watch_whose_client_dies_and_that_is_interrupted(
        self, run: Run, server: WandbServer
    ) -> None:
        run.life(1, 3)
        command = [sys.executable, "-m", "launch", "sync", run.folder, "--watch", "--every", "1"]
        watching = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        wait_until(lambda: num_losses(server) == 3)
        os.kill(process_of_the_client(watching.pid), signal.SIGKILL)
        run.life(3, 6)
        wait_until(lambda: num_losses(server) == 6)
        watching.send_signal(signal.SIGINT)
        _, said = watching.communicate(timeout=20)
        assert watching.returncode == 130
        assert "Traceback" not in said
        check_numbering(server.run)
        assert server.run.values("train/loss") == run.losses[:6]
        assert server.run.exit_codes == [1]
        assert server.run.preempting

    def test_launcher_needs_neither_torch_nor_wandb(self) -> None:
        script = (
            "import sys, launch.__main__, distributed_lm.tracking.sync\n"
            "print([name for name in ('torch', 'wandb') if name in sys.modules])"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert done.stdout == "[]\n"


def launch_sync(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch", "sync", folder]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


class TestPoints:
    def test_half_a_line_is_read_when_it_is_whole(self, run: Run) -> None:
        run.life(1, 2)
        points = Points(run.path)
        line = wandb_line("train", train(3))
        with run.path.open("a") as file:
            for part in (line[:10], line[10:]):
                file.write(part)
                file.flush()
                points.read()
        assert points.total == 3
        assert [number for number, _ in points.take()] == [0, 1, 2]

    def test_a_page_on_its_way_is_waited_for(self, run: Run) -> None:
        run.life(1, 5)
        whole = run.path.read_bytes()
        run.path.write_bytes(whole[:100] + b"\0" * 100 + whole[200:])
        points = Points(run.path)
        points.read()
        assert points.total < 2
        run.path.write_bytes(whole)
        points.read()
        assert points.total == 5

    def test_a_page_lost_with_its_node_is_not(self, run: Run) -> None:
        run.life(1, 5)
        whole = run.path.read_bytes()
        run.path.write_bytes(whole[:100] + b"\0" * 100 + whole[200:])
        run.life(4, 8)
        points = Points(run.path)
        points.read()
        assert points.last_step == 8


class TestReport:
    def media(self, folder: Path) -> dict[str, Path]:
        page, picture = folder / "claims.html", folder / "curve.png"
        page.write_text("<p>a claim</p>")
        picture.write_bytes(PNG)
        return {"tables/claims": page, "plots/curve": picture}

    def send(self, folder: Path, wandb_mode: str) -> list[str]:
        said: list[str] = []
        config = load_config("configs/runs/smoke.yaml", [f"tracking.wandb={wandb_mode}"])
        send_report(config, folder, self.media(folder), said.append)
        return said

    def test_pages_and_pictures_arrive(self, tmp_path: Path, server: WandbServer) -> None:
        assert self.send(tmp_path, "online")[-1].startswith("W&B: http")
        kinds = {name: content for name, content in server.uploads.items() if "media" in name}
        assert sorted(Path(name).suffix for name in kinds) == [".html", ".png"]
        assert PNG in kinds.values()
        assert any(b"a claim" in content for content in kinds.values())
        assert {"tables/claims", "plots/curve"} <= set(server.run.history[-1])
        assert server.run.exit_codes == [0]

    def test_again_is_the_same_wandb_run(self, tmp_path: Path, server: WandbServer) -> None:
        self.send(tmp_path, "online")
        wandb.teardown()
        self.send(tmp_path, "online")
        assert len(server.runs) == 1

    def test_trouble_is_said_and_no_more(
        self, tmp_path: Path, server: WandbServer, impatient: None
    ) -> None:
        server.fault = lambda path: 403
        [said] = self.send(tmp_path, "online")
        assert said.startswith("W&B: the report was not sent: ")
        assert self.send(tmp_path, "disabled") == []
