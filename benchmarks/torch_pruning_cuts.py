"""Make the same cuts with Torch-Pruning 1.6.1 as with this project, and compare shapes and logits.

    python benchmarks/torch_pruning_cuts.py --tp-python TP_ENV/bin/python [--model FOLDER]

Torch-Pruning has an environment of its own (`pip install torch-pruning==1.6.1 transformers`). It is
given the units to drop, so that importance does not matter: what is compared is the cut. It finds
what belongs together by tracing the model (`DependencyGraph`); this project has a table of slots.
Without `--model` the source is a random Llama in the shape of `toy-large`. Each dimension is a
fresh process with a time limit: with key/value heads that query heads share, its search for the
group of a head did not come to an end.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

#: Dimension -> share of its units that is kept.
CUTS = {"mlp": 0.5, "width": 0.5, "heads": 0.5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tp-python", help="Python of an environment with torch-pruning")
    parser.add_argument("--model", type=Path, help="a folder that save_pretrained wrote")
    parser.add_argument("--seconds", type=float, default=120, help="limit of one dimension")
    parser.add_argument("--cut", help=argparse.SUPPRESS)  # of a child: one dimension
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cut:
        return cut_with_torch_pruning(options.folder, options.cut)
    if not options.tp_python:
        parser.error("give --tp-python, the Python of an environment with torch-pruning")
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), options)


def compare(folder: Path, options: argparse.Namespace) -> None:
    """Cut each dimension on both sides; print a line for each."""
    from kd_utils.models import loading
    from kd_utils.models.cut import pruning, sizes, slots
    from kd_utils.models.importance import choosing

    source = slots.StoredModel(str(options.model or random_source(folder)))
    whole, config = sizes.sizes_of(source.config), source.config
    model = loading.load_pretrained("AutoModelForCausalLM", source.name, ("*.safetensors",))
    model.save_pretrained(folder / "source")
    for name, share in CUTS.items():
        kept = whole._replace(**{name: round(share * getattr(whole, name))})
        units = choosing.kept_units(config, kept, choosing.random_scores(config, seed=0))
        began = time.perf_counter()
        made = pruning.pruned(source, units)
        own = time.perf_counter() - began
        document = {"kept": getattr(units, name), "head_dim": sizes.head_dim(config)}
        (folder / f"{name}.json").write_text(json.dumps(document))
        child = [options.tp_python, __file__, "--cut", name, "--folder", str(folder)]
        try:
            subprocess.run(child, check=True, timeout=options.seconds, capture_output=True)
        except subprocess.TimeoutExpired:
            print(f"{name}: Torch-Pruning did not end within {options.seconds:g} s")
            continue
        except subprocess.CalledProcessError as error:
            print(f"{name}: Torch-Pruning failed: {error.stderr.decode().splitlines()[-1]}")
            continue
        theirs = torch.load(folder / f"{name}.pt", weights_only=True)
        shapes = {key: list(weight.shape) for key, weight in made.state_dict().items()}
        alike = shapes == theirs["shapes"]
        difference = (logits_of(made) - theirs["logits"]).abs().max().item()
        print(
            f"{name}: {getattr(whole, name)} -> {getattr(kept, name)}, shapes "
            f"{'equal' if alike else 'differ'}, logits differ by at most {difference:.1e}; "
            f"{own:.2f} s here, {theirs['seconds']:.2f} s there"
        )


def random_source(folder: Path) -> Path:
    """A folder with a random Llama in the shape of `toy-large`."""
    import transformers

    from kd_utils.demos.toy_large import SIZES

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, vocab_size=640, initializer_range=0.06)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "random")
    return folder / "random"


def cut_with_torch_pruning(folder: Path, name: str) -> None:
    """Make one cut in this process, which has torch-pruning; write shapes and logits."""
    import torch_pruning as tp
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "source", dtype=torch.float32).eval()
    document = json.loads((folder / f"{name}.json").read_text())
    kept, config, layers = document["kept"], model.config, model.model.layers
    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    began = time.perf_counter()
    graph = tp.DependencyGraph().build_dependency(
        model,
        example_inputs={"input_ids": ids(), "use_cache": False},
        unwrapped_parameters=[(norm.weight, 0) for norm in norms],
        output_transform=lambda output: output.logits,
    )
    if name == "width":
        dropped = without(kept, config.hidden_size)
        first = model.model.embed_tokens, tp.prune_embedding_out_channels
        graph.get_pruning_group(*first, idxs=dropped).prune()
    for layer, units in zip(layers, kept if name != "width" else (), strict=name != "width"):
        if name == "mlp":
            dropped = without(units, config.intermediate_size)
            first = layer.mlp.gate_proj, tp.prune_linear_out_channels
        else:
            size = document["head_dim"]
            heads = without(units, config.num_attention_heads)
            dropped = [head * size + place for head in heads for place in range(size)]
            first = layer.self_attn.o_proj, tp.prune_linear_in_channels
        graph.get_pruning_group(*first, idxs=dropped).prune()
    seconds = time.perf_counter() - began
    shapes = {key: list(weight.shape) for key, weight in model.state_dict().items()}
    found = {"logits": logits_of(model), "shapes": shapes, "seconds": seconds}
    torch.save(found, folder / f"{name}.pt")


def without(kept: list[int], total: int) -> list[int]:
    return sorted(set(range(total)) - set(kept))


def ids() -> torch.Tensor:
    return torch.arange(4, 40)[None]


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=ids(), use_cache=False).logits


if __name__ == "__main__":
    sys.exit(main())
