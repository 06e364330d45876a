"""Writes a report: one self-contained HTML file, one Markdown file, and the pictures. No torch."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

import jinja2

from distributed_lm.study.measures import RunSet
from distributed_lm.study.report.content import Content
from distributed_lm.study.report.figures import Figure, draw_figures

TEMPLATES = Path(__file__).parent


def write_report(content: Content, runs: RunSet, folder: Path) -> list[Figure]:
    """Write ``report.html``, ``report.md`` and ``plots/`` into ``folder``.

    Returns:
        The figures that there was data for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = draw_figures(runs, folder)
    (folder / "report.md").write_text(_markdown(content, figures), encoding="utf-8")
    (folder / "report.html").write_text(_html(content, figures, folder), encoding="utf-8")
    return figures


def _markdown(content: Content, figures: Sequence[Figure]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters["cell"] = lambda text: text.replace("|", "\\|").replace("\n", " ")
    return environment.get_template("report.md.jinja").render(content=content, figures=figures)


def _html(content: Content, figures: Sequence[Figure], folder: Path) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), trim_blocks=True, lstrip_blocks=True,
        autoescape=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    pictures = [
        (figure, base64.b64encode(figure.path(folder, "svg").read_bytes()).decode())
        for figure in figures
    ]
    return environment.get_template("report.html.jinja").render(content=content, pictures=pictures)
