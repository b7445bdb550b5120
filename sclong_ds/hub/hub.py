"""Model folders that lie elsewhere: on the Hugging Face hub, or behind any web address.

    hf://ORG/NAME[@REVISION]     a repository of the hub
    https://HOST/PATH            a folder that a web server shows as it is

Files come into a cache and are compared with the model's manifest, as those of any folder are; no
code that comes with them is run. `push_to_hub` publishes a folder: its files, a model card with the
front matter that the hub reads, and a config.json by which the hub counts downloads.

Reads HF_ENDPOINT, HF_TOKEN and the other variables of huggingface_hub, and SSL_CERT_FILE, the
certificates of an authority of one's own, for both; the cache of web addresses
is $XDG_CACHE_HOME/sclong_ds/models, ~/.cache without it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml

from sclong_ds.command_line import HUB, WEB, local_path, need
from sclong_ds.exported.manifest import CARD, MANIFEST, check_files, read_manifest
from sclong_ds.files.atomic import file_sha256, read_file
from sclong_ds.files.sealed_json import CHECKSUM
from sclong_ds.progress import count_progress

if TYPE_CHECKING:
    import requests
    import torch

    from sclong_ds.model.sclong import ScLong

_SECONDS = (10, 60)
"""Of a connection, and between two pieces of an answer."""
_PIECE = 2**20
_EXAMPLES = {"model.encode(x)": 'model.encode(x, genes="all")'}
"""What cards of earlier versions say and this one refuses, and what it wants instead."""


def model_folder(place: str | Path) -> Path:
    """Return a model's folder on this machine; what lies elsewhere is fetched into a cache.

    Args:
        place: A folder or an address.

    Raises:
        FileNotFoundError: Nothing is there.
        OSError: The server does not answer, or not as it should.
        ValueError: A damaged file, or no manifest.
        ModuleNotFoundError: The client of the hub is not installed.
    """
    text = str(place)
    if text.startswith(HUB):
        return _from_hub(text)
    return _from_web(text.rstrip("/")) if text.startswith(WEB) else Path(place)


def load_model(place: str | Path, *, device: str | torch.device = "cpu") -> ScLong:
    """Load an exported model in evaluation mode.

    On the CPU its weights are mapped from the file: keep the file while the model is in use.

    Args:
        place: Folder of `python -m sclong_ds export` or `import-reference`, or the address of one,
            hf://ORG/NAME[@REVISION] or https://..., which is fetched into a cache.
        device: Where the model goes.

    Returns:
        The model, float32, with `genes` (GeneVocabulary) and `transform` (Transform) set.

    Raises:
        FileNotFoundError: Not there, or a file is missing.
        OSError: A server does not answer.
        ValueError: A damaged file, another format version, files that do not belong together, or a
            device that is not there.
    """
    from sclong_ds.exported import model_dir

    model_dir.checked_device(device)  # before anything is fetched
    return model_dir.load_model(model_folder(place), device=device)


def _from_hub(address: str) -> Path:
    name, _, revision = address.removeprefix(HUB).partition("@")
    if name.count("/") != 1:
        raise ValueError(f"{address}: must be {HUB}ORG/NAME or {HUB}ORG/NAME@REVISION")
    return Path(
        _asked(
            address,
            lambda hub: hub.snapshot_download(
                name, revision=revision or None, endpoint=os.environ.get("HF_ENDPOINT")
            ),
        )
    )


def _asked(address: str, ask: Callable[[Any], Any]) -> Any:
    """Return what the hub's client answers; its errors are one line that names the address."""
    need("huggingface_hub", extra="hub")
    import huggingface_hub
    from huggingface_hub import errors

    # Where no answer comes, its HTTP library raises: another one with each version.
    wire = cast("tuple[type[Exception], ...]", errors.HfHubHTTPError.__bases__)
    silent: tuple[type[Exception], ...] = (errors.LocalEntryNotFoundError, *wire, OSError)
    try:
        return ask(huggingface_hub)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise FileNotFoundError(
            f"{address}: no such model on the hub, or HF_TOKEN may not read it"
        ) from None
    except silent as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(
            f"{address}: {reason[:300]}; is the hub reachable, is HF_ENDPOINT right?"
        ) from None


def _from_web(address: str) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sclong_ds/models"
    import requests

    with requests.Session() as session:
        # As the hub's client does; requests' own REQUESTS_CA_BUNDLE comes before it.
        session.verify = os.environ.get("SSL_CERT_FILE") or True
        answer = _get(session, f"{address}/{MANIFEST}")
        waiting = cache / f".{os.getpid()}.partial"
        waiting.mkdir(parents=True, exist_ok=True)
        try:
            (waiting / MANIFEST).write_bytes(answer.content)
            manifest = cast(dict[str, Any], read_manifest(waiting))
            folder = cache / str(manifest[CHECKSUM])
            if not folder.is_dir():
                _fetch_files(session, address, manifest["files"], waiting)
                check_files(waiting)
                waiting.rename(folder)
        finally:
            shutil.rmtree(waiting, ignore_errors=True)
    return folder


def _fetch_files(
    session: requests.Session, address: str, files: dict[str, Any], folder: Path
) -> None:
    total = sum(record["bytes"] for record in files.values())
    with count_progress("fetch", total, "bytes") as on_bytes:
        for name, record in files.items():
            if Path(name).name != name or name in ("", ".", ".."):
                raise ValueError(f"{address}/{MANIFEST}: names a file outside the folder, {name}")
            with (
                _get(session, f"{address}/{name}", stream=True) as answer,
                (folder / name).open("wb") as file,
            ):
                size = 0
                for piece in answer.iter_content(_PIECE):
                    size += len(piece)
                    if size > record["bytes"]:
                        break
                    file.write(piece)
                    on_bytes(len(piece))
            found = file_sha256(folder / name)
            if name != CARD and (size, found) != (record["bytes"], record["sha256"]):
                raise ValueError(
                    f"{address}/{name}: {size} bytes with SHA-256 {found[:12]}, the manifest says "
                    f"{record['bytes']} with {record['sha256'][:12]}; try again"
                )


def _get(session: requests.Session, address: str, *, stream: bool = False) -> requests.Response:
    import requests

    try:
        answer = session.get(address, stream=stream, timeout=_SECONDS)
        if answer.status_code == 404:
            raise FileNotFoundError(f"{address}: no such file on the server")
        answer.raise_for_status()
    except requests.RequestException as error:
        raise OSError(f"{address}: {' '.join(str(error).split())[:300]}") from None
    return answer


from_pretrained = load_model
"""`load_model` under the name that users of the hub know."""


def save_pretrained(model: ScLong, folder: str | Path) -> None:
    """Write a model that was loaded, with its weights as they are now, into a new folder.

    The folder is as `export` writes it, and that of the hub: README.md with front matter,
    config.json, model.safetensors. With the weights that were loaded it is a copy. With others the
    recipe of its embeddings stays, while validation figures and a fine-tuned head, which were of
    the other weights, are left out.

    Args:
        model: From `load_model`, changed or not.
        folder: To make.

    Raises:
        FileExistsError: It exists.
        FileNotFoundError: The folder that the model came from is gone.
        ValueError: A model that was not loaded (`train` and `export` write one), or whose modules
            are others than those that were loaded: merge adapters first.
    """
    from sclong_ds.exported.described.changed import write_changed

    write_changed(model, Path(folder))


def push_to_hub(
    model: ScLong | str | Path, name: str, *, licence: str | None = None, private: bool = False
) -> str:
    """Publish a model on the hub; its files are checked first.

    Args:
        model: From `load_model`, changed or not, or a folder of `python -m sclong_ds export`.
        name: ORG/NAME of the repository, made if it is not there.
        licence: Identifier for the card, such as cc-by-4.0; None: the card says none.
        private: Whether a new repository is private.

    Returns:
        The address of the commit.

    Raises:
        FileNotFoundError: No such folder.
        OSError: The hub does not answer, or refuses.
        ValueError: A damaged file, or a model that was not loaded.
    """
    if isinstance(model, str | Path):
        return _push(Path(model), name, licence=licence, private=private)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        save_pretrained(model, folder)
        return _push(folder, name, licence=licence, private=private)


def _push(folder: Path, name: str, *, licence: str | None, private: bool) -> str:
    from sclong_ds.exported.described.model_card import CONFIG, front_matter, hub_config

    if name.count("/") != 1 or not all(name.split("/")):
        raise ValueError(f"{name}: must be ORG/NAME")
    if read_manifest(folder) is None:
        raise FileNotFoundError(f"{folder}/{MANIFEST}: missing; export the model again")
    check_files(folder)
    config = yaml.safe_load(read_file(folder / "config.yaml"))
    card = read_file(folder / CARD).decode("utf-8")
    for before, after in _EXAMPLES.items():
        card = card.replace(before, after)
    texts = {CARD: front_matter(card, licence=licence)}
    if not (folder / CONFIG).is_file():  # an export of an earlier version
        texts[CONFIG] = hub_config(config)

    def publish(hub: Any) -> Any:
        api = hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
        api.create_repo(name, private=private, exist_ok=True)
        files = [path for path in sorted(folder.iterdir()) if path.name not in texts]
        content: list[tuple[str, str | bytes]] = [(path.name, str(path)) for path in files]
        content += [(name, text.encode()) for name, text in texts.items()]
        operations = [
            hub.CommitOperationAdd(path_in_repo=place, path_or_fileobj=what)
            for place, what in content
        ]
        return api.create_commit(name, operations=operations, commit_message="Publish the model")

    return str(_asked(f"{HUB}{name}", publish).commit_url)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `python -m sclong_ds push`."""
    parser.add_argument("model_dir", type=local_path, metavar="MODEL_DIR", help="exported model")
    parser.add_argument("repository", metavar="ORG/NAME", help="repository of the hub, new or not")
    parser.add_argument("--licence", metavar="ID", help="of the weights, such as cc-by-4.0")
    parser.add_argument("--private", action="store_true", help="make a new repository private")


def run(args: argparse.Namespace) -> int:
    """Run `python -m sclong_ds push`; returns the exit status.

    Args:
        args: Parsed arguments of `add_arguments`.
    """
    print(push_to_hub(args.model_dir, args.repository, licence=args.licence, private=args.private))
    return 0
