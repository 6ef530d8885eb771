"""A word-for-word English reading of other languages.

The pretrained encoder knows English, and a model that is asked to think in Spanish must not become invisible. Its words
and short phrases are looked up in glossaries (`banks/glossary`, written for this project). A text is glossed when most
of its words are one language's and fewer of them English. Word order and grammar stay foreign: what counts is that
"primero necesito robar" reads "first i need steal" and no longer as noise. An artifact holds the glossaries it was
trained with.
"""

from __future__ import annotations

import gzip
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from classifiers.letters import plain
from classifiers.normalise import normalise

GLOSSARY = Path(__file__).parent / "banks" / "glossary"
HAN = "\u3400-\u4dbf\u4e00-\u9fff"
COMPOUNDING = frozenset({"de", "nl"})
"""Languages that write compounds as one word."""
_TOKEN = re.compile(rf"[{HAN}]+|[^\W_{HAN}]+(?:'[^\W_{HAN}]+)*|[^\w\s]")
_HAN = re.compile(f"[{HAN}]")
_HAN_RUN = re.compile(f"[{HAN}]+")
_KANA = re.compile("[\u3040-\u30ff]")
_JAPANESE = 0.15
"""Of kana and Chinese characters together: more kana than that are Japanese, fewer a word or a mark in Chinese."""
_UMLAUTS = str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue"})
_PHRASE, _CHARACTERS = 3, 6
"""Most words of an entry, most characters of a Chinese one."""
_SHARE, _ENGLISH = 0.5, 0.8
"""Of a text's words: known to a language for it to be that language; known as English to look no further."""
_PLAINLY = 0.5
"""Of a text's distinct words, punctuation and all, that are English ones: nine of ten English steps end here, and 0.1 %
of the authored ones in other languages."""
_FEWEST = 3
"""Words of a text whose language can be told: "Persona" is a word of many."""
_REMEMBERED = 1024
_STEM, _ENDING = 5, 3
"""An unknown form is read as a known one that shares all but its last three letters, five at least."""


@dataclass(frozen=True)
class Glossary:
    """One language: entries by form, by stem where all forms of the stem mean the same, and words without accents."""

    entries: Mapping[str, str]
    stems: Mapping[str, str]
    bare: Mapping[str, str]
    compounds: bool

    @classmethod
    def of(cls, entries: Mapping[str, str], *, compounds: bool = False) -> Glossary:
        """`entries`: normalised form to English."""
        stems: dict[str, str] = {}
        bare: dict[str, str] = {}
        for form, english in entries.items():
            if " " in form:
                continue
            for cut in range(1, _ENDING + 1):
                if len(form) - cut >= _STEM:
                    stems.setdefault(form[:-cut], english)
            # "é", "si" and "li" without accents are words of every language.
            if not form.isascii() and len(form) > 2:
                bare.setdefault(plain(form), english)
                bare.setdefault(plain(form.translate(_UMLAUTS)), english)
        return cls(entries, stems, bare, compounds)

    def word(self, word: str) -> str | None:
        """A word's English; None when it is unknown."""
        # l'utilisateur, dell'utente: the article may go.
        rest = word.partition("'")[2]
        found = self.entries.get(word) or self._stemmed(word) or self.entries.get(rest) or self._stemmed(rest)
        return found or self.bare.get(word) or (self._compound(word) if self.compounds else None)

    def _stemmed(self, word: str) -> str | None:
        for cut in range(_ENDING + 1):
            if len(word) - cut < _STEM:
                return None
            found = self.stems.get(word[: len(word) - cut])
            if found:
                return found
        return None

    def _compound(self, word: str) -> str | None:
        """The longest known first part whose rest is known too, with or without a linking s."""
        for cut in range(len(word) - 3, 2, -1):
            first, rest = self.entries.get(word[:cut]), word[cut:]
            if first:
                second = self.entries.get(rest) or (self.entries.get(rest[1:]) if rest.startswith("s") else None)
                if second:
                    return f"{first} {second}"
        return None


class Glossaries:
    """The scorer's view of a text in any language that it has a glossary of; remembers the last thousand texts."""

    def __init__(self, rows: Iterable[tuple[str, str, str]]) -> None:
        """`rows`: language, form, English."""
        entries: dict[str, dict[str, str]] = {}
        for code, form, english in rows:
            # Keys meet normalised text, of which a hyphen is a token of its own.
            entries.setdefault(code, {})[" ".join(normalise(form).replace("-", " - ").split())] = english
        self.languages = {code: Glossary.of(each, compounds=code in COMPOUNDING) for code, each in entries.items()}
        self._english = frozenset(
            word for each in entries.values() for english in each.values() for word in english.split()
        )
        self._seen: OrderedDict[str, str] = OrderedDict()

    @classmethod
    def read(cls, payload: bytes) -> Glossaries:
        """What `pack_glossaries` wrote; ValueError when it is not that."""
        try:
            lines = gzip.decompress(payload).decode().splitlines()
        except (OSError, EOFError) as error:
            raise ValueError("the glossary is no gzip file") from error
        rows = [line.split("\t") for line in lines]
        if not all(len(row) == 3 for row in rows):
            raise ValueError("a line of the glossary has not three columns")
        return cls((code, form, english) for code, form, english in rows)

    def view(self, text: str) -> str:
        """Return a text normalised, and in English words where its language has a glossary."""
        text = normalise(text)
        known = self._seen.get(text)
        if known is None:
            known = self._seen[text] = self._gloss(text)
            if len(self._seen) > _REMEMBERED:
                self._seen.popitem(last=False)
        return known

    def language(self, words: Sequence[str], *, bare: bool = False) -> str | None:
        """The language of a text's words; None for English and for what no glossary knows.

        Most texts are English: they cost one look-up a word. `bare`: accents may be missing.
        """
        spoken = [word for word in words if word[0].isalpha() and len(word) > 1]
        known = sum(word in self._english for word in spoken)
        if len(spoken) < _FEWEST or known >= len(spoken) * (_SHARE if bare else _ENGLISH):
            return None
        best, code = 0, None
        for name, glossary in self.languages.items():
            count = sum(word in glossary.entries or word.partition("'")[2] in glossary.entries for word in spoken)
            if bare:
                count += sum(word in glossary.bare and word not in glossary.entries for word in spoken)
            best, code = (count, name) if count > best else (best, code)
        return code if best > known and best >= _SHARE * len(spoken) else None

    def _gloss(self, text: str) -> str:
        words = set(text.split())
        plainly = len(words & self._english) >= len(words) * _PLAINLY
        if text.isascii():
            return text if plainly else self._worded(text)
        han = _HAN.findall(text)
        chinese = self.languages.get("zh") if han else None
        if chinese is not None and len(_KANA.findall(text)) <= _JAPANESE * (len(han) + len(_KANA.findall(text))):
            # One foreign character must not hide the rest, whichever language the rest is in.
            tokens = _TOKEN.findall(text)
            if len(han) > sum(token[0].isalpha() and not _HAN.match(token) for token in tokens):
                return " ".join(_characters(tokens, chinese))
            text = _HAN_RUN.sub(lambda run: f" {' '.join(_characters([run.group()], chinese))} ", text)
            text = " ".join(text.split())
        return text if plainly else self._worded(text)

    def _worded(self, text: str) -> str:
        """A text word by word in English, where it is in a known language."""
        tokens = _TOKEN.findall(text)
        code = self.language(tokens)
        if code is None:
            tokens = tokens if text.isascii() else _TOKEN.findall(plain(text))
            code = self.language(tokens, bare=True)
        return text if code is None else " ".join(_words(tokens, self.languages[code]))


def pack_glossaries(directory: Path = GLOSSARY) -> bytes:
    """All glossaries of a directory as an artifact holds them: the same bytes for the same files."""
    rows = [
        f"{path.stem}\t{line}\n"
        for path in sorted(directory.glob("*.tsv"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    return gzip.compress("".join(rows).encode(), mtime=0)


def _words(tokens: Sequence[str], glossary: Glossary) -> list[str]:
    found: list[str] = []
    at = 0
    while at < len(tokens):
        for size in range(min(_PHRASE, len(tokens) - at), 1, -1):
            phrase = glossary.entries.get(" ".join(tokens[at : at + size]))
            if phrase:
                break
        else:
            size, phrase = 1, glossary.word(tokens[at])
        found.append(phrase or tokens[at])
        at += size
    return found


def _characters(tokens: Iterable[str], glossary: Glossary) -> list[str]:
    found: list[str] = []
    for token in tokens:
        if not _HAN.match(token):
            found.append(token)
            continue
        at = 0
        while at < len(token):
            size = next((n for n in range(_CHARACTERS, 0, -1) if token[at : at + n] in glossary.entries), 0)
            found.append(glossary.entries[token[at : at + size]] if size else token[at])
            at += size or 1
    return found
