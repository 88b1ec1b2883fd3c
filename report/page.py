"""What every page has in common: one self-contained file, no network, and texts of models that stay text.

Everything that is not written here reaches a page in one of two ways: through Jinja2, which escapes it, or as JSON in a
data block, from which the page's script takes it with `textContent`. A Content-Security-Policy in the page allows its
own script and style by their hashes and nothing else, so that markup in an answer could do nothing even if it came
through.
"""

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from hps.records import write_atomic

HERE = Path(__file__).parent


def script_json(value: Any) -> Markup:
    """JSON that cannot end the data block it stands in: `<`, `>`, `&` and the line separators of Unicode as escapes."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _source(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


def render(template: str, title: str, data: Any, **context) -> str:
    """A page from `templates/<template>.html`, with `data`, `static/page.css`, `common.js` and `<template>.js` inside.

    Args:
        data: for the script, JSON-able; the script finds it in the element `data`.
        context: for the template.
    """
    style = (HERE / "static" / "page.css").read_text(encoding="utf-8")
    script = "\n".join((HERE / "static" / f"{name}.js").read_text(encoding="utf-8") for name in ("common", template))
    policy = f"default-src 'none'; img-src data:; style-src {_source(style)}; script-src {_source(script)}"
    environment = Environment(
        loader=FileSystemLoader(HERE / "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["figure"] = figure
    return environment.get_template(f"{template}.html").render(
        title=title,
        policy=Markup(policy),
        style=Markup(style),
        script=Markup(script),
        data=script_json(data),
        **context,
    )


def figure(value: float | None, digits: int = 3) -> str:
    """A number for a table; a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def write_page(path: Path, text: str) -> None:
    """Write a page and say where it is."""
    write_atomic(path, text)
    print(f"report: {path}")
