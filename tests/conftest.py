"""What all tests share: their markers, where the real data is, no network, one thread.

Markers are given here and not in the test files: by a test's folder or file, by its fixtures, and
by its name where it was measured to be long. pyproject.toml says what each of them means.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from stubs import run_dir, stub_notebooks  # noqa: F401 (fixtures of many tests)

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for the network
# Tiny models: a second thread costs more than it gives, above all on a busy machine.
torch.set_num_threads(1)

#: Markers by where a test is: the start of its path under tests/.
PLACES = {
    "faults/": "fault",
    "gpu/": "gpu",
    "gpu/test_gpu_trials.py": "notebook",
    "notebooks/": "notebook",
    "sweep/test_execution.py": "notebook",
    "sweep/test_local_pool.py": "ray",
    "sweep/test_ray_executor.py": "ray",
    "sweep/test_slots.py": "ray",
    "sweep/test_sweep.py": "ray",
    "teacher/test_pool.py": "ray",
    "cluster/test_session.py": "ray",
    "demos/test_smol.py": "long",
    "extending/test_new_term.py": "notebook",
}
#: Markers by the fixtures that a test asks for.
FIXTURES = {"harness": "peer", "compared": "peer", "real": "long"}
#: Markers by the test's name, with or without its case. `long`: more than 2 seconds of CPU time,
#: all cases together. `slow`: a long tour; the comment names what stays in `make test` instead.
NAMES = {
    "long": {
        "test_a_calibrated_models_error_on_few_examples_is_not_0",
        "test_a_command_is_stopped_at_the_limit_and_what_it_left_is_packed",
        "test_a_default_that_differs_is_run_and_told_and_strictly_refused",
        "test_a_folder_that_changed_is_refused_in_one_line",
        "test_a_killed_build_leaves_nothing_half_done",
        "test_a_save_that_is_killed_anywhere_leaves_a_whole_state_and_no_rest",
        "test_a_step_with_all_terms_stays_on_its_device",
        "test_all_methods_meet_the_same_rows_and_count_those_with_an_answer_only",
        "test_an_interaction_on_these_rows_only_is_not_called_one",
        "test_another_seed_replaces_what_is_there_and_leaves_no_rest",
        "test_compiled_layers_give_the_same_gradient_at_every_shape",
        "test_every_command_ends_by_itself_in_an_ascii_terminal",
        "test_every_tenth_real_row_is_lined_up",
        "test_figures_render_to_a_small_picture",
        "test_intervals_cover_95_per_cent",
        "test_memory_of_training_is_what_is_estimated",
        "test_merging_in_batches_is_merging_and_spreading_is_its_transpose",
        "test_methods_that_answer_alike_are_equal_where_there_are_examples_enough",
        "test_methods_that_differ_on_these_rows_only_are_not_called_better",
        "test_mmlu_cut_in_two_as_the_notebook_says",
        "test_no_cache_batch_or_loss_has_an_own_answer_of_a_row_without_a_label",
        "test_real_data",
        "test_real_tokenizers_have_fingerprints_of_their_own",
        "test_tests_are_recorded_as_they_end_and_stop_at_the_limit",
        "test_the_folder_is_the_model_with_the_kept_layers",
        "test_the_length_mix_is_that_of_the_real_rows",
        "test_this_machines_own_torch_is_asked_in_another_process",
        "test_vocabularies_of_one_size_share_pieces_under_other_ids",
        "test_over_worlds_intervals_cover_and_nothing_is_found_without_an_effect",
        "test_with_all_labels_the_answers_change_nothing",
        "test_with_two_swept_keys_a_family_keeps_together",
        "test_without_effects_whole_experiments_find_nothing_more_often_than_promised",
    },
    "slow": {
        "test_a_full_disk_is_told_and_leaves_no_half_file[2500000]",  # no room at all
        # Sixty experiments of each kind.
        "test_over_worlds_the_same_in_many_more_experiments",
        # The other two interrupts.
        "test_ctrl_c_once_stops_within_ten_seconds_and_leaves_no_process[to the driver]",
        "test_every_real_row_is_lined_up",  # every tenth row
        # Mistral, which has pieces of its own too.
        "test_the_pairs_train_on_real_rows[llama2]",
        "test_the_pairs_train_on_real_rows[llama3]",
    },
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give every test its markers."""
    for item in items:
        place = item.path.relative_to(ROOT).as_posix().removeprefix("tests/")
        name = getattr(item, "originalname", None) or item.name
        markers = {marker for start, marker in PLACES.items() if place.startswith(start)}
        markers |= {FIXTURES[key] for key in getattr(item, "fixturenames", ()) if key in FIXTURES}
        markers |= {marker for marker, names in NAMES.items() if {name, item.name} & names}
        for marker in sorted(markers):
            item.add_marker(marker)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared` beside the checkout (or KD_SHARED): real data and tokenizers, which are
    not part of the project.
    """
    folder = Path(os.environ.get("KD_SHARED") or ROOT.parent / "shared")
    if not (folder / "data").is_dir():
        message = (
            "needs the real data and tokenizers in ../shared (or KD_SHARED), which are not part "
            "of the project"
        )
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    return folder


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """`once(name, make)`: a folder that `make` fills, once for all test processes of this run."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base

    def folder(name: str, make: Callable[[Path], None]) -> Path:
        made, done = base / name, base / f"{name}.done"
        with FileLock(f"{made}.lock"):
            if not done.exists():
                made.mkdir(exist_ok=True)
                make(made)
                done.touch()
        return made

    return folder


@pytest.fixture(scope="session")
def with_toy(once: Callable[[str, Callable[[Path], None]], Path]) -> Callable[[Path], None]:
    """`with_toy(home)` puts the embedded toy, as 01 builds it, into a project root."""

    def build(folder: Path) -> None:
        from kd_utils.demos import toy_models

        toy_models.build(folder / "toy")

    def put(home: Path) -> None:
        embedded = once("embedded", build)
        shutil.copytree(embedded, home / "artifacts" / "embedded", dirs_exist_ok=True)

    return put
