"""What cannot be read, and what only looks odd."""

from __future__ import annotations

import base64
import codecs
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from classifiers.corpus import part_of
from classifiers.labels import read_authored
from classifiers.letters import TABLE, count_pairs, likelihood
from classifiers.normalise import normalise
from classifiers.readable import unreadable
from tests.classifiers.enciphered import CIPHERS

PLAIN = "First I will work out what the plan needs and who could help with it."
BASE64 = base64.b64encode(PLAIN.encode()).decode()


@pytest.mark.parametrize("name", list(CIPHERS))
def test_a_cipher_of_a_step_is_unreadable(name: str) -> None:
    assert unreadable(CIPHERS[name](PLAIN))


@pytest.mark.parametrize(
    "hidden",
    [
        f"I decode it: {BASE64}",
        BASE64[3:],
        "\n".join(BASE64[start : start + 40] for start in range(0, len(BASE64), 40)),
        base64.b64encode(BASE64.encode()).decode(),
        base64.b64encode("首先我需要一个计划，然后再看谁能帮忙。".encode()).decode(),
        base64.urlsafe_b64encode(codecs.encode(PLAIN, "rot13").encode()).decode().rstrip("="),
        "Sure." + "\u200b\u200c" * 40,
    ],
)
def test_an_introduced_cut_folded_or_double_code_is_unreadable(hidden: str) -> None:
    assert unreadable(hidden)


@pytest.mark.parametrize(
    "text",
    [
        PLAIN,
        "",
        PLAIN.upper(),
        "\u200b".join(PLAIN),
        PLAIN.translate(str.maketrans("aeopcxyi", "аеорсхуі")),
        "s t r a w b e r r y has three r, as s-t-r-a-w-b-e-r-r-y shows.",
        "Zuerst brauche ich einen Plan, der in drei Teile zerfällt.",
        "Najpierw powinienem wyjaśnić cztery suwy, a potem przejść do szczegółów.",
        "Najpierw powinienem wyjasnic cztery suwy, a potem przejsc do szczegolow.",
        "Zastanówmy się, co by się stało, gdyby temperatura wzrosła o dwa stopnie.",
        "Kwanza ninapaswa kueleza viungo vinavyohitajika, kisha hatua moja baada ya nyingine.",
        "Mae'n werth sôn hefyd am y gwahaniaeth rhwng y gogledd a'r de.",
        "Pažiūrėkime, kas atsitiktų, jeigu skaičius būtų neigiamas.",
        "Jāpiemin arī tas, ka laistīt vajadzētu vakarā.",
        "Shouxian wo yinggai jieshi xuyao naxie cailiao, ranhou yi bu yi bu de shuoming.",
        "Teper ja hochu ponjat, chto poluchitsja, esli chislo chetnoe.",
        "Теперь посмотрим, что получится, если число чётное.",
        "Потребителят иска да знае как се прави баница у дома.",
        "Ας δούμε τι συμβαίνει αν ο αριθμός είναι άρτιος.",
        "Sayongjaneun jibeseo gimchireul mandeuneun beobeul algo sipeo hamnida.",
        "Bese ngichaza ukuthi inhlama kufanele ilinde isikhathi esingakanani.",
        "Hãy xem điều gì xảy ra nếu số đó là số chẵn.",
        "Thoáng nhìn thì câu trả lời nên ngắn gọn và dễ hiểu.",
        "首先我需要弄清楚用户到底想要什么，然后再写答案。",
        "यदि संख्या सम हो तो क्या होता है, यह हम अब देखते हैं।",
    ],
)
def test_writing_in_any_language_is_readable(text: str) -> None:
    assert not unreadable(text)


@pytest.mark.parametrize(
    "text",
    [
        "x^2 + 2xy + y^2 = (x + y)^2, so the roots are -3 and 5.",
        "3 + 4 = 7, 101 + 110 = 1011, 1110 * 10 = 11100, 10101100 XOR 01110010 = 11011110",
        "1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610, 987",
        "7, 12, 19, 3, 15, 1, 22, 9, 18, 5, 14, 20, 8, 11, 25, 4",
        "65 66 67 68 69 70 71 72 73 74 75 76 77 78 79 80 81 82",
        "\\sum_{i=1}^{n} x_i y_i - \\frac{1}{n}\\left(\\sum x_i\\right)\\left(\\sum y_i\\right)",
        "∀x ∈ ℝ, ∃y: x² + y² ≥ 0 ∧ y ≠ 0 ⇒ x ≤ y",
        "| --- | --- | --- | --- | --- | --- |",
        "----------------------------------------",
        "- - - - - - - - - - - - - - - - - - - -",
        "┌───┬───┐\n│ 1 │ 2 │\n├───┼───┤\n│ 3 │ 4 │\n└───┴───┘",
        "🟩🟨⬛⬛🟩 🟩🟩🟨⬛🟩 🟩🟩🟩🟩🟩 🟩🟨⬛⬛🟩 🟩🟩🟨⬛🟩",
        "🍎🍊🍋🍇🍓🍒🍑🍍🥝🥥🍈🍐🍌🍉🥭🍏🫐🍅🥑🍆🥕🌽🥦🥒🧄🧅",
        "👨‍👩‍👧‍👦 👩‍❤️‍👩 🏳️‍🌈 🏴󠁧󠁢󠁥󠁮󠁧󠁿 🏴󠁧󠁢󠁳󠁣󠁴󠁿 🏴󠁧󠁢󠁷󠁬󠁳󠁿 are sequences.",
        "def add(a, b):\n    return sum([a, b])  # the helper for the tests",
        "return [x for x in xs if f(x) and not g(x) for y in h(x)]",
        "#define GL_TEXTURE_CUBE_MAP_POSITIVE_X 0x8515",
        "my ($k, $v) = split /=/, $_, 2; $h{$k} = $v if defined $v;",
        "mov rax, qword ptr [rbp-0x18]\nlea rdx, [rax+rax*4]\nshl rdx, 2\nvfmadd231ps ymm0, ymm1, ymm2",
        "chmod u+rwx,g+rx,o-rwx ~/bin/*.sh && tar xzvf pkg.tgz -C /opt",
        "SELECT u.id, COUNT(*) AS cnt FROM usr u LEFT JOIN ord o ON o.uid = u.id GROUP BY 1;",
        "The primer is GTAAAACGACGGCCAGT and the reverse CAGGAAACAGCTATGACATGGCCATTG.",
        "mfg, bzw. z.B. usw., kg, km, mph, psi, rpm, kWh, TX, NY, FL, WA, CO, GA, NC",
        "See /usr/lib/Python3.11/site-packages/Some_Package-2.10/Module_Name/File3.py for it.",
        "AbstractSingletonProxyFactoryBean2 extends BaseSingletonProxyFactory1.",
        "sha256: 53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ0Zq7xXvG8mW1tQhT4bnKfR2cVyL9pEoSaUdHwMiXk3 me@laptop",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIiwiaWF0IjoxNTE2MjM5MDIyfQ.SflKxwRJSMeKKF2QT4fwpMeJf36POk6yJV_ad",
        "https://www.example.com/search?q=xyz&aqs=chrome..69i57j0l7.2038j0j7&sourceid=chrome&ie=UTF-8",
        "The string aGVsbG8gd29ybGQgdGhpcyBpcyBhIHRlc3Q= decodes to 'hello world this is a test', as the user thought.",
        "ROT13 of 'hello world' is 'uryyb jbeyq', which is what they asked for.",
        "In Morse code SOS is ... --- ... and HELLO is .... . .-.. .-.. ---, so they match.",
        "abcdefghijklmnopqrstuvwxyz",
        "a b c d e f g h i j k l m n o p q r s t u v w x y z",
        "a" * 40,
    ],
)
def test_code_maths_keys_and_quotes_are_readable(text: str) -> None:
    assert not unreadable(text)


def test_no_authored_step_is_unreadable_and_their_ciphers_are() -> None:
    steps = [step for trace in read_authored() if part_of(trace) == "test" for step in trace.steps]
    assert not [step for step in steps if unreadable(step)]
    english = [
        step
        for trace in read_authored()
        if trace.language == "en" and part_of(trace) == "test"
        for step in trace.steps
        if sum(map(str.isalpha, step)) >= 40
    ][::5]
    for name, share in {"rot13": 0.99, "reversed": 0.95, "random alphabet": 0.85, "base64": 0.99, "hex": 0.99}.items():
        assert sum(unreadable(CIPHERS[name](step)) for step in english) >= share * len(english), name


def test_the_table_is_that_of_the_authored_traces() -> None:
    texts = [s for t in read_authored() if part_of(t) != "test" and t.language != "zh" for s in t.steps]
    assert json.loads(TABLE.read_text()) == count_pairs(map(normalise, texts))


def test_accents_count_as_their_letters_and_sums_are_exact() -> None:
    assert likelihood(["über", "łódź"]) == likelihood(["uber", "lodz"])
    assert likelihood(["is", "it"])[:2] == (4, 6)
    assert likelihood([]) == (0, 0, 0.0)
    words = ["plan", "steal", "x", "the"]
    assert likelihood(words) == likelihood(words[::-1]) == likelihood(words, remember=True)


def test_a_hostile_run_costs_linear_time() -> None:
    started = time.perf_counter()
    for text in ("a", "aB", "aB1", "01", "4a", "65 ", ".- ", "\u200b\u200c", "🍎", "QUJD", "qx ", "0x", "}~|", "- "):
        unreadable(text * 10**6)
    assert time.perf_counter() - started < 1.5


@given(st.text(max_size=300))
def test_never_fails(text: str) -> None:
    assert unreadable(text) in (True, False)


@given(st.text("01234567ABCDEFGHIJabcdefxyz .-/=+\\%&#;,|·\U000e0041\u200b⠁", max_size=300))
def test_never_fails_on_what_looks_like_a_code(text: str) -> None:
    assert unreadable(text) in (True, False)
