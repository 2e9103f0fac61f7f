"""What ids spell: where each token ends in a text, and which pieces two vocabularies share."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any, Self

import numpy as np
import pyarrow as pa

PIECE, BYTE, SPECIAL, NONE = "piece", "byte", "special", "none"

#: A byte that SentencePiece falls back to.
FALLBACK = re.compile("<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's ids.

    Attributes:
        pieces: what each id spells; for a special token its role ("end", "begin") or else its
            content.
        kinds: "piece", "byte" (what SentencePiece falls back to), "special" (spells nothing) or
            "none" (no token).
    """

    pieces: list[bytes]
    kinds: list[str]

    @classmethod
    def of(cls, tokenizer: Any) -> Self:
        """The vocabulary of a `transformers` tokenizer.

        Raises:
            ValueError: it is not one of the `tokenizers` library, whose decoder says what the
                pieces spell.
        """
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(
                f"{type(tokenizer).__name__} does not say which bytes its pieces spell: give a "
                "tokenizer.json (a fast tokenizer)"
            )
        decoder = str(backend.decoder)
        byte_level = "ByteLevel(" in decoder
        sentencepiece = "▁" in decoder and not byte_level
        # The byte that each character of GPT-2's byte-level BPE stands for.
        alphabet = {character: byte for byte, character in bytes_to_unicode().items()}
        # One token may have both roles: then it is the end.
        roles = {tokenizer.bos_token_id: "begin", tokenizer.eos_token_id: "end"}
        added = tokenizer.added_tokens_decoder  # made anew at each look
        special = {index for index, token in added.items() if token.special}
        special.update(tokenizer.all_special_ids)
        ids = tokenizer.get_vocab()
        rows = [(b"", NONE)] * (max(ids.values(), default=-1) + 1)
        for piece, index in ids.items():
            text = (piece.replace("▁", " ") if sentencepiece else piece).encode()
            byte = FALLBACK.fullmatch(piece)
            if index in special:
                rows[index] = roles.get(index, piece).encode(), SPECIAL
            elif index in added:  # in texts as it is, but for the mark of a space: Gemma has runs
                rows[index] = text, PIECE
            elif byte and sentencepiece:
                rows[index] = bytes.fromhex(byte[1]), BYTE if "ByteFallback" in decoder else PIECE
            elif byte_level and alphabet.keys() >= set(piece):
                rows[index] = bytes(alphabet[character] for character in piece), PIECE
            else:
                rows[index] = text, PIECE
        return cls([piece for piece, _ in rows], [kind for _, kind in rows])

    def table(self) -> pa.Table:
        """As a cache stores it: `piece` (binary) and `kind`, a row per id."""
        return pa.table({"piece": pa.array(self.pieces, pa.binary()), "kind": self.kinds})

    @classmethod
    def from_table(cls, table: pa.Table) -> Self:
        return cls(table["piece"].to_pylist(), table["kind"].to_pylist())

    def spell(self, ids: Sequence[int]) -> list[bytes]:
        """What each token of a sequence adds to its text; nothing for special tokens."""
        return [self.pieces[i] if self.kinds[i] in (PIECE, BYTE) else b"" for i in ids]


def byte_ends(tokenizer: Any, vocabulary: Vocabulary, text: str, ids: Sequence[int]) -> np.ndarray:
    """After how many bytes of the UTF-8 `text` each token of `ids` ends.

    Special tokens have no bytes, nor has the space that some tokenizers put before every text. A
    token that ends inside a character counts to the byte. Where the pieces do not spell the text
    (it was normalised, or has the character that stands for a space), the tokenizer's own offsets
    are used. They count characters, so all but the last token of a character have no bytes.

    Returns:
        (n,) int32.

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
    encoded_ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    added = set(ids[len(encoded_ids) :])
    if list(ids[: len(encoded_ids)]) != encoded_ids or not added <= set(tokenizer.all_special_ids):
        raise ValueError(
            f"its tokens do not spell {text[-40:]!r}: prompt and answer are joined into one token"
        )
    starts = [len(text)]  # of what follows each token, from the last one back
    for first, last in reversed(offsets[1:]):
        starts.append(first if first < last else starts[-1])
    ends = []  # in characters
    for (first, last), following in zip(offsets, reversed(starts), strict=False):
        # A normaliser may have composed characters that follow with the last one.
        while first < last < following and unicodedata.combining(text[last]):
            last += 1
        # The next token may have a part of this one's last character, which then counts there.
        ends.append(0 if first < last and following < last else last)
    # The last token may stand before white space that a normaliser dropped.
    ends[-1:] = [len(text)] * (len(ids) - len(ends[:-1]))
    bytes_before = np.cumsum([0, *(len(character.encode()) for character in text)])
    return bytes_before[np.maximum.accumulate(np.array(ends, np.int64))].astype(np.int32)


@dataclass(frozen=True)
class SharedPieces:
    """Which of the teacher's ids stand for the same bytes as which of the student's.

    Attributes:
        teacher, student: (K,) int64, ids of the same piece, one to one.
    """

    teacher: np.ndarray
    student: np.ndarray


def shared_pieces(teacher: Vocabulary, student: Vocabulary) -> SharedPieces:
    """The pieces of both, matched by what they spell; special tokens by their role or content.

    A byte that a vocabulary has twice, as a piece and as a fallback, is matched as a piece first.
    """
    student_ids = _by_bytes(student)
    found = (zip(ids, student_ids[key], strict=False) for key, ids in _by_bytes(teacher).items())
    pairs = np.array(sorted(chain.from_iterable(found)), np.int64).reshape(-1, 2)
    return SharedPieces(pairs[:, 0].copy(), pairs[:, 1].copy())


def shared_output_rows(
    teacher: Vocabulary,
    student: Vocabulary,
    teacher_size: int,
    student_size: int,
) -> SharedPieces:
    """The pieces of both vocabularies that have a row in both heads, of these sizes."""
    pieces = shared_pieces(teacher, student)
    kept = (pieces.teacher < teacher_size) & (pieces.student < student_size)
    return SharedPieces(pieces.teacher[kept], pieces.student[kept])


def same_pieces(teacher: Vocabulary, student: Vocabulary) -> bool:
    """Whether each id stands for the same piece in both, so that logits can be compared id by id.

    Special tokens other than the end of a text may differ, since models of one family configure
    them differently.
    """
    sides = [zip(side.kinds, side.pieces, strict=True) for side in (teacher, student)]
    return all(
        a == b or ({a[0], b[0]} <= {SPECIAL, NONE} and b"end" not in (a[1], b[1]))
        for a, b in zip_longest(*sides, fillvalue=(NONE, b""))
    )


def compared(teacher: Vocabulary, student: Vocabulary) -> str:
    """How far two vocabularies agree, in one sentence."""
    if same_pieces(teacher, student):
        return "teacher and student have the same tokenizer"
    return (
        f"teacher and student share {len(shared_pieces(teacher, student).teacher):,} pieces "
        f"(teacher {len(teacher.pieces):,}, student {len(student.pieces):,}): notebook 06 shows "
        "the alignment"
    )


def _by_bytes(vocabulary: Vocabulary) -> defaultdict[tuple[bool, bytes], list[int]]:
    """Ids by (is it a special token, what it spells); fallback bytes come behind pieces."""
    ids: defaultdict[tuple[bool, bytes], list[int]] = defaultdict(list)
    kinds = vocabulary.kinds
    for index in sorted(range(len(kinds)), key=lambda index: kinds[index] == BYTE):
        if kinds[index] != NONE:
            ids[kinds[index] == SPECIAL, vocabulary.pieces[index]].append(index)
    return ids
