"""Personal data and secrets in text: e-mail addresses, phone numbers, payment cards, keys. Found by form, never shown.

Rules lean towards silence: dates, sums, hashes, prices, versions and addresses of machines are none of these. What has
no form (names, postal addresses) is not looked for.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["KINDS", "PII_RULE", "Finding", "redact", "scan"]

PII_RULE = 1
"""Version of the rules of this file; a change makes every cached finding anew."""
KINDS = ("email", "phone", "card", "key")

# The part before the @ is searched backwards from it, so that long texts without one cost nothing.
_LOCAL = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-][A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{0,63}\Z")
_DOMAIN = re.compile(r"@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}(?![A-Za-z0-9-])(?!:[\w/])")
# Runs of digits with the punctuation of numbers for people, at least eight digits long.
_NUMBER = re.compile(r"(?<![\w.,/:=#$€£%@-])(?:\+|\(|00)?\d(?:[ ()./-]{0,2}\d){7,18}(?![\w%@]|[.,:/-]\d)")
_INTERNATIONAL = re.compile(r"(?:\+|00)[1-9]\d{0,2}[ ./-]?(?:\(\d{1,5}\)[ ./-]?)?\d{1,5}(?:[ ./-]?\d{2,5}){1,5}")
_NORTH_AMERICAN = re.compile(r"(?:1[ .-])?(?:\([2-9]\d{2}\) ?|[2-9]\d{2}([-.]))[2-9]\d{2}(?(1)\1|-)\d{4}")
_TRUNK = re.compile(r"(?:\(0[1-9]\d{1,4}\) ?|0[1-9]\d{1,4}[ /-])\d{3,5}(?:[ -]?\d{2,5}){0,3}")
_CARD = re.compile(
    r"4\d{12}(?:\d{3}){0,2}|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|3[47]\d{13}"
    r"|3(?:0[0-5]|[689]\d)\d{11}|6(?:011|5\d\d|4[4-9]\d)\d{12}|35(?:2[89]|[3-8]\d)\d{12}|62\d{14,17}"
)
_CARD_GROUPS = re.compile(r"\d{4}([ -])\d{4}\1\d{4}\1\d{1,7}|\d{4}([ -])\d{6}\2\d{4,5}|\d{13,19}")
_KEY = re.compile(
    r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----(?:[\s\S]{0,8000}?-----END (?:[A-Z]+ )*PRIVATE KEY-----)?"
    r"|(?<![A-Za-z0-9])(?:"
    r"sk-(?:ant-|proj-|or-|svcacct-)?[A-Za-z0-9_-]{20,200}|gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9_]{22,255}"
    r"|glpat-[A-Za-z0-9_-]{20,64}|(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])|AIza[A-Za-z0-9_-]{35}|hf_[A-Za-z]{30,40}"
    r"|xox[abeoprs]-[A-Za-z0-9-]{10,250}|[rs]k_(?:live|test)_[A-Za-z0-9]{16,250}|npm_[A-Za-z0-9]{36}"
    r"|pypi-[A-Za-z0-9_-]{50,250}|SG\.[A-Za-z0-9_-]{16,32}\.[A-Za-z0-9_-]{16,64}"
    r"|eyJ[A-Za-z0-9_-]{10,2000}\.eyJ[A-Za-z0-9_-]{10,2000}\.[A-Za-z0-9_-]{10,1000})"
)
_NAMED_KEY = re.compile(
    r"(?i:api[_-]?key|access[_-]?key|secret[_-]?key|client[_-]?secret|auth[_-]?token|access[_-]?token|password|passwd)"
    r"[\"']?\s{0,3}[:=]\s{0,3}[\"']?([A-Za-z0-9_+/=.~-]{20,200})"
)
# Plain searches before the patterns: most texts hold none of these.
_NAMED_WORDS = (
    "apikey", "api_key", "api-key", "accesskey", "access_key", "access-key", "secret", "authtoken", "auth_token",
    "auth-token", "accesstoken", "access_token", "access-token", "passw",
)
_KEY_MARKS = (
    "sk-", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "hf_", "k_live_", "k_test_", "npm_", "glpat-", "AKIA",
    "ASIA", "AIza", "xox", "pypi-", "SG.", "eyJ", "PRIVATE KEY",
)
# Below this many bits a character, a long word after "key:" is a placeholder or a sentence, not a secret.
_KEY_BITS = 3.5


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One place in a text; it holds no part of the text."""

    kind: str
    """A name of KINDS."""
    start: int
    end: int


def scan(text: str) -> list[Finding]:
    """Returns what looks like personal data or a secret, ascending, not overlapping."""
    found = sorted(_all(text), key=lambda f: (f.start, -f.end))
    kept: list[Finding] = []
    for one in found:
        if not kept or one.start >= kept[-1].end:
            kept.append(one)
    return kept


def redact(text: str) -> tuple[str, Counter[str]]:
    """Returns the text with each finding replaced by [EMAIL], [PHONE], [CARD] or [KEY], and how many of each kind."""
    parts, counts, end = [], Counter[str](), 0
    for one in scan(text):
        parts += [text[end : one.start], f"[{one.kind.upper()}]"]
        counts[one.kind] += 1
        end = one.end
    return "".join([*parts, text[end:]]), counts


def _all(text: str) -> Iterator[Finding]:
    if "@" in text:
        yield from _emails(text)
    yield from _numbers(text)
    if any(mark in text for mark in _KEY_MARKS):
        for match in _KEY.finditer(text):
            yield Finding(kind="key", start=match.start(), end=match.end())
    lowered = text.lower()
    if any(word in lowered for word in _NAMED_WORDS) and ("=" in text or ":" in text):
        for match in _NAMED_KEY.finditer(text):
            if _is_secret(match[1]):
                yield Finding(kind="key", start=match.start(1), end=match.end(1))


def _emails(text: str) -> Iterator[Finding]:
    for domain in _DOMAIN.finditer(text):
        local = _LOCAL.search(text, max(0, domain.start() - 65), domain.start())
        if local and not local[0].startswith(("/", "=")):
            yield Finding(kind="email", start=local.start(), end=domain.end())


def _numbers(text: str) -> Iterator[Finding]:
    for match in _NUMBER.finditer(text):
        number = match[0]
        digits = re.sub(r"\D", "", number)
        if _CARD_GROUPS.fullmatch(number) and _CARD.fullmatch(digits) and _luhn(digits):
            yield Finding(kind="card", start=match.start(), end=match.end())
        elif len(digits) <= 15 and any(
            form.fullmatch(number) for form in (_INTERNATIONAL, _NORTH_AMERICAN, _TRUNK)
        ):
            yield Finding(kind="phone", start=match.start(), end=match.end())


def _luhn(digits: str) -> bool:
    """The check digit of payment cards (ISO/IEC 7812-1); all equal digits are no card."""
    doubled = [sum(divmod(2 * int(d), 10)) for d in digits[-2::-2]]
    return (sum(doubled) + sum(map(int, digits[-1::-2]))) % 10 == 0 and len(set(digits)) > 1


def _is_secret(word: str) -> bool:
    counts = Counter(word)
    bits = -sum(n / len(word) * math.log2(n / len(word)) for n in counts.values())
    return bits >= _KEY_BITS and any(c.isdigit() for c in word) and any(c.isalpha() for c in word)
