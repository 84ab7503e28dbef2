"""Adapter or model -> a repository on ModelScope or Hugging Face, through the hubs' own client libraries.

Only what a user of the weights needs is sent: a checkpoint-N also holds optimiser, random state and log, twice the
size of the weights and of no use to anybody else. Nor are paths of the machine that trained: they name nothing
elsewhere, and whose folders they are is nobody's business. The folder itself stays as it is.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

from latexocr.card import FILE_NAME as CARD
from latexocr.card import card
from latexocr.checkpoint import ADAPTER_CONFIG, AVERAGE_WEIGHTS, HUB_ID, LOSS_METER, TRAINER_STATE, read_json
from latexocr.contract import write_text
from latexocr.errors import InputError
from latexocr.info import Info, inspect

# Weights, configurations, tokenizers, chat template, model card. Pickles (.pt, .pth, .bin) are state of a training.
SENT = {".safetensors", ".json", ".jinja", ".txt", ".model", ".md"}
KEPT_BACK = {TRAINER_STATE, LOSS_METER, AVERAGE_WEIGHTS}
logger = logging.getLogger(__name__)


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
    base: str | None = None,
    public: bool = False,
    dry_run: bool = False,
) -> str:
    """Upload an adapter or a model with its model card; a new repository is private unless you say otherwise.

    Args:
        folder: adapter/, model/, checkpoint-N/, a merged model, or the folder of a run.
        repo_id: organisation/name; made if it is not there. ModelScope's client enters Apache-2.0 as the license of a
            new one: change it there if yours is another.
        to: the hub. Its token comes from the environment: MODELSCOPE_API_TOKEN or HF_TOKEN.
        base: hub id of the base model there, organisation/name, which is written into what is sent; needed where an
            adapter was trained on a folder (default: the hub id that training was given).
        public: everybody may see a repository that is made by this command.
        dry_run: say what would be sent, send nothing.

    Raises:
        InputError: no adapter or model, a base without hub id, no token, or a hub that refuses.
    """
    for option, name in (("repo_id", repo_id), ("base", base)):
        if name is not None and not HUB_ID.fullmatch(name):
            raise InputError(f"{option} is {name!r}, needs organisation/name")
    found = inspect(folder)
    with TemporaryDirectory() as staging:
        staged = Path(staging)
        sizes = stage(found, staged, base=base, hub=to)
        size = f"{len(sizes)} files, {sum(sizes.values()) / 1e6:,.1f} MB"
        if dry_run:
            listed = "\n".join(f"  {size:>14,}  {name}" for name, size in sizes.items())
            return f"{found.folder} -> {to}:{repo_id}: {size}\n{listed}\nnothing was sent (--dry-run)"
        return f"{_send(staged, list(sizes), repo_id, to, public)}: {size}"


def _send(staged: Path, names: list[str], repo_id: str, to: str, public: bool) -> str:
    hub = HUBS[to]
    token = os.environ.get(hub.token_name)
    if not token:
        raise InputError(f"no token for {to}: get one at {hub.token_page} and set {hub.token_name}")
    try:
        return hub.send(staged, names, repo_id, token, public)
    except Exception as error:  # both clients raise many kinds; what they say is all there is to say
        reason = " ".join(str(error).split()).replace(token, "***")[:300]
        raise InputError(f"{to} did not take {repo_id} ({type(error).__name__}: {reason})") from error


def stage(found: Info, target: Path, *, base: str | None, hub: str) -> dict[str, int]:
    """Put what is sent into an empty folder: links, and the files that named a folder of this machine written anew.

    Args:
        found: the adapter or model.
        target: the empty folder.
        base: hub id of the base model on `hub`.
        hub: where it goes.

    Returns:
        Size of each file in bytes.

    Raises:
        InputError: an adapter's base has no hub id.
    """
    names = files_to_send(found.folder)
    for name in names:
        (target / name).symlink_to((found.folder / name).resolve())
    sent = published(found, base=base, hub=hub)
    if sent.contract != found.contract:
        sent.contract.save(target)
    if ADAPTER_CONFIG in names:
        config = read_json(target / ADAPTER_CONFIG)
        if config.get("base_model_name_or_path") != sent.base_model:  # peft writes where it read the base
            config["base_model_name_or_path"] = sent.base_model
            write_text(target / ADAPTER_CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    if CARD in names and found.contract:
        if (target / CARD).read_text(encoding="utf-8") == card(found):
            write_text(target / CARD, card(sent))
        else:
            logger.info(f"{found.folder / CARD} was written by hand: sent as it is")
    return {name: (target / name).stat().st_size for name in names}


def published(found: Info, *, base: str | None, hub: str) -> Info:
    """What is known of a folder, as others may read it: hub ids and names in place of paths.

    Arguments and errors as `stage`. A whole model needs no base, so that a folder's name will do.
    """
    known = found.base_model or ""
    if base is None and found.kind == "adapter" and not HUB_ID.fullmatch(known):
        raise InputError(
            f"{found.folder}: its base is a folder of this machine ({known}); give the base's hub id: "
            "--base organisation/name"
        )
    name = base or (known if HUB_ID.fullmatch(known) else Path(known).name) or None
    if found.contract is None:
        return replace(found, base_model=name)
    contract = replace(
        found.contract, base_model=name, hub=hub if base else found.contract.hub, training=_short(found.training)
    )
    return replace(found, base_model=name, contract=contract)


def _short(value: Any) -> Any:
    """The last two names of every absolute path in facts about a training."""
    if isinstance(value, dict):
        return {key: _short(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_short(inner) for inner in value]
    return "/".join(Path(value).parts[-2:]) if isinstance(value, str) and Path(value).is_absolute() else value


def files_to_send(folder: Path) -> list[str]:
    """Names of the files in an adapter's or model's folder that make it up.

    Folders, hidden files and what only a resumed training needs stay here.
    """
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.is_file() and path.suffix in SENT and path.name not in KEPT_BACK and not path.name.startswith(".")
    )
