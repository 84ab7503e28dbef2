"""Adapter or model -> a repository on ModelScope or Hugging Face, through the hubs' own client libraries.

Only what a user of the weights needs is sent: a checkpoint-N also holds optimiser, random state and log, twice the
size of the weights and of no use to anybody else.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from latexocr.checkpoint import AVERAGE_WEIGHTS, HUB_ID, LOSS_METER, TRAINER_STATE
from latexocr.errors import InputError
from latexocr.info import inspect

# Weights, configurations, tokenizers, chat template, model card. Pickles (.pt, .pth, .bin) are state of a training.
SENT = {".safetensors", ".json", ".jinja", ".txt", ".model", ".md"}
MODELSCOPE_CACHE = ".ms_upload_cache"  # modelscope writes it into the folder (1.40)
KEPT_BACK = {TRAINER_STATE, LOSS_METER, AVERAGE_WEIGHTS}


class Hub(NamedTuple):
    """Where to send, and the environment variable that holds the token."""

    token_name: str
    token_page: str
    send: Callable[[Path, list[str], str, str, bool], str]


def _to_huggingface(folder: Path, names: list[str], repo_id: str, token: str, public: bool) -> str:
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name="latexocr")
    url = api.create_repo(repo_id, private=not public, exist_ok=True)
    api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=names, commit_message="Upload by latexocr")
    return str(url)


def _to_modelscope(folder: Path, names: list[str], repo_id: str, token: str, public: bool) -> str:
    from modelscope.hub.api import HubApi

    api = HubApi(token=token)
    visibility = "public" if public else "private"
    api.create_repo(repo_id, token=token, visibility=visibility, exist_ok=True)
    api.upload_folder(
        repo_id=repo_id, folder_path=str(folder), allow_patterns=names, token=token,
        commit_message="Upload by latexocr",
    )  # fmt: skip
    (folder / MODELSCOPE_CACHE).unlink(missing_ok=True)  # kept after a failure, to go on from there
    return f"https://modelscope.cn/models/{repo_id}"


HUBS = {
    "modelscope": Hub("MODELSCOPE_API_TOKEN", "https://modelscope.cn/my/myaccesstoken", _to_modelscope),
    "huggingface": Hub("HF_TOKEN", "https://huggingface.co/settings/tokens", _to_huggingface),
}


def upload(
    folder: Path,
    repo_id: str,
    /,
    *,
    to: Literal["modelscope", "huggingface"],
    public: bool = False,
    dry_run: bool = False,
) -> str:
    """Upload an adapter or a model with its model card; a new repository is private unless you say otherwise.

    Args:
        folder: adapter/, model/, checkpoint-N/, a merged model, or the folder of a run.
        repo_id: organisation/name; made if it is not there. ModelScope's client enters Apache-2.0 as the license of a
            new one: change it there if yours is another.
        to: the hub. Its token comes from the environment: MODELSCOPE_API_TOKEN or HF_TOKEN.
        public: everybody may see a repository that is made by this command.
        dry_run: say what would be sent, send nothing.

    Raises:
        InputError: no adapter or model, no token, or a hub that refuses.
    """
    if not HUB_ID.fullmatch(repo_id):
        raise InputError(f"repo_id is {repo_id!r}, needs organisation/name")
    folder = inspect(folder).folder
    names = files_to_send(folder)
    size = f"{len(names)} files, {sum((folder / name).stat().st_size for name in names) / 1e6:,.1f} MB"
    if dry_run:
        listed = "\n".join(f"  {(folder / name).stat().st_size:>14,}  {name}" for name in names)
        return f"{folder} -> {to}:{repo_id}: {size}\n{listed}\nnothing was sent (--dry-run)"
    hub = HUBS[to]
    token = os.environ.get(hub.token_name)
    if not token:
        raise InputError(f"no token for {to}: get one at {hub.token_page} and set {hub.token_name}")
    try:
        url = hub.send(folder, names, repo_id, token, public)
    except Exception as error:  # both clients raise many kinds; what they say is all there is to say
        reason = " ".join(str(error).split()).replace(token, "***")[:300]
        raise InputError(f"{to} did not take {repo_id} ({type(error).__name__}: {reason})") from error
    return f"{url}: {size}"


def files_to_send(folder: Path) -> list[str]:
    """Names of the files in an adapter's or model's folder that make it up.

    Folders, hidden files and what only a resumed training needs stay here.
    """
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.is_file() and path.suffix in SENT and path.name not in KEPT_BACK and not path.name.startswith(".")
    )
