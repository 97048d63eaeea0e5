"""Bundles by address: of a repository at Hugging Face (``hf://OWNER/NAME@REVISION``) or a folder of the web.

What is fetched is kept in the cache as an ordinary bundle: the manifest first, then the files that it lists, each only
if its SHA-256 is the manifest's. Each start asks for the manifest again; what cannot be reached runs from what is kept.
"""

from __future__ import annotations

import errno
import hashlib
import ipaddress
import logging
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any, Protocol
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from espmedsam_edge.bundle import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    Bundle,
    Manifest,
    own_files,
    parse_manifest,
    write_bundle,
)
from espmedsam_edge.errors import UserError
from espmedsam_edge.files import read_regular, write_errors
from espmedsam_edge.machine.cache import PRIVATE_FILE, cache_place, distrusted, make_private, read_kept
from espmedsam_edge.machine.installation import why_missing

log = logging.getLogger(__name__)

FETCHED = "fetched"
"""Where in the cache."""
_MAX_GRAPH_BYTES = 2 << 30  # no file of protobuf's is larger
_PATIENCE = 30.0  # seconds without a byte, and before a rate is asked for
_SLOWEST = 10_000  # bytes a second
_HUB_PIECE = 1 << 20
_HUB = "hf://"
_HUB_ADDRESS = re.compile(r"hf://(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
_HUB_FORM = "Write it as hf://OWNER/NAME or hf://OWNER/NAME@REVISION."


class _UnreachableError(Exception):
    """Nobody answers, or answers that he cannot at the moment."""


class _Place(Protocol):
    """Where a bundle's files are."""

    name: str

    def read(self, file: str, limit: int) -> bytes:
        """A file's content, of at most so many bytes.

        Raises:
            _UnreachableError: it may be there, but cannot be had now.
            UserError: it is not there, or too large.
        """
        ...


def is_remote(reference: object) -> bool:
    """Whether a bundle's name is an address; other web addresses are sources."""
    text = str(reference)
    web = re.match(r"https?://", text) is not None and re.split("[?#]", text)[0].rstrip("/").endswith(".bundle")
    return isinstance(reference, str) and (text.startswith(_HUB) or web)


def open_bundle(reference: str | Path) -> Bundle:
    """The bundle at a path, or fetched from an address.

    Raises:
        UserError: there is none, it is damaged, or it cannot be reached and was never fetched.
    """
    return fetch(reference) if isinstance(reference, str) and is_remote(reference) else Bundle.open(reference)


def fetch(reference: str) -> Bundle:
    """The bundle at an address, kept in the cache; what is there already and whole is not fetched again.

    Raises:
        UserError: see ``open_bundle``.
    """
    place: _Place = _HubPlace(reference) if reference.startswith(_HUB) else _WebPlace(reference)
    root = cache_place()
    where = root / FETCHED / hashlib.sha256(reference.encode()).hexdigest()[:16] / f"{place.name}.bundle"
    try:
        manifest = parse_manifest(place.read(MANIFEST, MAX_MANIFEST_BYTES), f"{reference}: {MANIFEST}")
        if not _is_whole(where, manifest, root):
            log.info("Fetching %s: %s", reference, where)
            _keep(place, manifest, where, root)
    except _UnreachableError as error:
        try:
            manifest = _kept_before(where, root)
        except OSError as lack:
            kept = "" if isinstance(lack, FileNotFoundError) else f"; what is kept is not used: {lack.strerror}"
            raise UserError(
                f"{reference} cannot be reached: {error}{kept}.", "Check the address and the network.", exit_code=1
            ) from error
        log.info("%s cannot be reached (%s): what was fetched before is used.", reference, error)
    return Bundle(where, manifest)


def push(bundle: Bundle, reference: str, *, private: bool = True) -> str:
    """Put a bundle into a repository at Hugging Face, which is made if there is none; the address of what was written.

    Args:
        bundle: its own files are written and no others in its folder.
        reference: hf://OWNER/NAME, or hf://OWNER/NAME@BRANCH.
        private: of a repository that is made: not everyone may read it.

    Raises:
        UserError: a graph is damaged, the package is missing, or the hub refuses.
    """
    if not reference.startswith(_HUB):
        raise UserError(f"nothing can be pushed to '{reference}'.", _HUB_FORM)
    place = _HubPlace(reference)
    contents = _contents(bundle)
    from huggingface_hub import CommitOperationAdd, HfApi

    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # see ``_HubPlace.read``
    api = HfApi()
    try:
        api.create_repo(place.repository, private=private, exist_ok=True)
        commit = api.create_commit(
            place.repository,
            [CommitOperationAdd(name, content) for name, content in contents.items()],
            revision=place.revision,
            commit_message=f"Bundle: {', '.join(bundle.manifest.modalities)}",
        )
    except Exception as error:  # httpx's, requests' and its own: they share no class
        raise UserError(
            f"{reference} was not written: {_said(error)}.", "Log in: hf auth login. Check owner and name.", exit_code=1
        ) from error
    return f"{_HUB}{place.repository}@{commit.oid}"


def _contents(bundle: Bundle) -> dict[str, bytes]:
    """A bundle's own files by name, read once: what is written is what was checked."""
    contents = {graph.file: bundle.read_graph(graph) for graph in bundle.manifest.graphs}
    for name in sorted(own_files(bundle.path, bundle.manifest) - contents.keys()):
        file = bundle.path / name
        if file.is_symlink():
            raise UserError(f"{file} is a link; a bundle holds its own files.", "Export it again.")
        try:
            contents[name] = read_regular(file, MAX_MANIFEST_BYTES if name == MANIFEST else _MAX_GRAPH_BYTES)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror}.", "Check its permissions.", exit_code=1) from error
    return contents


def _is_whole(where: Path, manifest: Manifest, root: Path) -> bool:
    """Whether what is kept is this bundle, the user's alone."""
    try:
        return parse_manifest(read_kept(where / MANIFEST, root), str(where)) == manifest and all(
            hashlib.sha256(read_kept(where / graph.file, root)).hexdigest() == graph.sha256 for graph in manifest.graphs
        )
    except (UserError, OSError):
        return False


def _kept_before(where: Path, root: Path) -> Manifest:
    """Of what was fetched before; graphs are hashed when they are loaded.

    Raises:
        OSError: there is nothing, or others could have changed it.
        UserError: it is damaged.
    """
    manifest = parse_manifest(read_kept(where / MANIFEST, root), str(where / MANIFEST))
    for graph in manifest.graphs:
        if (reason := distrusted(where / graph.file, root)) is not None:
            raise PermissionError(errno.EACCES, reason)
    return manifest


def _keep(place: _Place, manifest: Manifest, where: Path, root: Path) -> None:
    """Write a bundle into the cache, whole or not at all."""
    with write_errors(where):
        make_private(where if where.exists() else where.parent, root)
    with write_bundle(where, own=True) as draft:
        for graph in manifest.graphs:
            content = place.read(graph.file, _MAX_GRAPH_BYTES)
            if hashlib.sha256(content).hexdigest() != graph.sha256:
                raise UserError(
                    f"{place.name}: {graph.file} is not the file of its manifest (SHA-256 differs); nothing was kept.",
                    "Try again; if it stays so, whoever published it must do so anew.",
                    exit_code=1,
                )
            file = draft.new_file(graph.file)
            file.write_bytes(content)
            file.chmod(PRIVATE_FILE)
        draft.manifest = manifest


class _WebPlace:
    """A folder of the web: https, or http to this machine."""

    def __init__(self, address: str) -> None:
        try:
            parts = urlsplit(address)
        except ValueError:
            raise UserError(f"{address} is no address.", "Write it as https://HOST/FOLDER/NAME.bundle.") from None
        if parts.username is not None or parts.query or parts.fragment or not parts.hostname:
            raise UserError(
                "the address of a bundle is that of its folder, without name, password or question mark.",
                "Write it as https://HOST/FOLDER/NAME.bundle.",
            )
        if not _is_safe(address):
            raise UserError(f"{address} could be changed on its way.", "Use https://")
        self._base = address.rstrip("/")
        self.name = parts.path.rstrip("/").rpartition("/")[2].removesuffix(".bundle")
        self._opener = build_opener(_SafeRedirects)

    def read(self, file: str, limit: int) -> bytes:
        """See ``_Place``."""
        address = f"{self._base}/{file}"
        content = bytearray()

        def work(transfer: _Transfer) -> bytes:
            with self._opener.open(Request(address), timeout=_PATIENCE) as response:  # noqa: S310
                while len(content) <= limit and not transfer.given_up:
                    piece = response.read1(1 << 20)
                    content.extend(piece)
                    if not piece:
                        break
                if response.length and len(content) <= limit:
                    raise _UnreachableError("the connection broke off")
            return bytes(content)

        try:
            whole = _Transfer(work, lambda: len(content), limit, _PATIENCE).wait()
        except HTTPError as error:
            if error.code >= 500 or error.code == 429:
                raise _UnreachableError(f"the server answers {error.code}") from error
            raise UserError(
                f"{address}: the server answers {error.code}.", "Check the address.", exit_code=1
            ) from error
        except (URLError, HTTPException, OSError, ValueError) as error:  # ValueError: where it sends us is no address
            raise _UnreachableError(_said(getattr(error, "reason", error))) from error
        if len(whole) > limit:
            raise _too_large(limit)
        return whole


class _Transfer:
    """A file on its way, in a thread of its own, so that a server that sends a byte now and then is not waited for.

    Args:
        work: brings it; knows by ``given_up`` that nobody waits any more.
        received: bytes that came so far.
        limit: bytes after which no more are waited for.
        patience: seconds before a rate is asked for.
    """

    def __init__(
        self, work: Callable[[_Transfer], bytes], received: Callable[[], int], limit: int, patience: float
    ) -> None:
        self._work, self._received, self._limit, self._patience = work, received, limit, patience
        self._content = b""
        self._error: BaseException | None = None
        self.given_up = False

    def wait(self) -> bytes:
        """The content.

        Raises:
            _UnreachableError: less came than ``_SLOWEST`` a second, after the patience; or the connection broke off.
            UserError: it is too large.
            Exception: what ``work`` raises.
        """
        thread = threading.Thread(target=self._run, name="espmedsam-fetch", daemon=True)
        begin = time.monotonic()
        thread.start()
        while thread.is_alive():
            thread.join(0.2)
            late = time.monotonic() - begin - self._patience
            received = self._received()
            self.given_up = thread.is_alive() and (received < _SLOWEST * late or received > self._limit)
            if self.given_up and received > self._limit:
                raise _too_large(self._limit)
            if self.given_up:
                raise _UnreachableError(f"it sends less than {_SLOWEST // 1000} kB a second")
        if self._error is not None:
            raise self._error
        return self._content

    def _run(self) -> None:
        try:
            self._content = self._work(self)
        except BaseException as error:  # noqa: BLE001 (raised again in ``wait``)
            self._error = error


def _too_large(limit: int) -> UserError:
    return UserError(f"a file of the bundle has over {limit >> 20} MiB.", "Check the address.", exit_code=1)


class _SafeRedirects(HTTPRedirectHandler):
    """Follows no redirection that leaves https."""

    def redirect_request(self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Request | None:
        if not _is_safe(newurl):
            raise UserError(f"{req.full_url} leads to an address that is not https.", "Ask whoever published it.")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _is_safe(address: str) -> bool:
    try:
        parts = urlsplit(address)
        if parts.scheme != "http":
            return parts.scheme == "https"
        return parts.hostname == "localhost" or ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return False


class _HubPlace:
    """A repository at Hugging Face, by its own client, whose cache, log-in and addresses (HF_ENDPOINT) hold."""

    def __init__(self, address: str) -> None:
        found = _HUB_ADDRESS.fullmatch(address)
        if found is None:
            raise UserError(f"'{address}' names no repository.", _HUB_FORM)
        missing = why_missing("huggingface_hub", "hub")
        if missing is not None:
            raise UserError(missing)
        self.repository, self.revision = found["repository"], found["revision"]
        self._commit = ""
        self.name = self.repository.partition("/")[2].removesuffix(".bundle")

    def read(self, file: str, limit: int) -> bytes:
        """See ``_Place``. From the first file on, all are of one commit."""
        from huggingface_hub import constants, errors, hf_hub_download
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
        logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # it tells whole addresses
        constants.DOWNLOAD_CHUNK_SIZE = _HUB_PIECE  # it says nothing of what came until a piece is whole: 10 MiB
        blobs = Path(constants.HF_HUB_CACHE, f"models--{self.repository.replace('/', '--')}", "blobs")
        before = _growing(blobs)

        def work(transfer: _Transfer) -> bytes:
            path = Path(hf_hub_download(self.repository, file, revision=self.revision))
            self._commit = path.parent.name
            return read_regular(path, limit)

        try:
            patience = _PATIENCE + _HUB_PIECE / _SLOWEST
            content = _Transfer(work, lambda: max(0, _growing(blobs) - before), limit, patience).wait()
        except errors.LocalEntryNotFoundError as error:
            raise _UnreachableError(_said(error.__cause__ or error)) from error
        except errors.HfHubHTTPError as error:
            code = getattr(error.response, "status_code", 0)
            if code >= 500 or code == 429:
                raise _UnreachableError(f"the hub answers {code}") from error
            raise UserError(
                f"{_HUB}{self.repository}: {_said(error)}.",
                "Check owner, name and revision; log in: hf auth login.",
                exit_code=1,
            ) from error
        except errors.HFValidationError as error:
            raise UserError(f"'{self.repository}' names no repository: {_said(error)}.", _HUB_FORM) from error
        except (UserError, _UnreachableError):
            raise
        except Exception as error:  # httpx's or requests', by its version
            raise _UnreachableError(_said(error)) from error
        self.revision = self._commit
        return content


def _growing(blobs: Path) -> int:
    """Bytes of the files in the hub's own cache that are on their way."""
    total = 0
    for path in blobs.glob("*.incomplete"):
        with suppress(OSError):  # it became whole just now
            total += path.stat().st_size
    return total


def _said(error: object) -> str:
    """The first sentence of an error's text, without the password that an address in it may have (HF_ENDPOINT)."""
    lines = re.sub(r"//[^/\s]*@", "//", str(error)).strip().splitlines() or [type(error).__name__]
    return next((line.strip() for line in lines if line.strip()), "").rstrip(".")[:200]
