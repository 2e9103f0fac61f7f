"""A small project, made in a second by the functions that notebooks 01 and 02 call."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
from tiny import tiny_llama, tiny_tokenizer

from kd_utils.cache.manifest import cache_folder
from kd_utils.cache.verification import verify
from kd_utils.cache.writer import assemble_cache, write_shards
from kd_utils.config.parameter_files import notebook_config
from kd_utils.data.answers import answered_tables
from kd_utils.data.drawing import prepare
from kd_utils.data.prepared_data import load_prepared, save_prepared
from kd_utils.evaluation.footprint import footprint
from kd_utils.evaluation.scoring import evaluate
from kd_utils.models.devices import choose_device
from kd_utils.models.loading import load_causal_lm, load_tokenizer, model_fingerprint, save_model
from kd_utils.teacher.answers import ask_teacher
from kd_utils.teacher.extraction import (
    cache_header,
    cached_layers,
    signal_function,
    stored_head_bias,
    stored_lm_head,
)
from kd_utils.tokens.encoding import encode_splits
from kd_utils.tokens.vocabulary import Vocabulary

ADJECTIVES = ("dull", "fine", "warm", "slow", "bright", "tedious", "clever", "flat")


def write_rows(data: Path) -> None:
    """Rows of SST-2 and GSM8K, as the hub has them."""
    for split, nouns in (("train", ("film", "cast", "plot", "score")), ("validation", ("end",))):
        sentences = [f"a {adjective} {noun}" for noun in nouns for adjective in ADJECTIVES]
        labels = [k % 2 for k in range(len(sentences))]
        _write(data / "sst2" / f"{split}.parquet", sentence=sentences, label=labels)
    for split, numbers in (("train", range(2, 22)), ("test", range(30, 34))):
        questions = [f"Tom has {n} apples and buys 3 more. How many?" for n in numbers]
        answers = [f"{n}+3=<<{n}+3={n + 3}>>{n + 3} apples.\n#### {n + 3}" for n in numbers]
        _write(data / "gsm8k" / f"{split}.parquet", question=questions, answer=answers)


def _write(path: Path, **columns: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(columns).to_parquet(path, index=False)


def small_project(root: Path, **parameters: Any) -> SimpleNamespace:
    """A teacher and a student with one tokenizer, prepared data, and 02 as a function.

    Args:
        root: where everything goes.
        parameters: at least `train_rows` and `validation_rows`.
    """
    write_rows(root / "data")
    tokenizer = tiny_tokenizer(begin=False)
    size = dict(vocab=len(tokenizer), max_position_embeddings=512)
    for name, model in (
        ("teacher", tiny_llama(width=48, layers=3, seed=5, **size)),
        ("student", tiny_llama(layers=2, seed=1, **size)),
    ):
        save_model(model, tokenizer, root / name)
    parameters = {
        "name": "tiny",
        "artifacts_dir": str(root / "artifacts"),
        "build": "none",
        "data_dir": str(root / "data"),
        "tokenizer": str(root / "student"),
        "teacher": str(root / "teacher"),
        "student": str(root / "student"),
        "held_out_rows": 2,
        "teacher_epochs": 0,
        "device": "cpu",
    } | parameters
    config = notebook_config("01_prepare_data", parameters)
    save_prepared(prepare(config, tokenizer), config.data_path)
    return SimpleNamespace(
        root=root, parameters=parameters, cache=partial(cache, parameters), tokenizer=tokenizer
    )


def cache(parameters: dict[str, Any], **changes: Any) -> tuple[Path, pd.Series]:
    """What notebook 02 does: every row cached and verified. Returns the folder and the table."""
    config = notebook_config("02_cache_teacher", {**parameters, **changes})
    prepared, tokenizer = load_prepared(config.data_path), load_tokenizer(config.teacher)
    vocabulary = Vocabulary.of(tokenizer)
    base, model = model_fingerprint(config.teacher), load_causal_lm(config.teacher).eval()
    model.to(choose_device(config.device))
    said = ask_teacher(config, model, tokenizer, load_tokenizer(config.tokenizer), prepared)
    data = answered_tables(prepared, said)
    examples = encode_splits(tokenizer, data, vocabulary)
    header = cache_header(config, prepared, config.teacher, base, base, model, tokenizer, {})
    folder = cache_folder(config.artifacts, config.name, header["key"])
    run_teacher = signal_function(
        model,
        signals=config.signals,
        temperatures=header["temperatures"],
        attention_dtype=config.attention_dtype,
        layers=cached_layers(config, model),
    )
    options = {"batch_tokens": config.batch_tokens, "new_sums": run_teacher.new_sums}
    write = partial(write_shards, folder, signals_of=run_teacher, **options)
    has_hidden = "hidden" in header["dtypes"]
    lm_head = stored_lm_head(model) if has_hidden else None
    bias = stored_head_bias(model) if has_hidden else None
    header["footprint"] = footprint(model, examples["validation"])
    answered = evaluate(
        model, tokenizer, prepared.validation, batch_size=8, max_new_tokens=config.max_new_tokens
    )
    sizes = dict(shard_examples=16, vocabulary=vocabulary, head_bias=bias, answers=said)
    sizes["predictions"] = answered
    assemble_cache(folder, examples, write, lm_head, header, **sizes)
    return folder, verify(folder, data, run_teacher).set_index("check")["result"]
