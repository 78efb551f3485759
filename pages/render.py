"""HTML pages that are one file each and need no network: `page.html.jinja` is what they have in common."""

from pathlib import Path
from typing import Any

import jinja2


def render_page(template: str, title: str, **context: Any) -> str:
    """The page that a template of this folder makes of `context`. A name that it does not have is an error."""
    here = Path(__file__).resolve().parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([here, here.parent / "experiment", here.parent / "comparison"]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template).render(title=title, **context)
