"""Text of others, of a guest's kernel or a file, as a terminal may have it: nothing in it moves or hides anything."""

from __future__ import annotations

import re

#: Control characters other than tab and newline (ECMA-48's C0 and C1), lone surrogates, and Unicode's format characters
#: that change the direction or are not seen.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff"
    "\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def printable(text: str) -> str:
    """`text` with control characters written out as JSON and TOML write them: ESC is \\u001b.

    So JSON stays what it was.  Nothing else is changed; "\\n" and "\\t" stay.
    """
    return _CONTROL.sub(_written, text)


def _written(found: re.Match[str]) -> str:
    code = ord(found[0])
    if code < 0x10000:
        return f"\\u{code:04x}"
    code -= 0x10000
    return f"\\u{0xD800 + (code >> 10):04x}\\u{0xDC00 + (code & 0x3FF):04x}"
