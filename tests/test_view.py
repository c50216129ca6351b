"""Tests of the viewer: the server gives nothing to strangers, and a click in Chromium moves the other crosshair."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from gvsl_zoo import load
from gvsl_zoo.cli import main
from gvsl_zoo.demo import as_volume
from gvsl_zoo.errors import ArgumentError, GvslZooError, VolumeError
from gvsl_zoo.inference.correspond import Matcher
from gvsl_zoo.pretrain.anatomy import sample_subject
from gvsl_zoo.view import server as room
from gvsl_zoo.view.pair import CELLS, Pair
from gvsl_zoo.view.server import STATIC, PageServer
from gvsl_zoo.volume import Volume, write_volume

VIEWER = Path(__file__).parents[1] / "viewer"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SHIFT_MM = np.array([22.0, -9.0, 35.0])
VOXEL_MM = 4.0  # of the embedded model's grid
POINT = [12.0, -8.0, 4.0]


@pytest.fixture(scope="module")
def scans() -> tuple[Volume, Volume]:
    """A subject, and the same one elsewhere in the world with its axes the other way round."""
    fixed = as_volume(sample_subject((34, 30, 34), torch.Generator().manual_seed(101), (6.0,) * 3))
    affine = fixed.affine @ np.diag([-1.0, -1.0, 1.0, 1.0])
    affine[:3, 3] = fixed.affine[:3, :3] @ [fixed.shape[0] - 1, fixed.shape[1] - 1, 0] + fixed.affine[:3, 3] + SHIFT_MM
    return fixed, Volume(np.ascontiguousarray(fixed.data[::-1, ::-1]), affine)


@pytest.fixture(scope="module")
def matcher(scans: tuple[Volume, Volume]) -> Matcher:
    return Matcher(*scans, load("gvsl-unet-ct-nano"))


@pytest.fixture(scope="module")
def pair(scans: tuple[Volume, Volume], matcher: Matcher, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    names = {"fixed": "fixed.nii.gz", "moving": "moving.nii.gz", "model": "gvsl-unet-ct-nano"}
    folder = tmp_path_factory.mktemp("view")
    return Pair(*scans, matcher, folder, warped=scans[0], names=names)


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files where the built page would be: what the server does with them needs no Node.js."""
    for name in STATIC.values():
        (tmp_path / name).write_text(f"this is {name}")
    monkeypatch.setattr(room, "PAGE", tmp_path)


@pytest.fixture
def server(pair: Pair, page: None) -> Iterator[PageServer]:
    with serving(pair) as running:
        yield running


def far_away(scan: Volume) -> Volume:
    affine = scan.affine.copy()
    affine[0, 3] += 5000
    return Volume(scan.data, affine)


class serving:
    """A server that answers in a thread."""

    def __init__(self, pair: Pair) -> None:
        self.server = PageServer()
        self.server.pair = pair

    def __enter__(self) -> PageServer:
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self.server

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def ask(
    server: PageServer, name: str, method: str = "GET", body: bytes | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of a request below the token; a name that begins with / is the whole path."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=60)
    path = name if name.startswith("/") else f"/{server.token}/{name}"
    connection.request(method, path, body, {key.replace("_", "-"): value for key, value in headers.items()})
    response = connection.getresponse()
    answer = response.status, dict(response.getheaders()), response.read()
    connection.close()
    return answer


def match(server: PageServer, question: Any, **headers: str) -> tuple[int, dict[str, Any]]:
    body = question if isinstance(question, bytes) else json.dumps(question).encode()
    status, _, answer = ask(server, "match", "POST", body, **{"Content_Type": "application/json"} | headers)
    return status, json.loads(answer)


# ---- who is let in


def test_the_server_listens_on_loopback_under_a_new_secret_each_time(pair: Pair, server: PageServer) -> None:
    assert server.server_address[0] == "127.0.0.1" and server.url.startswith("http://127.0.0.1:")
    with serving(pair) as other:
        assert other.token != server.token and len(server.token) >= 43  # 256 bits


def test_the_page_is_served_under_the_token_with_headers_that_keep_it_to_itself(server: PageServer) -> None:
    for name, file in STATIC.items():
        status, headers, body = ask(server, name)
        assert (status, body) == (200, f"this is {file}".encode())
        assert "default-src 'none'" in headers["Content-Security-Policy"] and headers["Cache-Control"] == "no-store"
        assert headers["Referrer-Policy"] == "no-referrer" and headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("path", ["/", "/index.html", "/app.js", "/wrong/", "/wrong/fixed.nii", "//", "/%00/"])
def test_without_the_token_nothing_is_given(server: PageServer, path: str) -> None:
    status, _, body = ask(server, path)
    assert status == 403 and b"whole address" in body


def test_the_token_alone_or_shortened_is_not_enough(server: PageServer) -> None:
    for path in (f"/{server.token}", f"/{server.token[:-1]}/", f"/{server.token}x/"):
        assert ask(server, path)[0] == 403


def test_another_host_or_origin_is_refused(server: PageServer) -> None:
    port = server.server_port
    assert ask(server, "", Host=f"localhost:{port}")[0] == 200
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1", f"127.0.0.1:{port + 1}"):
        assert ask(server, "", Host=host)[0] == 403
    question = {"scan": "fixed", "point_mm": POINT}
    assert match(server, question, Origin=f"http://127.0.0.1:{port}")[0] == 200
    for origin in ("http://evil.example", "null", f"https://127.0.0.1:{port}"):
        assert match(server, question, Origin=origin) == (403, {"error": "a request from another page"})


def test_at_port_80_browsers_leave_the_port_out(server: PageServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "server_port", 80)
    question = {"scan": "fixed", "point_mm": POINT}
    for host in ("127.0.0.1", "localhost", "localhost:80"):
        assert match(server, question, Host=host, Origin=f"http://{host}")[0] == 200
    assert ask(server, "", Host="evil.example")[0] == 403


@pytest.mark.parametrize(
    "name",
    ["../server.py", "..%2fserver.py", "fixed.nii/..", "heat.nii", "app.js?x", "./app.js", "/etc/passwd", "match"],
)
def test_names_that_are_not_on_the_list_are_not_found(server: PageServer, name: str) -> None:
    assert ask(server, f"/{server.token}/{name}")[0] == 404


@pytest.mark.parametrize("method", ["PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"])
def test_only_get_and_the_question_are_answered(server: PageServer, method: str) -> None:
    assert ask(server, "", method)[0] == 501
    assert ask(server, "app.js", "POST", b"{}", Content_Type="application/json")[0] == 404


@pytest.mark.parametrize(
    "question",
    [
        b"",
        b"[]",
        b"not json",
        b"\xff\xfe",
        b"[" * 900,
        {"scan": "fixed"},
        {"scan": "other", "point_mm": POINT},
        {"scan": "fixed", "point_mm": [1, 2]},
        {"scan": "fixed", "point_mm": ["a", 2, 3]},
        {"scan": "fixed", "point_mm": [10**400, 2, 3]},
        b'{"scan": "fixed", "point_mm": [NaN, 2, 3]}',
        {"scan": "fixed", "point_mm": [9000, 0, 0]},
    ],
)
def test_a_question_that_is_none_is_answered_with_its_fault(server: PageServer, question: Any) -> None:
    status, answer = match(server, question)
    assert status == 400 and answer["error"]


def test_a_question_too_long_or_of_another_kind_is_not_read(server: PageServer) -> None:
    assert match(server, b"x" * 1025)[0] == 413
    assert match(server, {}, Content_Type="text/plain")[0] == 415
    assert match(server, {}, Content_Length="-5")[0] == 413
    assert match(server, {}, Content_Length="9" * 5000)[0] == 413


def test_a_question_that_cannot_be_answered_now_is_told_why(
    server: PageServer, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise VolumeError("cannot write it: no space left", "free some")

    monkeypatch.setattr(pair, "match", full)
    status, answer = match(server, {"scan": "fixed", "point_mm": POINT})
    assert status == 409 and answer["error"].startswith("cannot write it: no space left")


# ---- what is shown


def test_the_scans_are_served_whole_and_described(
    server: PageServer, scans: tuple[Volume, Volume], tmp_path: Path
) -> None:
    facts = json.loads(ask(server, "scans.json")[2])
    assert facts["warped"] and facts["fixed"]["description"] == "34 × 30 × 34 voxels of 6 × 6 × 6 mm"
    for name, scan in zip(("fixed", "moving"), scans, strict=True):
        (tmp_path / "scan.nii").write_bytes(ask(server, f"{name}.nii")[2])
        image: Any = nib.load(tmp_path / "scan.nii")
        np.testing.assert_array_equal(np.asarray(image.dataobj), scan.data)
        np.testing.assert_allclose(image.affine, scan.affine, atol=1e-4)
        low, high = facts[name]["range"]
        assert low < high


def test_the_match_is_that_of_the_matcher(server: PageServer, matcher: Matcher) -> None:
    status, answer = match(server, {"scan": "fixed", "point_mm": POINT})
    found = matcher.match(np.array([POINT]))
    assert status == 200 and answer["point_mm"] == pytest.approx(found.points_mm[0].tolist(), abs=1e-3)
    assert answer["confidence"] == pytest.approx(found.confidence[0], abs=1e-3)
    _, back = match(server, {"scan": "moving", "point_mm": answer["point_mm"]})
    assert np.linalg.norm(np.array(back["point_mm"]) - POINT) < VOXEL_MM / 2


@pytest.mark.parametrize("codes", [(1, 2), (0, 0)], ids=["qform first", "neither"])
def test_the_page_gets_the_one_world_in_which_points_are_matched(
    pair: Pair, scans: tuple[Volume, Volume], page: None, tmp_path: Path, codes: tuple[int, int]
) -> None:
    fixed, elsewhere = scans[0], scans[0].affine.copy()
    elsewhere[0, 3] += 40
    header = nib.Nifti1Header()
    header.set_data_shape(fixed.shape)
    header.set_xyzt_units("mm")
    header.set_sform(fixed.affine, codes[0])
    header.set_qform(elsewhere, codes[1])
    read = Volume(fixed.data, header.get_best_affine(), header)
    with serving(Pair(read, read, pair.matcher, tmp_path, names=pair.names)) as server:
        (tmp_path / "scan.nii").write_bytes(ask(server, "fixed.nii")[2])
    served: Any = nib.load(tmp_path / "scan.nii")
    for form in (served.header.get_sform(coded=True), served.header.get_qform(coded=True)):
        np.testing.assert_allclose(form[0], read.affine, atol=1e-3)
        assert form[1] > 0


def test_a_question_that_was_given_up_before_its_turn_is_not_answered(
    server: PageServer, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[float]] = []
    matched = pair.matcher.match
    monkeypatch.setattr(
        pair.matcher, "match", lambda points, **how: asked.extend(points.tolist()) or matched(points, **how)
    )
    before = set(threading.enumerate())
    with pair._lock:  # another question is being answered
        for x in (1.0, 2.0):
            connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
            body = json.dumps({"scan": "fixed", "point_mm": [x, 0, 0]})
            connection.request("POST", f"/{server.token}/match", body, {"Content-Type": "application/json"})
            connection.close()
    assert match(server, {"scan": "fixed", "point_mm": POINT})[0] == 200
    for thread in set(threading.enumerate()) - before:
        thread.join()
    assert asked == [POINT]


def test_a_checkerboard_takes_its_fields_from_both_scans_in_turn(pair: Pair, scans: tuple[Volume, Volume]) -> None:
    fixed = scans[0]
    brighter = Pair(
        fixed,
        scans[1],
        pair.matcher,
        pair.folder,
        warped=Volume(np.full(fixed.shape, 3000, np.int16), fixed.affine),
        names=pair.names,
    )
    board = brighter._volume("warped-checkerboard").data
    plain = brighter._volume("warped-blend").data
    own = pair._volume("warped-checkerboard").data
    assert (plain == 255).all() and board.dtype == np.uint8
    from_warped = (board == 255) & (own < 255)
    edge = -(-34 // CELLS)
    assert not from_warped[:4, :4, :4].any() and from_warped[edge + 1 : edge + 3, :4, :4].any()
    assert 0.3 < from_warped.mean() < 0.6


def test_scans_that_do_not_overlap_say_so_when_they_are_laid_over_each_other(
    pair: Pair, scans: tuple[Volume, Volume], page: None, tmp_path: Path
) -> None:
    apart = Pair(scans[0], far_away(scans[1]), pair.matcher, tmp_path, names=pair.names)
    with serving(apart) as server:
        status, _, body = ask(server, "moving-blend.nii")
        assert status == 409 and b"the scans do not overlap; lay the warped one over" in body
        assert ask(server, "warped-blend.nii")[0] == 404


# ---- the command


def test_a_page_that_was_not_built_is_said_before_long_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "PAGE", tmp_path)
    result = CliRunner().invoke(main, ["view", "a.nii.gz", "b.nii.gz"])
    assert result.exit_code == 1 and "not built" in result.output and "make viewer" in result.output
    with pytest.raises(GvslZooError, match="install a wheel"):
        room.page_files()


def test_a_port_that_is_taken_is_said_before_anything_is_read(server: PageServer) -> None:
    result = CliRunner().invoke(main, ["view", "none.nii.gz", "none.nii.gz", "--port", str(server.server_port)])
    assert result.exit_code == 1 and "cannot listen on port" in result.output
    assert "choose another --port" in result.output


def test_a_warped_scan_that_does_not_fit_is_said_before_the_work(
    page: None, scans: tuple[Volume, Volume], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gvsl_zoo.zoo.load", lambda *_, **__: pytest.fail("the model was loaded"))
    monkeypatch.chdir(tmp_path)
    for name, scan in zip(("fixed.nii", "moving.nii"), scans, strict=True):
        write_volume(scan, name)
    result = CliRunner().invoke(main, ["view", "fixed.nii", "moving.nii", "--warped", "moving.nii"])
    assert result.exit_code == 1 and "resample the warped scan onto the grid of the fixed scan" in result.output


def test_a_browser_in_the_terminal_does_not_keep_the_server_from_answering(
    page: None, scans: tuple[Volume, Volume], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = threading.Event()

    def serve(server: PageServer) -> None:
        served.set()
        raise KeyboardInterrupt

    def browse(url: str) -> None:
        assert served.wait(30), "the browser waits for the page, and nobody serves it"

    monkeypatch.setattr("webbrowser.open", browse)
    monkeypatch.setattr(PageServer, "serve_forever", serve)
    monkeypatch.setattr("gvsl_zoo.zoo.load", lambda *_, **__: None)
    monkeypatch.setattr("gvsl_zoo.inference.correspond.Matcher", lambda *_, **__: None)
    monkeypatch.chdir(tmp_path)
    write_volume(scans[0], "scan.nii")
    result = CliRunner().invoke(main, ["view", "scan.nii", "scan.nii", "--open"])
    assert result.exit_code == 0 and "ended" in result.output, result.output


VIEW = """
import signal, sys
from pathlib import Path
from gvsl_zoo import zoo
from gvsl_zoo.cli import main
from gvsl_zoo.inference import correspond
from gvsl_zoo.view import server

signal.signal(int(sys.argv[1]), signal.SIG_DFL)
server.PAGE = Path()
zoo.load = correspond.Matcher = lambda *_, **__: None
main(["view", "scan.nii", "scan.nii"])
"""


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGHUP])
def test_whatever_ends_the_command_it_leaves_no_scans_behind(
    page: None, scans: tuple[Volume, Volume], tmp_path: Path, end: signal.Signals
) -> None:
    write_volume(scans[0], tmp_path / "scan.nii")
    words, settings = [sys.executable, "-c", VIEW, str(end.value)], os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=settings) as process:
        assert process.stdout is not None
        try:
            _, _, address, path = process.stdout.readline().split()[1].split("/", 3)
            connection = http.client.HTTPConnection(address)
            connection.request("GET", f"/{path}fixed.nii")
            assert connection.getresponse().status == 200 and list(tmp_path.glob("gvsl-zoo-view-*/fixed.nii"))
            process.send_signal(end)
            assert process.wait(timeout=30) == 0
        finally:
            process.kill()
    assert not list(tmp_path.glob("gvsl-zoo-view-*"))


# ---- in a browser


@pytest.fixture(scope="module")
def browser() -> dict[str, Any]:
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    if shutil.which("node") is None or not (VIEWER / "node_modules" / "playwright-core").is_dir():
        pytest.skip("the viewer's npm packages are not installed: make viewer")
    if not all((room.PAGE / file).is_file() for file in STATIC.values()):
        pytest.skip("the viewer's page is not built: make viewer")
    return {"executable": CHROMIUM}


def drive(browser: dict[str, Any], url: str, steps: list[dict[str, Any]]) -> dict[str, Any]:
    """What a browser sees after each step; see viewer/test/look.mjs."""
    task = json.dumps(browser | {"url": url, "steps": steps})
    done = subprocess.run(
        ["node", str(VIEWER / "test" / "look.mjs")], input=task, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_click_moves_the_other_crosshair_to_the_corresponding_point(browser: dict[str, Any], pair: Pair) -> None:
    steps: list[dict[str, Any]] = [
        {"click": ["fixed", [0.35, 0.4]]},
        {"click": ["moving", [0.6, 0.55]]},
        {"press": "ArrowUp", "on": "moving"},
        {"press": "Shift+ArrowLeft", "on": "fixed"},
    ]
    with serving(pair) as server:
        result = drive(browser, server.url, steps)
    assert result["complaints"] == [] and result["hosts"] == ["127.0.0.1"]
    for seen in result["seen"]:
        assert seen["state"] == "matched"
        apart = np.array(seen["moving"]) - seen["fixed"] - SHIFT_MM
        assert np.linalg.norm(apart) < VOXEL_MM  # the crosshair itself snaps to no voxel
        assert seen["confidence"] > 0.8 and "Similarity" in seen["status"]
    clicked, _, up, left = (seen["fixed"] for seen in result["seen"])
    assert np.linalg.norm(clicked) > 10  # it was not the middle, where both crosshairs begin
    assert up[2] - result["seen"][1]["fixed"][2] == pytest.approx(6, abs=VOXEL_MM)  # one voxel towards the head
    assert left[0] - up[0] == pytest.approx(30, abs=VOXEL_MM)  # five towards the patient's right
    assert [seen["layers"]["moving"][1:] == ["heat.nii"] for seen in result["seen"]] == [True, False, False, True]


@pytest.mark.slow
def test_the_match_lies_where_an_oblique_scan_has_it(
    browser: dict[str, Any], scans: tuple[Volume, Volume], tmp_path: Path, pair: Pair
) -> None:
    turn = np.eye(4)
    turn[:3, :3] = [[0.9254, -0.3368, 0.1736], [0.3420, 0.9397, 0.0], [-0.1632, 0.0594, 0.9848]]  # 20 and 10 degrees
    oblique = Volume(scans[0].data, turn @ scans[0].affine)
    matcher = Matcher(scans[0], oblique, load("gvsl-unet-ct-nano"))
    steps: list[dict[str, Any]] = [{"click": ["fixed", [0.35, 0.4]]}, {"click": ["moving", [0.6, 0.55]]}]
    with serving(Pair(scans[0], oblique, matcher, tmp_path, names=pair.names)) as server:
        result = drive(browser, server.url, steps)
    for seen in result["seen"]:
        assert np.linalg.norm(turn[:3, :3] @ seen["fixed"] - seen["moving"]) < VOXEL_MM


@pytest.mark.slow
def test_only_a_match_is_called_one(browser: dict[str, Any], pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    clicks = [{"click": ["fixed", [share, 0.4]]} for share in (0.35, 0.4, 0.45)]
    answer = pair.match

    def answers(scan: str, point: list[float], *awaited: Any) -> dict[str, Any] | None:
        kind = kinds.pop(0)
        if kind == "error":
            raise ArgumentError("no")
        none = {"point_mm": None, "confidence": 0.0, "similarity": None, "return_mm": None}
        return (answer(scan, point, *awaited) or {}) | (none if kind == "none" else {})

    kinds = ["match", "none", "error"]
    monkeypatch.setattr(pair, "match", answers)
    with serving(pair) as server:
        seen = drive(browser, server.url, clicks)["seen"]
    assert [one["marks"] for one in seen] == [["Chosen:", "Match:"], *[["Chosen:", "Crosshair:"]] * 2]
    assert [one["state"] for one in seen] == ["matched", "matched", "error"]
    assert seen[0]["confidence"] > 0.8 and seen[1]["confidence"] == seen[2]["confidence"] == 0
    assert seen[2]["layers"]["moving"] == ["moving.nii"]


@pytest.mark.slow
def test_an_overlay_that_fails_leaves_none(
    browser: dict[str, Any], scans: tuple[Volume, Volume], pair: Pair, tmp_path: Path
) -> None:
    apart = Pair(scans[0], far_away(scans[1]), pair.matcher, tmp_path, warped=scans[0], names=pair.names)
    with serving(apart) as server:
        steps = [{"check": f"input[value={which}]"} for which in ("warped", "moving")]
        first, then = drive(browser, server.url, steps)["seen"]
    assert first["layers"]["fixed"] == ["fixed.nii", "warped-blend.nii"] and then["layers"]["fixed"] == ["fixed.nii"]
    assert then["state"] == "error" and "do not overlap" in then["status"]


@pytest.mark.slow
def test_overlays_come_and_go_and_the_keyboard_reaches_everything(browser: dict[str, Any], pair: Pair) -> None:
    steps: list[dict[str, Any]] = [
        {"check": "input[value=moving]"},
        {"check": "input[value=checkerboard]"},
        {"check": "input[value=warped]"},
        {"check": "input[value=none]"},
        *({"press": "Tab", "on": "fixed"} if n == 0 else {"tab": True} for n in range(7)),
    ]
    with serving(pair) as server:
        result = drive(browser, server.url, steps)
    shown = [seen["layers"]["fixed"][1:] for seen in result["seen"][:4]]
    assert shown == [["moving-blend.nii"], ["moving-checkerboard.nii"], ["warped-checkerboard.nii"], []]
    assert result["complaints"] == []
    order = [seen["focus"] for seen in result["seen"][4:]]
    assert order[:3] == ["moving", "show-heat", "heat-opacity"] and "none" in order


@pytest.mark.slow
def test_without_a_warped_scan_none_is_offered(
    browser: dict[str, Any], scans: tuple[Volume, Volume], matcher: Matcher, pair: Pair, tmp_path: Path
) -> None:
    with serving(Pair(*scans, matcher, tmp_path, names=pair.names)) as server:
        (seen,) = drive(browser, server.url, [{}])["seen"]
    assert seen["state"] == "ready" and "warped" not in seen["offered"]


@pytest.mark.slow
def test_the_command_serves_a_page_and_ends_with_ctrl_c(
    browser: dict[str, Any], scans: tuple[Volume, Volume], tmp_path: Path
) -> None:
    for name, scan in zip(("fixed", "moving"), scans, strict=True):
        write_volume(scan, tmp_path / f"{name}.nii.gz")
    words = ["view", str(tmp_path / "fixed.nii.gz"), str(tmp_path / "moving.nii.gz")]
    with subprocess.Popen([sys.executable, "-m", "gvsl_zoo", *words], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            url = process.stdout.readline().split()[1]
            (seen,) = drive(browser, url, [{"click": ["fixed", [0.4, 0.4]]}])["seen"]
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=30) == 0
        finally:
            process.kill()  # where the test failed it would wait for ever
    assert np.linalg.norm(np.array(seen["moving"]) - seen["fixed"] - SHIFT_MM) < VOXEL_MM
