"""The reward functions that come with the repository, for `models.reward.function` and `models.evaluator.function`.

`sentiment`   how positive a response is, by VADER's lexicon, in [-1, 1]
`brevity`     minus the number of a response's tokens
`checks`      how well a response follows instructions of the prompt that a program can verify, in [0, 1]

Their arguments are described in pipeline/functions.py. docs/operations.md shows how to write one of your own.
"""

import re
from collections.abc import Callable, Iterator
from functools import cache

Grade = Callable[[str], float]  # a response in, a grade in [0, 1] out


def sentiment(prompts: list, completions: list, **kwargs) -> list[float]:
    """VADER's compound score of each response (Hutto and Gilbert, 2014)."""
    return [_vader().polarity_scores(text)["compound"] for text in _texts(completions)]


@cache
def _vader():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def brevity(prompts: list, completions: list, completion_ids: list, **kwargs) -> list[float]:
    """Minus the number of tokens of each response, the end of its turn among them unless it was cut."""
    return [-float(len(ids)) for ids in completion_ids]


def checks(prompts: list, completions: list, **kwargs) -> list[float]:
    """The mean grade over the verifiable instructions of the last message; an empty response has 0.

    | instruction | grade |
    |---|---|
    | "three sentences", "20 words", "one line" (also "exactly"), for n and k found | 1 - abs(k - n) / n, at least 0 |
    | "at most", "no more than", "up to" n | 1 up to n, then as above |
    | "at least" n | k / n up to n, then 1 |
    | "fewer than 20 words", "two or three lines", "1,500 words", "twenty-one words" | not read |
    | "no letter e", "without the letter e" | share of the words without it |
    | "in capital letters", "in lower case" ("no capital letters") | share of the letters that are |
    | "no commas", "without commas" | 1 / (1 + commas) |
    | "begin with the word X", "start with the word X" | 1 or 0 |
    | "end with a question mark" ("an exclamation mark", "a full stop", "a period") | 1 or 0 |

    Raises:
        ValueError: the last message has no such instruction.
    """
    scores = []
    for messages, text in zip(prompts, _texts(completions), strict=True):
        grades = list(_instructions(messages[-1]["content"].lower()))
        if not grades:
            raise ValueError("the last message has no instruction that `checks` can verify")
        scores.append(sum(grade(text) for grade in grades) / len(grades) if text.strip() else 0.0)
    return scores


def _texts(completions: list) -> list[str]:
    return [messages[-1]["content"] for messages in completions]


NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
MOST, LEAST = r"at most|no more than|up to", r"at least"
# Not a count: a part of a longer number ("1,500", "twenty-one") or of a range, and a bound that excludes its number.
UNREAD = r"(?<![\w,.–-])(?<!than )(?<!under )(?<!below )(?<!over )(?<!or )(?<!to )(?<!between )"
COUNT = re.compile(rf"(?:\b({MOST}|{LEAST}) |{UNREAD})(\d+|{'|'.join(NUMBERS)})[ -](sentence|word|line)s?\b")
RANGE = re.compile(r"\bbetween \S+ and \S+")
NO_LETTER = re.compile(r"\b(?:no|without|avoid|not use)(?: using)?(?: the)? letter \W?([a-z])\b")
LOWER = re.compile(r"\bin lower[ -]?case|\bno capital letters|\bwithout capital letters")
UPPER = re.compile(r"\bin (?:all )?(?:capital letters|capitals|upper[ -]?case)")
NO_COMMA = re.compile(r"\b(?:no|without|avoid)(?: using)?(?: any)? commas?\b")
BEGIN = re.compile(r"\b(?:begin|start) with the word \W?(\w+)")
END = re.compile(r"\bend with an? (question mark|exclamation mark|full stop|period)")
MARKS = {"question mark": "?", "exclamation mark": "!", "full stop": ".", "period": "."}
SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+")


def _instructions(request: str) -> Iterator[Grade]:
    """A grade for each verifiable instruction of a message in lower case."""
    for bound, number, unit in COUNT.findall(RANGE.sub("", request)):
        wanted = NUMBERS.index(number) + 1 if number in NUMBERS else int(number)
        if wanted:
            yield lambda text, n=wanted, unit=unit, bound=bound: _near(_count(text, unit), n, bound)
    for letter in NO_LETTER.findall(request):
        yield lambda text, letter=letter: _share(letter not in word for word in _words(text))
    if LOWER.search(request):
        yield lambda text: _share(letter.islower() for letter in text if letter.isalpha())
    if UPPER.search(request):
        yield lambda text: _share(letter.isupper() for letter in text if letter.isalpha())
    if NO_COMMA.search(request):
        yield lambda text: 1 / (1 + text.count(","))
    for word in BEGIN.findall(request):
        yield lambda text, word=word: float(_words(text)[:1] == [word])
    for mark in END.findall(request):
        yield lambda text, mark=MARKS[mark]: float(text.rstrip().endswith(mark))


def _near(found: int, wanted: int, bound: str) -> float:
    """1 where a count is what was asked for, falling to 0 with its distance."""
    if bound and (found <= wanted if re.fullmatch(MOST, bound) else found >= wanted):
        return 1.0
    return max(0.0, 1 - abs(found - wanted) / wanted)


def _count(text: str, unit: str) -> int:
    parts = {"sentence": SENTENCE_END.split, "word": str.split, "line": str.splitlines}[unit](text.strip())
    return sum(bool(re.search(r"\w", part)) for part in parts)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+(?:['’]\w+)*", text.lower())


def _share(found: Iterator[bool]) -> float:
    """The share of true ones; 0 of nothing."""
    values = list(found)
    return sum(values) / len(values) if values else 0.0
