"""What a student is shown of its teachers: the aligned way equals the direct one, and what cannot
be compared.
"""

from functools import partial

import numpy as np
import pytest
import torch
from test_teacher_cache import HEADER
from tiny import all_terms, example_rows, tiny_llama

from kd_utils.cache.teacher_cache import TeacherCache
from kd_utils.cache.writer import assemble_cache, write_shards
from kd_utils.config.notebook_files import notebook_defaults
from kd_utils.config.trial import METHODS, Method, TrialConfig
from kd_utils.distill.batches import collate, split_batch
from kd_utils.distill.logit_losses import Shared
from kd_utils.distill.teacher_terms import (
    TeacherTerms,
    TermSetup,
    layers_needed,
    teacher_terms_of,
)
from kd_utils.distill.terms.attention import AttentionMaps, head_mix
from kd_utils.distill.terms.hidden import make_projector
from kd_utils.distill.terms.kd import KD, forward_kl_top_k, outcome_kl
from kd_utils.distill.training import loss_terms, weighted_sum
from kd_utils.models.attention_maps import decode_map
from kd_utils.models.devices import autocast
from kd_utils.models.output_head import OutputHead, output_head
from kd_utils.models.signal_kinds import columns_of
from kd_utils.models.signals import forward_signals
from kd_utils.speed.step import cosine
from kd_utils.teacher.extraction import signal_function, stored_lm_head
from kd_utils.tokens.alignment import merge_map
from kd_utils.tokens.encoding import Example
from kd_utils.tokens.vocabulary import PIECE, SPECIAL, Vocabulary

WEIGHTS = {"task": 1.0, "kd": 0.5, "hidden": 0.1, "attention": 0.1}
DEFAULTS = notebook_defaults("03_train_student")
CPU = torch.device("cpu")


def permuted(teacher, order):
    """The same teacher under other ids: old id order[i] is new id i."""
    other = tiny_llama(width=48, layers=3)
    other.load_state_dict(teacher.state_dict())
    for weight in (other.model.embed_tokens.weight, other.lm_head.weight):
        weight.data = weight.data[order]
    return other


def terms_for(student, batch, *teachers, terms=tuple(WEIGHTS)):
    last = student.config.num_hidden_layers
    signals = forward_signals(student, batch.input_ids, map_layers=[last])
    return loss_terms(signals, output_head(student), batch=batch, terms=terms, teachers=teachers)


def results(student, batch, teacher_terms):
    terms = terms_for(student, batch, teacher_terms)
    gradients = torch.autograd.grad(
        weighted_sum(terms, WEIGHTS), [*student.parameters(), *teacher_terms.parameters()]
    )
    return terms, gradients


@pytest.mark.parametrize("distill_tokens", ["all", "answer"])
def test_with_equal_tokenizers_the_aligned_way_is_the_direct_way(distill_tokens):
    """The teacher's ids are the student's in another order, so every group is one token on each
    side.
    """
    teacher, student = tiny_llama(width=48, layers=3), tiny_llama(seed=1)
    order = torch.randperm(97, generator=torch.Generator().manual_seed(0))
    place = torch.argsort(order).numpy()
    rows = example_rows([5, 9, 4])
    for row in rows:
        row.ends = np.arange(1, len(row.tokens) + 1, dtype=np.int32) * 3
    renamed = [
        Example(row.example_id, place[row.tokens].astype(np.int32), row.answer_start, row.ends)
        for row in rows
    ]
    found = []
    for model, cached, shared in (
        (teacher, rows, None),
        (permuted(teacher, order), renamed, Shared.of(torch.arange(97), order, 97, 97)),
    ):
        run = signal_function(model, signals="white_box")
        batch = collate(rows, [list(run(cached))], distill_tokens=distill_tokens)
        terms = all_terms(OutputHead(stored_lm_head(model)), shared=shared)
        found.append((results(student, batch, terms), batch.teachers[0].whole))
    assert found[0][1] == found[1][1]
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-6, rtol=1e-5)
    assert (
        batch.teachers[0].single is None
        and batch.teachers[0].maps["attention"].merges[0] is not None
    )


#: One text of 10 bytes; groups are {a} {b c | bc} {d e | d'e'} {end}. Ids of one piece differ by
#: 40.
TEACHER_ROW, STUDENT_ROW = (
    Example("x", np.array(ids, np.int32), start, np.array(ends, np.int32))
    for ids, start, ends in (
        ([50, 51, 52, 53, 54, 42], 3, [2, 4, 5, 7, 10, 10]),
        ([10, 11, 12, 13, 2], 2, [2, 5, 8, 10, 10]),
    )
)
TEACHER_LAST, STUDENT_LAST = [0, 2, 4, 5], [0, 1, 3, 4]


@pytest.mark.parametrize("distill_tokens, first, count", [("all", 0, 4), ("answer", 1, 2)])
def test_terms_across_tokenizers_by_hand(distill_tokens, first, count):
    teacher, student = tiny_llama(width=48, layers=3), tiny_llama(seed=1)
    [row] = signal_function(teacher, signals="white_box")([TEACHER_ROW])
    head = OutputHead(stored_lm_head(teacher))
    shared = Shared.of(torch.arange(40, 97), torch.arange(57), 97, 97)
    teacher_terms = all_terms(head, shared=shared)
    batch = collate([STUDENT_ROW], [[row]], distill_tokens=distill_tokens)
    chosen = slice(first, first + count)
    with torch.no_grad():
        signals = forward_signals(student, batch.input_ids, map_layers=[2])
        terms = loss_terms(
            signals,
            output_head(student),
            batch=batch,
            terms=tuple(WEIGHTS),
            teachers=[teacher_terms],
        )
        ours, theirs = signals.hidden[0], torch.from_numpy(row.signals["hidden"].astype(np.float32))
        student_log = (ours @ student.lm_head.weight.T / 2).log_softmax(-1)
        teacher_log = (theirs @ head.weight.T / 2).log_softmax(-1)

        def single(t, s):
            p = torch.cat([teacher_log[t, 40:], teacher_log[t, :40].logsumexp(-1, keepdim=True)])
            q = torch.cat([student_log[s, :57], student_log[s, 57:].logsumexp(-1, keepdim=True)])
            return 4 * (p.exp() * (p - q)).sum()

        def chain(log, row, after, last):
            places = range(after, last)
            return sum(log[place, int(row.tokens[place + 1])] for place in places)[None, None]

        # behind group 0 comes {b c | bc}, behind 1 {d e | d'e'}, behind 2 the end token, behind 3
        # nothing
        values = [
            outcome_kl(
                chain(student_log, STUDENT_ROW, 0, 1), chain(teacher_log, TEACHER_ROW, 0, 2), 2.0
            )[0],
            outcome_kl(
                chain(student_log, STUDENT_ROW, 1, 3), chain(teacher_log, TEACHER_ROW, 2, 4), 2.0
            )[0],
            single(4, 3),
            single(5, 4),
        ]
        torch.testing.assert_close(
            terms["kd"], torch.stack(values[chosen]).mean(), atol=1e-4, rtol=1e-4
        )
        error = (
            teacher_terms["hidden"].projectors[0](ours[STUDENT_LAST[chosen]])
            - theirs[TEACHER_LAST[chosen]]
        )
        torch.testing.assert_close(terms["hidden"], error.square().mean(), atol=1e-4, rtol=1e-4)
        maps = [
            merge_map(each.numpy(), np.array(last))
            for each, last in (
                (decode_map(torch.from_numpy(row.signals["attention"].copy()), 0, 6), TEACHER_LAST),
                (signals.attentions[2].map()[0], STUDENT_LAST),
            )
        ]
        errors = np.square(maps[0] - maps[1])[:, chosen]
        entries = sum(range(first + 1, first + count + 1))
        assert terms["attention"].item() == pytest.approx(errors.sum() / (4 * entries), rel=1e-3)


@pytest.mark.parametrize("heads, logit_loss", [(4, "kl"), (6, "kl"), (6, "uld")])
def test_terms_across_tokenizers_under_bfloat16_autocast_are_those_of_float32(heads, logit_loss):
    teacher = tiny_llama(width=48, layers=3, heads=heads)
    rows = list(
        signal_function(teacher, signals="white_box")([TEACHER_ROW, *example_rows([7, 4], seed=2)])
    )
    found = []
    for precision in ("float32", "bfloat16"):
        student = tiny_llama(seed=1)
        teacher_terms = all_terms(
            OutputHead(stored_lm_head(teacher)),
            heads=heads,
            attention={"mix": head_mix("learned", 4, heads), "learned": True},
            shared=Shared.of(torch.arange(40, 97), torch.arange(57), 97, 97),
            logit_loss=logit_loss,
        )
        with autocast(CPU, precision):
            terms, gradients = results(
                student,
                collate([STUDENT_ROW, *example_rows([7, 4], seed=2)], [rows]),
                teacher_terms,
            )
        found.append((terms, torch.cat([gradient.flatten() for gradient in gradients])))
    for name, value in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], value, atol=1e-3, rtol=5e-2)
    assert cosine(*(gradient for _, gradient in found)) > 0.99


@pytest.mark.parametrize("size", [1, 2, 3])
def test_micro_batches_of_other_tokens_change_nothing(size):
    teacher = tiny_llama(width=48, layers=3)
    students = [STUDENT_ROW, *example_rows([7, 4], seed=2)]
    rows = list(
        signal_function(teacher, signals="white_box")([TEACHER_ROW, *example_rows([7, 4], seed=2)])
    )
    gradients = []
    for micro in (3, size):
        student = tiny_llama(seed=1)
        teacher_terms = all_terms(OutputHead(stored_lm_head(teacher)))
        for batch in split_batch(students, micro, [rows]):
            weighted_sum(terms_for(student, batch, teacher_terms), WEIGHTS).backward()
        gradients.append([p.grad for p in [*student.parameters(), *teacher_terms.parameters()]])
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-3)


def test_several_teachers_count_by_their_weights():
    student, batches, teachers = tiny_llama(seed=1), [], []
    rows = example_rows([5, 9])
    for k, width in enumerate((48, 40)):
        teacher = tiny_llama(width=width, layers=3, seed=5 + k)
        cached = list(signal_function(teacher, signals="white_box")(rows))
        batches.append(cached)
        head = OutputHead(stored_lm_head(teacher))
        teachers.append(all_terms(head, widths=(32, width), seed=k, weight=(0.3, 0.7)[k]))
    together, alone = terms_for(student, collate(rows, batches), *teachers), []
    for k in range(2):
        teachers[k].weight = 1.0
        alone.append(terms_for(student, collate(rows, [batches[k]]), teachers[k]))
    for name in ("hidden", "attention"):
        torch.testing.assert_close(together[name], 0.3 * alone[0][name] + 0.7 * alone[1][name])
    assert (
        together["kd"] < 0.3 * alone[0]["kd"] + 0.7 * alone[1]["kd"]
    )  # of mixed probabilities, not mixed KLs
    assert together["task"] == alone[0]["task"]


@pytest.mark.parametrize("case", ["a begin token less", "a row cut differently"])
def test_teachers_of_one_vocabulary_with_other_tokens_are_not_mixed_place_by_place(case):
    """Their KLs are added, whatever the micro-batches. Where tokens agree, mixing has the same
    gradient.
    """
    students = example_rows([6, 8, 5])
    for row in students:
        row.ends = np.arange(len(row.tokens), dtype=np.int32) * 2  # the first has no bytes
    teachers = [tiny_llama(width=48, layers=3, seed=5 + k) for k in range(2)]
    others = [
        Example(row.example_id, row.tokens[1:], row.answer_start - 1, row.ends[1:])
        for row in students
    ]
    if case == "a row cut differently":
        cut = students[0]
        tokens, ends = (
            np.delete(cut.tokens, 2),
            np.delete(cut.ends, 2),
        )  # where the student has two, it has one
        others = [Example(cut.example_id, tokens, cut.answer_start - 1, ends), *students[1:]]
    run = [signal_function(model, signals="white_box") for model in teachers]
    cached = [list(run[0](students)), list(run[1](others))]
    built = [
        TeacherTerms([KD(OutputHead(stored_lm_head(model)), 2.0)], weight)
        for model, weight in zip(teachers, (0.3, 0.7))
    ]

    def gradient(size, chosen=(0, 1), rows=cached):
        student = tiny_llama(seed=1)
        for batch in split_batch(students, size, [rows[k] for k in chosen]):
            terms = terms_for(student, batch, *(built[k] for k in chosen), terms=("kd",))
            terms["kd"].backward()
        return [p.grad for p in student.parameters()]

    whole = gradient(3)
    torch.testing.assert_close(gradient(1), whole, atol=1e-6, rtol=1e-4)
    for rows in (cached, [cached[0], list(run[1](students))]):
        apart = [a + b for a, b in zip(gradient(3, (0,), rows), gradient(3, (1,), rows))]
        torch.testing.assert_close(gradient(3, rows=rows), apart, atol=1e-6, rtol=1e-4)


def test_a_top_k_cache_says_nothing_of_places_before_longer_groups():
    teacher, student = tiny_llama(width=48, layers=3), tiny_llama(seed=1)
    rows = list(
        signal_function(teacher, signals="top_k", top_k=8, temperatures=[2.0])([TEACHER_ROW])
    )
    batch = collate([STUDENT_ROW], [rows])
    assert batch.teachers[0].single.tolist() == [2, 3]
    teacher_terms = TeacherTerms([KD(None, 2.0, temperatures=[2.0])])
    signals = forward_signals(student, batch.input_ids)
    [found] = terms_for(student, batch, teacher_terms, terms=("kd",)).values()
    top = {name: torch.from_numpy(array[[4, 5]]) for name, array in rows[0].signals.items()}
    wanted = forward_kl_top_k(
        signals.hidden[0, [3, 4]] @ student.lm_head.weight.T,
        top["top_logits"],
        top["top_ids"].long(),
        top["log_mass"][:, 0],
        2.0,
    )
    torch.testing.assert_close(found, wanted.sum() / 4)


def test_heads_are_averaged_in_groups_whatever_their_numbers():
    assert head_mix("none", 4, 4) is None
    torch.testing.assert_close(
        head_mix("mean_groups", 2, 4), torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
    )
    torch.testing.assert_close(head_mix("mean_groups", 4, 2), torch.eye(2).repeat_interleave(2, 0))
    torch.testing.assert_close(
        head_mix("mean_groups", 2, 3), torch.tensor([[0.5, 0.5, 0], [0, 0.5, 0.5]])
    )
    for student in range(1, 9):
        for teacher in range(1, 9):
            mix = head_mix("learned", student, teacher)
            torch.testing.assert_close(mix.sum(-1), torch.ones(student))
            assert (mix.sum(0) > 0).all()  # no head of the teacher is left out
    with pytest.raises(
        ValueError, match="teacher has 32 heads, student 16.*'mean_groups'.*or 'learned'"
    ):
        head_mix("none", 16, 32)


def test_a_learned_mix_finds_the_heads_that_fit():
    """The student's four heads are the teacher's in another order: mixing learns which."""
    teacher = tiny_llama()
    rows = list(signal_function(teacher, signals="white_box")(example_rows([20, 31])))
    term = AttentionMaps([(2, 2)], 2, 4, torch.full((4, 4), 0.25), learned=True)
    order, batch = [2, 0, 3, 1], collate(rows)
    signals = forward_signals(teacher, batch.input_ids, map_layers=[2])
    attention = signals.attentions[2]
    attention.query = attention.query.detach()[:, order]
    attention.key = attention.key.detach().repeat_interleave(2, 1)[:, order]
    optimizer = torch.optim.Adam(term.parameters(), lr=0.1)
    for _ in range(150):
        term(signals, None, batch.teachers[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert term.mix.argmax(-1).tolist() == order and term.mix.max(-1)[0].min() > 0.9


# --- from a cache


VOCABULARY = Vocabulary([b"%d" % i for i in range(96)] + [b"end"], [PIECE] * 96 + [SPECIAL])


def make_cache(folder, model, *, vocabulary=VOCABULARY, layers=None, signals="white_box", **header):
    total = model.config.num_hidden_layers
    layers = layers or {"hidden": [total], "attention": [total]}
    if signals == "top_k":
        layers = {"hidden": [], "attention": []}
        header = {"temperatures": [1.0, 2.0], "top_k": 8, **header}
    shape = {"num_hidden_layers": total, "num_attention_heads": 4, "vocab_size": 97}
    columns = columns_of(signals, layers, total, "float16")
    header = {
        **HEADER,
        "signals": signals,
        "shape": shape,
        "layers": layers,
        "head": {"scale": 1.0, "cap": None},
        "hidden_size": 48,
        "dtypes": {name: dtype for name, (_, _, dtype) in columns.items()},
        **header,
    }
    run = signal_function(model, signals=signals, top_k=8, temperatures=[1.0, 2.0], layers=layers)
    assemble_cache(
        folder,
        {"train": example_rows([5, 9])},
        partial(write_shards, folder, signals_of=run, batch_tokens=64),
        stored_lm_head(model) if signals == "white_box" else None,
        header,
        shard_examples=2,
        vocabulary=vocabulary,
    )
    return TeacherCache(folder)


def config(**changes):
    return TrialConfig(**{**DEFAULTS, "distill_type": "combined", **changes})


def terms_of_cache(cache, student, vocabulary, chosen, index=0):
    text_model = student.config.get_text_config()
    return teacher_terms_of(TermSetup(chosen, cache, text_model, vocabulary, CPU, index))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hidden_layers": "uniform", "attention_layers": "uniform"},
        {"hidden_layers": "reversed"},
        {"attention_layers": "random", "hidden_layers": "1:1 4:2"},
        {"head_mapping": "learned"},
    ],
)
def test_the_chosen_layers_are_compared_and_no_other_is_read(tmp_path, changes):
    teacher, student = tiny_llama(width=48, layers=4), tiny_llama(layers=2, seed=1)
    layers = {"hidden": [1, 2, 4], "attention": [2, 4]}
    cache, chosen = make_cache(tmp_path / "c", teacher, layers=layers), config(**changes)
    teacher_terms = terms_of_cache(cache, student, VOCABULARY, chosen)
    hidden, attention = teacher_terms["hidden"], teacher_terms["attention"]
    rows = [cache[i] for i in cache.splits["train"]]
    wanted = {f"hidden_{t}" if t < 4 else "hidden" for t, _ in hidden.pairs} | {"hidden"}
    wanted |= {f"attention_{t}" if t < 4 else "attention" for t, _ in attention.pairs}
    assert set(rows[0].signals) == wanted and teacher_terms["kd"].shared is None
    batch, needed = collate(rows), layers_needed([teacher_terms])
    assert needed == {
        "hidden_layers": {s for _, s in hidden.pairs},
        "map_layers": {s for _, s in attention.pairs},
    }
    signals = forward_signals(student, batch.input_ids, **needed)
    terms = loss_terms(
        signals, output_head(student), batch=batch, terms=tuple(WEIGHTS), teachers=[teacher_terms]
    )
    inner = forward_signals(teacher, batch.input_ids, hidden_layers=[1, 2, 4], map_layers=[2, 4])
    by_hand = [
        (projector(signals.layers[s]) - inner.layers[t])
        .square()[[0] * 5 + [1] * 9, [*range(5), *range(9)]]
        .mean()
        for projector, (t, s) in zip(hidden.projectors, hidden.pairs)
    ]
    torch.testing.assert_close(terms["hidden"], sum(by_hand) / len(by_hand), atol=1e-3, rtol=2e-3)
    if chosen.head_mapping == "none":

        def maps(side, layer, b):
            return side.attentions[layer].example(b, 0, batch.lengths[b]).map()

        errors = [
            sum((maps(signals, s, b) - maps(inner, t, b)).square().sum() for b in range(2))
            / (4 * (15 + 45))
            for t, s in attention.pairs
        ]
        torch.testing.assert_close(
            terms["attention"], sum(errors) / len(errors), atol=1e-3, rtol=2e-3
        )
    assert len(list(teacher_terms.parameters())) == len(hidden.pairs) + (
        chosen.head_mapping == "learned"
    )
    assert f"{hidden.pairs[0][0]}:{hidden.pairs[0][1]}" in teacher_terms.about()


def test_projectors_are_fixed_by_seed_pair_and_teacher(tmp_path):
    layers = {"hidden": [1, 2, 4], "attention": [4]}
    cache = make_cache(tmp_path / "c", tiny_llama(width=48, layers=4), layers=layers)

    def weights(seed, index=0):
        chosen = config(distill_type="hidden_state", hidden_layers="uniform", seed=seed)
        terms = terms_of_cache(cache, tiny_llama(), VOCABULARY, chosen, index=index)
        return list(terms.parameters())

    first, again, other, second = weights(1), weights(1), weights(2), weights(1, index=1)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert torch.equal(first[0], make_projector(32, 48, 1).weight)  # the seed itself, for the first
    different = [*first, *other, *second]
    assert not any(torch.equal(a, b) for k, a in enumerate(different) for b in different[:k])


def test_what_does_not_agree_is_compared_over_shared_pieces(tmp_path):
    cache = make_cache(tmp_path / "c", tiny_llama(width=48))
    other = Vocabulary([b"%d" % (i + 50) for i in range(96)] + [b"end"], VOCABULARY.kinds)
    teacher_terms = terms_of_cache(cache, tiny_llama(seed=1), other, config())
    assert len(teacher_terms["kd"].shared.teacher) == 47
    words = "over 47 shared pieces (not shared: 50 of the teacher, 50 of the student)"
    assert words in teacher_terms.about()
    # the same pieces, more output rows
    larger = terms_of_cache(cache, tiny_llama(vocab=120), VOCABULARY, config())
    assert len(larger["kd"].shared.student_rest) == 120 - 97


def test_a_top_k_teacher_of_the_same_tokenizer_may_have_fewer_output_rows(tmp_path):
    cache = make_cache(tmp_path / "c", tiny_llama(width=48), signals="top_k")
    black_box, student = config(distill_type="black_box"), tiny_llama(vocab=120)
    assert terms_of_cache(cache, student, VOCABULARY, black_box)["kd"].shared is None
    with pytest.raises(ValueError, match="the teacher has another tokenizer"):
        terms_of_cache(cache, student, Vocabulary([b"x"], [PIECE]), black_box)


def test_a_term_that_nobody_registered_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "relations", Method({"task": "alpha", "relation": "beta"}))
    cache = make_cache(tmp_path / "c", tiny_llama(width=48))
    with pytest.raises(ValueError, match="no term of the loss is called 'relation'.*known: .*kd"):
        chosen = config(distill_type="relations")
        terms_of_cache(cache, tiny_llama(), VOCABULARY, chosen)


@pytest.mark.parametrize(
    "header, changes, message",
    [
        (
            {"shape": {"num_hidden_layers": 2, "num_attention_heads": 8, "vocab_size": 97}},
            {},
            "set head_mapping to",
        ),
        (
            {},
            {"hidden_layers": "uniform"},
            "holds 'hidden' of the teacher's layers 2, not of 1: set hidden_layers in the",
        ),
        (
            {},
            {"attention_layers": "1:1"},
            "'attention' of the teacher's layers 2, not of 1: set attention_layers",
        ),
        ({}, {"paired_layers": 3, "hidden_layers": "random"}, "paired_layers = 3"),
        (
            {"signals": "top_k"},
            {"distill_type": "hidden_state"},
            "holds 'top_k' without 'hidden': add hidden to `signals` .'white_box' has hidden",
        ),
        (
            {"signals": "top_k"},
            {"distill_type": "black_box", "temperature": 3.0},
            "exact at temperature .1.0, 2.0. only, not 3.0",
        ),
        (
            {"signals": "top_k", "temperatures": [2.0]},
            {"distill_type": "black_box", "logit_loss": "uld"},
            "'uld' sorts the whole distribution: set signals to 'white_box'",
        ),
        (
            {"signals": "top_k"},
            {"distill_type": "black_box", "student": "other"},
            "another tokenizer than the student and its cache holds top-k logits",
        ),
        (
            {
                "signals": "top_k",
                "shape": {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 120},
            },
            {"distill_type": "black_box"},
            "the teacher has 120 output rows \\(the student 97\\) and its cache holds top-k logits",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, header, changes, message):
    cache = make_cache(tmp_path / "c", tiny_llama(width=48), **header)
    vocabulary = Vocabulary([b"x"], [PIECE]) if "student" in changes else VOCABULARY
    with pytest.raises(ValueError, match=message):
        terms_of_cache(cache, tiny_llama(seed=1), vocabulary, config(**changes))
