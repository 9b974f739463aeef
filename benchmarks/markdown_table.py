"""Markdown tables, in which the benchmarks print their results."""

from collections.abc import Iterable, Sequence


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Formats a table; there is no newline at its end."""
    lines = (header, ["---"] * len(header), *rows)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table and an empty line, which separates it from what follows."""
    print(markdown(header, rows), end="\n\n", flush=True)
