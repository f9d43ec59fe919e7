"""What counts as personal data, what only looks like it, and that nothing of it stays after redaction."""

from __future__ import annotations

from collections import Counter

import pytest

from sparktune.setup.data.pii import redact, scan

FOUND = {
    "email": ["jane@example.org", "J.Doe+tag@mail.sub.example.co.uk", "<a_b@x-y.io>", "(root@corp.example.com)",
              "mailto:jane@example.org", "jane@example.org: hello", "jane@example.org.", "'x@y.dev',"],
    "phone": ["+49 30 9018 2034", "+1 (415) 555-2671", "(415) 555-2671", "415-555-2671", "+442071838750",
              "call 030 9018-2034", "0171-1234567", "+1-202-555-0143."],
    "card": ["4242 4242 4242 4242", "4242424242424242", "5555-5555-5555-4444", "3782 822463 10005", "6011111111111117"],
    "key": ["sk-proj-" + "aB3" * 12, "ghp_" + "a1B2c3D4e5" * 4, "AKIAIOSFODNN7EXAMPLE",
            "hf_" + "AbCdEfGhIj" * 3 + "KlMn",
            "password = 'kT9!'; api_key: 'x8Fq2Lp0Zr7Wm4Vt6Ys1'", "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA "
            "PRIVATE KEY-----", "xoxb-123456789012-abcdefGHIJ",
            "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N"],
}
NOTHING = [
    "2026-11-22 14:05:09", "22.11.2026 09:30", "12/31/1999", "ISBN 978-3-16-148410-0", "192.168.178.24", "fe80::1",
    "1,234,567.89", "10 000 000", "1 000 000 000 km", "3.14159265358979", "v12.4.0-rc.1", "@app.route('/users')",
    "git@github.com:acme/tools.git", "a@b.T", "pkg@1.2.3", "user@localhost", "password: ************",
    "password: correct-horse-battery-staple-words", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4",
    "550e8400-e29b-41d4-a716-446655440000", "4111 1111 1111 1112", "1234567890123456", "0000 0000 0000 0000",
    "pages 1024-2048", "17 + 25 = 42", "0.0000012345", "#1234567890", "task-force sk-learn disk-1",
    "1999-2004, 2005-2010",
    "x = 12345678; y = 87654321", "1 2 3 4 5 6 7 8 9 10 11 12", "https://x.org/p/0123-4567890", "$1234567890",
]


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in FOUND.items() for text in texts])
def test_personal_data_is_found_and_redacted(kind, text):
    assert [found.kind for found in scan(f"before {text} after")] == [kind]
    clean, counts = redact(f"before {text} after")
    assert counts == Counter({kind: 1})
    assert f"[{kind.upper()}]" in clean
    assert clean.startswith("before ")
    assert clean.endswith(" after")
    assert not scan(clean)


@pytest.mark.parametrize("text", NOTHING)
def test_what_only_looks_like_it_is_left_alone(text):
    assert scan(f"before {text} after") == []
    assert redact(text) == (text, Counter())


def test_many_in_one_text_and_long_texts_without_any():
    text = "jane@example.org, 4242 4242 4242 4242 and +49 30 9018 2034"
    assert redact(text)[0] == "[EMAIL], [CARD] and [PHONE]"
    assert scan("word " * 100_000 + "@" * 1000 + "1" * 100_000) == []
