"""Text that does harm to a terminal which shows it as it is."""

from __future__ import annotations

#: ESC sequences (a title, a colour), C1's CSI, a bell, a backspace, a carriage return, and "abc" from right to left.
EVIL = "a\x1b]0;title\x07b\x1b[31mc\x9b2Jd\be\rf\u202eabc\u202c"


def is_clean(shown: bytes) -> bool:
    """Whether only rich's own colours are in it, and what a terminal makes of newlines."""
    text = shown.decode()
    return not any(part in text for part in ("\x1b]", "\x07", "\x9b", "\b", "\u202e", "\x1b[2J", "title\x07"))
