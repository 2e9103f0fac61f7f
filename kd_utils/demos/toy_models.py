"""The toy benchmark's models: tokenizers, teachers to be trained, a student that has read a little.

There are two teachers: one with the student's tokenizer, which takes words whole, and one with a
tokenizer of its own.

What `build` writes are ordinary Parquet files and ordinary `transformers` folders, so no other code
knows that it is a toy.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from kd_utils.demos.toy import Row, draw_facts, generate, gsm8k_rows, mmlu_rows, sst2_rows
from kd_utils.records.source_code import code_of
from kd_utils.store.files import full_disk_named, sha256_file, sha256_json
from kd_utils.store.sealed import RecordError, read_sealed, write_sealed

SPECIAL_TOKENS = ["<pad>", "<s>", "</s>"]

#: Teacher and student differ in width, depth and head size (the projector is needed) and share the
#: head count, so that attention maps compare head by head.
TEACHER = dict(hidden_size=96, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4)

STUDENT = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)

#: Pieces of the tokenizer of `teacher-subwords`: frequent words whole, rarer ones in parts.
SUBWORDS = 580

#: The fixed wording of the three prompts, which `tasks` forms. Each phrase is one token: it does
#: not differ between the examples of a task, and a third of all tokens is saved.
PHRASES = (
    "The following are multiple choice questions (with answers) about",
    "\nQuestion: Is this sentence positive or negative?\nAnswer:",
    "Question:",
    "\nA.",
    "\nB.",
    "\nC.",
    "\nD.",
    "\nAnswer:",
)

#: What the student reads before it comes here, as a TinyLlama has read much before it is distilled:
#: rows of each kind, and the training. From random weights it would not learn in a trial's few
#: epochs to match choices and letters.
PRETRAINING_ROWS = {"sst2": 1200, "mmlu": 6000, "gsm8k": 800}

PRETRAINING = dict(epochs=4, learning_rate=3e-3, batch_size=32, prompt_weight=1.0)


def pretraining_text(tables: dict[str, list[Row]], seed: int) -> list[tuple[str, str]]:
    """(prompt, answer) of what the student is pretrained on: no question and no fact of `tables` is
    among them.

    Sentences that follow their sentiment, multiple choice about a world in which every thing has
    another one's value, and worked answers without problems. They teach to read, to match and to
    calculate; the tasks are still to come.
    """
    from kd_utils.data.tasks import TASKS

    rng = random.Random(f"{seed}/pretraining")
    facts = draw_facts(random.Random(f"{seed}/facts"))
    other = {
        subject: dict(zip(known, [*list(known.values())[1:], *known.values()]))
        for subject, known in facts.items()
    }
    sst2, gsm8k = (
        sst2_rows(rng, PRETRAINING_ROWS["sst2"]),
        gsm8k_rows(rng, PRETRAINING_ROWS["gsm8k"]),
    )
    # The same question comes again with its choices in another order.
    mmlu = [row for _ in range(10) for row in mmlu_rows(rng, other, PRETRAINING_ROWS["mmlu"] // 10)]
    told = {prompt for prompt, _ in _pairs(tables)}
    return [
        *(
            (f"{('negative', 'positive')[row['label']]}:", f" {row['sentence']}")
            for row in sst2
            if TASKS["sst2"].prompt(row) not in told
        ),
        *(pair for pair in _pairs({"mmlu": mmlu}) if pair[0] not in told),
        *(("Answer:", f" {row['answer']}") for row in gsm8k),
    ]


def pretrain(model: Any, tokenizer: Any, text: list[tuple[str, str]], seed: int) -> None:
    """Train `model` on `text`, with the same result whatever the number of cores."""
    import pandas as pd
    import torch

    from kd_utils.teacher.fine_tuning import fine_tune
    from kd_utils.tokens.encoding import encode_table

    table = pd.DataFrame([("", *pair) for pair in text], columns=["example_id", "prompt", "answer"])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums are added up in another order with more threads
    try:
        with torch.random.fork_rng(devices=[]):
            fine_tune(
                model,
                encode_table(tokenizer, table),
                **PRETRAINING,
                seed=seed,
                autocast=nullcontext,
                device=torch.device("cpu"),
            )
    finally:
        torch.set_num_threads(threads)


def build_tokenizer(texts: Iterable[str]) -> Any:
    """A lossless word-level tokenizer: one token for each word of `texts`, bytes for whatever else
    may come.

    A word takes the space before it, as in GPT-2, so a prompt's tokens stay a prefix once " answer"
    is appended.

    Returns:
        A `PreTrainedTokenizerFast` with bos, eos and pad tokens; it adds none of them by itself.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    phrases = "|".join(re.escape(phrase) for phrase in PHRASES)
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(phrases + r"| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\n+|\s"),
                behavior="isolated",
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    words = {word for text in texts for word, _ in split.pre_tokenize_str(text)}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [*SPECIAL_TOKENS, *alphabet, *sorted(words - set(alphabet))]
    # With no merges and `ignore_merges`, BPE takes a word whole where the vocabulary has it, and
    # else byte by byte.
    tokenizer = Tokenizer(
        models.BPE({token: i for i, token in enumerate(vocabulary)}, [], ignore_merges=True)
    )
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def build_subword_tokenizer(texts: Iterable[str]) -> Any:
    """A byte-level BPE of the texts, as Llama-3's is made: for a teacher whose tokens are not the
    student's.

    Frequent words are pieces in both, under other ids; rarer ones fall into parts, and phrases into
    words.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r" ?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]+|\n+|\s"), behavior="isolated"
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SUBWORDS,
        special_tokens=SPECIAL_TOKENS[::-1],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(sorted(texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def build_model(tokenizer: Any, sizes: dict[str, int], seed: int) -> Any:
    """A `LlamaForCausalLM` of `sizes` with random weights; the caller's random state is left as it
    was.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **sizes,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        initializer_range=0.06,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def build(folder: Path, seed: int = 1) -> None:
    """Write the toy benchmark to `folder`: data/{sst2,mmlu,gsm8k}/SPLIT.parquet, tokenizer,
    teacher, teacher-subwords, student.

    Nothing is done where `folder` already holds, byte for byte, what this code writes for `seed`.
    Otherwise it is built aside and renamed into place, so that a build that is killed leaves
    nothing half done.

    Raises:
        FileExistsError: `folder` holds something that no build wrote.
        OSError: the disk is full.
    """
    from kd_utils.data.prepared_data import remove_leftovers

    folder = Path(folder)
    code = {
        name: digest
        for name, digest in code_of("01_prepare_data", {"demos.toy_models"}).items()
        if name.endswith(".py")
    }
    stamp = {"seed": seed, "code": sha256_json(code)[:16]}
    remove_leftovers(folder)
    found = _stamp(folder)
    if found == stamp:
        return
    if found is None and folder.exists() and any(folder.iterdir()):
        raise FileExistsError(
            f"{folder} holds files that no toy build wrote: move them, or name another folder"
        )
    aside = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    try:
        with full_disk_named(folder):
            _write(aside, seed)
            checksums = {
                str(path.relative_to(aside)): sha256_file(path)
                for path in sorted(aside.rglob("*"))
                if path.is_file()
            }
            write_sealed(aside / "toy.json", {**stamp, "checksums": checksums}, "checksums")
            _move_into_place(aside, folder, stamp)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write(folder: Path, seed: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = generate(seed)
    for name, rows in tables.items():
        path = folder / "data" / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), path)
    text = pretraining_text(tables, seed)
    texts = ["".join(pair) for pair in [*_pairs(tables), *text]]
    words, subwords = build_tokenizer(texts), build_subword_tokenizer(texts)
    words.save_pretrained(folder / "tokenizer")
    for name, tokenizer, sizes in (
        ("teacher", words, TEACHER),
        ("teacher-subwords", subwords, TEACHER),
        ("student", words, STUDENT),
    ):
        model = build_model(tokenizer, sizes, seed)
        if name == "student":
            pretrain(model, tokenizer, text, seed)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def _pairs(tables: dict[str, list[Row]]) -> Iterable[tuple[str, str]]:
    """Prompt and answer of each row, as `tasks.load_task` forms them; the tables' names start with
    their task's.
    """
    from kd_utils.data.tasks import TASKS

    for name, rows in tables.items():
        task = TASKS[name.split("/")[0]]
        for row in rows:
            about = (
                f"{PHRASES[0]} {row['subject'].replace('_', ' ')}.\n\n" if "subject" in row else ""
            )
            yield about + task.prompt(row), task.answer(row)


def _stamp(folder: Path) -> dict[str, Any] | None:
    """Seed and code of the build in `folder`; {} if it is damaged, None if there is none."""
    if not (folder / "toy.json").is_file():
        return None
    try:
        stamp = read_sealed(folder / "toy.json", "checksums")
        checksums = stamp.pop("checksums")
        checksums.pop("sha256")
        return (
            stamp if {name: sha256_file(folder / name) for name in checksums} == checksums else {}
        )
    except (RecordError, OSError):
        return {}


def _move_into_place(aside: Path, folder: Path, stamp: dict[str, Any]) -> None:
    old = folder.parent / f".{folder.name}.old-{os.getpid()}"
    if _stamp(folder) is not None:
        # Not deleted in place: killed in the middle of that, a folder would be left that no build
        # seems to have made.
        folder.rename(old)
    try:
        aside.rename(folder)
    except OSError:
        # Another process was faster: its build is as good as this one if it has the same stamp.
        if _stamp(folder) != stamp:
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
