"""The real trainer, made to diverge: it stops, says at which step and in which term, and leaves no
record.
"""

import pytest
from papermill_cli import start
from test_resume import COMBINED, TRIAL


@pytest.mark.parametrize(
    "parameter, value, said",
    [
        # Step 0 has the rate 0 of a warm-up's beginning.
        ("learning_rate", "1e30", "training diverged at step 2: gradient norm nan"),
        ("gamma_hidden", "1e38", "training diverged at step 0: gradient norm inf"),
    ],
)
def test_a_loss_or_gradient_that_is_not_finite_ends_the_trial(
    prepared, tried, parameter, value, said
):
    run = prepared / "runs" / "diverged"
    with (prepared / "small.yaml").open("a") as file:
        file.write(f"\n{parameter}: {value}\n")
    process = start(prepared, "diverged", COMBINED)
    output = process.communicate(timeout=1500)[0]
    assert process.returncode != 0 and said in output and "FloatingPointError" in output, output[
        -3000:
    ]
    assert (
        not (run / "trials" / TRIAL).exists()
        and not (prepared / "artifacts" / "students" / "diverged").exists()
    )
    tried("trial fails: not finite, raising cell, kernel killed, out of memory")
