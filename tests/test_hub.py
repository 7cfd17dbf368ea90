"""A hub id instead of a folder, against a local server that speaks the few paths of the hub."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
from conftest import FIXTURES

from minislm import load_backbone

FOLDER = FIXTURES / "chat-tied"
COMMIT = "c0ffee" + "0" * 34
FILES = {path.name: path.read_bytes() for path in FOLDER.iterdir()} | {
    "1_Pooling/config.json": b"{}",
    "pytorch_model.bin": b"a pickle",
    "README.md": b"# tiny",
}

REQUESTED = []  # what the server was asked for

# The hub's settings are read at import, so each use of the hub is a process of its own.
LOAD = """
import json, sys, torch
from minislm import load_backbone
ids, answers = torch.arange(24).view(2, 12), {}
for model in sys.argv[1:]:
    try:
        decoder = load_backbone(model)
        answers[model] = decoder.logits(decoder(ids)).flatten().tolist()
    except ValueError as error:
        answers[model] = str(error)
print(json.dumps(answers))
"""


class Hub(BaseHTTPRequestHandler):
    """The repository org/tiny; org/gated, which may not be read; nothing else."""

    def do_GET(self):
        REQUESTED.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        if "/org/gated" in path:
            reason = "Your token has no access to gated models"
            self.answer(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": reason})
        elif path == "/api/models/org/tiny/revision/main":
            siblings = [{"rfilename": name} for name in FILES]
            self.answer_json({"id": "org/tiny", "sha": COMMIT, "siblings": siblings})
        elif path == f"/api/models/org/tiny/tree/{COMMIT}":
            self.answer_json([
                {"type": "file", "path": name, "size": len(body), "oid": etag(body)}
                for name, body in FILES.items()
            ])  # fmt: skip
        elif (name := path.removeprefix(f"/org/tiny/resolve/{COMMIT}/")) in FILES:
            body = FILES[name]
            self.answer(200, body, {"ETag": f'"{etag(body)}"', "X-Repo-Commit": COMMIT})
        else:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def answer_json(self, content) -> None:
        self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def answer(self, status: int, body: bytes, headers: dict) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


def etag(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()


def load_each(models: list[str], home, **env: str) -> dict:
    """What each model's logits are, or the error's message, in a new process."""
    online = {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
    env = os.environ | online | env | {
        "HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub"), "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
    }  # fmt: skip
    command = [sys.executable, "-c", LOAD, *models]
    cwd = FIXTURES.parents[1]
    return json.loads(subprocess.check_output(command, env=env, cwd=cwd, text=True, timeout=60))


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict:
    """What was loaded while the server was up and, under "offline", from the cache without it."""
    home = tmp_path_factory.mktemp("hub")
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        models = ["org/tiny", "org/none", "org/gated", str(FOLDER)]
        answers = load_each(models, home, HF_ENDPOINT=endpoint)
        server.shutdown()
    offline = load_each(["org/tiny"], home, HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="1")
    return answers | {"offline": offline["org/tiny"]}


def test_a_hub_id_gives_the_same_logits_as_the_folder(answers):
    assert len(answers["org/tiny"]) == 2 * 12 * 512
    assert answers["org/tiny"] == answers[str(FOLDER)]


def test_a_model_that_was_downloaded_once_loads_without_a_network(answers):
    assert answers["offline"] == answers[str(FOLDER)]


def test_only_what_is_read_is_downloaded(answers):
    start = f"GET /org/tiny/resolve/{COMMIT}/"
    got = {r.removeprefix(start) for r in REQUESTED if r.startswith(start)}
    assert {"config.json", "model.safetensors", "tokenizer.json", "1_Pooling/config.json"} <= got
    assert not got & {"pytorch_model.bin", "README.md"}


def test_an_unknown_id_is_refused_by_name(answers):
    assert answers["org/none"].startswith("org/none: ")
    assert "404" in answers["org/none"]


def test_the_hubs_reason_is_passed_on(answers):
    assert answers["org/gated"].startswith("org/gated: ")
    assert "Your token has no access to gated models" in answers["org/gated"]


@pytest.mark.parametrize("text, shown", [
    ("", "ConnectionError"),
    ("\n\n403 Client Error.\n\nAsk for access.", "403 Client Error. Ask for access."),
])  # fmt: skip
def test_any_error_of_the_hubs_client_is_reported(text, shown, monkeypatch):
    def fail(*_, **__):
        raise ConnectionError(text)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ValueError, match=f"org/tiny: .*{shown}"):
        load_backbone("org/tiny")
