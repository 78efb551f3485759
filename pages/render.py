"""Render HTML pages that are one file each and need no network. `page.html.jinja` is the frame that they share."""

from pathlib import Path
from typing import Any

import jinja2


def render_page(template: Path, title: str, **context: Any) -> str:
    """Return the page that a template makes of `context`. Raises `UndefinedError` if a name in it is not given."""
    return _render(template, True, title=title, **context)


def render_text(template: Path, **context: Any) -> str:
    """Return the text, which is no HTML, that a template makes of `context`, as `render_page` does."""
    return _render(template, False, **context)


def _render(template: Path, is_html: bool, **context: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=is_html,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=not is_html,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template.name).render(**context)
