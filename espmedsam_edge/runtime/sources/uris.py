"""One grammar for what is not a file: cameras, streams and the test source, as ``scheme://place?option=value``."""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from espmedsam_edge.errors import UserError, nearest


@dataclass(frozen=True)
class Scheme:
    """A kind of source that is named by a URI.

    Attributes:
        opener: ``module:function``, which is called with a ``Uri`` and ``LiveOptions`` and returns the ``Source``, not
            yet opened; the module is imported when such a source is named. Empty for files.
        example: for messages.
        network: whether the query is the server's, so that options stand behind ``#``, and the rest may hold secrets.
    """

    opener: str
    example: str
    network: bool = False


_SOURCES = "espmedsam_edge.runtime.sources"
_STREAM = f"{_SOURCES}.network:open_stream"
SCHEMES: dict[str, Scheme] = {
    "file": Scheme("", "file:///data/clip.mp4"),
    "v4l2": Scheme(f"{_SOURCES}.camera:open_camera", "v4l2:///dev/video0"),
    "csi": Scheme(f"{_SOURCES}.gstreamer:open_csi", "csi://0"),
    "test": Scheme(f"{_SOURCES}.phantom:open_phantom", "test://fundus"),
    "rtsp": Scheme(_STREAM, "rtsp://192.168.1.20/stream", network=True),
    "rtsps": Scheme(_STREAM, "rtsps://192.168.1.20/stream", network=True),
    "http": Scheme(_STREAM, "http://192.168.1.20/stream", network=True),
    "https": Scheme(_STREAM, "https://192.168.1.20/stream", network=True),
    "rtmp": Scheme(_STREAM, "rtmp://192.168.1.20/stream", network=True),
    "udp": Scheme(_STREAM, "udp://192.168.1.20/stream", network=True),
    "tcp": Scheme(_STREAM, "tcp://192.168.1.20/stream", network=True),
    "srt": Scheme(_STREAM, "srt://192.168.1.20/stream", network=True),
}
"""What is no plain file, by what stands before ``://``: a new kind of source is a module and a line here."""

_START = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/(/?)")
_LOGIN = re.compile(r"[^/]+(//[^/]*)?:.+@[\w.\[\]:-]+([/?#].*)?", re.DOTALL)
_MAX_LABEL = 80
# Some cameras take names and passwords in the path: /user=admin&password=x, /user=admin_password=x_channel=1.
_SECRET = re.compile(
    r"((?:user(?:name)?|usr|login|pass(?:word|wd)?|pwd|token|auth|api_?key)(?:=|%3d))[^/&;?#]*?(?=_[a-z]+=|[/&;?#]|$)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Uri:
    """A source that is not a plain file name.

    Attributes:
        scheme: one of ``SCHEMES``.
        place: what is opened: a device's path, a sensor's number, a phantom's name; for a network the whole URI, user
            name and password included, which is never shown.
        options: what stands behind ``?``, or for a network behind ``#``: there the query is the server's.
        address: what messages and records call it: no user name, no password, no query; see ``without_secrets``.
        label: ``address`` as a file name without a suffix.
    """

    scheme: str
    place: str
    options: Mapping[str, str]
    address: str
    label: str

    def size(self) -> tuple[int, int] | None:
        """Option ``size=WIDTHxHEIGHT`` as (height, width); None without it.

        Raises:
            UserError: not two whole numbers with an x between.
        """
        text = self.options.get("size")
        if text is None:
            return None
        match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
        if not match:
            raise UserError(f"size={text} in {self.address} is not a size.", "Write it as 640x480: width x height.")
        return int(match[2]), int(match[1])

    def number(self, option: str, low: float, high: float) -> float | None:
        """An option that is a number from ``low`` to ``high``; None without it.

        Raises:
            UserError: it is not such a number.
        """
        text = self.options.get(option)
        if text is None:
            return None
        if not re.fullmatch(r"\d{1,12}(\.\d{1,6})?", text) or not low <= float(text) <= high:
            raise UserError(f"{option}={text} in {self.address} is not a number from {low:g} to {high:g}.")
        return float(text)

    def whole(self, option: str, low: int, high: int) -> int | None:
        """An option that is a whole number from ``low`` to ``high``; None without it.

        Raises:
            UserError: it is not such a number.
        """
        value = self.number(option, low, high)
        if value is not None and value != int(value):
            raise UserError(f"{option}={self.options[option]} in {self.address} is not a whole number.")
        return None if value is None else int(value)

    def allow(self, *known: str) -> None:
        """Refuse options other than these.

        Raises:
            UserError: there is one, or one that stands twice or without a value.
        """
        for option in self.options:
            if option not in known:
                raise UserError(f"no option '{option}' in {self.address}.", nearest(option, known))


def parse_uri(text: str) -> Uri | None:
    """Read a source's specification.

    Returns:
        None where it is a file, a folder or a glob. A bare number is that USB camera.

    Raises:
        UserError: a scheme that is not known, nothing behind it, or a login without one.
    """
    if re.fullmatch(r"\d{1,3}", text):
        text = f"v4l2:///dev/video{text}"
    start = _START.match(text)
    if not start:
        if lacks_scheme(text):  # else what says that there is no such file would show the password
            hint = "Write it as rtsp://USER:PASSWORD@HOST/PATH."
            raise UserError("what has a user name and a password in it is no file, and no whole address.", hint)
        return None
    scheme = start[1].lower()
    if scheme not in SCHEMES:
        shown = f"{start[1]}://..."
        raise UserError(f"no source of the kind {shown}", _nearest(scheme))
    if not start[2]:
        raise UserError(f"{scheme}:/ lacks a slash.", f"Write {scheme}://...")
    if SCHEMES[scheme].network:
        check_login(text)
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise UserError(f"{scheme}://... is not a valid address.", "Check the host and the port.") from None
    if SCHEMES[scheme].network:
        return _network(scheme, text, host, port, parts.path, parts.fragment)
    place = unquote(parts.netloc + parts.path)
    if not place:
        raise UserError(f"{scheme}:// names nothing.", f"For example {SCHEMES[scheme].example}")
    address = f"{scheme}://{place}"
    return Uri(scheme, place, read_options(parts.query, address), address, _label(scheme, place))


def _nearest(scheme: str) -> str:
    common = [name for name in SCHEMES if name not in ("rtsps", "https", "rtmp", "srt")]  # near to more usual ones
    return nearest(scheme, common).partition("Known:")[0] + f"Known: {', '.join(SCHEMES)}."


def _network(scheme: str, text: str, host: str, port: int | None, path: str, fragment: str) -> Uri:
    if not host and scheme != "udp":
        raise UserError(f"{scheme}:// names no host.", f"For example {SCHEMES[scheme].example}")
    shown_host = f"[{host}]" if ":" in host else host
    place = f"{shown_host}{f':{port}' if port else ''}{without_secrets(path)}"
    address = f"{scheme}://{place}"
    return Uri(scheme, text.partition("#")[0], read_options(fragment, address), address, _label(scheme, place))


def lacks_scheme(text: str) -> bool:
    """Whether what is no file looks like an address with a login whose start is missing or misspelt: ``me:x@host/``."""
    return not _START.match(text) and _LOGIN.fullmatch(text) is not None and next(glob.iglob(text), None) is None


def check_login(text: str) -> None:
    """Refuse an address whose user name or password ends it early: ``rtsp://me:a#b@host/``.

    Where that cannot be told from an ``@`` in the path (``rtsp://host:554/a@b``), it is refused, too: taken the other
    way, part of the password would be shown.

    Raises:
        UserError: says which character to write otherwise, and no other part of the address.
    """
    scheme, _, rest = text.partition("://")
    before, at, _ = rest.rpartition("@")
    host = re.split("[/?#]", before)[0]
    ends = sorted(set(re.findall("[/?#]", before)), key=before.index)
    if not at or not ends or not ("#" in ends or ":" in host or "@" in host):
        return
    written = ", ".join(f"{character} as {quote(character, safe='')}" for character in ends)
    raise UserError(
        f"the address {scheme}://... has a '{ends[0]}' before its last '@': in a password it ends the address early.",
        f"In user names and passwords, write {written}; an @ behind the host as %40.",
    )


def without_secrets(path: str) -> str:
    """An address's path with ``***`` for what follows ``user=``, ``password=``, ``token=`` and the like."""
    return _SECRET.sub(r"\1***", path)


def read_options(query: str, address: str) -> dict[str, str]:
    """``name=value&...`` behind an address.

    Raises:
        UserError: one without a value, or that stands twice.
    """
    options: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if not value or name in options:
            raise UserError(f"option '{name}' in {address} has no value or stands twice.", f"Write {name}=VALUE once.")
        options[name] = value
    return options


def _label(scheme: str, place: str) -> str:
    text = re.sub(r"[^A-Za-z0-9]+", "-", f"{scheme}-{place}").strip("-")
    return text[:_MAX_LABEL].rstrip("-")
