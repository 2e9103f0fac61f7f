"""What a tokenizer's ids spell: where each token ends in its text, and which pieces two
vocabularies share.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

PIECE, BYTE, SPECIAL, NONE = "piece", "byte", "special", "none"


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's ids.

    Attributes:
        pieces: what each id spells; of a special token its role ("end", "begin") or else its
            content.
        kinds: "piece", "byte" (what SentencePiece falls back to), "special" (spells nothing) or
            "none" (no token).
    """

    pieces: list[bytes]
    kinds: list[str]

    @classmethod
    def of(cls, tokenizer: Any) -> Vocabulary:
        """The vocabulary of a `transformers` tokenizer.

        Raises:
            ValueError: it is not one of the `tokenizers` library, whose decoder says what the
                pieces spell.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(
                f"{type(tokenizer).__name__} does not say which bytes its pieces spell: give a "
                "tokenizer.json (a fast tokenizer)"
            )
        decoder = str(backend.decoder)
        spelled = (
            _from_byte_level
            if "ByteLevel(" in decoder
            else _from_sentencepiece
            if "▁" in decoder
            else str.encode
        )
        roles = {
            tokenizer.bos_token_id: "begin",
            tokenizer.eos_token_id: "end",
        }  # one token may be both: then the end
        added = tokenizer.added_tokens_decoder  # made anew at each look
        special = {
            *tokenizer.all_special_ids,
            *(index for index, token in added.items() if token.special),
        }
        ids = {index: piece for piece, index in tokenizer.get_vocab().items()}
        pieces, kinds = [], []
        for index in range(max(ids, default=-1) + 1):
            piece = ids.get(index)
            if piece is None:
                kind, text = NONE, b""
            elif index in special:
                kind, text = SPECIAL, roles.get(index, piece).encode()
            elif (
                index in added
            ):  # stands in the text as it is, but for a space's mark: Gemma has runs of them
                kind, text = (
                    PIECE,
                    (piece.replace("▁", " ") if spelled is _from_sentencepiece else piece).encode(),
                )
            else:
                kind, text = (BYTE if _is_fallback(piece, decoder) else PIECE), spelled(piece)
            pieces.append(text)
            kinds.append(kind)
        return cls(pieces, kinds)

    def table(self) -> pa.Table:
        """As a cache stores it: `piece` (binary) and `kind`, a row per id."""
        return pa.table({"piece": pa.array(self.pieces, pa.binary()), "kind": self.kinds})

    @classmethod
    def from_table(cls, table: pa.Table) -> Vocabulary:
        return cls(table["piece"].to_pylist(), table["kind"].to_pylist())

    def spell(self, ids: Sequence[int]) -> list[bytes]:
        """What each token of a sequence adds to its text; nothing for special ones."""
        return [self.pieces[i] if self.kinds[i] in (PIECE, BYTE) else b"" for i in ids]


def byte_ends(tokenizer: Any, vocabulary: Vocabulary, text: str, ids: Sequence[int]) -> np.ndarray:
    """(n,) int32: behind which byte of the UTF-8 `text` each token of `ids` ends.

    Special tokens that the tokenizer put there have no bytes, nor has the space that some put
    before every text. A token that ends inside a character counts to the byte. Where the pieces do
    not spell the text (it was normalised, or has the very character that stands for a space), the
    tokenizer's own offsets are taken; they know characters only, and all but the last token of a
    character then have no bytes.

    Raises:
        ValueError: `ids` are not tokens of this text.
    """
    wanted, pieces = text.encode(), vocabulary.spell(ids)
    ends, spelled = np.cumsum([len(piece) for piece in pieces], dtype=np.int32), b"".join(pieces)
    if spelled == wanted:
        return ends
    if spelled == b" " + wanted:
        return np.maximum(ends - 1, 0)
    return _ends_by_offsets(tokenizer, text, ids)


def _ends_by_offsets(tokenizer: Any, text: str, ids: Sequence[int]) -> np.ndarray:
    encoded = tokenizer(text, return_offsets_mapping=True)
    own, offsets = encoded["input_ids"], encoded["offset_mapping"]
    if list(ids[: len(own)]) != own or any(
        piece not in tokenizer.all_special_ids for piece in ids[len(own) :]
    ):
        raise ValueError(
            f"its tokens do not spell {text[-40:]!r}: prompt and answer are joined into one token"
        )
    bytes_before = np.concatenate([[0], np.cumsum([len(character.encode()) for character in text])])
    characters = np.zeros(len(ids), np.int64)
    starts = [len(text)]  # of what follows each token, from the last one back
    for first, last in reversed(offsets[1:]):
        starts.append(first if first < last else starts[-1])
    for k, ((first, last), following) in enumerate(zip(offsets, reversed(starts))):
        before = characters[k - 1] if k else 0
        cut = first < last and following < last  # the next has a part of its last character too
        while first < last < following and unicodedata.combining(
            text[last]
        ):  # composed with it by a normaliser
            last += 1
        characters[k] = before if cut else max(before, last)
    characters[len(own) :] = len(text)
    if len(own):
        characters[len(own) - 1] = len(text)  # white space at the end that a normaliser dropped
    return bytes_before[characters].astype(np.int32)


@dataclass(frozen=True)
class SharedPieces:
    """Which of the teacher's ids stand for the same bytes as which of the student's.

    Attributes:
        teacher, student: (K,) int64, ids of the same piece, one to one.
    """

    teacher: np.ndarray
    student: np.ndarray


def shared_pieces(teacher: Vocabulary, student: Vocabulary) -> SharedPieces:
    """The pieces of both, matched by what they spell and special tokens by their role or content.

    A byte that one vocabulary has twice, as a piece and to fall back to, is matched as a piece
    first.
    """
    found: list[tuple[int, int]] = []
    theirs = _by_bytes(student)
    for key, ids in _by_bytes(teacher).items():
        found += zip(ids, theirs.get(key, ()))
    pairs = np.array(sorted(found), np.int64).reshape(-1, 2)
    return SharedPieces(pairs[:, 0].copy(), pairs[:, 1].copy())


def same_pieces(teacher: Vocabulary, student: Vocabulary) -> bool:
    """Whether each id stands for the same piece in both, so that logits can be compared id by id.

    Special tokens other than the end of a text may differ, since models of one family configure
    them differently.
    """
    size = max(len(teacher.pieces), len(student.pieces))
    for a, b in zip(_padded(teacher, size), _padded(student, size)):
        free = {a[0], b[0]} <= {SPECIAL, NONE} and b"end" not in (a[1], b[1])
        if a != b and not free:
            return False
    return True


def _padded(vocabulary: Vocabulary, size: int) -> list[tuple[str, bytes]]:
    rows = list(zip(vocabulary.kinds, vocabulary.pieces))
    return rows + [(NONE, b"")] * (size - len(rows))


def _by_bytes(vocabulary: Vocabulary) -> dict[tuple[bool, bytes], list[int]]:
    order = {PIECE: 0, SPECIAL: 0, BYTE: 1}
    ids: dict[tuple[bool, bytes], list[tuple[int, int]]] = defaultdict(list)
    for index, (piece, kind) in enumerate(zip(vocabulary.pieces, vocabulary.kinds)):
        if kind != NONE:
            ids[kind == SPECIAL, piece].append((order[kind], index))
    return {key: [index for _, index in sorted(places)] for key, places in ids.items()}


def _is_fallback(piece: str, decoder: str) -> bool:
    return (
        "ByteFallback" in decoder
        and len(piece) == 6
        and piece.startswith("<0x")
        and piece.endswith(">")
    )


def _from_sentencepiece(piece: str) -> bytes:
    if _is_fallback(piece, "ByteFallback"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()


def _from_byte_level(piece: str) -> bytes:
    table = _byte_level_alphabet()
    return (
        bytes(table[character] for character in piece)
        if all(c in table for c in piece)
        else piece.encode()
    )


@lru_cache(maxsize=1)
def _byte_level_alphabet() -> dict[str, int]:
    """The character by which GPT-2's byte-level BPE writes a byte: printable ones as they are,
    others from U+0100.
    """
    kept = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in kept]
    return {chr(byte): byte for byte in kept} | {
        chr(256 + k): byte for k, byte in enumerate(others)
    }
