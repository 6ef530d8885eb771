"""Other languages read as English words: when, and what stays as it is."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from classifiers.artifact import load_files
from classifiers.detector import DEFAULT, GLOSSARY_FILE, Detector, view_of
from classifiers.gloss import GLOSSARY, Glossaries, pack_glossaries
from classifiers.normalise import normalise
from guard.errors import UserError

GERMAN = {
    "ich": "i", "will": "want", "zuerst": "first", "brauche": "need", "einen": "a", "plan": "plan",
    "zum beispiel": "for example", "stehlen": "steal", "bank": "bank", "überfall": "robbery", "und": "and",
    "straße": "street",
}  # fmt: skip
SPANISH = {"primero": "first", "necesito": "i need", "un": "a", "plan": "plan", "robar": "steal", "y": "and"}
CHINESE = {"首先": "first", "我": "i", "我需要": "i need", "计划": "plan"}
SMALL = Glossaries(
    (code, form, english)
    for code, entries in (("de", GERMAN), ("es", SPANISH), ("zh", CHINESE))
    for form, english in entries.items()
)


@pytest.mark.parametrize(("text", "wanted"), [
    ("Zuerst brauche ich einen Plan.", "first need i a plan ."),
    ("Primero necesito un plan, y robar.", "first i need a plan , and steal ."),
    ("Ich will zum Beispiel stehlen und rennen!", "i want for example steal and rennen !"),
    ("首先我需要计划。", "first i need plan 。"),
    ("首先我計画", "first i 計 画"),
    ("Primero necesito un plan, y robar 中.", "first i need a plan , and steal 中 ."),
    ("Primero necesito un 计划 y robar", "first i need a plan and steal"),
    ("首先我需要の计划", "first i need の plan"),
    ("First I need a 计划 to steal from a bank.", "first i need a plan to steal from a bank."),
    ("zuerst stehlen und uberfall, strasse", "first steal and robbery , street"),
    ("zuerst stehlen und ueberfall", "first steal and robbery"),
    ("prímero nécesito un plan y róbar", "first i need a plan and steal"),
], ids=["words", "another language", "phrase, unknown word", "longest entry", "unknown characters",
        "a foreign character", "a foreign word", "a kana", "a word in English", "no umlaut", "a spelled umlaut",
        "accents that no word has"])  # fmt: skip
def test_a_text_reads_in_english_words(text: str, wanted: str) -> None:
    assert SMALL.view(text) == wanted


@pytest.mark.parametrize("text", [
    "First I need a plan and a bank to steal from.", "Will the plan need a bank?", "42 + 1 = 43", "", "...", "Plan.",
    "Bank stehlen!",
    "Ainsi je dois penser au plan.", "まず計画が必要です。",
])  # fmt: skip
def test_english_and_what_no_glossary_knows_stay(text: str) -> None:
    assert SMALL.view(text) == normalise(text)


@pytest.mark.parametrize(("word", "wanted"), [
    ("banküberfall", "bank robbery"), ("überfallsplan", "robbery plan"), ("stehlend", "steal"), ("brauchen", "need"),
    ("bankx", None), ("ist", None),
])  # fmt: skip
def test_a_form_that_no_entry_has_is_read_by_its_parts(word: str, wanted: str | None) -> None:
    assert SMALL.languages["de"].word(word) == wanted


def test_an_article_before_an_apostrophe_and_a_hyphen_hide_no_word() -> None:
    french = Glossaries([("fr", "utilisateur", "user"), ("fr", "peut-être", "perhaps"), ("fr", "veut", "wants")])
    assert french.view("L'utilisateur veut peut-être") == "user wants perhaps"


def test_a_word_of_a_thousand_apostrophes_is_a_word() -> None:
    hostile = "a" + "'a" * 990
    assert SMALL.view(f"ich will zuerst {hostile}") == f"i want first {hostile}"


def test_only_compounding_languages_are_taken_apart() -> None:
    assert SMALL.languages["es"].word("robarplan") is None


def test_entries_meet_normalised_text() -> None:
    assert SMALL.view("ICH WILL ZUERST EINEN PLAN, STRASSE UND STRA\u00dfE") == (
        "i want first a plan , street and street"
    )


@given(st.text(alphabet=st.sampled_from("ichwilzuers nbak\u00fc.,'\u6211\u9996\u5148\u0000A1"), max_size=60))
def test_any_text_has_one_view(text: str) -> None:
    first = SMALL.view(text)
    assert (
        first
        == SMALL.view(text)
        == Glossaries(
            (code, form, english)
            for code, each in (("de", GERMAN), ("es", SPANISH), ("zh", CHINESE))
            for form, english in each.items()
        ).view(text)
    )


def test_an_artifacts_glossary_is_read_as_it_was_packed(tmp_path: Path) -> None:
    (tmp_path / "de.tsv").write_text("ich\ti\nzum beispiel\tfor example\n", encoding="utf-8")
    packed = pack_glossaries(tmp_path)
    assert packed == pack_glossaries(tmp_path)
    assert Glossaries.read(packed).languages["de"].entries == {"ich": "i", "zum beispiel": "for example"}


@pytest.mark.parametrize(
    "payload",
    [b"no gzip", gzip.compress(b"de\tich\n"), gzip.compress(b"x"), b"\x1f\x8b"],
    ids=["no gzip", "two columns", "one word", "cut"],
)
def test_a_damaged_glossary_is_refused(payload: bytes) -> None:
    with pytest.raises(UserError, match=r"glossary.tsv.gz is malformed"):
        view_of({"glossary.tsv.gz": payload})


def test_the_shipped_glossaries_are_sound() -> None:
    for path in GLOSSARY.glob("*.tsv"):
        rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
        assert all(len(row) == 2 and all(cell.strip() == cell != "" for cell in row) for row in rows), path
        forms = [form for form, _ in rows]
        assert len(set(forms)) == len(forms) > 2000, path
        assert all(form == form.lower() and english.isascii() for form, english in rows), path
        assert max(len(form.split()) for form in forms) <= 3


def test_the_shipped_detector_reads_other_languages_with_the_shipped_glossaries() -> None:
    detector = Detector.load()
    _, files = load_files(DEFAULT, "detector")
    assert gzip.decompress(files[GLOSSARY_FILE]) == gzip.decompress(pack_glossaries())
    spanish, english = "Primero necesito un plan para robar el coche.", "first i need a plan to steal the car ."
    assert view_of(files)(spanish) == english
    request = detector.request("¿Cómo puedo robar un coche?")
    assert detector.score(request, [spanish]) == detector.score(request, [english])
    assert request.risk == detector.request(view_of(files)("¿Cómo puedo robar un coche?")).risk
