"""The hub: files of a model or dataset, fetched whole before anything is read."""

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants, errors, utils

from kd_utils.store.files import sha256_json

#: What is fetched from the hub to load a tokenizer, and a model: no pickle, no code.
TOKENIZER_FILES = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt")

MODEL_FILES = ("*.json", "*.safetensors")


def hub_folder(
    name: str,
    files: Sequence[str],
    *,
    revision: str = "",
    kind: str = "model",
    otherwise: str = "name a folder that holds the model",
) -> Path:
    """The folder .../snapshots/COMMIT of the hub's local cache, with a model's or dataset's files.

    They are fetched before anything is loaded, because transformers waits for minutes for a hub
    that does not answer, and treats a tokenizer's file that it could not get as one that does not
    exist. A first request without retries shows in HF_HUB_ETAG_TIMEOUT (10) seconds whether the hub
    can be reached. If not, what the cache holds is used.

    Args:
        name: the hub's `owner/name`.
        files: patterns of the files to fetch.
        revision: a branch, tag or commit; "" is `main`.
        kind: "model" or "dataset". A model's subfolders hold other formats and are left out.
        otherwise: how to do without the hub, for the error.

    Raises:
        ConnectionError: what is wrong (gate, name, revision, network, the hub), with the remedy.
    """
    revision = revision or "main"
    fetch = partial(
        huggingface_hub.snapshot_download,
        name,
        repo_type=kind,
        revision=revision,
        allow_patterns=list(files),
        ignore_patterns=["*/*", "consolidated*"] if kind == "model" else None,
    )
    try:
        _ask_hub(name, revision, kind)
        return Path(fetch())
    except Exception as error:  # the hub's, httpx's, JSON's and the disk's own
        with suppress(Exception):
            return Path(fetch(local_files_only=True))
        problem = _hub_problem(error, name, revision, kind)
        raise ConnectionError(
            f"cannot get the {kind} {name} from the hub: {problem}, or {otherwise}"
        ) from None


def _ask_hub(name: str, revision: str, kind: str) -> None:
    """One request: does the hub answer, let us in, and have this revision?"""
    hooks = utils.get_session().event_hooks
    if _limit_wait not in hooks["request"]:
        hooks["request"].append(_limit_wait)
        hooks["response"].append(_refuse_to_wait)
    file = "config.json" if kind == "model" else "README.md"
    with suppress(errors.EntryNotFoundError):  # an answer too
        url = huggingface_hub.hf_hub_url(name, file, repo_type=kind, revision=revision)
        if huggingface_hub.get_hf_file_metadata(url).commit_hash is None:
            raise errors.FileMetadataError(
                f"{constants.ENDPOINT} does not answer like the hub: check for a network login "
                "page, and HF_ENDPOINT"
            )


def _limit_wait(request: Any) -> None:
    """Give every request a time limit: huggingface_hub has none where it lists files."""
    limit = max(constants.HF_HUB_ETAG_TIMEOUT, constants.HF_HUB_DOWNLOAD_TIMEOUT)
    request.extensions["timeout"] = {
        part: min(seconds or limit, limit)
        for part, seconds in request.extensions["timeout"].items()
    }


def _refuse_to_wait(response: Any) -> None:
    """Raise where huggingface_hub sleeps as long as it is told, or restarts a download forever."""
    if response.status_code == 429:
        utils.hf_raise_for_status(response)
    resumed = response.request.headers.get("Range", "bytes=0-") != "bytes=0-"
    if response.status_code == 200 and resumed:
        raise ConnectionError("the download was interrupted, and the server cannot resume it")


def _hub_problem(error: BaseException, name: str, revision: str, kind: str) -> str:
    """What went wrong and the remedy, by the class of the error or of its causes."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    kinds = {base for link in chain for base in type(link).__mro__}
    status = next(
        (link.response.status_code for link in chain if isinstance(link, errors.HfHubHTTPError)), 0
    )
    page = f"https://huggingface.co/{'datasets/' * (kind == 'dataset')}{name}"
    login = "log in with `hf auth login` or set HF_TOKEN"
    problems = [
        (
            errors.GatedRepoError in kinds,
            f"it is gated: accept its licence on {page}, then {login}",
        ),
        (
            errors.RepositoryNotFoundError in kinds,
            f"the hub has no {kind} of that name, or it is private: check the name, {login}",
        ),
        (
            errors.RevisionNotFoundError in kinds,
            f"it has no revision {revision}: choose one of {page}/commits",
        ),
        (
            status in (401, 403),
            f"the hub refuses the token (HTTP {status}): log in anew with `hf auth login`, or set "
            f"HF_TOKEN to a token that may read {page}",
        ),
        (status == 429, f"the hub limits requests (HTTP 429): try again in some minutes, {login}"),
        (status >= 500, f"the hub has a fault of its own (HTTP {status}): try again later"),
        (
            errors.OfflineModeIsEnabled in kinds,
            "HF_HUB_OFFLINE is set and the local cache has no copy: unset HF_HUB_OFFLINE",
        ),
        (
            getattr(error, "errno", None) is not None,
            f"the cache cannot be written ({one_line(error)}): make room, or set HF_HOME to "
            "another folder",
        ),
        (True, f"no complete answer ({one_line(chain[-1])}): check the network, try again later"),
    ]
    return next(problem for holds, problem in problems if holds)


def one_line(error: BaseException) -> str:
    """An error's class and text in one line of readable length."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def fingerprint_of(checksums: dict[str, str]) -> str:
    """What a model is by content: of a folder whose files, or some of them, have these SHA-256
    digests."""
    told = {"config.json", "generation_config.json"}
    return sha256_json(
        {
            name: checksum
            for name, checksum in checksums.items()
            if name in told or name.endswith(".safetensors")
        }
    )
