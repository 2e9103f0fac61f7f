"""Print the tables of docs/cost.md: what the paper's three pairs take, and what fits on which card.

Nothing is loaded: models are sized from their configs, on torch's `meta` device. Run it from the
project's root: `python docs/cost_table.py`.
"""

import pandas as pd
import torch

from kd_utils.config import parameter_files, stages
from kd_utils.cost import cards, disk, estimates, rows, shapes
from kd_utils.models import signal_kinds

TRAINED_METHOD = "combined"

SIZES = """
hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size
""".split()


def llama(*sizes: int) -> shapes.Shape:
    """The shape of a Llama, whose output layer is not tied, from its `SIZES`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**dict(zip(SIZES, sizes, strict=True)))
    with torch.device("meta"):
        return shapes.shape_of(LlamaForCausalLM(config))


#: Parameter file -> its teacher. Mistral has the modules of a Llama.
TEACHERS = {
    "llama2": (4096, 11008, 32, 32, 32, 32000),
    "mistral": (4096, 14336, 32, 32, 8, 32000),
    "llama3": (4096, 14336, 32, 32, 8, 128256),
}
TINY_LLAMA = (2048, 5632, 22, 32, 4, 32000)


def tables(name: str) -> tuple[dict[str, str], pd.DataFrame]:
    """One pair's sizes, and the settings that fit on each card."""
    values = parameter_files.load_parameters(f"papermill_params/{name}.yaml")
    data, cache, trial = (
        parameter_files.notebook_config(stem, values | {"distill_type": TRAINED_METHOD})
        for stem in (stages.PREPARE, stages.CACHE, stages.TRAIN)
    )
    teacher, student = llama(*TEACHERS[name]), llama(*TINY_LLAMA)
    found, _ = rows.expected_rows(data)
    wide, compact = (
        signal_kinds.columns_of(cache.signals, {}, teacher["num_hidden_layers"], dtype)
        for dtype in ("float16", "uint8")
    )
    of_02 = estimates.teacher_memory(cache, teacher, wide, found, True)
    of_03 = estimates.trial_memory(trial, student, [teacher], found, True)

    numbers = {
        "pair": f"`{name}`",
        "teacher, bfloat16": estimates.size(2 * teacher["weights"]),
        "cache, float16 maps": estimates.size(disk.cache(wide, teacher, found.tokens, half=True)),
        "cache, uint8 maps": estimates.size(disk.cache(compact, teacher, found.tokens, half=True)),
        "pass": estimates.size(of_02["batch_tokens"]),
        "its evaluation": estimates.size(of_02["eval_batch_size"]),
        "student with AdamW": estimates.size(16 * student["weights"]),
        "trial": estimates.size(max(of_03.values())),
        "saved state": estimates.size(disk.STATE_BYTES * student["weights"]),
    }
    parts = {
        "02": estimates.teacher_part(cache, teacher, wide, found),
        "03": estimates.trial_part(trial, student, [teacher], found),
    }
    fitting = cards.what_fits(parts)
    fitting.insert(0, "pair", f"`{name}`")
    return numbers, fitting


def markdown(table: pd.DataFrame) -> str:
    lines = [[*table.columns], ["---"] * len(table.columns), *table.values.tolist()]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def main() -> str:
    """Both tables as Markdown."""
    numbers, fitting = zip(*map(tables, TEACHERS), strict=True)
    both = pd.DataFrame(numbers), pd.concat(fitting)
    return "\n\n".join(map(markdown, both))


if __name__ == "__main__":
    print(main())
