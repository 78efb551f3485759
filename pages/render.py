"""Render HTML pages that are one file each and need no network. `page.html.jinja` is the frame that they share."""

from pathlib import Path
from typing import Any

import jinja2


def render_page(template: Path, title: str, **context: Any) -> str:
    """Return the page that a template makes of `context`. Raises `UndefinedError` if a name in it is not given."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template.name).render(title=title, **context)
