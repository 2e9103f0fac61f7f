"""Compare this project's logit losses across tokenizers with TRL's GOLD on the same inputs.

    python benchmarks/trl_gold.py --trl-python TRL_ENV/bin/python

Both get the same logits, ids and byte ends; the table says what is equal and what is not. TRL has
an environment of its own (`pip install trl`; written against `trl.experimental.gold` of 1.16).
GOLD's numbers come from its `ULDLoss`, called as its trainer calls it, with
`uld_token_merge_strategy="bayesian"` (the default looks at the next position), `beta=0` (over
matched pieces that is KL(teacher || student)), and the end token kept, which is left out by
default. The loss of a group is what `ULDLoss` returns if nothing else is labelled.

**The inputs.** Rows and tokenizers are real, and every vocabulary has its real size. Logits are
drawn from N(0, 1/4), and the token that follows is raised to a probability of about 0.1 to 0.9. So
the sizes of the numbers mean little; which of them are equal, and why others are not, does not
depend on them. No probability is below 1e-8, where GOLD cuts them off. The hidden states given to
this project's losses are unit vectors: the weight of the head is the logits, and its gradient is
their gradient.

**These must be equal, or the exit status is 1:** groups, sorted distances and their gradients where
a group is one token on each side, KL over matched pieces, and the probability of a text of several
tokens. The other lines say why the numbers differ.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

TEACHERS, STUDENT = ("llama3", "mistral"), "llama2"
ROWS = {"gsm8k": "test", "mmlu": "test", "sst2": "validation"}
TEMPERATURES = (1.0, 2.0)
TOLERANCE = 5e-5  # relative to the largest value; float32, sums over 128 thousand pieces
SIDES = ("student", "teacher")
#: Byte ends (student's, teacher's), and whether both must group them alike.
CASES = {
    "a begin token on one side": ([0, 2, 4], [2, 4], True),
    "a begin token on both, a bare space on one": ([0, 0, 3], [0, 3], True),
    "an end token on one side": ([2, 4, 4], [2, 4], False),
    "two texts": ([2, 4], [2, 5], False),
}


# ---- the sides, which run in processes of their own


def read(path: Path) -> Any:
    """Load what another process saved; tensors stay on disk until they are used."""
    return torch.load(path, mmap=True, weights_only=True)


def prepare(args: argparse.Namespace) -> None:
    """Write every row for every teacher: ids, byte ends, the start of the answer, and logits."""
    from kd_utils.data.task_rows import load_task
    from kd_utils.models.loading import load_tokenizer
    from kd_utils.tokens.encoding import encode_example
    from kd_utils.tokens.vocabulary import Vocabulary, byte_ends

    texts = [
        (row.prompt, row.answer)
        for task, split in ROWS.items()
        for row in load_task(task, split, data_dir=args.shared / "data", limit=args.rows)
        .head(args.rows)
        .itertuples()
    ]
    draw = torch.Generator().manual_seed(0)
    for teacher in TEACHERS:
        tokenizers = [
            load_tokenizer(str(args.shared / "tokenizers" / name)) for name in (STUDENT, teacher)
        ]
        vocabularies = [Vocabulary.of(tokenizer) for tokenizer in tokenizers]
        for number, (prompt, answer) in enumerate(texts):
            row: dict[str, Any] = {"text": prompt + answer}
            for side, tokenizer, vocabulary in zip(SIDES, tokenizers, vocabularies):
                asked, answered = encode_example(tokenizer, prompt, answer)
                ids, size = asked + answered, len(vocabulary.pieces)
                logits = torch.randn(len(ids), size, generator=draw) / 2
                logits[range(len(ids) - 1), ids[1:]] = (
                    math.log(size) + 4 * torch.rand(len(ids) - 1, generator=draw) - 2
                )
                row[side] = {
                    "ids": torch.tensor(ids),
                    "start": len(asked),
                    "logits": logits,
                    "ends": torch.tensor(byte_ends(tokenizer, vocabulary, row["text"], ids)),
                }
            if len(bases := {int(row[side]["ends"][row[side]["start"] - 1]) for side in SIDES}) > 1:
                raise ValueError(
                    f"the answer to {prompt[-40:]!r} starts at bytes {bases}: choose other rows"
                )
            torch.save(row, args.work / f"{teacher}-{number:03}.pt")


def gold(args: argparse.Namespace) -> dict[str, str]:
    """Write GOLD's numbers for the rows, in TRL's environment, and return versions."""
    from transformers import AutoTokenizer
    from trl.experimental.gold.gold_trainer import ULDLoss
    from trl.experimental.utils import encode_with_byte_offsets

    tokenizers = {
        name: AutoTokenizer.from_pretrained(args.shared / "tokenizers" / name)
        for name in (*TEACHERS, STUDENT)
    }

    def own_ends(name: str, texts: list[str]) -> Any:
        try:
            encoded = encode_with_byte_offsets(tokenizers[name].backend_tokenizer, texts)
        except NotImplementedError as error:
            return str(error).split(" (")[0]
        return [(ids, [end for _, end in offsets]) for ids, offsets in encoded]

    for teacher in TEACHERS:
        paths, pair = (
            sorted(args.work.glob(f"{teacher}-*.pt")),
            (tokenizers[STUDENT], tokenizers[teacher], "cpu"),
        )
        distances = {T: ULDLoss(gold_config(args.work, T), *pair) for T in TEMPERATURES}
        hybrid = ULDLoss(gold_config(args.work, 1.0, uld_use_hybrid_loss=True), *pair)
        torch.save(
            {
                "rows": [gold_row(read(path), distances, hybrid) for path in paths],
                "pieces": sorted(hybrid._vocab_mapping.items()),
                "ends": {
                    name: own_ends(name, [read(path)["text"] for path in paths])
                    for name in (teacher, STUDENT)
                },
            },
            args.work / f"gold-{teacher}.pt",
        )
    (args.work / "cases.json").write_text(
        json.dumps(
            {
                name: ULDLoss._align_by_byte_offsets(
                    *([(0, end) for end in ends] for ends in case[:2])
                )
                for name, case in CASES.items()
            }
        )
    )
    return {package: version(package) for package in ("trl", "torch", "transformers")}


def gold_config(work: Path, temperature: float, **options: Any) -> Any:
    from trl.experimental.gold import GOLDConfig

    return GOLDConfig(
        output_dir=str(work / "trl"),
        use_cpu=True,
        bf16=False,
        report_to="none",
        use_uld_loss=True,
        beta=0.0,
        uld_token_merge_strategy="bayesian",
        uld_student_temperature=temperature,
        uld_teacher_temperature=temperature,
        uld_skip_student_eos=False,
        uld_skip_teacher_eos=False,
        **options,
    )


def gold_row(row: dict[str, Any], distances: dict[float, Any], hybrid: Any) -> dict[str, Any]:
    """Compute GOLD's numbers for one row, group by group."""
    sides = [row[name] for name in SIDES]
    starts = [side["start"] for side in sides]
    offsets = [
        torch.stack([side["ends"]] * 2, -1) - side["ends"][side["start"] - 1] for side in sides
    ]
    groups = hybrid._align_by_byte_offsets(
        *(offset[start:].tolist() for offset, start in zip(offsets, starts))
    )
    out = {
        "whole_groups": list(
            hybrid._align_by_byte_offsets(*(offset.tolist() for offset in offsets))
        ),
        "groups": [
            [[k + start for k in group] for group in side] for side, start in zip(groups, starts)
        ],
    }

    def value(loss: Any, spans: Any, logits: torch.Tensor = sides[0]["logits"]) -> torch.Tensor:
        labels = [torch.full_like(side["ids"], -100) for side in sides]
        for label, side, span in zip(labels, sides, spans):
            label[list(span)] = side["ids"][list(span)]
        return loss(
            logits[None],
            sides[1]["logits"][None],
            *(label[None] for label in labels),
            *(side["ids"][None] for side in sides),
            *(offset[None] for offset in offsets),
        )

    pairs = list(zip(*out["groups"]))
    with torch.no_grad():
        out |= {
            f"uld {T}": torch.stack([value(loss, pair) for pair in pairs])
            for T, loss in distances.items()
        }
        parts = [
            (value(hybrid, pair), hybrid.last_matched_loss, hybrid.last_unmatched_loss)
            for pair in pairs
        ]
        out |= dict(zip(("hybrid", "matched", "unmatched"), map(torch.stack, zip(*parts))))
        for name, side, start, side_groups in zip(SIDES, sides, starts, groups):
            probs, ids = side["logits"][start - 1 : -1].softmax(-1), side["ids"][start:]
            assert probs.min() > 1e-8
            merged = hybrid._merge_probabilities_with_alignment_groups(
                probs, side_groups, ids.tolist()
            )
            out[name] = {
                "mass": merged.sum(-1),
                "joint": merged[range(len(side_groups)), ids[[group[-1] for group in side_groups]]],
            }
    answer = [range(start, len(side["ids"])) for start, side in zip(starts, sides)]
    for name, loss in (("uld", distances[1.0]), ("hybrid", hybrid)):
        whole = value(loss, answer, leaf := sides[0]["logits"].clone().requires_grad_())
        out |= {
            f"whole {name}": whole.detach(),
            f"gradient {name}": torch.autograd.grad(whole, leaf)[0],
        }
    return out


def kd_utils_row(
    row: dict[str, Any], gold_numbers: dict[str, Any], shared: Any, by_string: Any
) -> dict[str, Any]:
    """Compute this project's numbers for one row, group by group, and compare the gradients."""
    from kd_utils.distill.batches import collate
    from kd_utils.distill.logit_losses import kd_loss, uld_loss
    from kd_utils.distill.terms.kd import KD, outcome_kl, span_log_probs
    from kd_utils.models.output_head import OutputHead
    from kd_utils.models.signals import Signals
    from kd_utils.tokens.alignment import align
    from kd_utils.tokens.encoding import Example

    eye = {name: torch.eye(len(row[name]["ids"])) for name in SIDES}
    head = {
        name: OutputHead(row[name]["logits"].T.contiguous().requires_grad_(name == "student"))
        for name in SIDES
    }
    student, teacher = (
        Example(
            "",
            row[name]["ids"].numpy(),
            row[name]["start"],
            row[name]["ends"].numpy(),
            {"hidden": eye[name].half().numpy()},
        )
        for name in SIDES
    )
    found = align(teacher.ends, student.ends)
    out: dict[str, Any] = {"whole_groups": [tokens_of(found.student), tokens_of(found.teacher)]}
    pairs = [pair for pair in zip(*out["whole_groups"]) if pair[0][0] >= student.answer_start]
    groups = dict(zip(SIDES, map(list, zip(*pairs))))
    out |= {
        "groups": list(groups.values()),
        "single": torch.tensor([len(s) == len(t) == 1 for s, t in pairs]),
    }
    before = {name: [group[0] - 1 for group in side_groups] for name, side_groups in groups.items()}
    batch = collate([student], [[teacher]], distill_tokens="answer").teachers[0]
    assert batch.places.tolist() == before["student"]

    def at_each(loss: Any, temperature: float, **options: Any) -> torch.Tensor:
        return torch.stack(
            [
                loss(
                    eye["student"][[s]],
                    head["student"],
                    eye["teacher"][[t]],
                    head["teacher"],
                    temperature,
                    **options,
                )
                for s, t in zip(*before.values())
            ]
        )

    def chain(name: str, until: int | None) -> torch.Tensor:
        spans = [(token, k) for k, group in enumerate(groups[name]) for token in group[:until]]
        tokens, span = torch.tensor(spans, dtype=torch.long).reshape(-1, 2).T
        return span_log_probs(
            eye[name][tokens - 1], head[name], row[name]["ids"][tokens], span, len(pairs), 1.0
        )

    with torch.no_grad():
        out |= {f"uld {T}": at_each(uld_loss, T) for T in TEMPERATURES}
        for key, matched in (("bytes", shared), ("string", by_string)):
            q, p = (
                row[name]["logits"][before[name]].double().softmax(-1)[:, rest].sum(-1)
                for name, rest in zip(SIDES, (matched.student_rest, matched.teacher_rest))
            )
            out |= {f"kl {key}": at_each(kd_loss, 1.0, shared=matched), f"rest {key}": p}
            out[f"bucket {key}"] = p * (p / q).log()
        out |= {
            name: {"joint": chain(name, None).exp(), "mass": chain(name, -1).exp()}
            for name in SIDES
        }
        chains = (chain(name, None)[:, None] for name in SIDES)
        out["span"] = outcome_kl(*chains, 1.0)
    single, slopes = torch.tensor(before["student"])[out["single"]], {}
    for loss in ("uld", "kl"):
        term = KD(head["teacher"], 1.0, shared=shared, logit_loss=loss)
        whole = term(Signals(eye["student"][None], {}, {}, 1), head["student"], batch)
        out[f"whole {loss}"], [slopes[loss]] = (
            whole.detach(),
            torch.autograd.grad(whole, head["student"].weight),
        )
        for other in ("uld", "hybrid"):
            gradients = (
                slopes[loss].T.double().flatten(),
                gold_numbers[f"gradient {other}"].double().flatten(),
            )
            out[f"cosine {other} {loss}"] = torch.cosine_similarity(*gradients, dim=0)
    out["slopes"] = [
        slope[single] * len(pairs) for slope in (gold_numbers["gradient uld"], slopes["uld"].T)
    ]
    ends = [0, *student.ends.tolist()]
    return out | {
        "text": [
            row["text"].encode()[ends[group[0]] : ends[group[-1] + 1]].decode(errors="replace")
            for group in groups["student"]
        ]
    }


def tokens_of(last: np.ndarray) -> list[list[int]]:
    """The tokens of every group, from the index of its last token."""
    return [list(range(a + 1, b + 1)) for a, b in zip([-1, *last[:-1].tolist()], last.tolist())]


def compare(args: argparse.Namespace) -> list[list[Any]]:
    """Compare both sides.

    Returns:
        Lines: what, GOLD's value, this project's value, the largest difference, whether it must be
        0, and the reason if it need not.
    """
    from kd_utils.tokens.alignment import align

    def shown(groups: Any) -> str:
        return " ".join(
            "+".join(map(str, s)) + ":" + "+".join(map(str, t)) for s, t in zip(*groups)
        )

    lines = []
    for name, gold_groups in json.loads((args.work / "cases.json").read_text()).items():
        student, teacher, must = CASES[name]
        try:
            found = align(np.array(teacher), np.array(student))
            found_groups = shown([tokens_of(found.student), tokens_of(found.teacher)])
        except ValueError:
            found_groups = "ValueError"
        why = (
            "GOLD does not check"
            if found_groups == "ValueError"
            else "our last group takes what is left over; GOLD makes "
            "a group of it, dropped later where one side is empty"
        )
        lines.append(
            [
                f"groups (student:teacher), {name}, ends {student} {teacher}",
                shown(gold_groups),
                found_groups,
                float(found_groups != shown(gold_groups)),
                must,
                "" if must else why,
            ]
        )
    return lines + [
        [f"{teacher}: {what}", *rest]
        for teacher in TEACHERS
        for what, *rest in lines_of_pair(args, teacher)
    ]


def lines_of_pair(args: argparse.Namespace, teacher: str) -> list[list[Any]]:
    from kd_utils.distill.logit_losses import Shared
    from kd_utils.models.loading import load_tokenizer
    from kd_utils.tokens.vocabulary import Vocabulary, byte_ends, shared_pieces

    gold, paths = read(args.work / f"gold-{teacher}.pt"), sorted(args.work.glob(f"{teacher}-*.pt"))
    tokenizers = {
        name: load_tokenizer(str(args.shared / "tokenizers" / name)) for name in (teacher, STUDENT)
    }
    known = {name: Vocabulary.of(tokenizer) for name, tokenizer in tokenizers.items()}
    sizes, pieces = (
        [len(vocabulary.pieces) for vocabulary in known.values()],
        shared_pieces(*known.values()),
    )
    shared = Shared.of(torch.from_numpy(pieces.teacher), torch.from_numpy(pieces.student), *sizes)
    by_string = Shared.of(*torch.tensor(gold["pieces"]).T, *sizes)
    rows = [
        kd_utils_row(read(path), gold_numbers, shared, by_string)
        for path, gold_numbers in zip(paths, gold["rows"])
    ]
    both, lines, single = (gold["rows"], rows), [], torch.cat([row["single"] for row in rows])
    long = ~single

    def joined(side: list[dict[str, Any]], *keys: str) -> torch.Tensor:
        for key in keys:
            side = [row[key] for row in side]
        return torch.cat([value.double().reshape(-1) for value in side])

    def line(what: str, expected: torch.Tensor, found: torch.Tensor, why: str = "") -> None:
        """Add a line of means; without a reason `why` not, they must be equal."""
        if len(expected):
            apart = ((expected - found).abs().max() / expected.abs().max()).item()
            lines.append(
                [
                    f"{what} ({len(expected)})",
                    f"{expected.mean():.6f}",
                    f"{found.mean():.6f}",
                    apart,
                    not why,
                    why,
                ]
            )

    def counts(what: str, expected: int, found: int, apart: int, why: str = "") -> None:
        lines.append([what, str(expected), str(found), float(apart), not why, why])

    for name, encoded in gold["ends"].items():
        if isinstance(encoded, str):
            lines.append(
                [
                    f"byte ends by {name}",
                    "refused",
                    "in use",
                    None,
                    False,
                    f"{encoded}; ours are given to it",
                ]
            )
            continue
        found_ends = [
            byte_ends(tokenizers[name], known[name], read(path)["text"], ids).tolist()
            for path, (ids, _) in zip(paths, encoded)
        ]
        wrong = sum(
            a != b
            for ends, (_, gold_ends) in zip(found_ends, encoded)
            for a, b in zip(ends, gold_ends)
        )
        counts(f"byte ends by {name}, tokens", *[sum(map(len, found_ends))] * 2, wrong)
    for what, key in (
        ("whole rows", "whole_groups"),
        ("answers alone, bytes counted from their start", "groups"),
    ):
        found = [
            {(k, str(pair)) for k, row in enumerate(side) for pair in zip(*row[key])}
            for side in both
        ]
        counts(f"groups of {what}", *map(len, found), len(found[0] ^ found[1]))
        if found[0] != found[1]:  # nothing below can be compared
            return lines
    for T in TEMPERATURES:
        line(
            f"sorted distance, T={T:g}, 1:1 groups",
            *(joined(side, f"uld {T}")[single] for side in both),
        )
    slopes = [torch.cat([row["slopes"][k] for row in rows]) for k in range(2)]
    lines.append(
        [
            f"norms of its gradients, 1:1 groups ({len(slopes[0])})",
            *(f"{slope.norm(dim=-1).mean():.6f}" for slope in slopes),
            ((slopes[0] - slopes[1]).abs().max() / slopes[0].abs().max()).item(),
            True,
            "",
        ]
    )
    plain = [[numbers for numbers, row in zip(side, rows) if row["single"].all()] for side in both]
    line(
        "whole sorted distance, rows of 1:1 groups", *(joined(side, "whole uld") for side in plain)
    )
    means = torch.stack([joined([row], "uld 1.0").mean() for row in gold["rows"]])
    line(
        "GOLD's own distances, averaged",
        means.mean()[None],
        joined(gold["rows"], "uld 1.0").mean()[None],
        "GOLD weighs every row alike, we every group of the batch",
    )

    pairs = [set(gold["pieces"]), set(zip(pieces.teacher.tolist(), pieces.student.tolist()))]
    other = [
        (t, s) for t, s in gold["pieces"] if known[teacher].pieces[t] != known[STUDENT].pieces[s]
    ]
    named = "".join(
        f", as {known[teacher].pieces[t]!r} and {known[STUDENT].pieces[s]!r}" for t, s in other[-1:]
    )
    counts(
        "matched pieces",
        *map(len, pairs),
        len(pairs[0] ^ pairs[1]),
        "GOLD matches what is written alike (Ġthe is "
        f"not ▁the); {len(other)} of its pairs spell other bytes{named}",
    )
    line(
        "teacher's mass on other pieces",
        joined(rows, "rest string"),
        joined(rows, "rest bytes"),
        "fewer are matched"
        if len(pairs[0]) < len(pairs[1])
        else "as many are matched, some bytes to other ids",
    )
    matched, unmatched, hybrid = (
        joined(gold["rows"], key)[single] for key in ("matched", "unmatched", "hybrid")
    )
    line(
        "KL over GOLD's matches, ours less its bucket, 1:1 groups",
        matched,
        (joined(rows, "kl string") - joined(rows, "bucket string"))[single],
    )
    weight, bucket = len(gold["pieces"]) / sizes[0], joined(rows, "bucket bytes")[single].mean()
    line(
        "hybrid = w KL + (1 - w) sorted rest, 1:1 groups",
        hybrid,
        weight * matched + (1 - weight) * unmatched,
    )
    line(
        "hybrid against our KL, 1:1 groups",
        hybrid,
        joined(rows, "kl bytes")[single],
        f"GOLD: {weight:.3f} x {matched.mean():.3f} + {1 - weight:.3f} x {unmatched.mean():.3f}, w "
        f"by number of "
        f"pieces; ours: pieces matched by bytes, and one exact bucket for the rest, whose part is "
        f"{bucket:.3f}",
    )

    for name in SIDES:
        line(
            f"{name}'s probability of a longer group",
            *(joined(side, name, "joint")[long] for side in both),
        )
        line(
            f"{name}'s: sum of GOLD's vector, probability of the earlier tokens",
            *(joined(side, name, "mass")[long] for side in both),
        )
    distance, span = joined(gold["rows"], "uld 1.0")[long], joined(rows, "span")[long]
    mass, joint = (
        [joined(gold["rows"], name, key)[long] for name in SIDES] for key in ("mass", "joint")
    )
    if len(distance):
        gap = ((mass[0] - mass[1]).abs() / distance).mean()
        line(
            "distance against our two-outcome KL, longer groups",
            distance,
            span,
            "GOLD compares vectors over the last "
            f"token, whose masses are not 1: their difference is {gap:.0%} of it; ours is of the "
            f"text or any other",
        )
        line(
            "distance against our sorted distance, longer groups",
            distance,
            joined(rows, "uld 1.0")[long],
            "ours is taken before the group's first token, where both sum to 1",
        )
        k = int(span.argmin())
        text = [
            text
            for row in rows
            for text, single_group in zip(row["text"], row["single"])
            if not single_group
        ][k]
        line(
            f"the one where our KL is smallest, {text!r}",
            distance[[k]],
            span[[k]],
            "student and teacher give it "
            "{:.3f} and {:.3f}, GOLD's vectors sum to {:.3f} and {:.3f}".format(
                *(values[k] for values in (*joint, *mass))
            ),
        )
    for what in ("uld uld", "uld kl", "hybrid kl"):
        cosines = joined(rows, f"cosine {what}")
        lines.append(
            [
                f"gradients' cosine, GOLD's and ours: {what}",
                "",
                f"{cosines.mean():.3f}",
                None,
                False,
                f"mean over rows, {cosines.min():.3f} at least; for information",
            ]
        )
    return lines


# ---- the driver


def in_process(python: str, side: str, args: argparse.Namespace, work: str) -> Any:
    """Run a side in a fresh process and return what it printed.

    Raises:
        RuntimeError: the process failed; with the end of its standard error.
    """
    command = [
        python,
        __file__,
        "--side",
        side,
        "--work",
        work,
        "--shared",
        str(args.shared),
        "--rows",
        str(args.rows),
    ]
    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        raise RuntimeError(
            f"side {side} failed (exit status {done.returncode}):\n{done.stderr[-3000:]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def verdict(difference: float | None, must: bool, why: str) -> str:
    """The last column: whether a line that must be equal is so, or why the line may differ."""
    return why if not must else "equal" if difference <= TOLERANCE else "NOT EQUAL, and must be"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl-python", help="Python of an environment with TRL")
    parser.add_argument(
        "--shared",
        type=Path,
        default=Path(__file__).parents[2] / "shared",
        help="tokenizers and data",
    )
    parser.add_argument("--rows", type=int, default=2, help="of each task")
    for internal, kind in (("--side", str), ("--work", Path)):
        parser.add_argument(internal, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps({"prepare": prepare, "gold": gold, "ours": compare}[args.side](args)))
        return 0
    if not args.trl_python:
        parser.error("give --trl-python")
    with tempfile.TemporaryDirectory() as work:
        in_process(sys.executable, "prepare", args, work)
        versions = in_process(args.trl_python, "gold", args, work)
        lines = in_process(sys.executable, "ours", args, work)
    print(
        ", ".join(map(" ".join, versions.items())),
        "\n\nwhat (how many, means) | GOLD | ours | largest difference, "
        "relative | equal, or why not",
    )
    verdicts = [verdict(*line[3:]) for line in lines]
    for (what, expected, found, difference, *_), said in zip(lines, verdicts):
        shown = "" if difference is None else f"{difference:.1e}"
        print(f"{what} | {expected} | {found} | {shown} | {said}")
    failed = sum(said.startswith("NOT EQUAL") for said in verdicts)
    print(f"\n{sum(line[4] for line in lines)} lines must be equal, {failed} are not")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
