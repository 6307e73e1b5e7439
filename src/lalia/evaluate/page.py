"""The frame of the report, styled by ``report.css``. No script, no external file, no font to load."""

from __future__ import annotations

import html
from importlib import resources


def page(title: str, body: str) -> str:
    """A whole HTML document; ``body`` is HTML, ``title`` is text."""
    style = resources.files(__package__ or "lalia.evaluate").joinpath("report.css").read_text(encoding="utf-8")
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{html.escape(title)}</title>\n'
        f"<style>{style}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )
