"""Every accepted shape of a training record becomes one `Record`, here and nowhere else.

    from latexocr.records import read_records
    from latexocr.train import TrainConfig, train

    print(read_records("chat.jsonl")[0].turns)  # messages, ShareGPT, markers, parquet: all look the same from here on
    train(TrainConfig(train_json="chat.jsonl", val_json="val.parquet", prompt="Read the plate.", answer_format="json"))

A `Record` is a conversation. It has `turns`; a turn has a role and parts; a part is text (`str`) or a `Media`: a
picture or a video, as a file, as bytes that stand in the record, or as a URL. Nothing is opened here: a file that is
missing or broken is found when records are measured, before training.

    Record(id, turns, where, source)      Turn(role, parts, reasoning)      Media(kind, content, sampling)

What each shape means, with the keys by which it is told:

| shape | keys | what becomes of it |
|---|---|---|
| tutorial | `conversations` of `role`, `value`, nothing beside | [user: picture at this path], [assistant: LaTeX] |
| messages | `messages` of `role`, `content`: text, or parts with a `type` | as it says |
| ShareGPT | `conversations` of `from`, `value` | human and gpt are user and assistant |
| table | `image`, `text` | as the tutorial |
| question | `text`, `answer` | [user: text], [assistant: answer] |
| document | `text` with markers | [document: text]: no chat template, all its text is learnt |

In user and system texts `<image>` stands for the next of the row's `images`, `<image_no_2>` for the second of them (or
for what the row has under `image_no_2`); likewise `<video>` and `videos`. Each marker needs its file, each file its
marker.

Three rules say all that the trainer needs to know:
- A user turn without a word of its own is asked the configured prompt. So the tutorial's record is no special case: a
  `plain` record (one picture, then its answer) is only the one whose prompt is the same for all, and can be kept.
- Answers are supervised, with the end token: all of them, or the last (`--supervised_turns`). `reasoning` is trained
  in front of its answer as a `<think>` block; an empty one is the ERNIE tutorial's `reasoning_content: "\\n"`.
- The last answer is the reference of evaluation; what stands before it is the prompt.

Files: only local ones, unless `Access` says more. The tutorial's own format may name files anywhere, absolute or
through `..`, because csv2json writes it on this machine and for it. All other shapes are what people download, and a
stranger's rows must not make a training open files of this machine: their paths stay below the data file's folder.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

from latexocr.errors import InputError, nearest

Kind = Literal["image", "video"]
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
MARKER = re.compile(r"<(image|video)(?:_no_(\d+))?>")
UNKNOWN_MARKER = re.compile(r"<(?!(?:image|video)_no_)[a-z]+_no_\d+>")
TELLING = ("conversations", "messages", "image", "text", "answer")  # keys by which shapes are told apart
SHAPES = (
    "[user image path, assistant LaTeX] under 'conversations', or ShareGPT's 'conversations', or 'messages', or "
    "'image' and 'text', or 'text' with markers"
)
SECONDS = 30  # that a server may take to answer
MAX_BYTES = 256 << 20  # that a URL may hold: what the largest picture (64 megapixels) would take unpacked, and a video
# how the frames of a video are chosen: names and meaning as in qwen-vl-utils
SAMPLING = ("fps", "nframes", "min_frames", "max_frames", "video_start", "video_end")


class Access(NamedTuple):
    """What records may name besides files below the data file's folder."""

    urls: bool = False
    outside: bool = False


LOCAL = Access()


class Media(NamedTuple):
    """A picture or a video.

    Args:
        content: a file, the encoded bytes, or a URL (`str`).
        sampling: of a video: names and numbers of `SAMPLING`.
    """

    kind: Kind
    content: Path | bytes | str
    sampling: tuple[tuple[str, float], ...] = ()

    @property
    def name(self) -> str:
        """How an error names it."""
        if isinstance(self.content, bytes):
            return f"inline {self.kind}"
        return self.content.name if isinstance(self.content, Path) else self.content

    def load(self, where: str) -> Path | bytes:
        """The file's path, or the encoded bytes; of a URL the file that keeps what it holds.

        Args:
            where: the row, for errors.

        Raises:
            InputError: a URL that cannot be read.
        """
        return self.content if not isinstance(self.content, str) else _fetched(self.content, where)


class Turn(NamedTuple):
    """What one side says.

    Args:
        reasoning: what an assistant thought before; trained in front of the answer. None: nothing.
    """

    role: Literal["system", "user", "assistant", "document"]
    parts: tuple[str | Media, ...]
    reasoning: str | None = None

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))


@dataclass(frozen=True)
class Record:
    """One conversation; see the module's docstring.

    Args:
        where: "data/train.json record 812 (img_0812.png)": how an error names it.
        source: where it comes from, if the file says so: scores are told apart by it.
    """

    id: str
    turns: tuple[Turn, ...]
    where: str
    source: str | None = None

    @classmethod
    def of_picture(
        cls, id: str, image: Path | bytes | str, text: str, where: str, source: str | None = None
    ) -> Record:
        """A picture and what it says: the tutorial's record."""
        turns = (Turn("user", (Media("image", image),)), Turn("assistant", (text,)))
        return cls(id, turns, where, source)

    @property
    def plain(self) -> bool:
        """One picture, then its answer: the common case, for which everything else is known beforehand."""
        if len(self.turns) != 2 or self.turns[1].reasoning is not None:
            return False
        role, parts, _ = self.turns[0]
        return role == "user" and len(parts) == 1 and isinstance(parts[0], Media) and parts[0].kind == "image"

    @property
    def media(self) -> list[Media]:
        """Pictures and videos in the order in which they are shown."""
        return [part for turn in self.turns for part in turn.parts if isinstance(part, Media)]

    def place_of(self, media: Media) -> str:
        """How an error names one of them."""
        return self.where if f"({media.name})" in self.where else f"{self.where}, {media.name}"

    @property
    def image_path(self) -> Path | None:
        """The file of the first picture; None where there is none, or it is no file."""
        found = next((one.content for one in self.media if one.kind == "image"), None)
        return found if isinstance(found, Path) else None

    @property
    def text(self) -> str:
        """The last answer, which evaluation compares with."""
        return self.turns[-1].text


def parse(row: object, index: int, path: Path, access: Access = LOCAL, name: str | None = None) -> Record:
    """One row of a data file as a record.

    Args:
        row: what JSON or a table holds.
        index: its number in the file.
        path: the file; relative paths are taken from its folder.
        access: what may be named besides files below that folder.
        name: of the data, where the user gave another one than this file's: a pattern, a folder, a hub id.

    Raises:
        InputError: another shape, a marker without its file, a file without its marker, no answer, a URL or a path
            that is not allowed.
    """
    where = f"{name or path} record {index}"
    turns = _turns(row, _Files(row, path.parent, access, where), where)
    first = next((f" ({part.name})" for turn in turns for part in turn.parts if isinstance(part, Media)), "")
    source = None if row.get("source") is None else str(row["source"])
    given = row.get("id")
    return Record(str(index if given is None else given), turns, f"{where}{first}", source)


def is_tutorial(row: object) -> bool:
    """Whether a row is a sound record of the tutorial's shape: known at once, for files of 100,000."""
    turns = (
        row.get("conversations") if isinstance(row, dict) and row.keys() <= {"id", "conversations", "source"} else ()
    )
    if not isinstance(turns, list) or len(turns) != 2:
        return False
    first, second = turns
    if not (
        isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys() == {"role", "value"}
    ):
        return False
    image, text = first["value"], second["value"]
    roles = first["role"] == "user" and second["role"] == "assistant"
    texts = isinstance(image, str) and isinstance(text, str)
    return roles and texts and image != "" and not image.startswith(("data:", "http://", "https://", "file://"))


class _Files:
    """Media of a row, handed out by marker, part or number; each must be used.

    Args:
        row: where `images`, `videos`, `image_no_1`, ... stand.
        folder: from which relative paths are taken.
    """

    def __init__(self, row: object, folder: Path, access: Access, where: str) -> None:
        self._folder, self._access, self._where = folder, access, where
        self._row, self._used, self._next = row, {"image": set(), "video": set()}, {"image": 1, "video": 1}

    @cached_property
    def _given(self) -> dict[str, dict[int, object]]:
        return {kind: _listed(self._row, kind) for kind in self._used}

    def next(self, kind: Kind, marker: str, **sampling: float) -> Media:
        """The next of this kind."""
        number = self._next[kind]
        self._next[kind] += 1
        return self.numbered(kind, number, marker, **sampling)

    def numbered(self, kind: Kind, number: int, marker: str, **sampling: float) -> Media:
        """Number 1 is the first; a number may be used twice."""
        if number not in self._given[kind]:
            have = len(self._given[kind])
            in_keys = isinstance(self._row, dict) and any(str(key).startswith(f"{kind}_no_") for key in self._row)
            key = f"{kind}_no_{number}" if in_keys else f"{kind}s"
            raise InputError(
                f"{self._where}: {marker} has no {kind}: the row names {have}; add its path under {key!r}"
            )
        self._used[kind].add(number)
        return self.media(kind, self._given[kind][number], **sampling)

    def check_all_used(self) -> None:
        for kind, given in self._given.items():
            unused = sorted(given.keys() - self._used[kind])
            if unused:
                raise InputError(
                    f"{self._where}: {kind} {unused[0]} ({str(given[unused[0]])[:60]}) has no marker in the text; "
                    f"put <{kind}> where it is shown"
                )

    def media(self, kind: Kind, value: object, *, anywhere: bool = False, **sampling: float) -> Media:
        """From a path, a data URI, a URL, bytes, or what tables hold of pictures (bytes and path)."""
        if isinstance(value, dict):
            value = next((value[key] for key in ("bytes", "path", "url") if value.get(key) is not None), None)
        if isinstance(value, str) and value.startswith("data:"):
            value = _inline(value, self._where)
        elif isinstance(value, str) and value.startswith(("http://", "https://")):
            if not self._access.urls:
                raise InputError(
                    f"{self._where}: {value[:80]} is a URL, only local files are opened; download it, or add "
                    "--allow_urls true"
                )
        elif isinstance(value, str) and value:
            value = self._path(value.removeprefix("file://"), anywhere)
        if not isinstance(value, bytes | str | Path) or not value:
            raise InputError(f"{self._where}: {kind} is {value!r:.60}, needs a path, a data URI or bytes")
        return Media(kind, value, tuple(sampling.items()))

    def _path(self, name: str, anywhere: bool) -> Path:
        leaves = Path(name).is_absolute() or os.path.normpath(name).startswith("..")
        if leaves and not (anywhere or self._access.outside):
            raise InputError(
                f"{self._where}: {name} is not below {self._folder}; move the file there, or add "
                "--allow_outside_paths true"
            )
        return self._folder / name  # an absolute one stays as it is


def _listed(row: object, kind: Kind) -> dict[int, object]:
    """Number -> file, of `images` (a list), `image` (one) and `image_no_1`, `image_no_2`, ..."""
    row = row if isinstance(row, dict) else {}
    several = row.get(f"{kind}s")
    several = [row[kind]] if several is None and row.get(kind) is not None else several
    several = several if isinstance(several, list) else [] if several is None else [several]
    found = dict(enumerate(several, 1))
    for key, value in row.items():
        number = re.fullmatch(rf"<?{kind}_no_(\d+)>?", str(key))
        if number and value is not None:
            found[int(number[1])] = value
    return found


def _inline(uri: str, where: str) -> bytes:
    """The content of a data URI (RFC 2397), base64."""
    head, comma, content = uri.partition(",")
    if not comma or not head.endswith(";base64"):
        raise InputError(f"{where}: {uri[:40]}... is no base64 data URI; needed is data:image/png;base64,...")
    try:
        return base64.b64decode(content, validate=True)
    except binascii.Error as error:
        raise InputError(f"{where}: its data URI is damaged ({error}); encode the file again") from error


def _turns(row: object, files: _Files, where: str) -> tuple[Turn, ...]:
    """The conversation of a row, by the keys that it has."""
    keys = {key for key, value in row.items() if value is not None} if isinstance(row, dict) else set()
    if "conversations" in keys and not keys & {"images", "videos", "image", "video"} and _by_value(row):
        return _tutorial(row, files, where)
    if keys & {"messages", "conversations"}:
        turns = tuple(_conversation(row, files, where))
        if turns[-1].role == "assistant" and not (turns[-1].text.strip() or turns[-1].reasoning):
            raise InputError(f"{where}: the last assistant turn is empty; write the answer or delete the record")
    elif "text" in keys and isinstance(row["text"], str) and _is_question(row["text"], keys):
        parts = tuple(_parts(row["text"], files, where))
        asked = "answer" in keys
        turns = (Turn("user", parts), Turn("assistant", (row["answer"],))) if asked else (Turn("document", parts),)
    elif {"image", "text"} <= keys:
        turns = (Turn("user", (files.next("image", "'image'"),)), Turn("assistant", (row["text"],)))
    else:
        raise _other_shape(row, where)
    _check_order(turns, where)
    files.check_all_used()
    return turns


def _is_question(text: str, keys: set) -> bool:
    """Whether a text holds markers, rather than being the answer to an image."""
    marked = MARKER.search(text) if "image" in keys else _has_markers(text)
    return "answer" in keys or bool(marked)


def _has_markers(text: str) -> bool:
    return bool(MARKER.search(text) or UNKNOWN_MARKER.search(text))


def _by_value(row: dict) -> bool:
    """Whether turns are written with `role` and `value`, as in the tutorial."""
    turns = row["conversations"]
    return not isinstance(turns, list) or not any(
        isinstance(turn, dict) and {"from", "content"} & turn.keys() for turn in turns
    )


def _tutorial(row: dict, files: _Files, where: str) -> tuple[Turn, ...]:
    turns = row["conversations"]
    roles = [turn.get("role") if isinstance(turn, dict) else None for turn in turns] if isinstance(turns, list) else []
    if roles != ["user", "assistant"]:
        raise _other_shape(row, where, roles)
    image, answer = (turn.get("value") for turn in turns)
    if not isinstance(image, str) or not image or not isinstance(answer, str):
        raise InputError(f"{where}: both values must be text, the first an image path")
    return Turn("user", (files.media("image", image, anywhere=True),)), Turn("assistant", (answer,))


def _other_shape(row: object, where: str, roles: list | None = None) -> InputError:
    found = f"keys {sorted(map(str, row))}" if isinstance(row, dict) else type(row).__name__
    empty = [key for key in TELLING if key in row and row[key] is None] if isinstance(row, dict) else []
    if empty:
        found += f"; empty: {', '.join(map(repr, empty))}, fill it or delete the record"
    return InputError(f"{where}: needs {SHAPES}, has {found}{'' if roles is None else f' with roles {roles}'}")


def _conversation(row: dict, files: _Files, where: str) -> Iterator[Turn]:
    """`messages` and ShareGPT: they differ in names only."""
    turns = row["messages"] if row.get("messages") is not None else row["conversations"]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise _other_shape(row, where, [])
    if isinstance(row.get("system"), str) and row["system"]:
        yield Turn("system", (row["system"],))
    for turn in turns:
        name = turn.get("role") or turn.get("from")
        if name not in ROLES:
            raise InputError(f"{where}: unknown role {name!r}; needed is one of {', '.join(ROLES)}")
        content = turn["content"] if turn.get("content") is not None else turn.get("value")
        reasoning = turn.get("reasoning_content") if ROLES[name] == "assistant" else None
        parts = (
            (content,) if ROLES[name] == "assistant" and isinstance(content, str) else _parts(content, files, where)
        )
        yield Turn(ROLES[name], tuple(parts), reasoning)


def _parts(content: object, files: _Files, where: str) -> Iterator[str | Media]:
    """Text with markers, or a list of parts with a `type`."""
    if isinstance(content, str):
        if unknown := UNKNOWN_MARKER.search(content):
            raise InputError(
                f"{where}: {unknown[0]} is no marker; pictures are <image> or <image_no_1>, videos <video> or "
                "<video_no_1>"
            )
        at = 0
        for marker in MARKER.finditer(content):
            if marker.start() > at:
                yield content[at : marker.start()]
            kind, number = marker.groups()
            yield files.numbered(kind, int(number), marker[0]) if number else files.next(kind, marker[0])
            at = marker.end()
        if content[at:]:
            yield content[at:]
        return
    if not isinstance(content, list):
        raise InputError(f"{where}: the content of a turn is {type(content).__name__}, needs text or a list of parts")
    for part in content:
        yield from _part(part, files, where)


def _part(part: object, files: _Files, where: str) -> Iterator[str | Media]:
    given = {key: value for key, value in part.items() if value is not None} if isinstance(part, dict) else {}
    kind = given.pop("type", None)
    if kind == "text" and isinstance(given.get("text"), str):
        yield from _parts(given["text"], files, where) if _has_markers(given["text"]) else [given["text"]]
        return
    kind = str(kind).removesuffix("_url")
    if kind not in ("image", "video"):
        raise InputError(f"{where}: a part is {part!r:.80}, needs type text, image or video")
    named = [key for key in (kind, f"{kind}_url", "url", "path", "bytes") if key in given]
    known = set(SAMPLING) if kind == "video" else set()
    other = sorted(given.keys() - {*named, *known, "text", "index"})
    if other:
        hint = nearest(other[0], known) or "; sizes are set by --image_mode and --max_visual_tokens"
        raise InputError(f"{where}: {kind} part has the unknown key {other[0]!r}{hint}")
    sampling = {name: given[name] for name in SAMPLING if name in given and kind == "video"}
    wrong = next((name for name, value in sampling.items() if not isinstance(value, int | float) or value < 0), None)
    if wrong:
        raise InputError(f"{where}: {wrong} of a video is {sampling[wrong]!r}, needs a number of at least 0")
    if named:
        yield files.media(kind, given[named[0]], **sampling)
    else:  # its place only, as datasets with a column of images write it
        yield files.next(kind, f"a part of type {kind}", **sampling)


def _check_order(turns: tuple[Turn, ...], where: str) -> None:
    """Answers must be text, stand behind a question, and end the conversation."""
    roles = [turn.role for turn in turns]
    if roles == ["document"]:
        if not turns[0].text.strip():
            raise InputError(f"{where}: there is no text to learn; add some beside the markers")
        return
    if "assistant" not in roles:
        raise InputError(f"{where}: no assistant turn, so nothing to learn; has roles {roles}")
    if roles[-1] != "assistant":
        raise InputError(f"{where}: ends with a {roles[-1]} turn that nobody answers; add the answer or remove it")
    spoken = [role for role in roles if role != "system"]
    if spoken[0] != "user" or "system" in roles[1:]:
        raise InputError(f"{where}: must begin with a user turn, after one system turn at most; has roles {roles}")
    for turn in turns:
        if turn.role == "assistant" and not all(isinstance(part, str) for part in turn.parts):
            raise InputError(f"{where}: an assistant turn must be text; only users show pictures and videos")
        if turn.role == "assistant" and not isinstance(turn.reasoning, str | None):
            raise InputError(f"{where}: reasoning_content is {turn.reasoning!r:.40}, needs text")


def _fetched(url: str, where: str) -> Path:
    """A file with what a URL holds, fetched once for all epochs, workers, ranks and runs of this user."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "latexocr" / "urls"
    path = cache / hashlib.sha256(url.encode()).hexdigest()
    if not path.exists():
        content = _download(url, where)
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cache, delete=False) as file:  # several processes may fetch it at once
            file.write(content)
        Path(file.name).replace(path)
    return path


def _download(url: str, where: str) -> bytes:
    import http.client
    import urllib.request

    place = where if url in where else f"{where}, {url}"
    try:
        with urllib.request.urlopen(url, timeout=SECONDS) as response:
            content = response.read(MAX_BYTES + 1)
            if response.length and len(content) <= MAX_BYTES:  # read with a limit does not tell by itself
                raise http.client.IncompleteRead(content, response.length)
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: an address that is none
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{place}: cannot be read ({type(error).__name__}: {reason}); download it, or remove the record"
        ) from error
    if len(content) > MAX_BYTES:
        raise InputError(f"{place}: holds more than {MAX_BYTES >> 20} MB; download it, or remove the record")
    return content
