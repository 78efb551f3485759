"""Text that is safe on a terminal: what models and data sets say must not move its cursor or colour what follows."""


def visible(text: str) -> str:
    """Return `text` with every character escaped that is not printable, line breaks aside."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def plural(count: int, noun: str) -> str:
    """Return `1 row` or `1,200 rows`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
