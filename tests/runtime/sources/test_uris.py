"""The grammar of sources that are not files."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from espmedsam_edge.errors import UserError
from espmedsam_edge.runtime.bundle_choice import means_a_bundle
from espmedsam_edge.runtime.sources.opening import open_sources
from espmedsam_edge.runtime.sources.uris import SCHEMES, Uri, parse_uri


def parsed(text: str) -> Uri:
    uri = parse_uri(text)
    assert uri is not None
    return uri


def parsed_or_refused(text: str) -> tuple[Uri | None, str]:
    try:
        return parse_uri(text), ""
    except UserError as error:
        return None, str(error)


@pytest.mark.parametrize("text", ["a.png", "folder/", "*.dcm", "C:file", "a:b", "12345", "-1", "", "./rtsp", "a b.mp4"])
def test_files_are_none_of_it(text: str) -> None:
    assert parse_uri(text) is None


@pytest.mark.parametrize(
    ("text", "scheme", "place", "address", "label"),
    [
        ("0", "v4l2", "/dev/video0", "v4l2:///dev/video0", "v4l2-dev-video0"),
        ("v4l2:///dev/v4l/by-id/cam-1", "v4l2", "/dev/v4l/by-id/cam-1", "v4l2:///dev/v4l/by-id/cam-1", None),
        ("csi://0?fps=60", "csi", "0", "csi://0", "csi-0"),
        ("TEST://fundus", "test", "fundus", "test://fundus", "test-fundus"),
        ("file:///a%20b/c.mp4", "file", "/a b/c.mp4", "file:///a b/c.mp4", None),
        ("rtsp://10.0.0.7:8554/cam/1", "rtsp", "rtsp://10.0.0.7:8554/cam/1", "rtsp://10.0.0.7:8554/cam/1",
         "rtsp-10-0-0-7-8554-cam-1"),
        ("rtsp://[fe80::1]:554/x", "rtsp", "rtsp://[fe80::1]:554/x", "rtsp://[fe80::1]:554/x", "rtsp-fe80-1-554-x"),
        ("http://h/v?token=s#timeout=3", "http", "http://h/v?token=s", "http://h/v", "http-h-v"),
        ("udp://@:5000", "udp", "udp://@:5000", "udp://:5000", "udp-5000"),
    ],
)  # fmt: skip
def test_parts(text: str, scheme: str, place: str, address: str, label: str | None) -> None:
    uri = parsed(text)
    assert (uri.scheme, uri.place, uri.address) == (scheme, place, address)
    assert label is None or uri.label == label
    assert "." not in uri.label
    assert "/" not in uri.label


@pytest.mark.parametrize(
    "text",
    [
        "rtsp:admin:s3cret@10.0.0.7/cam", "admin:s3cret@10.0.0.7:554/cam?x=1", "rtsp//admin:s3cret@camera.local/x",
        "admin:s3/c@ret@[fe80::1]/x", "rtsp:admin:s3cret@camera",
    ],
)  # fmt: skip
def test_a_login_without_its_scheme_is_not_shown(text: str) -> None:
    assert not means_a_bundle(text)
    with pytest.raises(UserError, match=r"rtsp://USER:PASSWORD@HOST/PATH") as caught:
        open_sources([text])
    assert "s3" not in str(caught.value)


def test_files_may_be_called_like_logins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("scan 1:2@10.png", "a:b@c/d.png"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(b"\x89PNG\r\n\x1a\n")
    assert [[str(file) for file in source.files] for source in open_sources(["scan 1:2@10.png", "a:b@c/*"])[0]] == [
        ["scan 1:2@10.png"],
        ["a:b@c/d.png"],
    ]
    assert means_a_bundle("a:b")
    assert means_a_bundle("hf://ward/heart@v2")


def test_passwords_and_tokens_are_kept_for_the_library_and_shown_to_nobody() -> None:
    uri = parsed("rtsp://admin:s3cret@camera.local/stream?token=t0ken#transport=udp")
    assert uri.place == "rtsp://admin:s3cret@camera.local/stream?token=t0ken"
    assert uri.options == {"transport": "udp"}
    for shown in (uri.address, uri.label):
        for secret in ("admin", "s3cret", "t0ken"):
            assert secret not in shown


@pytest.mark.parametrize(
    ("path", "shown", "label"),
    [
        ("/user=admin&password=s3cret&channel=1", "/user=***&password=***&channel=1", "user-password-channel-1"),
        ("/user=admin_password=s3cret_channel=1_stream=0.sdp", "/user=***_password=***_channel=1_stream=0.sdp",
         "user-password-channel-1-stream-0-sdp"),
        ("/live;PWD=s3cret/ch1", "/live;PWD=***/ch1", "live-PWD-ch1"),
        ("/cam/passwd=s3cret", "/cam/passwd=***", "cam-passwd"),
        ("/access_token=s3cret/auth=admin/apikey=s3cret", "/access_token=***/auth=***/apikey=***",
         "access-token-auth-apikey"),
        ("/username%3Dadmin&pass%3ds3cret", "/username%3D***&pass%3d***", "username-3D-pass-3d"),
        ("/users/1/token", "/users/1/token", "users-1-token"),
    ],
)  # fmt: skip
def test_secrets_in_a_path_are_shown_to_nobody(path: str, shown: str, label: str) -> None:
    uri = parsed(f"rtsp://10.0.0.7{path}?pwd=s3cret")
    assert uri.place == f"rtsp://10.0.0.7{path}?pwd=s3cret"
    assert uri.address == f"rtsp://10.0.0.7{shown}"
    assert uri.label == f"rtsp-10-0-0-7-{label}"


@given(
    user=st.text("abcdefghijk0123456789", min_size=8, max_size=12),
    password=st.text("lmnopqrstuvw%:", min_size=8, max_size=12),
)
def test_no_password_is_ever_shown(user: str, password: str) -> None:
    uri, refused = parsed_or_refused(f"rtsp://{user}:{password}@h.example/x")
    shown = refused if uri is None else uri.address + uri.label
    assert password not in shown
    assert user not in shown


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rtps://camera", "Did you mean 'rtsp'?"),
        ("htp://camera", "Did you mean 'http'?"),
        ("v4l://dev", "Did you mean 'v4l2'?"),
        ("gopher://x", "Known: file, v4l2"),
        ("rtsp:/camera", "Write rtsp://"),
        ("rtsp://", "names no host"),
        ("csi://", "csi://0"),
        ("test://?fps=3", "test://fundus"),
        ("rtsp://h:port/", "not a valid address"),
        ("http://[::1", "not a valid address"),
        ("test://fundus?fps", "has no value"),
        ("test://fundus?fps=1&fps=2", "stands twice"),
    ],
)
def test_what_is_written_wrongly(text: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_uri(text)
    assert words in str(caught.value)
    assert caught.value.exit_code == 2


@given(st.text(max_size=40), st.sampled_from(["", *(f"{scheme}://" for scheme in SCHEMES)]))
def test_any_text_is_parsed_or_refused(text: str, start: str) -> None:
    uri, refused = parsed_or_refused(start + text)
    assert "\n" not in refused
    assert uri is None or (uri.scheme in SCHEMES and uri.label)


def test_options_are_checked() -> None:
    uri = parsed("test://fundus?size=640x480&fps=29.97&frames=12")
    assert uri.size() == (480, 640)
    assert uri.number("fps", 1, 100) == 29.97
    assert uri.whole("frames", 1, 100) == 12
    assert uri.whole("seed", 0, 9) is None
    for wrong in ("size=640", "size=0x3", "size=ax3", "size=640x480x3"):
        with pytest.raises(UserError, match="width x height"):
            parsed(f"test://fundus?{wrong}").size()
    for wrong in ("fps=no", "fps=-1", "fps=1e3", "fps=1000", "fps=nan"):
        with pytest.raises(UserError, match="from 1 to 100"):
            parsed(f"test://fundus?{wrong}").number("fps", 1, 100)
    with pytest.raises(UserError, match="whole number"):
        uri.whole("fps", 1, 100)
    with pytest.raises(UserError, match="Did you mean 'fps'"):
        parsed("test://fundus?fbs=3").allow("fps", "size")


@pytest.mark.parametrize("character", ["/", "#", "?"])
@given(
    before=st.text("lmnopqrstuvw0123456789%:@", min_size=0, max_size=6),
    after=st.text("lmnopqrstuvw0123456789%:@/#?", min_size=0, max_size=6),
    scheme=st.sampled_from([name for name, scheme in SCHEMES.items() if scheme.network]),
)
def test_a_password_that_ends_the_address_is_refused_with_what_to_write(
    character: str, before: str, after: str, scheme: str
) -> None:
    password = f"s3{before}{character}{after}cret"
    uri, refused = parsed_or_refused(f"{scheme}://admin:{password}@camera.example/x")
    assert uri is None
    assert f"{character} as {quote(character, safe='')}" in refused
    assert f"{scheme}://..." in refused
    for secret in ("admin", "s3", "cret", "camera"):
        assert secret not in refused
    escaped = parsed(f"{scheme}://admin:{quote(password, safe='')}@camera.example/x")
    assert escaped.address == f"{scheme}://camera.example/x"
    assert urlsplit(escaped.place).hostname == "camera.example"


@pytest.mark.parametrize("text", ["rtsp://host/user@site/x", "http://me:pw@host:80/v?a=1#timeout=3", "udp://@:5000/"])
def test_addresses_that_end_where_they_seem_to_are_taken(text: str) -> None:
    assert parsed(text).place == text.partition("#")[0]
