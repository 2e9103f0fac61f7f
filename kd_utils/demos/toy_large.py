"""The toy benchmark's large teacher: what students are cut from, and converted to other layers.

It is wide and deep enough to be cut to a fiftieth, and has fewer key/value heads than query heads,
as the models have that this project is for.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from kd_utils.demos import toy, toy_models
from kd_utils.models import loading
from kd_utils.records.provenance import Ingredients, code_of
from kd_utils.tokens.encoding import tokenizer_fingerprint

SIZES = dict(
    hidden_size=192,
    intermediate_size=384,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
)

#: With the toy's own settings (a rate of 2e-3, 4 epochs) a model of this size gets 69 % of
#: sentiments right after its fine-tuning: docs/log.md.
PRETRAINING: dict[str, Any] = toy_models.PRETRAINING | dict(epochs=6, learning_rate=7e-4)


def build(folder: Path, toy_folder: Path, progress: Callable[[Iterable], Iterable] = iter) -> None:
    """Write the teacher to `folder`/teacher; a build that is whole is used again.

    It takes minutes, and has the same result on any number of cores.

    Args:
        toy_folder: the toy in its first world, from `toy_models.build`, whose tokenizer it has.
        progress: wraps the list of steps, e.g. `tqdm`.

    Raises:
        FileExistsError: `folder` holds something that no build wrote.
        OSError: the disk is full.
    """
    tokenizer = loading.load_tokenizer(str(toy_folder / "tokenizer"))
    code = code_of("01_prepare_data", {"demos.toy_large"})
    del code["notebooks/01_prepare_data.ipynb"]  # the model does not depend on it
    made_from = Ingredients(tokenizer={"is": tokenizer_fingerprint(tokenizer)}, code=code)

    def write(aside: Path) -> None:
        model = toy_models.build_model(tokenizer, SIZES, seed=1)
        text = toy_models.pretraining_text(toy.generate(1), seed=1)
        toy_models.pretrain(model, tokenizer, text, seed=1, settings=PRETRAINING, progress=progress)
        loading.save_model(model, tokenizer, aside / "teacher")

    toy_models.build_once(folder, made_from, write)
