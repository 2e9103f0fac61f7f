"""A cut reads one weight of its source at a time: memory for the result and little more."""

import subprocess
import sys

import pytest
import torch
from tiny import tiny_llama, tiny_tokenizer

from kd_utils.models.loading import save_model

CODE = """
import sys, threading, torch
torch.set_num_threads(1)
from kd_utils.models.cut import bases, narrowing, pruning, sizes, slots
from kd_utils.models.importance import choosing

def anonymous():  # MB; pages of mapped files, which the system takes back, do not count
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024

def cut(source):
    whole = sizes.sizes_of(source.config)
    if sys.argv[2] == "pruned":
        kept = sizes.Sizes(whole.layers // 2, whole.heads // 2, whole.mlp // 2, whole.width // 2)
        units = choosing.kept_units(source.config, kept, choosing.random_scores(source.config, 0))
        return pruning.pruned(source, units)
    return narrowing.narrowed(source, bases.of_weights(source, whole.width // 4))

cut(slots.StoredModel(sys.argv[3]))  # loads what is loaded once
before, peak, done = anonymous(), [0.0], threading.Event()

def watch():
    while not done.is_set():
        peak[0] = max(peak[0], anonymous())
        done.wait(0.002)

thread = threading.Thread(target=watch)
thread.start()
made = cut(slots.StoredModel(sys.argv[1]))
done.set()
thread.join()
print(max(peak[0], anonymous()) - before, sum(p.numel() for p in made.parameters()) * 4 / 2**20)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model of 12 layers in several files, half precision, and a small one; MB of a layer."""
    root, tokenizer = tmp_path_factory.mktemp("models"), tiny_tokenizer(begin=False)
    save_model(tiny_llama(width=64, vocab=len(tokenizer)), tokenizer, root / "small")
    large = tiny_llama(layers=12, width=768, heads=12, kv_heads=6, vocab=len(tokenizer))
    large.bfloat16().save_pretrained(root / "large", max_shard_size="40MB")
    assert len(list((root / "large").glob("*.safetensors"))) > 2
    layer = sum(weight.numel() for weight in large.model.layers[0].parameters()) * 4 / 2**20
    return root, layer


@pytest.mark.parametrize("way", ["pruned", "svd"])
def test_the_whole_source_is_never_in_memory(folders, way):
    root, layer = folders
    ran = subprocess.run(
        [sys.executable, "-c", CODE, str(root / "large"), way, str(root / "small")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    used, result = map(float, ran.stdout.split())
    assert 12 * layer > 5 * layer + result  # so the whole source would not fit into the bound
    # A basis needs a few (d, d) matrices in double precision too.
    square = {"pruned": 0, "svd": 4 * 768**2 * 8 / 2**20}[way]
    assert used < result + layer + square, (
        f"{used:.0f} MB for {result:.0f} MB, a layer is {layer:.0f}"
    )


def test_the_same_cut_of_half_precision_is_that_of_its_values(folders, tmp_path):
    from kd_utils.models.cut import pruning, sizes, slots
    from kd_utils.models.importance import choosing

    source = slots.StoredModel(str(folders[0] / "large"))
    kept = sizes.sizes_of(source.config)._replace(layers=1, mlp=5)
    units = choosing.kept_units(source.config, kept, choosing.random_scores(source.config, 0))
    made = pruning.pruned(source, units)
    stored = source.read(f"model.layers.{units.layers[0]}.mlp.up_proj.weight")
    assert stored.dtype == torch.bfloat16 and made.dtype == torch.float32
    assert torch.equal(made.model.layers[0].mlp.up_proj.weight, stored[units.mlp[0]].float())
