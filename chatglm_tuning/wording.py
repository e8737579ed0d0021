"""Numbers with their nouns, and text of others on a terminal."""

import re

# Escape sequences begin with one of these; then come marks that let what is written look like something else, and
# halves of surrogate pairs, which cannot be printed.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

BEFORE_START = "SIGTERM: the run has ended before its first step; start it again with the same command"


def counted(count: int, noun: str) -> str:
    """Return "1 prompt", "2 prompts"; nouns whose plural is an s."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def told_size(count: int) -> str:
    """Return a number of bytes in a unit in which it is no fraction of a hundredth."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 1 << power:
            return f"{count / (1 << power):.2f} {unit}"
    return f"{count} bytes"


def printable(text: str) -> str:
    """Return `text` with control characters written out (`\\x1b`), as a terminal obeys them; not newlines and tabs."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def told_precision(quantization_bit: int | None) -> str:
    """Return how weights are held: "in int4", "in full precision"."""
    return f"in int{quantization_bit}" if quantization_bit else "in full precision"
