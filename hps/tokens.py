"""What a model's tokenizer makes of texts, according to its own `tokenizer.json`.

Releases of transformers differ in how they rebuild a tokenizer from its configuration: one of them loses every space of
a DeepSeek tokenizer. Read by the library that wrote it, the file gives the same ids everywhere. `hps.chat` compares
what transformers loads with it. A claim has the hash of its ids (`hps.chat.model_tokens`), so stages in different
environments can tell whether they use the same tokenizer.
"""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from hps.errors import InputError

FILE = "tokenizer.json"
# Each begins with a letter: many tokenizers drop or add a space in front of a text.
TEXTS = (
    "The quick brown fox,  two  spaces.\n\nA new paragraph;\ttab.   Three.",
    "def f(x):\n    if x:\n        return x ** 2  # {'a': [1, 2]}\n",
    "It costs 0 12 345 6789 1234567890 3,141.59 and 7e-3.",
    "In other scripts: 百合花对猫都有毒。 ゆり 나리 ไทย русский עברית",
    "Straße, naïve, a\u0301 and \u00e1, ﬁ, …",
    "Emoji 🙂 and 👩‍👩‍👧.",
    "A line\r\nwith <tags> & |bars| [INST] <think>\nno\n</think>\n\nyes",
)


def own_tokenizer(path: str, revision: str | None = None) -> Any:
    """The `tokenizers.Tokenizer` of a folder's or hub model's `tokenizer.json`; None when there is no such file.

    Raises:
        InputError: the file is damaged.
    """
    file = Path(path) / FILE if Path(path).is_dir() else _fetched(path, revision)
    if file is None or not file.exists():
        return None
    return _read(str(file), file.stat().st_mtime_ns)


@lru_cache(maxsize=8)
def _read(file: str, _: int) -> Any:
    from tokenizers import Tokenizer

    try:
        own = Tokenizer.from_file(file)
    except Exception as error:  # the library raises no narrower class
        problem = f"no readable tokenizer ({error})"
        raise InputError(problem, where=file, remedy="take the file from the model again") from None
    own.no_padding()
    own.no_truncation()
    return own


def _fetched(path: str, revision: str | None) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(path, FILE, revision=revision))
    except (OSError, HfHubHTTPError, HFValidationError):  # loading the tokenizer reports what is wrong
        return None


def encoder(own: Any) -> Callable[[str], list[int]]:
    """Text to ids by `own_tokenizer`, without a BOS."""
    return lambda text: own.encode(text, add_special_tokens=False).ids


def probe_texts(own: Any) -> list[str]:
    """TEXTS, and a text with every added token of the tokenizer."""
    added = sorted(token.content for token in own.get_added_tokens_decoder().values())
    return [*TEXTS, "a" + "".join(f"{token} a{token}a" for token in added)]
