"""Numbers with their nouns."""


def counted(count: int, noun: str) -> str:
    """Return "1 prompt", "2 prompts"; nouns whose plural is an s."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
