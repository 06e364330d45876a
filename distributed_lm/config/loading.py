"""From YAML files and ``section.field=value`` overrides to a checked config."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pydantic
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distributed_lm.config.checks import check_config
from distributed_lm.config.run import RunConfig
from distributed_lm.errors import ConfigError

# Overrides that build the model unsplit: evaluation is not bound to the layout of training.
WHOLE_MODEL_LAYOUT = (
    "parallel.tensor=1",
    "parallel.pipeline=1",
    "parallel.virtual_pipeline=1",
    "parallel.sequence=false",
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read one run's config.

    Args:
        path: YAML file, or a run folder that holds ``config.yaml``.
        overrides: ``section.field=value`` strings, in YAML syntax after the ``=``.

    Raises:
        ConfigError: naming the field or file, what was found, and what to do.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "config.yaml"
    merged = OmegaConf.merge(_read_with_parents(path, ()), _parse_overrides(overrides))
    try:
        values = OmegaConf.to_container(merged, resolve=False)
        _refuse_interpolation(values, path)
        config = RunConfig.model_validate(values)
    except pydantic.ValidationError as error:
        raise ConfigError(f"{path}: {_first_problem(error)}") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {_one_line(error)}") from None
    check_config(config)
    return config


def load_run_config(run: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of a run folder, with the model unsplit and the folder where it is now.

    Raises:
        ConfigError: if ``run`` is no run folder, or as ``load_config``.
    """
    if not (run / "config.yaml").is_file():
        raise ConfigError(
            f"{run}: not a run folder (it has no config.yaml); give the folder that train wrote, "
            "as in runs/smoke"
        )
    config = load_config(run, [*WHOLE_MODEL_LAYOUT, *overrides])
    # The folder may have been moved since the config was written into it.
    place = run.resolve()
    return config.model_copy(update={"output_dir": str(place.parent), "name": place.name})


def parse_lengths(text: str, option: str) -> tuple[int, ...]:
    """``"1024,2048"`` as numbers; empty text is no lengths.

    Args:
        option: of the command line, for the message.

    Raises:
        ConfigError: on anything but positive whole numbers with commas between them.
    """
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(
            f"{option}={text}: expected whole numbers of tokens with commas between them, "
            f"as in {option} 1024,2048"
        )
    return tuple(int(part) for part in parts)


def _read_with_parents(path: Path, children: tuple[Path, ...]) -> Any:
    """A YAML file over the files it ``extends`` (paths relative to it), the first at the bottom."""
    if path.resolve() in children:
        raise ConfigError(f"{path}: extends itself; remove one of the files from 'extends'")
    try:
        values = OmegaConf.create(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such config file; configs/runs/ has some to start from"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {_one_line(error)}") from None
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: not valid YAML: {_one_line(error)}") from None
    if not OmegaConf.is_dict(values):
        raise ConfigError(f"{path}: expected 'key: value' lines, found a list")
    parents = values.pop("extends", [])
    parents = [parents] if isinstance(parents, str | int) else parents
    if parents is None or not all(isinstance(parent, str) for parent in parents):
        raise ConfigError(f"{path}: extends={parents}: expected a file name or a list of them")
    chain = (*children, path.resolve())
    layers = [_read_with_parents(path.parent / parent, chain) for parent in parents]
    return OmegaConf.merge(*layers, values)


def _refuse_interpolation(values: Any, path: Path, field: str = "") -> None:
    """OmegaConf could fill ``${oc.env:NAME}`` in, and a secret would end up in the run folder."""
    if isinstance(values, dict | list):
        items = values.items() if isinstance(values, dict) else enumerate(values)
        for key, value in items:
            _refuse_interpolation(value, path, f"{field}.{key}" if field else str(key))
    elif isinstance(values, str) and "${" in values:
        raise ConfigError(f"{path}: {field}={values}: ${{}} is not filled in; write the value")


def _parse_overrides(overrides: Sequence[str]) -> Any:
    for override in overrides:
        if "=" not in override or override.startswith("="):
            raise ConfigError(
                f"override {override!r}: expected section.field=value, as in train.steps=100"
            )
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"overrides {list(overrides)}: {_one_line(error)}") from None


def _first_problem(error: pydantic.ValidationError) -> str:
    """One pydantic problem as 'field: what was found, what was expected'."""
    problem = error.errors()[0]
    field = _in_quotes(
        ".".join(str(part) for part in problem["loc"] if part not in ("str", "tuple"))
    )
    if problem["type"] == "extra_forbidden":
        return f"{field}: no such field; check the spelling (distributed_lm/config lists them all)"
    if problem["type"] == "missing":
        return f"{field}: missing; add it to the file or as {field}=… on the command line"
    found = _in_quotes(str(problem["input"])[:60])
    message = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{field}={found}: {message}"


def _in_quotes(text: str) -> str:
    """As it is, unless that would break the line or hide something in it."""
    return text if text.isprintable() else repr(text)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
