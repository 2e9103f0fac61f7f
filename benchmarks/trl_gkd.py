"""Compare the speed and peak memory of TRL's `GKDTrainer` with training from a teacher cache.

    python benchmarks/trl_gkd.py --trl-python TRL_ENV/bin/python

TRL trains off-policy with the teacher online. It has an environment of its own (`pip install trl`;
written against `trl.experimental.gkd` of 1.16). Every measurement is a fresh process, and the sides
take turns. Nothing is downloaded.

**Both sides have the same loss.** GKD with `beta=0` is KL(teacher || student) over the whole
vocabulary, summed over the tokens that predict the answer and divided by their number in the batch;
there is no cross-entropy term. Its `temperature` affects sampling only (`compute_loss` does not use
it), so T = 1, and the factor T^2 does not matter. In this project that is `{"kd": 1.0}` with
`distill_tokens="answer"` and T = 1. The run stops if the losses of the first batch do not agree.

**The same on both sides:** weights, rows, batches and their order (TRL gets them as one long epoch,
which its own sampler takes in sequence), padded widths, AdamW at a constant 1e-4, clipping at 1.0,
float32 on a CPU (on a GPU bfloat16 autocast and a bfloat16 teacher), and no gradient checkpointing,
which is TRL's default.

**TRL's way:** logits of both models at every token, padding on the left with a mask, its own
collator on token ids, no weight decay on norms, fused AdamW; all of `trainer.train()` is timed.

**From the cache ("ours"):** the time includes reading the cache. The teacher pass that wrote it,
with attention maps, is timed apart and is added where the table says so.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 8, 1e-4, 0.01, 1.0
TRIAL_EPOCHS, TRIALS = 3, 28  # what one teacher pass serves in the benchmark
TEACHER_BATCH_TOKENS = 8192  # notebook 02's default
#: Largest relative difference of the first losses (float16 cache; on a GPU bfloat16 products).
TOLERANCE = {"cpu": 1e-3, "cuda": 3e-2}
#: Weights of the loss terms, distilled tokens, temperature.
METHODS = {
    "ours": ({"kd": 1.0}, "answer", 1.0),
    "ours-combined": ({"task": 1.0, "kd": 0.5, "hidden": 0.1, "attention": 0.1}, "all", 2.0),
}


# ---- the sides, which run in processes of their own


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """Write teacher, student, rows by id, and the batches of every epoch as ids."""
    from kd_utils.distill.batches import epoch_batches
    from kd_utils.speed.workload import SHAPES, random_model, random_rows

    for seed, (role, shape) in enumerate(SHAPES[args.shapes].items()):
        random_model(shape, seed=seed).save_pretrained(args.work / role)
    rows = random_rows(args.rows, SHAPES[args.shapes]["student"]["vocab_size"])
    lengths = [len(row.tokens) for row in rows]
    epochs = [
        [
            [rows[i].example_id for i in batch]
            for batch in epoch_batches(lengths, BATCH_SIZE, 0, epoch)
        ]
        for epoch in range(1, args.epochs + 1)
    ]
    (args.work / "rows.json").write_text(
        json.dumps(
            {
                "rows": {row.example_id: [row.answer_start, row.tokens.tolist()] for row in rows},
                "epochs": epochs,
            }
        )
    )
    return {
        "shapes": {"name": args.shapes, **SHAPES[args.shapes]},
        "tokens_per_epoch": sum(lengths),
        "answer_tokens_per_epoch": sum(lengths) - sum(row.answer_start for row in rows),
    }


def train_trl(args: argparse.Namespace) -> dict[str, Any]:
    """Train with `GKDTrainer` on the batches, in TRL's environment."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    losses, on_gpu = [], args.device == "cuda"

    class Recorded(GKDTrainer):
        def compute_loss(self, *inputs: Any, **options: Any) -> torch.Tensor:
            loss = super().compute_loss(*inputs, **options)
            losses.append(loss.detach())
            return loss

    student = AutoModelForCausalLM.from_pretrained(args.work / "student", dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(
        args.work / "teacher", dtype=torch.bfloat16 if on_gpu else torch.float32
    )
    # A stand-in for a tokenizer: it never sees text.
    vocabulary = {str(token): token for token in range(student.config.vocab_size)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="0")),
        pad_token="0",
        bos_token="1",
        eos_token="2",
    )
    rows, epochs = json.loads((args.work / "rows.json").read_text()).values()
    ordered = [rows[example_id] for batches in epochs for batch in batches for example_id in batch]
    dataset = Dataset.from_list(
        [
            {
                "prompt": "",
                "input_ids": tokens,
                "completion_mask": [0] * start + [1] * (len(tokens) - start),
            }
            for start, tokens in ordered
        ]
    )
    config = GKDConfig(
        output_dir=str(args.work / "trl"),
        lmbda=0.0,
        beta=0.0,
        temperature=1.0,
        seq_kd=False,
        num_train_epochs=1,
        per_device_train_batch_size=BATCH_SIZE,
        train_sampling_strategy="sequential",
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=MAX_GRAD_NORM,
        lr_scheduler_type="constant",
        use_cpu=not on_gpu,
        bf16=on_gpu,
        gradient_checkpointing=False,
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Recorded(student, teacher, config, train_dataset=dataset, processing_class=tokenizer)
    start = clocks()
    trainer.train()
    return measured(
        args.device,
        start,
        losses,
        examples=len(ordered),
        tokens=sum(len(ids) for _, ids in ordered),
    )


def cache_teacher(args: argparse.Namespace) -> dict[str, Any]:
    """Run the teacher once over the rows and write its cache."""
    import numpy as np
    import torch

    from kd_utils.models.devices import amp_dtype
    from kd_utils.models.loading import load_causal_lm
    from kd_utils.speed.workload import write_sample
    from kd_utils.tokens.encoding import Example

    device = torch.device(args.device)
    teacher = load_causal_lm(str(args.work / "teacher"), dtype=amp_dtype(device, "auto"))
    teacher = teacher.to(device).eval()
    saved = json.loads((args.work / "rows.json").read_text())["rows"]
    rows = [
        Example(example_id, np.asarray(tokens, np.int32), start)
        for example_id, (start, tokens) in saved.items()
    ]
    start = clocks()
    manifest = write_sample(args.cache, rows, teacher, batch_tokens=TEACHER_BATCH_TOKENS)
    return measured(
        args.device,
        start,
        examples=len(rows),
        tokens=sum(len(row.tokens) for row in rows),
        cache_mb=sum(shard["bytes"] for shard in manifest["shards"]) / 2**20,
    )


def train_from_cache(args: argparse.Namespace) -> dict[str, Any]:
    """Train with the loop of notebook 03 on the same batches, from the cache."""
    import torch

    from kd_utils.cache.teacher_cache import TeacherCache
    from kd_utils.distill.batches import prefetched, split_batch
    from kd_utils.distill.teacher_terms import TeacherTerms
    from kd_utils.distill.terms.attention import AttentionMaps
    from kd_utils.distill.terms.hidden import Hidden
    from kd_utils.distill.terms.kd import KD
    from kd_utils.distill.training import loss_terms, seed_step, weighted_sum
    from kd_utils.models.devices import autocast
    from kd_utils.models.loading import load_causal_lm
    from kd_utils.models.output_head import OutputHead, output_head
    from kd_utils.models.signals import forward_signals

    weights, distill_tokens, temperature = METHODS[args.side]
    device = torch.device(args.device)
    model = load_causal_lm(str(args.work / "student")).to(device).train()
    cache = TeacherCache(args.cache)
    head = OutputHead(cache.lm_head().float().to(device))
    [total] = cache.manifest["layers"]["hidden"]
    last = (total, model.config.num_hidden_layers)
    widths = (model.config.hidden_size, head.weight.shape[1])
    possible = [
        KD(head, temperature),
        Hidden([last], total, widths, [0]),
        AttentionMaps([last], total, cache.manifest["heads"]),
    ]
    teacher = TeacherTerms(term for term in possible if term.name in weights).to(device)
    cache.read_only({column for term in teacher.values() for column in term.columns})
    steps = [
        batch
        for batches in json.loads((args.work / "rows.json").read_text())["epochs"]
        for batch in batches
    ]
    losses = []

    def step_batches(ids: list[str]) -> list:
        return split_batch(
            [cache[i] for i in ids], BATCH_SIZE, distill_tokens=distill_tokens, device=device
        )

    start = clocks()
    parameters = [*model.parameters(), *teacher.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
    )
    for global_step, [batch] in enumerate(prefetched(step_batches, steps)):
        seed_step(0, global_step)
        with autocast(device, "auto"):
            last = [model.config.num_hidden_layers] if "attention" in weights else []
            signals = forward_signals(model, batch.input_ids, map_layers=last)
            terms = loss_terms(
                signals,
                output_head(model),
                batch=batch,
                terms=tuple(weights),
                teachers=[teacher],
            )
            loss = weighted_sum(terms, weights)
        loss.backward()
        losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    ids = [i for batch in steps for i in batch]
    return measured(
        args.device, start, losses, examples=len(ids), tokens=sum(cache.lengths[i] for i in ids)
    )


def clocks() -> tuple[float, float]:
    """Wall seconds, and CPU seconds of this process; they drift apart on a shared machine."""
    return time.perf_counter(), time.process_time()


def measured(
    device: str, start: tuple[float, float], losses: list | tuple = (), **values: Any
) -> dict[str, Any]:
    """Collect what a side measured.

    Args:
        device: "cpu" or "cuda".
        start: `clocks()` when the work began.
        losses: of all steps.
        values: further numbers.

    Returns:
        Seconds since `start`, peak memory (a GPU's allocations, or the resident set), the first and
        the last loss, versions of packages, and `values`.
    """
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    seconds, cpu_seconds = (now - then for now, then in zip(clocks(), start))
    peak = (
        torch.cuda.max_memory_allocated() / 2**20
        if device == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    )
    packages = ("torch", "transformers", *(("trl", "accelerate") if "trl" in sys.modules else ()))
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_mb": peak,
        **values,
        "threads": torch.get_num_threads(),
        "losses": {"first": float(losses[0]), "last": float(losses[-1])} if losses else {},
        "versions": {package: version(package) for package in packages},
    }


SIDES = {
    "prepare": prepare,
    "cache": cache_teacher,
    "trl": train_trl,
    "ours": train_from_cache,
    "ours-combined": train_from_cache,
}


# ---- the driver


def in_process(args: argparse.Namespace, side: str, work: str, cache: str = "") -> dict[str, Any]:
    """Run a side in a fresh process and return what it measured.

    Raises:
        RuntimeError: the process failed; with the end of its standard error.
    """
    command = [
        args.trl_python if side == "trl" else sys.executable,
        __file__,
        "--side",
        side,
        "--work",
        work,
        "--cache",
        f"{work}/{cache}",
        "--shapes",
        args.shapes,
        "--rows",
        str(args.rows),
        "--epochs",
        str(args.epochs),
        "--device",
        args.device,
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


def compared_losses(trl: float, cached: float, tolerance: float) -> dict[str, float]:
    """Compare the losses of the first batch.

    Raises:
        ValueError: they differ by more than `tolerance`, so the sides minimise different losses.
    """
    difference = abs(trl - cached) / abs(trl)
    if not difference <= tolerance:
        raise ValueError(
            f"the loss of the first batch is {trl:.6f} in TRL and {cached:.6f} from the cache, a "
            f"relative difference of {difference:.1e} where {tolerance:.0e} is allowed: make rows, "
            "weights and loss equal before comparing speed"
        )
    return {"trl": trl, "ours": cached, "relative_difference": difference, "tolerance": tolerance}


def summarise(runs: dict[str, list[dict[str, Any]]], epochs: int) -> list[dict[str, Any]]:
    """Summarise the runs, a row per way of counting.

    Returns:
        Rows with median seconds of one epoch, examples per second, that number over TRL's, and
        median peak memory.
    """
    seconds = {
        side: median(run["seconds"] for run in side_runs) for side, side_runs in runs.items()
    }
    train = {side: seconds[side] / epochs for side in ("trl", *METHODS)}
    served = {
        "1 epoch": 1,
        f"a trial, {TRIAL_EPOCHS} epochs": TRIAL_EPOCHS,
        f"{TRIALS} trials of {TRIAL_EPOCHS}": TRIALS * TRIAL_EPOCHS,
    }
    table = [("teacher pass, cache written", "cache", seconds["cache"], "measured")]
    table += [(f"{side}, training", side, train[side], f"measured / {epochs}") for side in train]
    table += [
        (
            f"ours, with the pass over {name}",
            "ours",
            train["ours"] + seconds["cache"] / epochs_served,
            f"training + teacher pass / {epochs_served}",
        )
        for name, epochs_served in served.items()
    ]
    return [
        {
            "counted": counted,
            "seconds_per_epoch": value,
            "arithmetic": arithmetic,
            "examples_per_second": runs["cache"][0]["examples"] / value,
            "times_trl": train["trl"] / value,
            "peak_mb": median(run["peak_mb"] for run in runs[side]),
        }
        for counted, side, value, arithmetic in table
    ]


def drive(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every side `repeats` times, in turn."""
    from kd_utils.records.provenance import environment

    # "cache" comes first, since the sides of METHODS read what it wrote.
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in ("cache", "trl", *METHODS)}
    with tempfile.TemporaryDirectory() as work:
        rows = in_process(args, "prepare", work)
        for repeat in range(args.repeats):
            for side, side_runs in runs.items():
                side_runs.append(in_process(args, side, work, f"cache-{repeat}"))
                print(
                    f"{repeat + 1}/{args.repeats}  {side:<14}{side_runs[-1]['seconds']:9.2f} s",
                    flush=True,
                )
            first = compared_losses(
                *(runs[side][-1]["losses"]["first"] for side in ("trl", "ours")),
                TOLERANCE[args.device],
            )
    where = environment()
    return {
        "commit": where["git_commit"],
        "device": {"used": args.device, **where["device"]},
        "versions": {side: runs[side][0]["versions"] for side in ("trl", "ours")},
        **rows,
        "rows": args.rows,
        "epochs": args.epochs,
        "batch_size": BATCH_SIZE,
        "repeats": args.repeats,
        "first_loss": first,
        "summary": summarise(runs, args.epochs),
        "runs": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl-python", help="Python of an environment with TRL")
    parser.add_argument("--shapes", default="small", help="a key of kd_utils.speed.workload.SHAPES")
    parser.add_argument("--rows", type=int, default=96, help=f"a multiple of {BATCH_SIZE}")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=TOLERANCE, default="cpu")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parents[1] / "runs/bench/trl_gkd.json"
    )
    for internal, kind in (("--side", str), ("--work", Path), ("--cache", Path)):
        parser.add_argument(internal, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(SIDES[args.side](args)))
        return
    # A short batch within TRL's long epoch would shift all batches after it.
    if not args.trl_python or args.rows % BATCH_SIZE:
        parser.error(f"give --trl-python, and --rows as a multiple of {BATCH_SIZE}")
    result = drive(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    first = result["first_loss"]
    print(
        f"\nfirst loss: TRL {first['trl']:.6f}, ours {first['ours']:.6f}, "
        f"{first['relative_difference']:.1e} apart\n"
    )
    print(f"{'':<56}{'examples/s':>11}{'times TRL':>11}{'peak MB':>9}")
    for row in result["summary"]:
        print(
            f"{row['counted']:<56}{row['examples_per_second']:>11.2f}"
            f"{row['times_trl']:>11.2f}{row['peak_mb']:>9.0f}"
        )


if __name__ == "__main__":
    main()
