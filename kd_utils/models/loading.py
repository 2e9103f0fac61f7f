"""Tokenizers and causal LMs: loaded from a folder or the hub, saved, and told apart by content."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kd_utils.config.project_paths import project_path
from kd_utils.data import hub
from kd_utils.models import devices, folder_checks
from kd_utils.store.files import matching, sha256_file, written_folder

#: What is read from a model's output is there under its name, whatever its config.json asks for.
PLAIN_OUTPUTS = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}


def model_folder(name: str, files: Sequence[str], revision: str = "") -> Path:
    """The folder that `name` means, seen from the project's root; else that of the hub's model.

    Args:
        files, revision: what is downloaded of a model of the hub.

    Raises:
        FileNotFoundError: `name` looks like a folder and there is none.
    """
    if project_path(name).is_dir():
        return project_path(name)
    if name.count("/") > 1 or name.startswith((".", "/", "~", "artifacts")):
        raise FileNotFoundError(
            f"no model folder {name}: run notebook 01_prepare_data first (it builds the embedded "
            "models), or name a folder that exists or a model of the hub"
        )
    return hub.hub_folder(name, files, revision=revision)


def load_pretrained(
    auto_class: str, name: str, files: Sequence[str], revision: str = "", **kwargs: Any
) -> Any:
    """What `from_pretrained` of a class of `transformers` gives, without remote code.

    Raises:
        ValueError: it cannot be loaded, in one line; weights other than safetensors are refused,
            and a folder whose weights can be understood in several ways.
    """
    import transformers  # takes a second

    transformers.utils.logging.disable_progress_bar()  # over tensors; downloads have their own
    logging.getLogger("transformers.modeling_utils").addFilter(_is_no_report)
    loader, folder = getattr(transformers, auto_class), model_folder(name, files, revision)
    try:
        if auto_class == "AutoTokenizer":
            folder_checks.require_package(name, folder)
        else:
            kwargs = PLAIN_OUTPUTS | kwargs
        if "*.safetensors" in files:
            folder_checks.require_one_model(name, folder)
        return loader.from_pretrained(folder, trust_remote_code=False, **kwargs)
    except folder_checks.FolderError:
        raise
    except Exception as error:  # a folder that somebody else made may be wrong in every way
        raise ValueError(
            f"cannot load {name}: {hub.one_line(error)}: give a folder that save_pretrained wrote"
        ) from None


def _is_no_report(record: logging.LogRecord) -> bool:
    """Not transformers' table of keys that do not fit: `require_all_weights` says it in a line."""
    return "LOAD REPORT" not in record.getMessage()


def load_tokenizer(name: str, revision: str = "") -> Any:
    """`AutoTokenizer` from a folder or the hub, without remote code."""
    return load_pretrained("AutoTokenizer", name, hub.TOKENIZER_FILES, revision)


def load_causal_lm(
    name: str, revision: str = "", dtype: torch.dtype = torch.float32
) -> torch.nn.Module:
    """`AutoModelForCausalLM` from a folder or the hub, safetensors only, without remote code.

    Raises:
        ValueError: it cannot be loaded, or its config and its weights are not of one model.
    """
    options = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    model, report = load_pretrained(
        "AutoModelForCausalLM",
        name,
        hub.MODEL_FILES,
        revision,
        ignore_mismatched_sizes=True,  # they are in the report
        **options,
    )
    folder_checks.require_all_weights(name, model, report)
    return with_soft_capping(model)


def with_soft_capping(model: torch.nn.Module) -> torch.nn.Module:
    """The model, with eager attention where it soft-caps its scores (Gemma 2).

    SDPA has no soft-capping; transformers 5.17 runs such a model under it and drops the cap.
    """
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")
    return model


def save_model(model: torch.nn.Module, tokenizer: Any, folder: Path) -> None:
    """Write a plain `transformers` folder (safetensors), which loads without this project.

    Raises:
        ValueError: what is loaded is another model; what was at `folder` before stays there.
    """
    with written_folder(folder) as aside:
        write_model(model, tokenizer, aside)


def write_model(model: torch.nn.Module, tokenizer: Any, aside: Path) -> None:
    """Fill an empty folder that will take its place; it is loaded once and compared with `model`.

    Raises:
        ValueError: what is loaded is another model.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    if why := _why_another(model, aside):
        name = aside.name.removeprefix(".").partition(".partial-")[0]  # of `files.written_folder`
        raise ValueError(
            f"{name} is not saved: what would be loaded is not the {type(model).__name__} in "
            f"memory ({why}): use another model; a trial with save_student = False needs none"
        )


def _why_another(model: torch.nn.Module, folder: Path) -> str:
    """What a folder's model has that `model` has not, or "": weights, ties and, to the bit, logits.

    The loaded model computes with the tensors of `model`, on its device: where a tensor lies in
    memory can change the last bits of a product, and a GPU holds one copy only.
    """
    try:
        loaded = load_causal_lm(str(folder), dtype=model.dtype).eval()
    except ValueError as error:
        return str(error).removeprefix(f"cannot load {folder}: ")
    in_memory, in_file = model.state_dict(), loaded.state_dict()
    for name in sorted(in_memory.keys() ^ in_file.keys()):
        return f"{name} is only in {'memory' if name in in_memory else 'the loaded model'}"
    for name, tensor in in_memory.items():
        if not same(tensor.cpu(), in_file[name]):
            return f"{name} has other values when it is loaded"
    tied = {name for name, _ in model.named_parameters()}
    for name in sorted(tied ^ {name for name, _ in loaded.named_parameters()}):
        return f"{name} is tied to another weight in one of them only"
    loaded.load_state_dict(in_memory, assign=True)
    loaded.to(model.device).set_attn_implementation(model.config._attn_implementation)
    return "" if same(probe_logits(model), probe_logits(loaded)) else "it gives other logits"


@torch.no_grad()
def probe_logits(model: torch.nn.Module) -> torch.Tensor:
    """(1, 16, V) logits of ids spread over the vocabulary, the same in each call, no dropout."""
    size, training = model.get_input_embeddings().weight.shape[0], model.training
    ids = torch.arange(16, device=model.device)[None] * (size // 16)
    model.eval()
    try:
        with devices.reproducible():
            return model(input_ids=ids, use_cache=False).logits
    finally:
        model.train(training)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether type, shape and all values are equal; NaN equals NaN."""
    alike = a.dtype == b.dtype and a.shape == b.shape
    # The first of them needs no memory.
    return alike and (torch.equal(a, b) or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True))


def model_fingerprint(name: str, revision: str = "") -> str:
    """What a model is, by content: a digest of a folder's weights and configs, or the hub's commit.

    Take it before the model is loaded, since the folder may be replaced meanwhile.

    Raises:
        FileNotFoundError: a folder without safetensors.
    """
    folder = model_folder(name, ["config.json"], revision)
    if not project_path(name).is_dir():
        return f"{name}@{folder.name}"  # .../snapshots/COMMIT
    folder_checks.refuse_adapter(name, folder)
    files = sorted([*matching(folder, "*.safetensors"), folder / "config.json"])
    if len(files) < 2:
        raise FileNotFoundError(
            f"{name} holds no *.safetensors: save the model with `save_pretrained`"
        )
    # A repetition penalty or an end token in this file changes generated answers.
    files += folder.glob("generation_config.json")
    return hub.fingerprint_of({path.name: sha256_file(path) for path in files})
