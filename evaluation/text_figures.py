"""Figures of texts: BLEU, distinct n-grams and repetition, in every script. Called by evaluation.metrics."""

from collections.abc import Iterable

import numpy as np
import regex
from sacrebleu.metrics import BLEU
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from sacrebleu.tokenizers.tokenizer_char import TokenizerChar
from sacrebleu.tokenizers.tokenizer_re import TokenizerRegexp
from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh

from evaluation.intervals import bootstrap

REPEATED = 4  # words of a sequence that counts as repeated
# Letters of scripts that put no spaces between words: Unicode's line breaking (UAX #14) asks a dictionary there
# (Thai, Lao, Khmer, Burmese, ...) or breaks anywhere (Chinese, Japanese, Yi). Tibetan has its own mark.
UNSPACED = regex.compile(r"[[\p{lb=SA}\p{lb=ID}\p{lb=CJ}\p{Script=Tibetan}]&&[\p{L}\p{M}]]", regex.V1)
LETTER = regex.compile(r"[\p{L}\p{M}]")
WORDS, CHINESE, CHARACTERS = "13a", "zh", "char"  # sacrebleu's tokenizers


def tokenizer_of(reference: str) -> str:
    """sacrebleu's tokenizer for the script of most letters of a text.

    `zh` splits Chinese characters, `char` everything: Japanese words (`ja-mecab`) would need a dictionary.
    """
    unspaced = UNSPACED.findall(reference)
    if 2 * len(unspaced) <= len(LETTER.findall(reference)):
        return WORDS
    return CHINESE if all(regex.match(r"\p{Script=Han}", letter) for letter in unspaced) else CHARACTERS


class Bleu:
    """BLEU as shares (0 to 1), by sacrebleu; its signatures say how. The reference's script decides the tokenizer."""

    def __init__(self):
        tokenizers = (WORDS, CHINESE, CHARACTERS)
        self._sentence = {name: BLEU(tokenize=name, effective_order=True) for name in tokenizers}
        self._corpus = {name: BLEU(tokenize=name) for name in tokenizers}
        self._plain = BLEU(tokenize="none", smooth_method="none", effective_order=False)

    def sentence(self, answer: str, reference: str) -> float:
        """BLEU of one answer; orders that it is too short for are left out (effective order)."""
        return self._sentence[tokenizer_of(reference)].sentence_score(answer, [reference]).score / 100

    def characters(self, answer: str, reference: str) -> float:
        """The released code's figure: it passes strings to a function of tokens, so its tokens are characters."""
        # As a corpus of one: `sentence_score` would warn at each call about the released code's setting.
        return self._plain.corpus_score([_spelled(answer)], [[_spelled(reference)]]).score / 100

    def counts(self, prompts: Iterable[list[tuple[str, str]]]) -> np.ndarray:
        """The counts that corpus BLEU adds up, (prompts, numbers), from each prompt's pairs of answer and reference."""
        found = []
        for pairs in prompts:
            forget_texts()
            found.append(np.sum([self._counts(*pair) for pair in pairs], axis=0))
        return np.array(found)

    def corpus(self, counts: np.ndarray, samples: int, seed: int) -> dict:
        """Corpus BLEU with a bootstrap interval over the prompts.

        The answers to a prompt are drawn together: they are not independent.
        """
        return bootstrap(counts, samples, seed, lambda drawn: self._score(drawn.sum(axis=0)))

    def _counts(self, answer: str, reference: str) -> list[int]:
        """Of one answer: matches and n-grams of each order, lengths."""
        found = self._corpus[tokenizer_of(reference)].corpus_score([answer], [[reference]])
        return [*found.counts, *found.totals, found.sys_len, found.ref_len]

    def _score(self, counts: np.ndarray) -> float:
        orders = (len(counts) - 2) // 2
        matches, totals = counts[:orders].tolist(), counts[orders : 2 * orders].tolist()
        lengths = {"sys_len": int(counts[-2]), "ref_len": int(counts[-1])}
        corpus = self._corpus[WORDS]
        smoothing = {"smooth_method": corpus.smooth_method, "smooth_value": corpus.smooth_value}
        return BLEU.compute_bleu(matches, totals, **lengths, **smoothing).score / 100

    def signatures(self) -> dict:
        """sacrebleu's signatures of the figures that were computed."""
        metrics = {"sentence": self._sentence[WORDS], "corpus": self._corpus[WORDS], "characters": self._plain}
        for kind, by_tokenizer in (("sentence", self._sentence), ("corpus", self._corpus)):
            metrics |= {f"{kind}, {name}": by_tokenizer[name] for name in (CHINESE, CHARACTERS)}
        return {name: str(metric.get_signature()) for name, metric in metrics.items() if hasattr(metric, "num_refs")}


def forget_texts() -> None:
    """Empty sacrebleu's caches of 65,536 texts; only the current prompt's texts are used again."""
    for tokenizer in (Tokenizer13a, TokenizerRegexp, TokenizerZh, TokenizerChar):
        tokenizer.__call__.cache_clear()


def _spelled(text: str) -> str:
    """Characters as tokens, white space spelled out."""
    return " ".join(f"U+{ord(letter):04X}" if letter.isspace() else letter for letter in text)


def distinct(answers: list[str], size: int) -> float | None:
    """Distinct n-grams of words as a share of all, over the answers to a prompt (Li et al. 2016); None without any."""
    grams = [gram for answer in answers for gram in _grams(answer, size)]
    return len(set(grams)) / len(grams) if grams else None


def repetition(answer: str) -> float:
    """Share of an answer's sequences of four words that it has already used."""
    grams = _grams(answer, REPEATED)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _grams(text: str, size: int) -> list[tuple[str, ...]]:
    """N-grams of the words between white space, in lower case; where a script has no spaces, of characters."""
    words = UNSPACED.sub(r" \g<0> ", text.lower()).split()
    return list(zip(*(words[start:] for start in range(size)), strict=False))
