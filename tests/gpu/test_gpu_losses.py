"""Every term of the loss and its gradient against float64 on the CPU."""

import pytest
import references
import torch
from references import NEAR, PIECES, WIDTHS, Leaves, error, random_pair, signals_of

from kd_utils.distill.batches import collate
from kd_utils.distill.logit_losses import Shared
from kd_utils.distill.logit_losses import kd_loss as kd_of_hidden_states
from kd_utils.distill.teacher_terms import TeacherTerms
from kd_utils.distill.terms.attention import AttentionMaps, head_mix
from kd_utils.distill.terms.hidden import Hidden
from kd_utils.distill.terms.kd import KD, forward_kl_top_k
from kd_utils.distill.training import loss_terms
from kd_utils.models.devices import autocast
from kd_utils.models.output_head import OutputHead

LENGTHS = [150, 64, 201, 97, 130]  # 642 places: more than one chunk of 512, and padding
TOKENS = pytest.mark.parametrize("distill_tokens", ["all", "answer"])
PRECISE = pytest.mark.parametrize("precision", list(NEAR))
CUT = pytest.mark.parametrize("other_tokens", [False, True], ids=["same tokens", "other tokens"])


class Setting:
    """A random batch on the device, and the same in float64 on the CPU."""

    def __init__(
        self,
        device,
        precision,
        *,
        other_tokens,
        distill_tokens="all",
        heads=4,
        attention="float32",
        seed=0,
    ):
        self.device, self.precision = device, precision
        self.pair = random_pair(LENGTHS, other_tokens=other_tokens, heads=heads, seed=seed)
        leaves, attention = Leaves(self.pair, seed + 1), getattr(torch, attention)
        self.leaves = leaves.on(device, torch.float32, attention)
        self.exact = leaves.on("cpu", torch.float64, attention)
        self.wanted = self.pair.wanted(distill_tokens)
        rows = [self.pair.teacher_rows]
        options = {"distill_tokens": distill_tokens, "device": device}
        self.batch = collate(self.pair.student_rows, rows, **options)
        random = torch.Generator().manual_seed(seed + 2)
        self.head = torch.randn(PIECES["teacher"], WIDTHS["teacher"], generator=random) / 4

    def shared(self, other):
        """60 pieces of the two vocabularies, under other ids on each side."""
        random = torch.Generator().manual_seed(9)
        teacher, student = (torch.randperm(n, generator=random)[:60] for n in PIECES.values())
        on_device = Shared.of(teacher, student, *PIECES.values(), self.device) if other else None
        return on_device, (teacher, student) if other else None

    def term(self, name, *terms):
        """The term's value on the device, as the training step takes it."""
        teachers = [TeacherTerms(terms).to(self.device)]
        signals, head = signals_of(self.leaves)
        with autocast(self.device, self.precision):
            values = loss_terms(signals, head, batch=self.batch, terms=(name,), teachers=teachers)
        return values[name]

    def compare(self, found, expected, *names, more=(), slack=1):
        """The value, and its gradients with respect to these leaves (and `more` pairs of them),
        which may be off by `slack` times as much.
        """
        near = NEAR[self.precision]
        assert found.device.type == self.device.type and found.dtype == torch.float32
        assert error(found, expected) <= near
        pairs = [(self.leaves[name], self.exact[name]) for name in names] + list(more)
        slopes = torch.autograd.grad(3 * found, [leaf for leaf, _ in pairs])
        exact = torch.autograd.grad(3 * expected, [leaf for _, leaf in pairs])
        for slope, wanted, (leaf, _) in zip(slopes, exact, pairs, strict=True):
            assert slope.dtype == leaf.dtype
            assert error(slope, wanted) <= slack * near


@PRECISE
def test_the_task_term(device, precision):
    setting = Setting(device, precision, other_tokens=False)
    expected = references.task_loss(setting.pair, setting.exact)
    setting.compare(setting.term("task"), expected, "hidden", "head")


@PRECISE
@TOKENS
@CUT
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_the_kl_over_shared_pieces_and_groups(
    device, precision, distill_tokens, other_tokens, temperature
):
    setting = Setting(device, precision, other_tokens=other_tokens, distill_tokens=distill_tokens)
    shared, pieces = setting.shared(True)
    assert (setting.batch.teachers[0].spans is not None) == other_tokens
    found = setting.term("kd", KD(OutputHead(setting.head.to(device)), temperature, shared=shared))
    wanted = setting.wanted
    expected = references.kd_loss(
        setting.pair, setting.exact, setting.head, temperature, wanted, pieces
    )
    setting.compare(found, expected, "hidden", "head")


@PRECISE
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("chunk", [100, 512])
def test_the_kl_of_one_vocabulary_in_chunks(device, precision, temperature, chunk):
    setting = Setting(device, precision, other_tokens=False)
    head = setting.head[: PIECES["student"]]
    targets = setting.batch.teachers[0]
    with autocast(device, precision):
        found = kd_of_hidden_states(
            setting.leaves["hidden"].flatten(0, 1)[targets.places],
            setting.leaves["head"],
            targets.signals["hidden"],
            head.to(device),
            temperature,
            chunk_tokens=chunk,
        )
    expected = references.kd_loss(
        setting.pair, setting.exact, head, temperature, setting.wanted, None
    )
    setting.compare(found, expected, "hidden", "head")


@PRECISE
@TOKENS
@CUT
def test_the_distance_of_sorted_probabilities(device, precision, distill_tokens, other_tokens):
    setting = Setting(device, precision, other_tokens=other_tokens, distill_tokens=distill_tokens)
    found = setting.term("kd", KD(OutputHead(setting.head.to(device)), 2.0, logit_loss="uld"))
    expected = references.uld_loss(setting.pair, setting.exact, setting.head, 2.0, setting.wanted)
    # The gradient is one of signs, which turn where rounding changes the order of two masses.
    setting.compare(found, expected, "hidden", "head", slack=10)


@PRECISE
def test_the_kl_over_the_largest_logits(device, precision):
    """k of the vocabulary less one: the rest is one piece, so that it is the whole KL."""
    setting = Setting(device, precision, other_tokens=False)
    teacher = torch.cat(references.teacher_hidden(setting.pair)) @ setting.head[:97].double().T
    places = setting.batch.teachers[0].places
    top = teacher.topk(96)
    with autocast(device, precision):
        found = forward_kl_top_k(
            OutputHead(setting.leaves["head"]).logits(
                setting.leaves["hidden"].flatten(0, 1)[places]
            ),
            top.values.float().to(device),
            top.indices.to(device),
            (teacher / 2).logsumexp(-1).float().to(device),
            2.0,
        ).mean()
    expected = references.kd_loss(
        setting.pair, setting.exact, setting.head[:97], 2.0, setting.wanted, None
    )
    setting.compare(found, expected, "hidden", "head")


@PRECISE
@TOKENS
@CUT
def test_the_hidden_states_term(device, precision, distill_tokens, other_tokens):
    setting = Setting(device, precision, other_tokens=other_tokens, distill_tokens=distill_tokens)
    term = Hidden([(2, 2)], 2, (WIDTHS["student"], WIDTHS["teacher"]), [5])
    exact = term.projectors[0].weight.detach().double().requires_grad_()
    found = setting.term("hidden", term)
    expected = references.hidden_loss(setting.pair, setting.exact, exact, setting.wanted)
    setting.compare(found, expected, "hidden", more=[(term.projectors[0].weight, exact)])


@PRECISE
@TOKENS
@CUT
@pytest.mark.parametrize(
    "normaliser, mapping",
    [("entries", "none"), ("queries", "none"), ("entries", "mean_groups"), ("queries", "learned")],
)
def test_the_attention_term(device, precision, distill_tokens, other_tokens, normaliser, mapping):
    heads = 4 if mapping == "none" else 6
    setting = Setting(
        device, precision, other_tokens=other_tokens, distill_tokens=distill_tokens, heads=heads
    )
    mix, learned = head_mix(mapping, 4, heads), mapping == "learned"
    term = AttentionMaps([(2, 2)], 2, heads, mix, learned=learned, normaliser=normaliser)
    found, more, exact = setting.term("attention", term), [], mix
    if mix is not None:
        exact = mix.double()
    if learned:
        mixing = term.mixing.detach().cpu().double().requires_grad_()
        more, exact = [(term.mixing, mixing)], mixing.softmax(-1)
    expected = references.attention_loss(
        setting.pair, setting.exact, exact, normaliser, setting.wanted
    )
    # Rows of a mix sum to 1, so that most of their gradient cancels out.
    setting.compare(found, expected, "query", "key", more=more, slack=3 if learned else 1)


@PRECISE
@CUT
def test_the_attention_term_of_queries_in_bfloat16(device, precision, other_tokens):
    setting = Setting(device, precision, other_tokens=other_tokens, attention="bfloat16")
    found = setting.term("attention", AttentionMaps([(2, 2)], 2, 4))
    expected = references.attention_loss(
        setting.pair, setting.exact, None, "entries", setting.wanted
    )
    setting.precision = "bfloat16"  # of the products, with or without autocast
    setting.compare(found, expected, "query", "key")
