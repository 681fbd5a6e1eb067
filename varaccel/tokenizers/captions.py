"""Caption cleaning in the manner of DeepFloyd IF, as the T5-conditioned models were trained with it.

Web captions carry links, file names, shop phrases and broken markup. DeepFloyd IF, PixArt and, after them,
the text-to-image models of LlamaGen (arXiv 2406.06525) removed these before the caption went to T5, so a
prompt has to take the same road. The behaviour is that of `clean_caption=True` in the pipelines of diffusers,
oddities included: a cleaner that is "better" gives features the image model has not seen.
"""

from __future__ import annotations

import html
import re
import urllib.parse
import warnings
from collections.abc import Callable
from typing import NamedTuple

from varaccel.errors import InputError


class Rule(NamedTuple):
    """Replace each match of `pattern` by `replacement`; `reason` names what the pattern is after."""

    pattern: str
    replacement: str
    reason: str


_DASHES = (
    "\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40\u301c\u3030\u30a0"
    "\ufe31\ufe32\ufe58\ufe63\uff0d"
)
_FILE_TYPES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_HOST = r"[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"

# The order within and between the tables matters: later patterns rely on what earlier ones removed.
_MARKUP_RULES = (
    Rule(r"<person>", "person", "the placeholder for names in Conceptual Captions; no tag"),
    Rule(rf"\b(?:https?:(?:/{{1,3}}|[a-zA-Z0-9%])|{_HOST})", "", "a link or a bare host name"),
    Rule(rf"\b(?:www:(?:/{{1,3}}|[a-zA-Z0-9%])|{_HOST})", "", "a link that the first pass uncovered"),
)
_TEXT_RULES = (
    Rule(r"@\w+\b", "", "a social-media handle"),
    Rule(r"[\u31c0-\u4dff\u4e00-\u9fff]+", "", "CJK strokes, enclosed letters, ideographs, hexagrams"),
    Rule(rf"[{_DASHES}]+", "-", "every kind of dash, and runs of them"),
    Rule(r"[`´«»“”¨]", '"', "double quotation marks"),
    Rule(r"[‘’]", "'", "single quotation marks"),
    Rule(r"&quot;?", "", "an escaped quotation mark that the HTML parser left"),
    Rule(r"&amp", "", "an escaped ampersand that the HTML parser left"),
    Rule(r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " ", "an IP address"),
    Rule(r"\d:\d\d\s+$", "", "the tail of an article id"),
    Rule(r"\\n", " ", "a line break written as backslash and n"),
    Rule(r"#\d{1,3}\b", "", "a short number sign"),
    Rule(r"#\d{5,}\b", "", "a long number sign"),
    Rule(r"\b\d{6,}\b", "", "a serial number"),
    # the look-behind changes no match (greedy from the start of the word finds the same end) but keeps
    # words of thousands of characters from being searched once per character
    Rule(rf"(?<!\S)\S+\.(?:{_FILE_TYPES})", "", "a file name"),
    Rule(r"[\"']{2,}", '"', "repeated quotation marks"),
    Rule(r"\.{2,}", " ", "repeated full stops"),
    Rule(r"[#®•©™&@·º½¾¿¡§~)(\]\[}{|\\/*]+", " ", "punctuation that carries no meaning for an image"),
    Rule(r"\s+\.\s+", " ", "a full stop on its own"),
)
_WORDING_RULES = (
    Rule(r"\b[a-zA-Z]{1,3}\d{3,15}\b", "", "an article number such as jc6640"),
    Rule(r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", "", "an article number such as jc6640vc"),
    Rule(r"\b\d+[a-zA-Z]+\d+\b", "", "an article number such as 6640vc231"),
    Rule(r"(worldwide\s+)?(free\s+)?shipping", "", "a shop phrase"),
    Rule(r"(free\s)?download(\sfree)?", "", "a shop phrase"),
    Rule(r"\bclick\b\s(?:for|on)\s\w+", "", "an invitation to click"),
    Rule(rf"\b(?:{_FILE_TYPES})(\simage[s]?)?", "", "a file type, with or without the word image"),
    Rule(r"\bpage\s+\d+\b", "", "a page number"),
    Rule(r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " ", "letters and digits in turn, such as j2d1a2a"),
    Rule(r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", "", "a size such as 800x600, also with the Cyrillic letter"),
    Rule(r"\b\s+:\s+", ": ", "a space before a colon"),
    Rule(r"(\D[,./])\b", r"\1 ", "a missing space after punctuation"),
    Rule(r"\s+", " ", "runs of white space"),
    # white space at the ends is still there when these four look at the first and last character
    Rule(r"^[\"']([\w\W]+)[\"']$", r"\1", "quotation marks around the whole caption"),
    Rule(r"^['_,\-:;]", "", "a stray first character"),
    Rule(r"['_,\-:+]$", "", "a stray last character"),
    Rule(r"^\.\S+$", "", "a lone file extension"),
)
_JOINERS = re.compile(r"[-_]")


def clean_caption(text: str) -> str:
    """One pass of the cleaner; see the tables of this module for what goes.

    The published samplers apply it twice (`clean_prompt`): one pass can uncover what the next removes.

    Args:
        text: a caption or prompt.

    Returns:
        Lower-case text without links, markup, ids and shop phrases; it may be empty.

    Raises:
        InputError: ftfy or beautifulsoup4 is not installed.
    """
    fix_text, strip_markup = _cleaning_tools()
    text = urllib.parse.unquote_plus(text).strip().lower()
    text = strip_markup(_apply(_MARKUP_RULES, text))
    text = _apply(_TEXT_RULES, text)
    if len(_JOINERS.findall(text)) > 3:  # a caption made of a file name: this-is-my-cute-cat
        text = _JOINERS.sub(" ", text)
    text = html.unescape(html.unescape(fix_text(text)))
    return _apply(_WORDING_RULES, text).strip()


def clean_prompt(text: str) -> str:
    """The cleaner applied twice, as for the captions the T5-conditioned models were trained on."""
    return clean_caption(clean_caption(text))


_IDEOGRAPHS = re.compile("[\u31c0-\u4dff\u4e00-\u9fff]")


def what_is_cleaned(text: str) -> str:
    """What the cleaner takes out of a text of which it leaves nothing, in words."""
    if _IDEOGRAPHS.search(text):
        return "its Chinese characters"
    return "links, file names, numbers, markup and signs"


def _apply(rules: tuple[Rule, ...], text: str) -> str:
    for rule in rules:
        text = re.sub(rule.pattern, rule.replacement, text)
    return text


def _cleaning_tools() -> tuple[Callable[[str], str], Callable[[str], str]]:
    """The text repair of ftfy and the markup removal of Beautiful Soup, from the optional `text` extra."""
    try:
        import bs4
        import ftfy
    except ImportError as error:
        raise InputError(
            f"caption cleaning for T5 models needs {error.name}: pip install 'varaccel[text]'."
        ) from error

    def strip_markup(text: str) -> str:
        with warnings.catch_warnings():
            # a caption that is only a file name or a link is not a mistake here
            warnings.simplefilter("ignore", bs4.MarkupResemblesLocatorWarning)
            try:
                return bs4.BeautifulSoup(text, features="html.parser").text
            except bs4.builder.ParserRejectedMarkup:  # such as "<![x": not HTML, so nothing to strip
                return text

    return ftfy.fix_text, strip_markup
