"""Uploads, against a stand-in of the hubs' HTTP interfaces on this machine: no test reaches the real hubs.

The requests are made by the hubs' own clients; what the stand-in answers is what these clients ask for.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from latexocr.cli import main
from latexocr.contract import Contract
from latexocr.info import inspect
from latexocr.train import train
from latexocr.upload import HUBS, stage

BASE = "Qwen/Qwen2-VL-2B-Instruct"
TOKEN = "token-of-a-test"
# checkpoint-1 of a LoRA training: what makes up the adapter, and what stays here
SENT = {"README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "latexocr.json",
        "processor_config.json", "tokenizer.json", "tokenizer_config.json"}  # fmt: skip
KEPT_BACK = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "trainer_state.json",
             "loss_meter.json", "average.safetensors"}  # fmt: skip


class StandIn(BaseHTTPRequestHandler):
    """Both hubs: a repository is made, large files are put, a commit names all files."""

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer({}, 404)

    def do_PUT(self) -> None:
        data = self._body()
        self.server.blobs[hashlib.sha256(data).hexdigest()] = data
        self._answer({})

    def do_POST(self) -> None:
        body = self._body()
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self._answer({"error": "Invalid token"}, 401)
        if self.path == "/api/v1/models" and self.server.made:  # modelscope's client asks once more, for a public one
            return self._answer({"Code": 10010101001, "Success": False, "Message": "already exists"}, 409)
        if self.path in ("/api/repos/create", "/api/v1/models"):
            self.server.made.append(json.loads(body))
            reply = {"url": f"{self.server.url}/me/formulas"}
        elif self.path == "/api/validate-yaml":
            reply = {"errors": [], "warnings": []}
        elif self.path.endswith("/preupload/main"):
            files = [{**item, "uploadMode": self._mode(item["path"])} for item in json.loads(body)["files"]]
            reply = {"files": [{**item, "shouldIgnore": False} for item in files]}
        elif self.path.endswith("/info/lfs/objects/batch"):
            where = {"upload": {"href": f"{self.server.url}/put"}}
            objects = [{**item, "actions": where} for item in json.loads(body)["objects"]]
            reply = {"transfer": "basic", "objects": objects, "Code": 200, "Data": {"objects": objects}}
        elif self.path == "/api/models/me/formulas/commit/main":
            for line in map(json.loads, body.splitlines()[1:]):
                self._keep(line["value"]["path"], line["value"].get("content"), line["value"].get("oid"))
            reply = {"commitUrl": f"{self.server.url}/me/formulas/commit/1", "commitOid": "1"}
        elif self.path == "/api/v1/repos/models/me/formulas/commit/master":
            for action in json.loads(body)["actions"]:
                self._keep(action["path"], action.get("content"), action.get("sha256"))
            reply = {"oid": "1"}
        else:
            return self._answer({}, 404)
        self._answer({"Code": 200, "Success": True, "Data": reply, **reply})

    def _keep(self, name: str, content: str | None, sha256: str | None) -> None:
        self.server.files[name] = base64.b64decode(content) if content else self.server.blobs[sha256]

    @staticmethod
    def _mode(name: str) -> str:
        return "lfs" if name.endswith(".safetensors") else "regular"

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        return data

    def _answer(self, body: dict, status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def stand_in():
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.made, server.blobs, server.files = [], {}, {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def checkpoint(tiny, records, tmp_path_factory):
    """checkpoint-1, with everything that a resumed training reads."""
    from latexocr.train import TrainConfig

    output = tmp_path_factory.mktemp("run")
    options = dict(max_steps=1, save_strategy="steps", save_steps=1, average_weights=0.9, dataloader_num_workers=0)
    train(TrainConfig(model_name_or_path=str(tiny), train_json=str(records["train"]), output_dir=str(output),
                      use_cpu=True, swanlab_mode="disabled", disable_tqdm=True, **options))  # fmt: skip
    assert {path.name for path in (output / "checkpoint-1").iterdir()} == SENT | KEPT_BACK
    return output / "checkpoint-1"


def run_upload(folder, to, url, *flags, token=TOKEN) -> subprocess.CompletedProcess:
    """The command in a process of its own: the clients read their server's address when they are imported."""
    environment = {**os.environ, "HF_ENDPOINT": url, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1",
                   "MODELSCOPE_ENDPOINT": url, "MODELSCOPE_API_TOKEN": token}  # fmt: skip
    command = [sys.executable, "-m", "latexocr", "upload", str(folder), "me/formulas", "--to", to, *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("to", HUBS)
def test_a_checkpoint_arrives_without_its_optimiser(to, checkpoint, stand_in):
    """Stand-in hub: what is in the folder but for the base's place, and nothing of what only training needs."""
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    done = run_upload(checkpoint, to, stand_in.url, "--base", BASE)
    assert done.returncode == 0, done.stderr
    assert stand_in.files.keys() == SENT
    changed = {name for name in SENT if stand_in.files[name] != before[name]}
    assert changed == {"latexocr.json", "adapter_config.json", "README.md"}
    (made,) = stand_in.made
    assert made.get("visibility", made.get("Visibility")) in ("private", 1)
    assert re.search(r"^https?://\S+/me/formulas: 8 files, \d\.\d MB\n\Z", done.stdout, re.MULTILINE)
    assert TOKEN not in done.stdout + done.stderr
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before  # no traces of the client


@pytest.mark.slow
def test_a_hub_that_refuses_is_quoted(checkpoint, stand_in):
    done = run_upload(checkpoint, "huggingface", stand_in.url, "--base", BASE, token="wrong-token")
    assert done.returncode == 2 and stand_in.files == {}
    assert "latexocr upload: huggingface did not take me/formulas (" in done.stderr and "401" in done.stderr
    assert "wrong-token" not in done.stderr


def test_a_dry_run_shows_the_files(checkpoint, capsys):
    assert main(["upload", str(checkpoint), "me/formulas", "--to", "modelscope", "--base", BASE, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert set(re.findall(r"^ +[\d,]+  (\S+)$", printed, re.MULTILINE)) == SENT
    assert "8 files" in printed and printed.endswith("nothing was sent (--dry-run)\n")


def test_no_path_of_this_machine_is_published(checkpoint, tiny, tmp_path):
    """A base in a folder gets the hub id that is named; the three files that speak of it agree."""
    for name in SENT:
        assert (
            name in ("latexocr.json", "adapter_config.json")
            or str(tiny).encode() not in (checkpoint / name).read_bytes()
        )
    stage(inspect(checkpoint), tmp_path, base=BASE, hub="huggingface")
    contract, peft = (json.loads((tmp_path / name).read_text()) for name in ("latexocr.json", "adapter_config.json"))
    assert (contract["base_model"], contract["hub"]) == (BASE, "huggingface")
    assert peft["base_model_name_or_path"] == BASE
    assert f"base_model: {BASE}\n" in (tmp_path / "README.md").read_text()
    assert not [name for name in SENT if str(tiny).encode() in (tmp_path / name).read_bytes()]


def test_a_known_hub_id_is_published(checkpoint, tmp_path):
    """peft names the cache in which a downloaded base lies; a card that was written by hand is left alone."""
    mine, target = tmp_path / "mine", tmp_path / "target"
    shutil.copytree(checkpoint, mine)
    target.mkdir()
    replace(
        Contract.load(mine), base_model=BASE, training={"options": {"deepspeed": "/home/me/runs/zero3.json"}}
    ).save(mine)
    (mine / "README.md").write_text("My adapter.")
    stage(inspect(mine), target, base=None, hub="huggingface")
    contract, peft = (json.loads((target / name).read_text()) for name in ("latexocr.json", "adapter_config.json"))
    assert (contract["base_model"], contract["hub"], peft["base_model_name_or_path"]) == (BASE, "modelscope", BASE)
    assert contract["training"]["options"] == {"deepspeed": "runs/zero3.json"}
    assert (target / "README.md").read_text() == "My adapter."


def test_what_cannot_be_uploaded(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("MODELSCOPE_API_TOKEN", raising=False)
    for words, message in (
        ([str(checkpoint), "me/formulas", "--to", "modelscope"], "give the base's hub id: --base organisation/name"),
        (
            [str(checkpoint), "me/formulas", "--to", "modelscope", "--base", "/models/qwen"],
            "base is '/models/qwen', needs",
        ),
        (
            [str(checkpoint), "me/formulas", "--to", "modelscope", "--base", BASE],
            "no token for modelscope: get one at https://",
        ),
        ([str(checkpoint), "formulas", "--to", "modelscope"], "repo_id is 'formulas', needs organisation/name"),
        ([str(tmp_path), "me/formulas", "--to", "modelscope"], "neither an adapter nor a model"),
        ([str(checkpoint), "me/formulas", "--to", "github"], "invalid choice: 'github'"),
    ):
        assert main(["upload", *words]) == 2
        assert message in capsys.readouterr().err
