"""A small text encoder for tests: one id for each character, so that lengths can be counted by eye."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CharacterEncoder:
    """Encodes a text as its code points; `vocab_file` is any file, whose bytes identify the encoder."""

    vocab_file: str = __file__
    gmask_token_id: int = 2_000_001
    bos_token_id: int = 2_000_002
    eos_token_id: int = 2_000_003
    pad_token_id: int = 0

    def encode_texts(self, texts: list[str]) -> list[list[int]]:
        return [[ord(character) for character in text] for text in texts]
