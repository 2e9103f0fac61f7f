"""How much memory: bytes that a training step, the teacher's pass and an evaluation hold at most.

Counted from what torch keeps in a decoder of Llama's kind; the numbers of copies were read off its
profiler, and `tests/gpu` compares the sums with measured peaks. A GPU's own context and the process
itself (about 0.6 GB) are not counted.
"""

from collections.abc import Collection, Sequence

from kd_utils.cost import disk
from kd_utils.cost.shapes import Shape, matrices


def training(
    student: Shape,
    batch: tuple[int, int, int],
    terms: Collection[str] = (),
    teachers: Sequence[Shape] = (),
    *,
    half: bool,
    pairs: int = 1,
    waiting: int = 0,
) -> float:
    """Bytes of a training step with AdamW, the weights in float32.

    The gradient of one micro-batch is held while the next one's activations are: that is also what
    the gradient shares after a stretch need.

    Args:
        batch: the largest micro-batch: examples, tokens of each, and answer tokens of each.
        terms: the loss terms that compare the student with each teacher, such as "kd".
        teachers: their sizes.
        half: bfloat16 autocast.
        pairs: how many pairs of layers are compared.
        waiting: examples whose signals are on the device: batches that are read ahead.
    """
    examples, length, answer = batch
    width, vocabulary, inner = (
        student[name] for name in ("hidden_size", "vocab_size", "intermediate_size")
    )
    tokens, logits, head = examples * length, examples * answer * vocabulary, vocabulary * width
    trained, heads, signals, kept, one_map, kl = student["weights"], 0, 0, 0, 0, 0
    for teacher in teachers:
        if "kd" in terms:
            wide = max(vocabulary, teacher["vocab_size"])
            # A chunk's logits exist four times; three are held while those of the next are made.
            rows = min(max(16, min(512, 2**25 // wide)), tokens)
            chunks = max(4 * rows, 3 * rows + 4 * min(rows, tokens - rows))
            kl = max(kl, 4 * wide * chunks + 4 * head)
            heads += teacher["vocab_size"] * teacher["hidden_size"]
            signals += 2 * teacher["hidden_size"]
        if "hidden" in terms:
            trained += pairs * width * teacher["hidden_size"]
            kept += 8 * pairs * teacher["hidden_size"] * tokens  # both sides of the error
        if "attention" in terms:
            most_heads = max(student["num_attention_heads"], teacher["num_attention_heads"])
            signals += pairs * teacher["num_attention_heads"] * length
            entries = most_heads * length**2
            # Of one example, or of a few short ones together (`terms.attention.ENTRIES`).
            one_map = 24 * max(entries, min(examples * entries, 2**18))
    if "smoothing" in terms:  # a chunk's logits, their log-softmax and both gradients
        kl = 16 * vocabulary * min(512, tokens) + 4 * head
    moments_of_loss = (
        # While the KL is computed: chunks, the head's gradient, and casts of both heads.
        4 * logits + kl + bool(kl) * half * 2 * (head + heads),
        # Where the gradient starts: log-softmax and two gradients of it, the head's gradients.
        12 * logits + 4 * head * (2 if kl else 1) + kept,
        # In the last layer: gradients of the feed-forward layer's products.
        tokens * (3 * inner * (2 if half else 4) + 8 * width) + kept,
        4 * logits + one_map + kept,
    )
    held = 16 * trained + 4 * heads + waiting * length * signals  # 4 + 4 + 8: AdamW
    return held + _activations(student, tokens, half) + max(moments_of_loss)


def _activations(shape: Shape, tokens: int, half: bool) -> int:
    """What autograd keeps of a forward pass without `lm_head`, and autocast's copies of weights."""
    width, inner, heads = (
        shape["hidden_size"],
        shape["intermediate_size"],
        shape["num_attention_heads"],
    )
    # Queries and the output; keys and values.
    keys = 2 * shape["head_dim"] * (heads + shape["num_key_value_heads"])
    if half:  # both norms in float32, the inputs of seven products and their results in bfloat16
        layer = 26 * width + 8 + 4 * heads + 2 * keys + 8 * inner
    else:
        layer = 4 * (6 * width + 2 + keys + heads + 4 * inner)
    last_norm = 12 * width
    return tokens * (shape["num_hidden_layers"] * layer + last_norm) + half * copies(shape)


def copies(shape: Shape) -> int:
    """Bytes of autocast's bfloat16 copies of the layers' matrices."""
    return 2 * matrices(shape)["body"]


def teacher_pass(
    teacher: Shape, columns: disk.Columns, examples: int, length: int, top_k: int = 0, *, size: int
) -> float:
    """Bytes of the teacher's pass over a batch, for a cache with these columns.

    Args:
        examples, length: of the largest batch, and tokens of each.
        size: bytes of a weight.
    """
    tokens, heads = examples * length, teacher["num_attention_heads"]
    captures = [kind.captures for kind, *_ in columns.values()]
    maps, whole_logits = captures.count("map"), None in captures
    signals = sum(disk.signal_bytes(columns, teacher, [length], top_k).values())
    # Of one example's logits two more in float32; or one example's maps in float32.
    logits = teacher["vocab_size"] * (size * tokens + 8 * length)
    taken = logits if whole_logits else 12 * maps * heads * length**2
    kept = teacher["hidden_size"] + maps * teacher["head_dim"] * (
        heads + teacher["num_key_value_heads"]
    )
    held = size * (teacher["weights"] + tokens * kept)
    return held + max(_passing(teacher, tokens, size), 2 * examples * signals + taken)


def _passing(shape: Shape, tokens: int, size: int) -> int:
    """What one layer holds while it runs, without gradients."""
    return tokens * size * (2 * shape["hidden_size"] + 3 * shape["intermediate_size"])


def evaluation(
    shape: Shape, examples: int, longest: int, question: int, new_tokens: int, *, size: int
) -> int:
    """Bytes of scoring and generation beyond the weights.

    Args:
        examples: `eval_batch_size`.
        longest: tokens of the longest row.
        question: tokens of the longest prompt whose answer is generated; 0 if there is none.
        size: bytes of a value in the model's products.
    """
    # Choices end at different places: at most one for each example of a batch.
    ends = examples * min(examples, longest)
    scoring = _passing(shape, examples * longest, size) + size * ends * shape["vocab_size"]
    keys = 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"]
    cached = size * keys * examples * (question + new_tokens)
    generating = cached + _passing(shape, examples * question, size) if question else 0
    return max(scoring, generating)
