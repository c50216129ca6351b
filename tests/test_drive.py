"""Tests of Google Drive's files against a Drive of our own on 127.0.0.1: pages, faults, foreign hosts, kills."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate

import huggingface_hub.utils
import pytest
from drive_server import DriveServer, confirm_page, cookie_page, file, page, redirect, reset, silence, slow, stall

from gvsl_zoo import __version__, download, drive
from gvsl_zoo.cache import locked
from gvsl_zoo.errors import SourceError

CONTENT = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
MOST_BYTES = 400_000
FIRST = {"export": "download", "id": "an-id"}


@pytest.fixture
def server(monkeypatch):
    server = DriveServer()
    monkeypatch.setattr(drive, "ORIGIN", server.url())
    monkeypatch.setattr(drive, "HOSTS", ("127.0.0.1",))
    monkeypatch.setenv("NO_PROXY", "*")
    yield server
    server.close()


@pytest.fixture
def other():
    """A second server, which goes by the name of localhost."""
    other = DriveServer()
    other.answers = [file(CONTENT)]
    yield other
    other.close()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "upstream").mkdir()
    return tmp_path / "upstream"


def fetch(folder):
    return drive.fetch("an-id", folder / "model.pth", MOST_BYTES)


def arrives(folder):
    """The file comes, whole and alone."""
    assert fetch(folder) == SHA256
    assert [path.name for path in folder.iterdir()] == ["model.pth"]
    assert (folder / "model.pth").read_bytes() == CONTENT


def refused(folder, match, seconds=5.0):
    """The file does not come: an error that matches, in time, and nothing left behind."""
    started = time.monotonic()
    with pytest.raises(SourceError, match=match) as caught:
        fetch(folder)
    assert time.monotonic() - started < seconds
    assert caught.value.remedy and list(folder.iterdir()) == []


# --- The file and the pages before it -------------------------------------------------------------------------------


def test_a_small_file_comes_at_once(server, folder):
    server.answers = [file(CONTENT)]
    arrives(folder)
    (asked,) = server.log
    assert (asked.path, asked.query) == ("/uc", FIRST)
    assert asked.headers["User-Agent"] == f"gvsl-zoo/{__version__}"
    assert asked.headers["Accept-Encoding"] == "identity"
    assert not asked.headers.keys() & {"Cookie", "Authorization"}


def test_a_file_of_unknown_length_comes_whole(server, folder):
    server.answers = [file(CONTENT, None)]
    arrives(folder)


def test_redirects_within_drive_are_followed(server, folder):
    server.answers = [redirect("/elsewhere?a=1"), redirect(server.url() + "/there"), file(CONTENT)]
    arrives(folder)
    assert [(asked.path, asked.query) for asked in server.log[1:]] == [("/elsewhere", {"a": "1"}), ("/there", {})]


@pytest.mark.parametrize("action, form_id", [("{url}/download", "download-form"), ("/download", "downloadForm")])
def test_the_form_of_a_large_file_is_sent(server, folder, action, form_id):
    server.answers = [confirm_page(action.format(url=server.url()), form_id), file(CONTENT)]
    arrives(folder)
    assert server.log[1].path == "/download"
    assert server.log[1].query == FIRST | {"confirm": "t", "uuid": "5f0e&1"}


def test_the_cookie_of_a_large_file_is_its_confirmation(server, folder):
    server.answers = [cookie_page(), file(CONTENT)]
    arrives(folder)
    assert (server.log[1].path, server.log[1].query) == ("/uc", FIRST | {"confirm": "Xy7Z"})
    assert server.log[1].headers["Cookie"] == "download_warning_1305_an-id=Xy7Z"


def test_the_name_that_drive_gives_the_file_is_ignored(server, folder):
    server.answers = [file(CONTENT, Content_Disposition='attachment; filename="../../evil.pth"')]
    arrives(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["upstream"]


def test_a_replaced_file_of_the_same_size_has_another_hash(server, folder):
    server.answers = [file(CONTENT[::-1])]
    assert fetch(folder) == hashlib.sha256(CONTENT[::-1]).hexdigest() != SHA256


def test_the_progress_bar_shows_on_a_terminal_unless_the_hubs_are_off(server, folder, monkeypatch):
    server.answers = [file(CONTENT)]
    for terminal, wanted in ((True, True), (True, False), (False, True)):
        screen = io.StringIO()
        screen.isatty = lambda terminal=terminal: terminal
        monkeypatch.setattr(sys, "stderr", screen)
        with contextlib.nullcontext() if wanted else huggingface_hub.utils.disable_progress_bars():
            arrives(folder)
        assert ("model.pth: 100%" in screen.getvalue()) == (terminal and wanted)


# --- Pages that say no ----------------------------------------------------------------------------------------------

QUOTA = page(
    "Google Drive - Quota exceeded",
    '<p class="uc-error-caption">Sorry, you can&#39;t view or download this file at this time.</p>'
    '<p class="uc-error-subcaption">Too many users have viewed or downloaded this file recently.</p>',
)
REFUSALS = {
    "quota": (QUOTA, "file an-id: its quota is used up.*try later, or make a copy.*--from-file"),
    "quota by its title": (page("Google Drive – Quota exceeded"), "quota is used up"),
    "quota by its text": (page("Google Drive", "Too many users have\nviewed or downloaded"), "quota is used up"),
    "quota, curly": (page("Sorry", "you can’t view or <b>download</b> this file", 403), "quota is used up"),
    "quota with a cookie": (page("Quota exceeded", Set_Cookie="download_warning_1=a"), "quota is used up"),
    "sign-in host": (redirect("https://accounts.google.com/ServiceLogin"), "asks to sign in.*private.*access"),
    "sign-in page": (page("Google Drive: Sign-in", "Email or phone"), "it is private"),
    "no access": (page("Google Drive - Access Denied", "You need access. Ask for it."), "it is private"),
    "401": (page("Unauthorized", status=401), "it is private"),
    "403": (file(b"", status=403), "it is private"),
    "404": (page("Error 404 (Not Found)!!1", status=404), "does not exist any more.*ask its authors"),
    "410": (file(b"Gone", status=410), "does not exist any more"),
    "dead": (page("Google Drive", "Sorry, the file you have requested does not exist."), "does not exist any more"),
    "virus": (page("Google Drive", "Sorry, this file is infected with a virus"), "infected.*do not use it"),
    "robot": (page("Sorry...", "your network may be sending automated queries", 403), "this network for a robot"),
    "portal": (page("Hotel Wi-Fi"), "a web page instead of the file: 'Hotel Wi-Fi'; check the network"),
    "long title": (page("W\n  X" * 100), r"'(W XW? ?){20,40}X?W?'; check"),
    "words of a script": (page("Hotel", "<script>let a = 'Quota exceeded'</script>"), "instead of the file: 'Hotel'"),
    "disguise": (page("In disguise", Content_Type="application/zip"), "a web page instead of the file"),
    "odd markup": (file(b"<title>Odd</title><![odd<form>"), "a web page instead of the file: 'Odd'"),
    "no text": (file(b"<\xff\xfe\x00"), "a web page instead of the file: ''"),
    "206": (file(CONTENT, status=206), "answered 206"),
}


@pytest.mark.parametrize("answer, match", REFUSALS.values(), ids=REFUSALS)
def test_a_page_instead_of_the_file_is_named(server, folder, answer, match):
    server.answers = [answer]
    refused(folder, match)
    assert len(server.log) == 1


def test_a_page_without_end_is_not_read_to_its_end(server, folder):
    server.answers = [slow(itertools.chain([b"<title>Endless</title>"], itertools.repeat(b"x" * 9000)), None, 0)]
    refused(folder, "a web page instead of the file: 'Endless'")


@pytest.mark.parametrize("answer", [confirm_page("/download"), cookie_page()], ids=["form", "cookie"])
def test_a_page_that_comes_again_and_again_is_given_up(server, folder, answer):
    server.answers = [answer]
    refused(folder, "again and again")
    assert len(server.log) == 3


# --- Foreign hosts --------------------------------------------------------------------------------------------------

LINKS = {
    "plain": "http://localhost:{port}/",
    "no scheme": "//localhost:{port}/",
    "user": "http://127.0.0.1@localhost:{port}/",
    "backslash": r"http://localhost:{port}\@127.0.0.1/",
    "suffix": "http://127.0.0.1.localhost:{port}/",
    "other scheme": "https://127.0.0.1:{port}/",
    "file": "file:///etc/hostname",
    "script": "javascript:alert(1)",
    "no address": "http://[localhost:{port}/",
}


@pytest.mark.parametrize("link", LINKS.values(), ids=LINKS)
@pytest.mark.parametrize("answer", [redirect, confirm_page], ids=["redirect", "form"])
def test_a_foreign_host_is_never_asked(server, other, folder, answer, link):
    link = link.format(port=other.server_port)
    server.answers = [cookie_page(), answer(link)]
    refused(folder, "leads to the foreign (http|file|javascript)|which is no address")
    assert other.log == [] and len(server.log) == 2


@pytest.mark.parametrize(
    "host", ["evil.com", "googleusercontent.com", "drive.google.com.evil.com", "evildrive.google.com"]
)
def test_hosts_that_look_like_drives_are_foreign(host, monkeypatch):
    monkeypatch.setattr(drive, "ORIGIN", "https://drive.google.com")
    with pytest.raises(SourceError, match=f"leads to the foreign https://{host}"):
        drive._follow("https://drive.google.com/uc", f"https://{host}/download")


@pytest.mark.parametrize(
    "host", ["drive.usercontent.google.com", "doc-0g-docs.googleusercontent.com", "DOCS.google.com"]
)
def test_drives_own_hosts_are_followed_over_https_only(host, monkeypatch):
    monkeypatch.setattr(drive, "ORIGIN", "https://drive.google.com")
    assert drive._follow("https://drive.google.com/uc", f"https://{host}/x") == f"https://{host}/x"
    with pytest.raises(SourceError, match="leads to the foreign http://"):
        drive._follow("https://drive.google.com/uc", f"http://{host}/x")


def test_cookies_and_passwords_stay_where_they_belong(server, other, folder, monkeypatch):
    (folder.parent / "netrc").write_text("default login me password secret\n")
    monkeypatch.setenv("NETRC", str(folder.parent / "netrc"))
    monkeypatch.setattr(drive, "HOSTS", ("127.0.0.1", "localhost"))
    server.answers = [cookie_page(), redirect(other.url("localhost"), Set_Cookie="a=b; Domain=localhost")]
    arrives(folder)
    assert "Cookie" in server.log[1].headers
    assert not any(asked.headers.keys() & {"Authorization"} for asked in server.log + other.log)
    assert "Cookie" not in other.log[0].headers
    server.answers = [file(CONTENT)]
    fetch(folder)
    assert "Cookie" not in server.log[-1].headers  # of an earlier call


# --- Faults of the network ------------------------------------------------------------------------------------------

BROKEN = {
    "500": file(b"", status=500),
    "429 for a second": file(b"", status=429, Retry_After="1"),
    "truncated": file(CONTENT[:9999], len(CONTENT)),
    "empty": file(b"", len(CONTENT)),
    "reset": reset(CONTENT[:9999]),
    "stall": stall(CONTENT[:9999]),
    "lengths that disagree": file(CONTENT, Content_Length="5, 6"),
    "page cut short": file(b"<html>", 4000, Content_Type="text/html"),
}


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(download, "READ_SECONDS", 0.3)
    monkeypatch.setattr(download.Transient.__init__, "__defaults__", (download.TRY_LATER, 0.05))  # the wait


@pytest.mark.parametrize("answer", BROKEN.values(), ids=BROKEN)
def test_a_fault_that_passes_heals(server, folder, impatient, answer):
    server.answers = [answer, file(CONTENT)]
    arrives(folder)


@pytest.mark.parametrize("name", ["500", "truncated", "stall"])
def test_a_fault_that_stays_is_told_after_three_tries(server, folder, impatient, name):
    server.answers = [BROKEN[name]]
    refused(folder, r"Google Drive( answered 500)?.*tried 3 times.*try again later")
    assert len(server.log) == 3


@pytest.mark.parametrize("kind", ["seconds", "date"])
def test_a_server_that_asks_for_an_hour_is_told_at_once(server, folder, kind):
    wait = "3600" if kind == "seconds" else formatdate(time.time() + 3600, usegmt=True)
    server.answers = [file(b"", status=429, Retry_After=wait)]
    refused(folder, r"asks to wait 3[56]\d\d s; try again after \d\d:\d\d", seconds=1)
    assert len(server.log) == 1


def test_a_server_that_never_answers_is_told_in_time(server, folder, impatient):
    server.answers = [silence]
    refused(folder, "does not answer", seconds=2)


def test_a_closed_port_is_told(folder, impatient, monkeypatch):
    monkeypatch.setattr(drive, "ORIGIN", "http://127.0.0.1:9")
    refused(folder, r"ConnectionRefusedError: .*refused.*tried 3 times")


def test_a_name_that_does_not_resolve_is_told(folder, monkeypatch):
    monkeypatch.setattr(drive, "ORIGIN", "http://drive.invalid")
    refused(folder, "Google Drive cannot be found: drive.invalid")


@pytest.mark.parametrize("length", [None, MOST_BYTES])
@pytest.mark.parametrize("kind", ["application/zip", "text/html"])
def test_a_drip_ends_with_the_time_that_the_download_may_take(server, folder, monkeypatch, length, kind):
    monkeypatch.setattr(download, "GRACE_SECONDS", 0.3)
    monkeypatch.setattr(download, "SLOWEST_RATE", MOST_BYTES / 0.2)
    server.answers = [slow(itertools.repeat(b"x"), length, 0.02, Content_Type=kind)]
    refused(folder, r"took more than \d s for \d+ bytes", seconds=1)


def test_a_body_without_end_is_cut_off(server, folder):
    server.answers = [slow(itertools.repeat(b"x" * 65536), None, 0)]
    refused(folder, "sends more than the 400000 bytes")


def test_a_file_that_is_announced_as_too_large_is_not_begun(server, folder):
    server.answers = [stall(bytes(MOST_BYTES))]
    refused(folder, "offers 401000 bytes, at most 400000", seconds=1)


def test_a_compressed_body_is_refused(server, folder):
    server.answers = [file(CONTENT, Content_Encoding="gzip")]
    refused(folder, r"compressed body \(gzip\)")


def test_a_redirect_whose_body_has_no_end_is_not_read(server, folder):
    endless = slow(itertools.repeat(b"x" * 65536), None, 0, status=302, Location="/there")
    server.answers = [endless, file(CONTENT)]
    arrives(folder)


def test_redirects_in_a_circle_are_given_up(server, folder):
    server.answers = [redirect("/uc")]
    refused(folder, "redirects in a circle")
    assert len(server.log) == download.MAX_REQUESTS


# --- The disk, and the end of the process ---------------------------------------------------------------------------


@contextlib.contextmanager
def largest_file(size):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_nothing_and_later_the_file_comes(server, folder):
    server.answers = [file(CONTENT)]
    with largest_file(len(CONTENT) - 1):
        refused(folder, r"cannot write to .*model\.pth: File too large; free space")
    arrives(folder)


def test_a_folder_that_is_gone_is_told(server, folder):
    server.answers = [file(CONTENT)]
    with pytest.raises(SourceError, match=r"cannot write to .*gone.model\.pth: No such file"):
        fetch(folder / "gone")


def test_a_failed_download_leaves_the_file_that_was_there(server, folder):
    (folder / "model.pth").write_bytes(b"before")
    server.answers = [slow(itertools.repeat(b"x" * 65536), None, 0)]
    with pytest.raises(SourceError, match="sends more"):
        fetch(folder)
    assert [path.read_bytes() for path in folder.iterdir()] == [b"before"]
    server.answers = [file(CONTENT)]
    arrives(folder)


def test_an_interrupt_leaves_nothing(server, folder, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt("by hand")

    monkeypatch.setattr(download.Meter, "receive", interrupt)
    server.answers = [file(CONTENT)]
    with pytest.raises(KeyboardInterrupt, match="by hand"):
        fetch(folder)
    assert list(folder.iterdir()) == []


def test_a_kill_leaves_a_partial_file_that_the_next_call_sweeps(server, tmp_path):
    server.answers = [slow([CONTENT[i : i + 3000] for i in range(0, len(CONTENT), 3000)], len(CONTENT), 0.02)]
    code = (
        "import sys; from pathlib import Path; from gvsl_zoo import drive; "
        "drive.ORIGIN, drive.HOSTS = sys.argv[1], ('127.0.0.1',); "
        f"drive.fetch('an-id', Path(sys.argv[2]) / 'model.pth', {MOST_BYTES})"
    )

    def killed_after(delay):
        folder = tmp_path / str(delay)
        folder.mkdir()
        with subprocess.Popen([sys.executable, "-c", code, server.url(), folder], stderr=subprocess.DEVNULL) as process:
            while not any(folder.iterdir()) and process.poll() is None:
                time.sleep(0.002)
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        return folder

    dice = random.Random(0)
    delays = [dice.uniform(0, 1.5) for _ in range(10)]  # the whole takes 2 s
    with ThreadPoolExecutor(len(delays)) as pool:
        folders = list(pool.map(killed_after, delays))
    for folder in folders:
        (left,) = (path.name for path in folder.iterdir())
        assert left.startswith(".model.pth.") and left.endswith(".partial")
    server.answers = [file(CONTENT)]
    for folder in folders:
        with locked(folder):
            assert fetch(folder) == SHA256
        assert {path.name for path in folder.iterdir()} - {".lock"} == {"model.pth"}
