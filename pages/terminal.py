"""Text for a terminal: what models and data sets say must not move its cursor, or color what follows."""


def visible(text: str) -> str:
    """`text` with its line breaks as they are and what else has no shape, or moves a terminal's cursor, escaped."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def plural(count: int, noun: str) -> str:
    """Return `1 row` or `1,200 rows`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
