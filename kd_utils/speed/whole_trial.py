"""The paper's work as a user runs it: the teacher's pass, one trial's training, one generation."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from kd_utils.config import stages
from kd_utils.config.parameter_files import notebook_config
from kd_utils.data.tasks import gsm8k
from kd_utils.distill import meter, training
from kd_utils.evaluation import generation
from kd_utils.models import devices
from kd_utils.speed import meters, progress, workload
from kd_utils.speed.step import METHODS, WEIGHTS, StepBench
from kd_utils.tokens.encoding import Example


def teacher_pass(
    folder: Path, rows: list[Example], teacher: torch.nn.Module, *, batch_tokens: int
) -> dict[str, float]:
    """Write the rows' cache once, as notebook 02 does.

    Returns:
        `teacher_pass_s`, the seconds until the cache is sealed on disk; `teacher_pass_gb` on disk;
        `teacher_pass_peak_mb`, the most memory held, the teacher's weights included.
    """
    laps = meters.Laps(teacher.device)

    def write() -> None:
        laps.lap("before")
        workload.write_sample(folder, rows, teacher, batch_tokens=batch_tokens)
        laps.lap("pass")

    peak = meters.peak_mb(write, device=teacher.device, all_held=True)
    on_disk = sum(file.stat().st_size for file in folder.iterdir())
    return {
        "teacher_pass_s": laps.seconds["pass"],
        "teacher_pass_gb": on_disk / 1e9,
        "teacher_pass_peak_mb": peak,
    }


def train(bench: StepBench, count: int, record: progress.SpeedRecord) -> pd.DataFrame:
    """Run `epochs` and write each into the record; its time limit ends the training after one.

    The record gets `trial_peak_mb`, the most memory held, `trial_tokens_per_s`, the median over
    epochs, and, where all epochs are done, `trial_s`, the seconds of training.

    Returns:
        The rows of `epochs`.
    """
    rows: list[dict[str, float]] = []

    def run() -> None:
        for row in epochs(bench, count):
            rows.append(row)
            record.tables["epochs"] = rows
            record.write()
            if len(rows) < count and not record.has_time:
                record.left_out.append(f"whole trial: epochs {len(rows) + 1} to {count}")
                break

    record.measured["trial_peak_mb"] = meters.peak_mb(run, device=bench.device, all_held=True)
    table = pd.DataFrame(rows)
    record.measured["trial_tokens_per_s"] = float(table["tok_per_sec"].median())
    if len(rows) == count:
        record.measured["trial_s"] = float(table["seconds"].sum())
    return table


def epochs(bench: StepBench, count: int) -> Iterator[dict[str, float]]:
    """Train with all signals for `count` epochs, with notebook 03's loop and its meter.

    Yields:
        After each epoch its row of metrics, without an evaluation: `epoch`, `step`, `seconds`,
        `tok_per_sec`, `train_loss` and its terms.

    Raises:
        FloatingPointError: a step was not finite.
    """
    values = {
        "distill_type": "combined",
        "epochs": count,
        "batch_size": bench.config.bench_batch_size,
    }
    per_epoch = len(bench.plan)
    stretches = [range(epoch * per_epoch, (epoch + 1) * per_epoch) for epoch in range(count)]
    measure = meter.Meter(notebook_config(stages.TRAIN, values), stretches, datetime.now(UTC))
    for epoch, _ in enumerate(measure.stretches(), 1):
        for batch in bench.read(bench.plan_of(epoch), METHODS["combined"]):
            training.seed_step(bench.config.seed, measure.global_step)
            terms = bench.loss_terms(batch, METHODS["combined"])
            loss = training.weighted_sum(terms, WEIGHTS)
            loss.backward()
            measure.add(batch, loss, terms, parts=1)
            measure.step(bench.update(), terms)
        measure.stop_training()
        yield measure.end_stretch({})


def generate(bench: StepBench, prompts: int, max_new_tokens: int) -> dict[str, float]:
    """Answer one batch of prompts of GSM8K's lengths with the bench's student, as a trial does.

    Words are numbers, and random weights hardly ever stop: this is the longest that a batch takes.

    Returns:
        `generation_s`; `generation_prompts`; `generation_tokens`, generated for all of them.
    """
    vocab_size = bench.shape["student"]["vocab_size"]
    rows = workload.random_rows(7 * prompts, vocab_size, seed=bench.config.seed)  # 1 of 7 is GSM8K
    texts = [" ".join(map(str, row.tokens[: row.answer_start])) for row in rows[-prompts:]]
    model, tokenizer = bench.student.eval(), number_tokenizer(vocab_size)
    assert gsm8k.TASK.generation is not None
    sizes = {"stop_strings": gsm8k.TASK.generation.stop_strings, "batch_size": prompts}
    with devices.autocast(bench.device, bench.config.precision):
        generation.generate_answers(model, tokenizer, texts[:2], **sizes, max_new_tokens=2)
        laps = meters.Laps(bench.device)
        answers = generation.generate_answers(
            model, tokenizer, texts, **sizes, max_new_tokens=max_new_tokens
        )
        laps.lap("generation")
    tokens = sum(len(answer.split()) for answer in answers)
    return {
        "generation_s": laps.seconds["generation"],
        "generation_prompts": prompts,
        "generation_tokens": tokens,
    }


def number_tokenizer(vocab_size: int) -> Any:
    """A tokenizer whose words are its ids, from 3; the ids before are Llama's special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *map(str, range(3, vocab_size))]
    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
