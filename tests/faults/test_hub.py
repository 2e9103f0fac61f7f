"""A hub that is gated, gone, slow, broken or out of reach: one line with the remedy, soon, and
nothing half loaded.

A server on this machine answers as the hub does. What is asked of it is asked in processes of their
own, since `huggingface_hub` reads its environment when it is imported, and `conftest.py` keeps this
process off every network.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import select
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from tiny import tiny_model, tiny_tokenizer, write_task_files

from kd_utils.models.loading import save_model

FAULT = "gated model, no network, hub time-out"
COMMIT = "c" * 40
TOKEN = "hf_secretOfTheTest"

#: What the hub says, by the owner's name: status, headers, and what the user must read.
STATUS = {
    "gated_401": (
        401,
        {"X-Error-Code": "GatedRepo"},
        "gated: accept its licence on .*hf auth login.*HF_TOKEN",
    ),
    "gated_403": (
        403,
        {"X-Error-Code": "GatedRepo"},
        "gated: accept its licence on .*hf auth login.*HF_TOKEN",
    ),
    "missing_401": (
        401,
        {"X-Error-Code": "RepoNotFound"},
        "the hub has no (model|dataset) of that name, or it is private: check the name",
    ),
    "missing_404": (
        404,
        {"X-Error-Code": "RepoNotFound"},
        "the hub has no (model|dataset) of that name, or it is private: check the name",
    ),
    "revision_404": (
        404,
        {"X-Error-Code": "RevisionNotFound"},
        "has no revision v9: choose one of",
    ),
    "token_401": (
        401,
        {"X-Error-Message": "Invalid credentials in Authorization header"},
        r"refuses the token \(HTTP 401\): log in anew",
    ),
    "token_403": (403, {}, r"refuses the token \(HTTP 403\): log in anew"),
    "limited_429": (
        429,
        {"Retry-After": "300"},
        r"limits requests \(HTTP 429\): try again in some minutes",
    ),
    "broken_500": (500, {}, r"fault of its own \(HTTP 500\): try again later"),
    "broken_503": (503, {"Retry-After": "300"}, r"fault of its own \(HTTP 503\): try again later"),
}
#: What stands between us and the hub.
NETWORK = {
    "hang": "no complete answer .*timed out.*check the network",
    "reset": "no complete answer .*Connection reset by peer.*check the network",
    "html": "no complete answer .*does not answer like the hub: check for a network login page.*"
    "check the network",
    "garbage": "no complete answer .*check the network",
    "loop": "no complete answer .*[Rr]edirect.*check the network",
}
MESSAGES = {**{name: message for name, (*_, message) in STATUS.items()}, **NETWORK}
#: The same once the hub has answered: in the list of files, or (late) with a file itself.
LATE = {
    "list_hang": MESSAGES["hang"],
    "late_gated_403": MESSAGES["gated_403"],
    "late_limited_429": MESSAGES["limited_429"],
    "late_broken_503": MESSAGES["broken_503"],
    "late_reset": MESSAGES["reset"],
    "late_html": "no complete answer .*should be of size",
    "late_restart": "no complete answer .*peer closed connection",
}
SLOW = {"late_cut": "no complete answer .*peer closed connection", "late_hang": MESSAGES["hang"]}
CALLS = ("tokenizer", "model", "fingerprint", "data")
HASTY = {"HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1"}

CHILD = """
import contextlib, io, json, os, sys, time
from dataclasses import replace
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
from kd_utils.data import task_rows, tasks
from kd_utils.models import loading
from kd_utils.models.initial.ways import random_weights
from kd_utils.__main__ import main
from kd_utils.tokens.encoding import tokenizer_fingerprint

def use_dataset(name):
    tasks.TASKS["gsm8k"] = replace(tasks.TASKS["gsm8k"], hub=(name, "main"))

def data(name, revision):
    use_dataset(name)
    return ",".join(task_rows.load_task("gsm8k", "train")["gold"])

def command(name, revision):
    use_dataset(name)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        status = main(["evaluate", os.environ["FOLDER"], "--task=gsm8k", "--split=train", "--out=o.parquet"])
    return f"{status} {said.getvalue()}"

calls = {"data": data, "command": command, "fingerprint": loading.model_fingerprint,
         "tokenizer": lambda *name: tokenizer_fingerprint(loading.load_tokenizer(*name)),
         "model": lambda *name: float(sum(p.sum() for p in loading.load_causal_lm(*name).parameters())),
         "config": lambda *name: random_weights(*name).config.hidden_size}
for line in sys.stdin:
    call, *name = json.loads(line)
    start = time.perf_counter()
    try:
        said = ["", calls[call](*name)]
    except BaseException as error:
        said = [type(error).__name__, str(error)]
    print(json.dumps([*said, time.perf_counter() - start]), file=answers, flush=True)
"""


class Hub(BaseHTTPRequestHandler):
    """Serves `server.root/{models,datasets}` as every repository's content; the owner's name says
    how.
    """

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.seen.append(path)
        api, kind, repo, rest = re.fullmatch(
            r"(api/)?(?:(models|datasets)/)?(\w+/\w+)?/?(.*)", path
        ).groups()
        if not repo:
            return self.send(404)
        fault = self.server.fault or repo.split("/")[0]
        if fault.startswith("late_"):
            fault = fault.removeprefix("late_") if self.command == "GET" and not api else "fine"
        if fault in STATUS:
            self.send(STATUS[fault][0], **STATUS[fault][1])
        elif fault == "list_hang" and api:
            self.hang()
        elif fault in (*NETWORK, "cut", "restart"):
            getattr(self, fault)()
        else:
            self.serve(api, self.server.root / (kind or "models"), fault, rest)

    do_HEAD = do_GET

    def serve(self, api: str | None, root: Path, fault: str, rest: str) -> None:
        hidden = {
            "without_config": "config.json",
            "without_weights": "model.safetensors",
            "without_split": "main/train-00000-of-00001.parquet",
        }.get(fault)
        files = {
            str(path.relative_to(root)): path.read_bytes()
            for path in root.rglob("*")
            if path.is_file()
        }
        files.pop(hidden, None)
        if fault == "private" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.send(401, **{"X-Error-Code": "GatedRepo"})
        if api and rest.startswith("revision/"):
            return self.send(200, json.dumps({"id": "a/b", "sha": COMMIT, "siblings": []}).encode())
        if api and rest.startswith("tree/"):
            return self.send(
                200,
                json.dumps(
                    [
                        {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                        for name, data in files.items()
                    ]
                ).encode(),
            )
        body = files.get(rest.split("/", 2)[-1])
        if body is None:
            return self.send(404, **{"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send(
            206 if start else 200,
            body[start:],
            **{"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(body).hexdigest()}"'},
        )

    def send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def hang(self) -> None:
        self.server.over.wait(300)
        self.close_connection = True

    def reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def html(self) -> None:
        self.send(200, b"<html>Welcome to the hotel</html>", **{"Content-Type": "text/html"})

    def garbage(self) -> None:
        self.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n")
        self.close_connection = True

    def loop(self) -> None:
        self.send(302, Location=self.path)

    def cut(self, sent: int = 1000) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "30000000")
        self.end_headers()
        with contextlib.suppress(OSError):  # the other side leaves
            self.wfile.write(b"x" * sent)
        self.close_connection = True

    def restart(self) -> None:
        """More than huggingface_hub takes for progress, every time from the beginning."""
        self.cut(sent=11_000_000)

    def log_message(self, *_: Any) -> None:
        pass

    def finish(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # reset
            super().finish()


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Iterator[Any]:
    """The server; `seen` has its requests, `fault` holds for every owner."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads, server.root, server.over = (
        True,
        tmp_path_factory.mktemp("hub"),
        threading.Event(),
    )
    server.seen, server.fault = [], ""
    tokenizer = tiny_tokenizer(begin=True)
    save_model(tiny_model(tokenizer), tokenizer, server.root / "models")
    for name in (
        "pytorch_model.bin",
        "modeling_x.py",
        "original/params.json",
        "consolidated.safetensors",
    ):
        (server.root / "models" / name).parent.mkdir(exist_ok=True)
        (server.root / "models" / name).write_text("nothing that we want")
    rows = write_task_files(server.root / "rows") / "gsm8k/train.parquet"
    (server.root / "datasets/main").mkdir(parents=True)
    rows.rename(server.root / "datasets/main/train-00000-of-00001.parquet")
    (server.root / "datasets/README.md").write_text("# rows")
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def asking(hub, tmp_path_factory) -> Iterator[Any]:
    """`asking(**environment)`: a process; called with what to load, it gives the error, the text
    and the seconds.
    """
    children, home = [], tmp_path_factory.mktemp("home")

    def start(**environment: str) -> Any:
        clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=home,
            env={
                **clean,
                "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
                "HF_HOME": str(home),
                "HF_TOKEN": TOKEN,
                "HF_HUB_OFFLINE": "0",
                "OMP_NUM_THREADS": "1",
                "FOLDER": str(hub.root / "models"),
                **environment,
            },
        )
        children.append(child)

        def ask(call: str, name: str, revision: str = "") -> SimpleNamespace:
            before = asked_of(hub, name)
            child.stdin.write(json.dumps([call, name, revision]) + "\n")
            child.stdin.flush()
            assert select.select([child.stdout], [], [], 120)[0], (
                f"{call} {name}: no end after two minutes"
            )
            answer = dict(
                zip(("error", "text", "seconds"), json.loads(child.stdout.readline()), strict=True)
            )
            return SimpleNamespace(**answer, requests=asked_of(hub, name) - before)

        return ask

    yield start
    for child in children:
        child.kill()  # torch takes seconds to leave by itself
        child.wait()


@pytest.fixture(scope="module")
def ask(asking) -> Any:
    """Waits for each answer as long as huggingface_hub does of itself, but for a second alone where
    none will come.
    """
    patient, hasty = asking(), asking(**HASTY)

    def ask(call: str, name: str, revision: str = "", fault: str = "") -> SimpleNamespace:
        owner = fault or name.partition("/")[0]
        return (hasty if owner.endswith("hang") else patient)(call, name, revision)

    return ask


@pytest.fixture(scope="module")
def slow(asking) -> Iterator[dict[str, Future]]:
    """What takes its time, asked beside the other tests."""
    ask = asking(**HASTY)
    with ThreadPoolExecutor(1) as pool:
        yield {fault: pool.submit(ask, "data", f"{fault}/rows") for fault in SLOW}


def asked_of(hub: Any, name: str) -> int:
    """How many requests for a model or dataset there were."""
    return sum(f"/{name}/" in f"/{path}" for path in list(hub.seen))


def refused(answer: SimpleNamespace, name: str, message: str, seconds: float) -> None:
    """One line of ours, with the name, what is wrong and a way on, within the time; it holds no
    token.
    """
    assert answer.error in ("ValueError", "FileNotFoundError", "ConnectionError"), answer
    assert re.search(message, answer.text) and name in answer.text, answer.text
    assert "\n" not in answer.text and len(answer.text) < 700 and TOKEN not in answer.text
    assert re.search(
        "or name a folder that holds the model|or set data_dir to a folder with "
        "gsm8k/train.parquet|"
        "give a folder that save_pretrained wrote|choose another split",
        answer.text,
    )
    assert answer.seconds < seconds


def test_a_hub_that_answers_is_asked_for_what_is_needed_and_for_no_code(ask, slow, hub, tried):
    fingerprint = ask("fingerprint", "fine/model")
    assert (fingerprint.error, fingerprint.text) == ("", f"fine/model@{COMMIT}")
    assert ask("tokenizer", "fine/model").error == ask("model", "fine/model").error == ""
    assert ask("model", "fine/model", "v1").error == ask("config", "fine/model").error == ""
    assert ask("model", "private/model").error == ""  # the token goes along
    assert ask("data", "fine/rows").text == "5,1,200,9"
    files = {path.split("/")[-1] for path in hub.seen if "/resolve/" in path}
    assert {
        "config.json",
        "tokenizer.json",
        "model.safetensors",
        "train-00000-of-00001.parquet",
    } <= files
    assert not files & {
        "pytorch_model.bin",
        "modeling_x.py",
        "params.json",
        "consolidated.safetensors",
    }
    assert (
        ask("model", "fine/model").requests == 2
    )  # what is there is not fetched again: is it there, and which commit


@pytest.mark.parametrize("fault", MESSAGES)
@pytest.mark.parametrize("call", CALLS)
def test_a_hub_that_does_not_serve_is_one_line_with_the_remedy(ask, tried, call, fault):
    name, revision = (f"{fault}/rows", "main") if call == "data" else (f"{fault}/model", "v9")
    answer = ask(call, name, revision)
    refused(answer, name, MESSAGES[fault].replace("v9", revision), seconds=8)
    assert answer.requests == 1 or fault == "loop"
    tried(FAULT)


@pytest.mark.parametrize("call", ["tokenizer", "model", "data"])
@pytest.mark.parametrize("fault", LATE)
def test_a_file_that_does_not_come_is_an_error_and_not_a_missing_file(ask, tried, call, fault):
    name = f"{fault}/{'rows' if call == 'data' else 'model'}"
    refused(ask(call, name), name, LATE[fault], seconds=15)
    tried(FAULT)


def test_what_the_hub_has_not_is_said(ask, tried):
    refused(
        ask("model", "without_weights/model"),
        "without_weights/model",
        "not all in .*safetensors.*give a folder that save_",
        8,
    )
    refused(
        ask("model", "without_config/model"),
        "without_config/model",
        "config.json.*give a folder that save_pretrained",
        8,
    )
    refused(
        ask("data", "without_split/rows"),
        "without_split/rows",
        "has no main/train-.*choose another split",
        8,
    )
    refused(ask("model", "no--name/model"), "no--name/model", "HFValidationError", 8)
    tried(FAULT, 4)


def test_the_command_prints_one_line_and_no_traceback(ask, tried):
    for fault in ("broken_503", "gated_401", "hang"):
        answer = ask("command", f"{fault}/rows")
        status, _, said = answer.text.partition(" ")
        assert (answer.error, status) == ("", "2") and said.startswith(
            "error: cannot get the dataset"
        )
        assert said.count("\n") == 1 and "Traceback" not in said and answer.seconds < 8
        tried(FAULT)


def test_without_the_hub_the_cache_is_used_if_it_is_whole(ask, asking, hub, slow, tried):
    wait(slow.values())  # a fault of the whole hub would be theirs too
    offline = asking(HF_HUB_OFFLINE="1")
    online = {
        call: ask(call, "cached/rows" if call == "data" else "cached/model").text for call in CALLS
    }
    assert ask("tokenizer", "half/model").error == ""
    for way, fault in (
        (offline, ""),
        *((partial(ask, fault=fault), fault) for fault in ("broken_503", "gated_403", "hang")),
    ):
        hub.fault = fault
        try:
            for call in CALLS:
                answer = way(call, "cached/rows" if call == "data" else "cached/model")
                assert (answer.error, answer.text) == ("", online[call]) and answer.seconds < 45
            refused(
                way("model", "half/model"),
                "half/model",
                MESSAGES.get(fault, "HF_HUB_OFFLINE is set and the"),
                45,
            )
        finally:
            hub.fault = ""
        tried(FAULT, 5)
    for call in CALLS:
        name = f"never/{'rows' if call == 'data' else 'model'}"
        answer = offline(call, name)
        refused(
            answer,
            name,
            "HF_HUB_OFFLINE is set and the local cache has no copy: unset HF_HUB_OFFLINE",
            8,
        )
        assert not answer.requests
        tried(FAULT)


def test_nothing_listens(asking, tried):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: refused
        ask = asking(HF_ENDPOINT=f"http://127.0.0.1:{closed.getsockname()[1]}")
        for call in CALLS:
            name = f"never/{'rows' if call == 'data' else 'model'}"
            refused(
                ask(call, name),
                name,
                "no complete answer .*Connection refused.*check the network",
                45,
            )
            tried(FAULT)


@pytest.mark.parametrize("fault", SLOW)
def test_a_download_that_stops_is_tried_again_for_a_while(slow, ask, tried, times, fault):
    answers = [slow[fault].result(600)]
    for call in ["tokenizer", "model"][: times(0, 2)]:
        answers.append(ask(call, f"{fault}/model"))
    for answer in answers:
        refused(answer, fault, SLOW[fault], seconds=45)
        tried(FAULT)
