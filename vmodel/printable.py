"""Makes untrusted text, of a guest's kernel or a file, safe to print on a terminal."""

from __future__ import annotations

import re

#: Control characters other than tab and newline (ECMA-48's C0 and C1), lone surrogates, and Unicode's format characters
#: that change the direction of text or are invisible.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff"
    "\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def printable(text: str) -> str:
    """`text` with control characters escaped as in JSON and TOML, for example ESC as \\u001b.

    So JSON text keeps its meaning.  Nothing else is changed; "\\n" and "\\t" stay.
    """
    return _CONTROL.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    if code < 0x10000:
        return f"\\u{code:04x}"
    code -= 0x10000
    return f"\\u{0xD800 + (code >> 10):04x}\\u{0xDC00 + (code & 0x3FF):04x}"
