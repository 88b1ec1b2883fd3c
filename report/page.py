"""What all pages have in common: one self-contained file, no network, and models' texts shown as text.

Data reaches a page in two ways: through Jinja2, which escapes it, or as JSON in a data block, which the page's script
reads and sets as `textContent`. The page's Content-Security-Policy allows only its own script and style, by their
hashes. So markup in an answer does nothing, even if it got through.
"""

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError
from markupsafe import Markup

from evaluation.intervals import figure, signed
from evaluation.render import number
from hps.errors import InputError
from pipeline.files import write_atomic

HERE = Path(__file__).parent
LONGEST = 4000  # characters of a text on a page that bounds its size


def script_json(value: Any) -> Markup:
    """JSON that cannot end its data block: `<`, `>`, `&` and Unicode's line separators are escaped."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def fitting(entries: Iterable[dict], most: int, room: int) -> list[dict]:
    """The first entries: at most `most`, and at most `room` bytes as JSON.

    Texts of more than `LONGEST` characters are cut, with a note. The first entry is always included: its texts are cut
    until it fits.
    """
    found: list[dict] = []
    for entry in islice(entries, most):
        longest = LONGEST
        cut = cut_texts(entry, longest)
        while not found and longest > 1 and _bytes(cut) > room:
            longest //= 2
            cut = cut_texts(entry, longest)
        room -= _bytes(cut)
        if found and room < 0:
            break
        found.append(cut)
    return found


def _bytes(value: Any) -> int:
    return len(script_json(value).encode())


def cut_texts(value: Any, longest: int) -> Any:
    """A JSON value whose texts are cut to so many characters, with a note of how many are missing."""
    if isinstance(value, dict):
        return {name: cut_texts(inner, longest) for name, inner in value.items()}
    if isinstance(value, list):
        return [cut_texts(inner, longest) for inner in value]
    if isinstance(value, str) and len(value) > longest:
        return f"{value[:longest]} … [{len(value) - longest:,} more characters are left out of this page]"
    return value


def _source(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


def render(template: str, title: str, data: Any, **context) -> str:
    """A page from `templates/<template>.html`, with `data`, `static/page.css`, `common.js` and its own script inside.

    Its own script is `static/<template>.js`; a page without controls has none.

    Args:
        data: for the script, JSON-able; the script finds it in the element `data`.
        context: for the template.
    """
    style = (HERE / "static" / "page.css").read_text(encoding="utf-8")
    scripts = (HERE / "static" / f"{name}.js" for name in ("common", template))
    script = "\n".join(path.read_text(encoding="utf-8") for path in scripts if path.exists())
    policy = (
        f"default-src 'none'; img-src data:; style-src {_source(style)}; script-src {_source(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    environment = Environment(
        loader=FileSystemLoader(HERE / "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"figure": figure, "signed": signed, "number": number, "counted": counted}
    return environment.get_template(f"{template}.html").render(
        title=title,
        policy=Markup(policy),
        style=Markup(style),
        script=Markup(script),
        data=script_json(data),
        **context,
    )


def counted(count: int, noun: str) -> str:
    """`1 prompt`, `2 prompts`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


@contextmanager
def intact(path: Path, remedy: str) -> Iterator[None]:
    """Turn errors of the code inside, which reads JSON of this file or folder, into an InputError."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, UndefinedError) as error:
        problem = f"this is damaged, or another version wrote it ({type(error).__name__}: {error})"
        raise InputError(problem, where=str(path), remedy=remedy) from None


def write_page(path: Path, text: str) -> None:
    """Write a page and say where it is."""
    write_atomic(path, text)
    print(f"report: {path}")
