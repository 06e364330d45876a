"""Graphs of stages, as far as files tell: their mistakes, what is left out, and what is waited for.

What Slurm makes of them is in tests/slurm/test_stages.py.
"""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import submit
from launch.__main__ import main
from launch.array import array_graph
from launch.cluster import Cluster, load_cluster
from launch.graph import Graph, load_graph
from launch.health import code_hash
from launch.script import Wishes, render
from launch.stages import PlannedStage, plan_stages
from launch.submit import write_files
from launch.supervisor.job import Job
from launch.supervisor.journal import CANCELLED, Journal
from launch.supervisor.predecessors import come_back_after, find_unfinished
from launch.task import job_id

ROOT = Path(__file__).parents[2]
SMOKE = str(ROOT / "configs/runs/smoke.yaml")
TRAIN = {"config": SMOKE}
CPU = Cluster.model_validate({"devices_per_node": 1, "device": "cpu"})
NO_SLURM = ("PATH", "")


def one_stage(*tasks: dict[str, Any], **fields: Any) -> dict[str, Any]:
    stage = {"name": "first", "tasks": list(tasks)}
    return {"name": "demo", "folder": "/runs/demo", "stages": [stage], **fields}


class TestMistakes:
    @pytest.mark.parametrize(
        ("graph", "said"),
        [
            ([], "expected 'name:', 'folder:' and 'stages:', found '[]'"),
            (one_stage(TRAIN, stage=[]), "stage: no such field; launch/graph.py explains them all"),
            (one_stage({**TRAIN, "a\nb": 1}), r"'stages.0.tasks.0.a\nb': no such field"),
            (one_stage(), "stages.0.tasks: empty; it needs at least one"),
            ({"name": "demo", "stages": []}, "folder: missing; add it"),
            (one_stage(TRAIN, name="a b"), "name='a b': expected a plain name of letters, digits"),
            (one_stage({"command": ["report"], "part": "../x"}), "part='../x': expected a plain n"),
            (one_stage({"command": ["../x"]}), "expected a command of distributed-lm first"),
            (one_stage({}), "stage first: task 0: config: missing; training needs one"),
            (one_stage(TRAIN, {"command": ["report"]}), "tasks with a config and without one need"),
            (one_stage({**TRAIN, "part": "x"}), "part=x: the training of a run is no part of it"),
            (one_stage({**TRAIN, "command": ["train", "--x"]}), "train takes no arguments here"),
            (one_stage({"command": ["report"], "overrides": ["seed=2"]}), "there is no config to"),
            (one_stage({"command": ["report"], "part": CANCELLED}), "choose another"),
        ],
    )
    def test_is_one_sentence(
        self, graph: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert said in self.refusal(graph, tmp_path, capsys)

    def test_order_of_stages(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        graph = one_stage(TRAIN)
        graph["stages"][0]["after"] = ["last"]
        assert "first: after: 'last' is no stage before this one; there are: none" in self.refusal(
            graph, tmp_path, capsys
        )
        graph = one_stage(TRAIN)
        graph["stages"] *= 2
        assert "another stage has this name" in self.refusal(graph, tmp_path, capsys)

    def test_two_tasks_in_one_folder(
        self, demo_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = {**TRAIN, "overrides": [f"data.path={demo_data}", f"output_dir={tmp_path}/runs"]}
        said = self.refusal(one_stage(run, run), tmp_path, capsys)
        assert said == (
            f"error: stage first: two tasks are {tmp_path}/runs/smoke; give each its own name\n"
        )
        evaluation = {**run, "command": ["evaluate"]}
        said = self.refusal(one_stage(evaluation, evaluation), tmp_path, capsys)
        assert said.endswith(
            "part evaluate of " + f"{tmp_path}/runs/smoke; give each its own part\n"
        )
        assert not (tmp_path / "runs").exists()

    @staticmethod
    def refusal(graph: Any, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
        path = folder / "stages.yaml"
        path.write_text(yaml.safe_dump(graph))
        cluster = str(ROOT / "configs/clusters/local_test.yaml")
        with pytest.raises(SystemExit) as caught:
            main(["stages", str(path), "--cluster", cluster])
        said = capsys.readouterr()
        assert (caught.value.code, said.out) == (2, "")
        assert said.err.startswith("error: ")
        assert said.err.count("\n") == 1
        return said.err


class Study:
    """tune -> choose -> train -> evaluate -> report, with what has happened written by hand."""

    def __init__(self, data: Path, folder: Path) -> None:
        self.data = data
        self.folder = folder
        self.learning_rate = "1e-3"
        self.now = 1000.0

    def run(self, name: str, *overrides: str, **task: Any) -> dict[str, Any]:
        fixed = [f"name={name}", f"data.path={self.data}", f"output_dir={self.folder}"]
        return {**TRAIN, "overrides": [*fixed, *overrides], **task}

    def plan(self) -> dict[str, PlannedStage]:
        rate = f"optimizer.learning_rate={self.learning_rate}"
        evaluate = ["evaluate", "--lengths", "64"]
        arms = ("a", "b")
        stages = [
            ("tune", [], [self.run("proxy")]),
            ("choose", ["tune"], [{"command": ["ledger", "x", "y"], "part": "choose"}]),
            ("train", ["choose"], [self.run(name, rate) for name in arms]),
            ("evaluate", ["train"], [self.run(name, command=evaluate) for name in arms]),
            ("report", ["evaluate"], [{"command": ["report"]}]),
        ]  # fmt: skip
        listed = [{"name": n, "after": after, "tasks": tasks} for n, after, tasks in stages]
        graph = {"name": "study", "folder": f"{self.folder}/study", "stages": listed}
        planned = plan_stages(Graph.model_validate(graph), CPU, Wishes())
        return {one.stage.name: one for one in planned}

    def todo(self) -> list[str]:
        """Stages with something left to do, each with how many tasks."""
        return [f"{name} {len(stage.todo)}" for name, stage in self.plan().items() if stage.todo]

    def finish(self, *names: str) -> None:
        """As if these stages had been submitted and come to their ends."""
        for name in names:
            for task in self.plan()[name].todo:
                write_files(task.job, task.config if task.has_new_config else None)
                self.now += 1
                journal = Journal(task.job.slurm_dir, job="7", restart=0)
                journal.record("finished", time=self.now)


@pytest.fixture
def study(demo_data: Path, tmp_path: Path) -> Study:
    return Study(demo_data, tmp_path)


ALL = ["tune 1", "choose 1", "train 2", "evaluate 2", "report 1"]
STAGES = tuple(one.split()[0] for one in ALL)


class TestWhatIsLeftOut:
    def test_everything_that_is_finished(self, study: Study) -> None:
        assert study.todo() == ALL
        study.finish("tune")
        assert study.todo() == ALL[1:]
        study.finish("choose")
        study.finish(*STAGES[1:])
        assert study.todo() == []

    def test_new_config_of_a_run_is_trained_and_all_that_is_made_of_it(self, study: Study) -> None:
        study.finish(*STAGES)
        study.learning_rate = "2e-3"
        # The command before it may be what fills something into the config.
        assert study.todo() == ALL[1:]

    def test_config_that_a_stage_has_changed_is_neither_new_nor_overwritten(
        self, study: Study
    ) -> None:
        for task in study.plan()["train"].todo:
            write_files(task.job, task.config)
        path = study.folder / "a/slurm/config.yaml"
        path.write_text(path.read_text().replace("learning_rate: 0.001", "learning_rate: 0.005"))
        assert "0.005" in path.read_text()
        study.finish(*STAGES)
        assert study.todo() == []
        assert "0.005" in path.read_text()

    def test_what_is_older_than_what_it_is_made_of_is_done_again(self, study: Study) -> None:
        study.finish(*STAGES)
        Journal(study.folder / "b/slurm", job="8", restart=0).record("finished", time=2000.0)
        plan = study.plan()
        assert [task.job.run_dir for task in plan["evaluate"].todo] == [f"{study.folder}/b"]
        assert study.todo() == ["evaluate 1", "report 1"]

    def test_other_arguments(self, study: Study) -> None:
        study.finish(*STAGES)
        path = study.folder / "a/slurm/evaluate/job.json"
        job = json.loads(path.read_text())
        job["arguments"][-1] = "128"
        path.write_text(json.dumps(job))
        assert study.todo() == ["evaluate 1", "report 1"]


class TestJobs:
    def test_waits_for_its_own_run_or_else_for_all(self, study: Study) -> None:
        plan = study.plan()
        after = {name: [task.job.after for task in stage.todo] for name, stage in plan.items()}
        runs = str(study.folder)
        assert after == {
            "tune": [()],
            "choose": [(f"{runs}/proxy/slurm",)],
            "train": [(f"{runs}/study/slurm/choose",)] * 2,
            "evaluate": [(f"{runs}/a/slurm",), (f"{runs}/b/slurm",)],
            "report": [(f"{runs}/a/slurm/evaluate", f"{runs}/b/slurm/evaluate")],
        }

    def test_command_is_one_process_without_devices(self, tmp_path: Path) -> None:
        graph = Graph.model_validate(one_stage({"command": ["report", "x"]}, folder=str(tmp_path)))
        cluster = load_cluster(str(ROOT / "configs/clusters/h100_8x16.yaml"))
        [stage] = plan_stages(graph, cluster, Wishes(nodes=16, spare_nodes=1))
        [task] = stage.todo
        script = render("x", stage.cluster, stage.wishes, task.job).splitlines()
        assert {"#SBATCH --nodes=1", "#SBATCH --ntasks-per-node=1"} <= set(script)
        assert not [line for line in script if "gpus" in line or "exclusive" in line]
        assert (task.job.arguments, task.job.part) == (["report", "x"], "report")
        assert task.job.devices_per_node == 0
        # What it does goes unseen until it ends.
        assert not task.job.tells_end
        assert Job.read(task.job.write()) == task.job

    def test_array_is_made_of_stages(self, demo_data: Path, tmp_path: Path) -> None:
        fields = [f"data.path={demo_data}", f"output_dir={tmp_path}"]
        graph = array_graph([Path(SMOKE)], fields, [64, 128], reports=True)
        (tmp_path / "stages.json").write_text(graph.model_dump_json())
        assert load_graph(tmp_path / "stages.json") == graph
        plan = plan_stages(graph, CPU, Wishes(alert_command="tell"))
        jobs = [task.job for stage in plan for task in stage.todo]
        run = f"{tmp_path}/smoke"
        assert [job.arguments for job in jobs] == [
            ["train", f"{run}/slurm/config.yaml"],
            ["evaluate", run, "--lengths", "64"],
            ["evaluate", run, "--lengths", "128"],
            ["report", run, "--output", graph.folder],
        ]
        assert [len(job.after) for job in jobs] == [0, 1, 1, 2]
        assert {job.alert_command for job in jobs} == {"tell"}

    def test_of_an_arrays_task_is_named_apart(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SLURM_JOB_ID", "13")
        monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
        assert job_id() == "13"
        monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "13")
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
        assert job_id() == "13_2"


class TestPredecessors:
    """Where nobody can be asked what is in the queue: the journal alone tells."""

    @pytest.fixture(autouse=True)
    def _no_slurm(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(*NO_SLURM)
        monkeypatch.setattr("launch.supervisor.predecessors.LATE_SECONDS", 0.0)

    @pytest.fixture
    def journal(self, tmp_path: Path) -> Callable[..., Journal]:
        def journal(job: str = "7") -> Journal:
            return Journal(tmp_path / "slurm", job=job, restart=0)

        return journal

    def test_finished_since_its_launch(self, tmp_path: Path, journal: Any) -> None:
        folders = [str(tmp_path / "slurm")]
        journal().record("finished")
        assert find_unfinished(folders) is None
        journal().record("launch")
        assert find_unfinished(folders) is not None

    def test_goes_on_in_the_job_that_was_named(self, tmp_path: Path, journal: Any) -> None:
        folders = [str(tmp_path / "slurm")]
        journal().record("leave", "requeued job 7", goes_on=True)
        found = find_unfinished(folders)
        assert found is not None
        assert found.jobs == ("7",)
        journal().record("leave", "submitted job 9", goes_on=True, jobs=["9"])
        found = find_unfinished(folders)
        assert found is not None
        assert (found.jobs, found.message) == (("9",), f"{tmp_path} goes on in job 9")

    @pytest.mark.parametrize(
        ("event", "message"),
        [("mistake", "rank 0:\nno such file"), ("loop", "4 failures"), ("leave", "no sbatch")],
    )
    def test_ended(self, event: str, message: str, tmp_path: Path, journal: Any) -> None:
        journal().record("life")
        journal().record(event, message)
        found = find_unfinished([str(tmp_path / "slurm")])
        assert found is not None
        assert found.jobs == ()
        first = message.splitlines()[0]
        assert f"{tmp_path} ended without being finished ({event}: {first})" in found.message

    def test_cancelled(self, tmp_path: Path, journal: Any) -> None:
        journal().record("leave", "requeued job 7", goes_on=True)
        (tmp_path / "slurm" / CANCELLED).touch()
        found = find_unfinished([str(tmp_path / "slurm")])
        assert found is not None
        assert "(it was cancelled)" in found.message

    def test_where_nodes_cannot_submit_the_user_is_told_what_to_type(self, study: Study) -> None:
        [task] = study.plan()["tune"].todo
        way = come_back_after(task.job, ["9", "11_2"])
        assert not way.works
        script = study.folder / "proxy/slurm/run.sbatch"
        assert way.message.endswith(f"login node: sbatch --dependency=afterany:9:11_2 {script}")


def test_example_in_the_docs(tmp_path: Path) -> None:
    text = (ROOT / "docs/slurm.md").read_text(encoding="utf-8")
    path = tmp_path / "stages.yaml"
    path.write_text(text.partition("```yaml")[2].partition("```")[0])
    assert [stage.name for stage in load_graph(path).stages] == ["tune", "compare", "evaluate"]


def test_two_who_submit_at_once_share_the_code(tmp_path: Path) -> None:
    folder = tmp_path / "code" / "abc"
    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(submit._copy_code, folder) for _ in range(8)]:
            done.result()
    assert code_hash(folder) == code_hash(ROOT)
    assert [path.name for path in folder.parent.iterdir()] == ["abc"]
