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


def write_report(content: Content, runs: RunSet, folder: Path) -> dict[str, Path]:
    """Write ``report.html``, ``report.md`` and ``plots/`` into ``folder``, and each table as a page
    of its own.

    Returns:
        Pictures and pages by name, for W&B.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = draw_figures(runs, folder)
    (folder / "report.md").write_text(_markdown(content, figures), encoding="utf-8")
    (folder / "report.html").write_text(_html(content, figures, folder), encoding="utf-8")
    media = {f"plots/{figure.name}": figure.path(folder, "png") for figure in figures}
    tables = [*([content.claims] if content.claims else []), *content.tables]
    for table in tables:
        path = folder / "tables" / f"{table.name}.html"
        path.parent.mkdir(exist_ok=True)
        path.write_text(_html_template("table.html.jinja").render(table=table), encoding="utf-8")
        media[f"tables/{table.name}"] = path
    return {**media, "report": folder / "report.html"}


def _markdown(content: Content, figures: Sequence[Figure]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters["cell"] = lambda text: text.replace("|", "\\|").replace("\n", " ")
    page: str = environment.get_template("report.md.jinja").render(content=content, figures=figures)
    return page


def _html(content: Content, figures: Sequence[Figure], folder: Path) -> str:
    pictures = [
        (figure, base64.b64encode(figure.path(folder, "svg").read_bytes()).decode())
        for figure in figures
    ]
    page: str = _html_template("report.html.jinja").render(content=content, pictures=pictures)
    return page


def _html_template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), trim_blocks=True, lstrip_blocks=True,
        autoescape=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    return environment.get_template(name)
