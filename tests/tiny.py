"""Tokenizers, random models and examples of a few kilobytes, for tests."""

from __future__ import annotations

from typing import Any

TEXTS = (
    "Question: Is this sentence positive or negative?\nAnswer: positive\nAnswer: negative\n",
    "The following are multiple choice questions (with answers) about astronomy.\n\nA. one\nB. "
    "two\nC. three\nD.",
    "Tom has 12 apples and buys 30 more. How many apples?\nAnswer: 12+30=<<12+30=42>>42 "
    "apples.\n#### 42 $1,000.5",
)

#: Sizes that most decoders' configurations have, by the names that `transformers` uses.
SIZES = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=64,
    initializer_range=0.2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def tiny_tokenizer(*, begin: bool) -> Any:
    """A byte-level BPE with `<e>` as its end token, and `<b>` put before every text if `begin`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<b>", "<e>", "<|im_end|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<b> $A", special_tokens=[("<b>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<e>", bos_token="<b>" if begin else None
    )


def tiny_model(tokenizer: Any, *, context: int = 512, seed: int = 0) -> Any:
    """A random Llama of two layers, wide enough in its weights that log-probabilities differ
    clearly.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)  # at this size threads cost ten times what they give
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config).eval()


def write_task_files(folder: Any) -> Any:
    """A folder in the hub's schema with hand-written rows of the three tasks."""
    import pandas as pd

    sst2 = {
        "sentence": ["a dull film ", "not dull", "fine cast , tedious film", "a joy"],
        "label": [0, 1, 0, 1],
    }
    mmlu = {
        "question": [
            " Which is a star? ",
            "How many moons has Mars?",
            "What is 1+1?",
            "What is 1+2?",
            "What is 2+2?",
        ],
        "subject": [
            "astronomy",
            "astronomy",
            "abstract_algebra",
            "abstract_algebra",
            "abstract_algebra",
        ],
        "choices": [
            ["Mars", "Sun", "Moon", "Io"],
            ["0", "1", "2", "3"],
            ["2", "1", "3", "4"],
            ["3", "1", "2", "4"],
            ["4", "1", "2", "3"],
        ],
        "answer": [1, 2, 0, 0, 0],
    }
    gsm8k = {
        "question": [
            "Tom has 2 apples and buys 3. How many?",
            "A coat costs $1,000 and a hat $200. Together?",
            "Ann is 4. How old in 5 years?",
        ],
        "answer": [
            "2+3=<<2+3=5>>5 apples.\n#### 5",
            "1000+200=$<<1000+200=1200>>1,200.\n#### 1,200",
            "#### 9",
        ],
    }
    tables = {
        "sst2/train": sst2,
        "sst2/validation": {"sentence": ["a bore", "NOT  dull", "a delight"], "label": [0, 1, 1]},
        "mmlu/test": mmlu,
        "mmlu/dev": {
            key: [f"dev {v}" if key == "question" else v for v in values]
            for key, values in mmlu.items()
        },
        "gsm8k/train": gsm8k,
        "gsm8k/test": {
            "question": ["Sam has 7 pens, loses 4. Left?"],
            "answer": ["7-4=<<7-4=3>>3 pens.\n#### 3"],
        },
    }
    for name, values in tables.items():
        path = folder / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(values).to_parquet(path, index=False)
    return folder


def tiny_llama(
    *,
    layers: int = 2,
    width: int = 32,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 97,
    seed: int = 0,
    **config: Any,
) -> Any:
    """A random Llama of chosen shape, seeded."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    values = dict(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(LlamaConfig(**{**values, **config})).eval()


def tiny_of_family(family: str, **config: Any) -> Any:
    """A random model of six layers, all of whose parameters are random."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = dict(
        vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=6, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(sizes | config)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def logits(model: Any) -> Any:
    """(1, 37, V) of the ids from 3 on."""
    import torch

    with torch.no_grad():
        return model(torch.arange(3, 40)[None], use_cache=False).logits


def example_rows(lengths: list[int], *, vocab: int = 97, seed: int = 0) -> list[Any]:
    """Examples of random tokens whose answers are their last third; no signals yet."""
    import numpy as np

    from kd_utils.tokens.encoding import Example

    rng = np.random.default_rng(seed)
    return [
        Example(f"row{i}", rng.integers(3, vocab, n).astype(np.int32), n - max(n // 3, 1))
        for i, n in enumerate(lengths)
    ]


def all_terms(
    head: Any,
    *,
    widths: tuple[int, int] = (32, 48),
    pairs: list[tuple[int, int]] | None = None,
    layers: int = 3,
    heads: int = 4,
    temperature: float = 2.0,
    weight: float = 1.0,
    seed: int = 0,
    attention: dict[str, Any] | None = None,
    **kd: Any,
) -> Any:
    """The terms "kd", "hidden" and "attention" of a teacher with `layers` layers, by hand."""
    from kd_utils.distill.teacher_terms import TeacherTerms
    from kd_utils.distill.terms.attention import AttentionMaps
    from kd_utils.distill.terms.hidden import Hidden
    from kd_utils.distill.terms.kd import KD

    pairs = [(layers, 2)] if pairs is None else pairs
    terms = (
        KD(head, temperature, **kd),
        Hidden(pairs, layers, widths, [seed + k for k in range(len(pairs))]),
        AttentionMaps(pairs, layers, heads, **(attention or {})),
    )
    return TeacherTerms(terms, weight)


def late_copy() -> type:
    """A `HostCopy` as on a GPU, on a CPU: what it copied is there only when `result` waited."""
    import torch

    from kd_utils.models.devices import HostCopy

    class LateCopy(HostCopy):
        def __init__(self, tensors: dict[str, Any]) -> None:
            self.under_way = {name: tensor.detach().clone() for name, tensor in tensors.items()}
            self._values = {name: torch.full_like(tensor, 77) for name, tensor in tensors.items()}
            self._copied = self  # the event

        @torch.inference_mode()
        def synchronize(self) -> None:
            for name, tensor in self.under_way.items():
                self._values[name].copy_(tensor)

    return LateCopy


def eager_signals(model: Any, input_ids: Any, attention_mask: Any = None) -> Any:
    """The maps of every layer and all hidden states, as eager attention gives them."""
    model.set_attn_implementation("eager")
    output = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        output_attentions=True,
        output_hidden_states=True,
    )
    return output.attentions, output.hidden_states
