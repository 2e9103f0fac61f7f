"""Print the tables of docs/cost.md: what the paper's three pairs take, and what fits on which card.

Nothing is loaded: models are sized from their configs, on torch's `meta` device. Run it from the
project's root: `python docs/cost_table.py`.
"""

from functools import partial

import pandas as pd

from kd_utils.config import parameter_files, stages
from kd_utils.cost import cards, disk, estimates, memory, rows, shapes, work
from kd_utils.models import signal_kinds

TRAINED_METHOD = "combined"


def llama(*sizes: int) -> shapes.Shape:
    """The shape of a Llama, whose output layer is not tied, from its sizes in `Shape.NAMES`."""
    from transformers import LlamaConfig

    config = LlamaConfig(**dict(zip(shapes.Shape.NAMES, sizes, strict=True)))
    return shapes.Shape.of(shapes.meta_model(config))


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
    data, cache, config = (
        parameter_files.notebook_config(stem, values | {"distill_type": TRAINED_METHOD})
        for stem in (stages.PREPARE, stages.CACHE, stages.TRAIN)
    )
    teacher, student = llama(*TEACHERS[name]), llama(*TINY_LLAMA)
    found, _ = rows.expected_rows(data)
    splits = [*found.values()]
    probe, layers = work.Probe(1.0, 0.0, True), {"hidden": [32], "attention": [32]}  # no time
    cost = partial(estimates.teacher_pass, layers=layers, rows=splits, half=True, probe=probe)
    compact = cache.model_copy(update={"attention_dtype": "uint8"})
    compared = estimates.compared(config, student.layers, [teacher.sizes])
    trial = estimates.trial(config, student, compared, found, True, probe)
    longest = max(split.longest for split in splits)
    question, new_tokens = found["validation"].longest_question, cache.max_new_tokens
    evaluated = memory.evaluation(
        teacher, cache.eval_batch_size, longest, question, new_tokens, size=2
    )
    size = estimates.size
    numbers = {
        "pair": f"`{name}`",
        "teacher, bfloat16": size(2 * teacher.weights),
        "cache, float16 maps": size(cost(cache, teacher).cache),
        "cache, uint8 maps": size(cost(compact, teacher).cache),
        "pass": size(cost(cache, teacher).memory),
        "its evaluation": size(2 * teacher.weights + evaluated),
        "student with AdamW": size(16 * student.weights),
        "trial": size(trial.memory),
        "saved state": size(disk.saved_state(int(trial.state) // 12)),
    }
    fitting = cards.what_fits(
        teacher,
        student,
        signal_kinds.columns_of(cache.signals, layers, teacher.layers, cache.attention_dtype),
        compared,
        max_length=longest,
        answer=found["train"].longest_answer,
        question=question,
        max_new_tokens=new_tokens,
        batch_size=config.batch_size,
    )
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
