"""The toy benchmark's models: tokenizers, and teachers and a student pretrained a little.

One teacher has the student's tokenizer, which keeps words whole; the other has its own, and random
weights. `build` writes ordinary Parquet files and `transformers` folders, so no other code knows
that it is a toy.
"""

import random
import re
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from kd_utils.data.tasks import TASKS
from kd_utils.demos import toy
from kd_utils.models import loading
from kd_utils.records.arithmetic import arithmetic
from kd_utils.records.provenance import Ingredients, code_of
from kd_utils.store import files, sealed
from kd_utils.teacher.preparation import fine_tune
from kd_utils.tokens.encoding import encode_table

SPECIAL_TOKENS = ["<pad>", "<s>", "</s>"]

#: Teacher and student differ in width, depth and head size (the projector is needed) and share the
#: head count, so that attention maps compare head by head.
TEACHER = dict(hidden_size=96, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4)
STUDENT = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)

#: The fixed wording of the three prompts (see `data.tasks`). Each phrase is one token, which saves
#: a third of all tokens.
PHRASES = (
    "The following are multiple choice questions (with answers) about",
    "\nQuestion: Is this sentence positive or negative?\nAnswer:",
    "Question:",
    *("\nA.", "\nB.", "\nC.", "\nD."),
    "\nAnswer:",
)

#: Rows that teacher and student are pretrained on, and how: from random weights the student would
#: not learn in a trial's few epochs to read, to compose and to calculate.
PRETRAINING_ROWS = {"sst2": 1500, "mmlu": 800, "gsm8k": 2400}
PRETRAINING: dict[str, Any] = dict(
    epochs=4,
    learning_rate=2e-3,
    lr_schedule="linear",
    warmup_ratio=0.05,
    batch_size=32,
    prompt_weight=1.0,
)


def pretraining_text(tables: dict[str, list[toy.Row]], seed: int) -> list[tuple[str, str]]:
    """(prompt, answer) pairs for pretraining: the same tasks in another world (`toy.draw_worlds`).

    They hold no question of `tables`, no thing that it asks about, and none of its words of praise,
    blame, gain and loss.
    """
    rng = random.Random(f"{seed}/pretraining")
    _, other = toy.draw_worlds(random.Random(f"{seed}/world"))
    rows = {
        task: rows_of(rng, other, PRETRAINING_ROWS[task]) for task, rows_of in toy.TASKS.items()
    }
    told = {prompt for prompt, _ in _pairs(tables)}
    return [pair for pair in _pairs(rows) if pair[0] not in told]


def pretrain(
    model: Any,
    tokenizer: Any,
    text: list[tuple[str, str]],
    seed: int,
    settings: dict[str, Any] = PRETRAINING,
    progress: Callable[[Iterable], Iterable] = iter,
) -> None:
    """Train `model` on `text`, with the same result whatever the number of cores."""
    table = pd.DataFrame(text, columns=["prompt", "answer"]).assign(example_id="")
    rows = encode_table(tokenizer, table)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums are added up in another order with more threads
    try:
        with torch.random.fork_rng(devices=[]):
            fine_tune(
                model,
                rows,
                **settings,
                seed=seed,
                autocast=nullcontext,
                device=model.device,
                progress=progress,
            )
    finally:
        torch.set_num_threads(threads)


def build_tokenizer(texts: list[str]) -> Any:
    """A lossless word-level tokenizer: one token for each word of `texts`, bytes for other text.

    A word includes the space before it, as in GPT-2, so a prompt's tokens stay a prefix when
    " answer" is appended. The bos and eos tokens are not added by the tokenizer itself.
    """
    tokenizer = _byte_level(
        "|".join(map(re.escape, PHRASES)) + r"| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\n+|\s"
    )
    words = {word for text in texts for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [*SPECIAL_TOKENS, *alphabet, *sorted(words - set(alphabet))]
    ids = {token: i for i, token in enumerate(vocabulary)}
    # With `ignore_merges` BPE keeps whole words of the vocabulary; without merges others are bytes.
    tokenizer.model = models.BPE(ids, [], ignore_merges=True)
    return _fast(tokenizer)


def build_subword_tokenizer(texts: list[str]) -> Any:
    """A byte-level BPE of the texts, like Llama 3's, for a teacher with other tokens.

    Frequent words are tokens in both tokenizers, with other ids; rarer words and the `PHRASES` are
    split.
    """
    tokenizer = _byte_level(r" ?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]+|\n+|\s")
    trainer = trainers.BpeTrainer(
        vocab_size=580,
        special_tokens=SPECIAL_TOKENS[::-1],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(sorted(texts), trainer)
    return _fast(tokenizer)


def _byte_level(pattern: str) -> Tokenizer:
    """Cuts text into the matches of a pattern, then writes each one's bytes as characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _fast(tokenizer: Tokenizer) -> Any:
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def build_model(tokenizer: Any, sizes: dict[str, int], seed: int) -> Any:
    """A `LlamaForCausalLM` with random weights; the caller's random state does not change."""
    config = transformers.LlamaConfig(
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
        return transformers.LlamaForCausalLM(config)


def build(folder: Path, seed: int = 1) -> None:
    """Write the toy benchmark to `folder`: data/TASK/SPLIT.parquet, tokenizer, models.

    Nothing is done if `folder` already holds, byte for byte, what this code writes for `seed`.

    Raises:
        FileExistsError: `folder` holds something that no build wrote.
        OSError: the disk is full.
    """
    code = code_of("01_prepare_data", {"demos.toy_models"})
    del code["notebooks/01_prepare_data.ipynb"]  # the models do not depend on it
    made_from = Ingredients(seed={"seed": seed}, code=code)
    build_once(folder, made_from, lambda aside: _write(aside, seed))


def build_once(folder: Path, made_from: Ingredients, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder that will be `folder`, unless it is there, made from the same.

    Raises:
        FileExistsError: `folder` holds something that no build wrote.
        OSError: the disk is full.
    """
    target = sealed.SealedFolder(folder, f"{folder.name}.json")
    files.remove_leftovers(folder)
    if _is_built(target, made_from):
        return
    if files.matching(folder, "*") and not (folder / target.document).is_file():
        raise FileExistsError(
            f"{folder} holds files that no toy build wrote: move them, or set another artifacts_dir"
        )
    try:
        # Another arithmetic gives other weights, which are no worse: it is told, and not compared.
        about = {"made_from": made_from, "arithmetic": arithmetic("cpu")}
        with target.replaced(about) as aside:
            write(aside)
    except OSError:
        # Another process may have built the same toy meanwhile.
        if not _is_built(target, made_from):
            raise


def _is_built(target: sealed.SealedFolder, made_from: Ingredients) -> bool:
    try:
        return target.check()["made_from"] == made_from
    except (sealed.RecordError, KeyError):
        return False


def _write(folder: Path, seed: int) -> None:
    tables = toy.generate(seed)
    for name, rows in tables.items():
        path = folder / "data" / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
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
        if tokenizer is words:
            pretrain(model, tokenizer, text, seed)
        loading.save_model(model, tokenizer, folder / name)


def _pairs(tables: dict[str, list[toy.Row]]) -> list[tuple[str, str]]:
    """Prompt and answer of each row, as `load_task` forms them; names are "TASK/SPLIT"."""
    return [
        (task.description(row) + task.prompt(row), task.answer(row))
        for name, rows in tables.items()
        for task in [TASKS[name.split("/")[0]]]
        for row in rows
    ]
