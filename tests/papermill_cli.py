"""papermill's own command line with the sweep's settings of kernels, which start side by side in
these tests too.
"""

import tempfile

import papermill.cli

from kd_utils.sweep.execution import kernel_settings

if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="kd-", ignore_cleanup_errors=True) as sockets:
        execute, settings = papermill.cli.execute_notebook, kernel_settings(sockets)
        papermill.cli.execute_notebook = lambda **given: execute(**given | settings)
        papermill.cli.papermill()
