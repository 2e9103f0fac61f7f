"""A new kind of signal as one row of the table: cached, verified, read back and lined up."""

import numpy as np
import pytest
import torch

from kd_utils.cache.manifest import CacheError
from kd_utils.cache.teacher_cache import TeacherCache
from kd_utils.cache.verification import check_row, open_verified, verify
from kd_utils.distill.batches import collate
from kd_utils.models import signal_kinds
from kd_utils.models.loading import load_causal_lm
from kd_utils.models.signal_kinds import SignalKind
from kd_utils.tokens.encoding import Example


def positive(array, n):
    if not (array > 0).all():
        raise ValueError("a token's embedding has no positive norm")
    return 0.0


#: The norm of each token's embedding.
TOKEN_NORM = SignalKind(
    "token_norm",
    dtypes=("float32",),
    shape=lambda n, manifest: (n, 1),
    take=lambda teacher, b, n, layer: teacher.model.get_input_embeddings()(
        teacher.input_ids[b, :n]
    ).norm(dim=-1, keepdim=True),
    check=positive,
    promise="norms are positive",
)


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(signal_kinds, "SIGNAL_KINDS", dict(signal_kinds.SIGNAL_KINDS))
    signal_kinds.register(TOKEN_NORM)


@pytest.mark.parametrize("signals", ["white_box token_norm", "top_k token_norm"])
def test_a_new_signal_is_cached_verified_read_and_lined_up(registered, project, signals):
    folder, checks = project.cache(signals=signals)
    assert checks["norms are positive"] == "within 0.0e+00"
    cache = open_verified(
        folder, data_hash=TeacherCache(folder).manifest["data_hash"], teacher=None
    )
    rows = [cache[example_id] for example_id in cache.splits["validation"]]
    norms = load_causal_lm(project.parameters["teacher"]).get_input_embeddings().weight.norm(dim=-1)
    for row in rows:
        wanted = norms[torch.tensor(row.tokens.tolist())].detach().numpy()
        np.testing.assert_allclose(row.signals["token_norm"][:, 0], wanted, rtol=1e-6)

    # A student whose tokenizer makes one token of the text's first two is compared behind them.
    student = [
        Example(row.example_id, row.tokens[1:], row.answer_start - 1, row.ends[1:]) for row in rows
    ]
    targets = collate(student, [rows]).teachers[0]
    wanted = np.concatenate([row.signals["token_norm"][1:] for row in rows])
    np.testing.assert_array_equal(targets.signals["token_norm"].numpy(), wanted)
    assert len(targets.places) == sum(len(row.tokens) for row in student)


def test_what_is_wrong_with_a_new_signal_is_found(registered, project):
    folder, _ = project.cache(signals="white_box token_norm")
    cache = TeacherCache(folder)
    row = cache[cache.splits["train"][0]]
    for spoiled, message in (
        (row.signals["token_norm"][:-1], "token_norm has shape .*, expected"),
        (row.signals["token_norm"] * np.nan, "token_norm has values that are not finite"),
        (-row.signals["token_norm"], "a token's embedding has no positive norm"),
    ):
        changed = Example(row.example_id, row.tokens, row.answer_start, row.ends)
        changed.signals = row.signals | {"token_norm": spoiled}
        with pytest.raises(CacheError, match=f"row {row.example_id}: {message}"):
            check_row(cache.manifest, changed)
    shard = next(folder.glob("train-*.parquet"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CacheError, match="damaged"):
        verify(folder)


def test_a_signal_that_nobody_registered_is_named(project):
    with pytest.raises(ValueError, match="no signal is called 'token_norm'.*known: hidden, att"):
        project.cache(signals="white_box token_norm")
    with pytest.raises(ValueError, match="signals = 'everything': String should match"):
        project.cache(signals="everything")
    with pytest.raises(ValueError, match="signal 'norm_2': use lower-case words"):
        signal_kinds.register(
            SignalKind("norm_2", ("float32",), lambda *_: (1, 1), lambda *_: None)
        )
