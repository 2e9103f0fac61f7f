"""How much memory: bytes that a training step, the teacher's pass and an evaluation hold at most.

Counted from what torch keeps in a decoder of Llama's kind; the numbers of copies were read off its
profiler, and `tests/cost` compares the sums with measured peaks. B, T, A: examples, tokens of the
longest, answer tokens of each. A GPU's own context (about 0.5 GB) is not counted.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from kd_utils.cost.shapes import Shape


class Batch(NamedTuple):
    """The largest batch: examples, tokens of each, and answer tokens of each."""

    examples: int
    tokens: int
    answers: int


class Compared(NamedTuple):
    """What the student is compared with.

    Attributes:
        terms: the teacher's, such as "kd".
        width, heads, vocabulary: the teacher's.
        pairs: how many pairs of layers.
    """

    terms: Collection[str]
    width: int
    heads: int
    vocabulary: int
    pairs: int = 1


def training(
    student: Shape,
    batch: Batch,
    teachers: Sequence[Compared] = (),
    *,
    half: bool,
    waiting: int = 48,
) -> dict[str, float]:
    """Bytes of a training step with AdamW, the weights in float32.

    The gradient of one micro-batch is held while the next one's activations are: that is also what
    the gradient shares after an epoch need.

    Args:
        batch: the largest micro-batch.
        half: bfloat16 autocast.
        waiting: examples whose signals are on the device: batches that are read ahead.

    Returns:
        `weights`, `gradients`, `optimizer`, `activations`, `teacher` (output layers, and signals of
        the batches that are read ahead) and `loss` (logits, and what comes and goes with them).
    """
    tokens, head = batch.examples * batch.tokens, student.vocabulary * student.width
    logits = batch.examples * batch.answers * student.vocabulary
    trained, heads, signals, kept, one_map, kl = student.weights, 0, 0, 0, 0, 0
    for teacher in teachers:
        if "kd" in teacher.terms:
            wide = max(student.vocabulary, teacher.vocabulary)
            # A chunk's logits exist four times; three are held while those of the next are made.
            rows = min(max(16, min(512, 2**25 // wide)), tokens)
            copies = max(4 * rows, 3 * rows + 4 * min(rows, tokens - rows))
            kl = max(kl, 4 * wide * copies + 4 * head)
            heads += teacher.vocabulary * teacher.width
            signals += 2 * teacher.width
        if "hidden" in teacher.terms:
            trained += teacher.pairs * student.width * teacher.width
            kept += 8 * teacher.pairs * teacher.width * tokens  # both sides of the error
        if "attention" in teacher.terms:
            signals += teacher.pairs * teacher.heads * batch.tokens
            one_map = 24 * max(student.heads, teacher.heads) * batch.tokens**2
    moments_of_loss = (
        # While the KL is computed: chunks, the head's gradient, and casts of both heads.
        4 * logits + kl + bool(kl) * half * 2 * (head + heads),
        # Where the gradient starts: log-softmax and two gradients of it, the head's gradients.
        12 * logits + 4 * head * (2 if kl else 1) + kept,
        # In the last layer: gradients of the feed-forward layer's products.
        tokens * (3 * student.inner * (2 if half else 4) + 8 * student.width) + kept,
        4 * logits + one_map + kept,
    )
    return {
        "weights": 4 * trained,
        "gradients": 4 * trained,
        "optimizer": 8 * trained,
        "activations": _activations(student, tokens, half),
        "teacher": 4 * heads + waiting * batch.tokens * signals,
        "loss": max(moments_of_loss),
    }


def _activations(shape: Shape, tokens: int, half: bool) -> float:
    """What autograd keeps of a forward pass without `lm_head`, and autocast's copies of weights."""
    keys = 2 * shape.query_width + 2 * shape.key_width  # queries, keys, values and the output
    if half:  # both norms in float32, the inputs of seven products and their results in bfloat16
        layer = 16 * shape.width + 8 + 10 * shape.width + 4 * shape.heads
        layer += 2 * keys + 8 * shape.inner
    else:
        layer = 4 * (6 * shape.width + 2 + keys + shape.heads + 4 * shape.inner)
    last_norm = 12 * shape.width
    return tokens * (shape.layers * layer + last_norm) + half * 2 * shape.matrices


def teacher_pass(
    teacher: Shape,
    batch: Batch,
    signal_bytes: float,
    *,
    size: int,
    layers: int = 1,
    whole_logits: bool = False,
) -> dict[str, float]:
    """Bytes of the teacher's pass over a batch, for its cache.

    Args:
        signal_bytes: of the signals of this batch, before compression (`disk.signal_bytes`).
        size: bytes of a weight.
        layers: whose queries and keys are kept.
        whole_logits: the signals are taken from the logits of the whole batch ("top_k").

    Returns:
        `weights`, `captured` (hidden states, queries and keys) and `passing`: what a layer, the
        signals of all examples twice, or the logits hold for a moment.
    """
    tokens = batch.examples * batch.tokens
    one_map = 12 * layers * teacher.heads * batch.tokens**2  # one example's maps in float32
    # Of one example's logits two more in float32.
    logits = teacher.vocabulary * (size * tokens + 8 * batch.tokens)
    moments = (
        _passing(teacher, tokens, size),
        2 * signal_bytes + (logits if whole_logits else one_map),
    )
    keys = layers * (teacher.query_width + teacher.key_width)
    return {
        "weights": size * teacher.weights,
        "captured": tokens * size * (teacher.width + keys),
        "passing": max(moments),
    }


def _passing(shape: Shape, tokens: int, size: int) -> float:
    """What one layer holds while it runs, without gradients."""
    return tokens * size * (2 * shape.width + 3 * shape.inner)


def evaluation(
    shape: Shape, examples: int, longest: int, question: int, new_tokens: int, *, size: int
) -> float:
    """Bytes of scoring and generation beyond the weights.

    Args:
        examples: `eval_batch_size`.
        longest: tokens of the longest row.
        question: tokens of the longest prompt whose answer is generated; 0 if there is none.
        size: bytes of a value in the model's products.
    """
    # Choices end at different places: at most one for each example of a batch.
    scoring = _passing(shape, examples * longest, size)
    scoring += size * examples * min(examples, longest) * shape.vocabulary
    cached = size * 2 * shape.layers * shape.key_width * examples * (question + new_tokens)
    generating = cached + _passing(shape, examples * question, size) if question else 0
    return max(scoring, generating)
