"""Hostile text for a browser: bounded, escaped, and with everything that could hide or reorder text made visible."""

from __future__ import annotations

import unicodedata

from markupsafe import Markup, escape

#: Control, format, surrogate, private and unassigned characters, and the two line ends that are none of ours.
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
#: Marks on one letter that are shown; languages need fewer than this, stacks that cover other text need more.
_MAX_MARKS = 4


def plain(text: str, limit: int = 300) -> str:
    """A text for an attribute or a cell: one line, each hidden character as <U+202E>. Not escaped yet."""
    kept = []
    for character, hidden in _characters(" ".join(text[: 4 * limit].split())[:limit]):
        kept.append(f"<{_name(character)}>" if hidden else character)
    return "".join(kept) + ("…" if len(text) > limit else "")


def visible(text: str, limit: int = 2000) -> Markup:
    """A text as HTML: line breaks stay, a hidden character stands as a small tag, what is beyond `limit` is counted."""
    kept: list[str] = []
    for character, hidden in _characters(text[:limit]):
        if hidden and character != "\n":
            kept.append(f'<span class="hidden" title="{_title(character)}">{_name(character)}</span>')
        else:
            kept.append(str(escape(character)))
    if len(text) > limit:
        kept.append(f'<span class="more">… {len(text) - limit:,} more characters, not shown</span>')
    # Every part was escaped above, or is made of our own words and hexadecimal digits.
    return Markup("".join(kept))


def _characters(text: str) -> list[tuple[str, bool]]:
    """Each character, and whether it must be made visible."""
    found = []
    marks = 0
    for character in text:
        category = unicodedata.category(character)
        marks = marks + 1 if category in ("Mn", "Me") else 0
        found.append((character, category in _HIDDEN or marks > _MAX_MARKS))
    return found


def _name(character: str) -> str:
    return f"U+{ord(character):04X}"


def _title(character: str) -> str:
    return str(escape(unicodedata.name(character, "control character").lower()))
