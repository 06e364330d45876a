"""The command line answers at once, and every mistake of the user is one sentence."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from distributed_lm import cli
from distributed_lm.errors import ConfigError, TrainingError

SMOKE = Path(__file__).parents[2] / "configs" / "runs" / "smoke.yaml"
COMMANDS = ("prepare-data", "merge-data", "train", "evaluate", "export-hf", "import-hf", "check",
            "demo", "drill", "rehearse")  # fmt: skip
HEAVY = ("torch", "megatron", "deepspeed", "transformers", "datasets", "wandb")


def run_main(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    code = caught.value.code
    return code if isinstance(code, int) else 0


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    script = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print('loaded', [m for m in {HEAVY} if m in sys.modules]))\n"
        "from distributed_lm.cli import main\n"
        "main(['--help'])\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 1.0
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in COMMANDS)
    assert done.stdout.rstrip().endswith("loaded []")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main([command, "--help"]) == 0
    assert "Usage: distributed-lm" in capsys.readouterr().out


def test_bad_layout_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(["train", str(SMOKE), "parallel.tensor=3"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: model.num_attention_heads=4")
    assert error.count("\n") == 1


def test_missing_config_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(["check", "nowhere.yaml"]) == 2
    assert capsys.readouterr().err.startswith("error: nowhere.yaml: no such config file")


def test_unknown_option_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(["train", str(SMOKE), "--epochs", "3"]) == 2
    assert "--epochs" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["64;128", "64,", "-1", "0", "a"])
def test_bad_lengths(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--lengths=.* expected whole numbers of tokens"):
        cli.parse_lengths(text, "--lengths")


def test_lengths() -> None:
    assert cli.parse_lengths("64, 128", "--lengths") == (64, 128)
    assert cli.parse_lengths("", "--lengths") == ()


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (ConfigError("x: wrong"), 2, "error: x: wrong\n"),
        (TrainingError("loss is NaN"), 1, "error: loss is NaN\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=["mistake", "failed run", "ctrl-c"],
)
def test_exit_codes(
    error: BaseException,
    code: int,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(cli, "load_config", fail)
    assert run_main(["train", str(SMOKE)]) == code
    assert capsys.readouterr().err == sentence


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "load_config", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", str(SMOKE)])
