"""``fastmsflow predict --format parquet`` on images behind URLs, into a folder or an object store."""

import json
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fastmsflow.data import url_images
from tests.helpers.predictions import IMAGES, PER_PART, Command, rows

pytest.importorskip("fsspec", reason="needs fsspec: pip install 'fastmsflow[shards]'")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def served(noise_images: Path, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A web server of a folder with the images, and that folder."""
    root = tmp_path / "served"
    shutil.copytree(noise_images, root / "images")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=root))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", root
    server.shutdown()
    server.server_close()


def test_a_folder_behind_a_url_has_the_rows_of_the_folder(
    served: tuple[str, Path], noise_images: Path, checkpoint: Path, predict_parquet: Command, tmp_path: Path
) -> None:
    url, root = served
    given = ("--workers", 0, "--batch-size", PER_PART)
    (root / "images/05.png").write_bytes(b"?")
    code, _, err = predict_parquet(checkpoint, f"{url}/images", "--out", tmp_path / "far", *given)
    assert code == 1
    assert err.strip() == f"skipped {url}/images/05.png: not an image that can be read; remove it or save it as PNG"
    predict_parquet(checkpoint, root / "images", "--out", tmp_path / "near", *given)
    far = rows(tmp_path / "far")
    near = [{**row, "path": row["path"].replace(str(root), url)} for row in rows(tmp_path / "near")]
    assert [row["path"] for row in far] == [f"{url}/images/{i:02}.png" for i in range(IMAGES)]
    assert [row for row in far if not row["fault"]] == [row for row in near if not row["fault"]]


def test_a_set_of_shards_behind_a_url_is_known_by_its_manifest(
    served: tuple[str, Path], noise_shards: Path, checkpoint: Path, predict_parquet: Command, tmp_path: Path
) -> None:
    url, root = served
    shutil.copytree(noise_shards, root / "shards")
    assert predict_parquet(checkpoint, f"{url}/shards", "--out", tmp_path / "out", "--workers", 0)[0] == 0
    assert rows(tmp_path / "out")[0]["path"] == f"{url}/shards/000000.tar/00.png"


def test_a_model_behind_a_url_scores_as_its_file_does(
    served: tuple[str, Path], noise_images: Path, checkpoint: Path, predict_parquet: Command, tmp_path: Path
) -> None:
    url, root = served
    shutil.copy(checkpoint, root / "m.safetensors")
    assert predict_parquet(f"{url}/m.safetensors", noise_images, "--out", tmp_path / "out", "--workers", 0)[0] == 0
    # The same results, so there is nothing left to do.
    code, printed, _ = predict_parquet(checkpoint, noise_images, "--out", tmp_path / "out", "--workers", 0, "--json")
    assert (code, json.loads(printed)["scored_now"]) == (0, 0)
    code, _, err = predict_parquet(f"{url}/none.safetensors", noise_images, "--out", tmp_path / "none", "--workers", 0)
    assert (code, f"{url}/none.safetensors: no such file" in err, len(err.splitlines())) == (1, True, 1)
    code, _, err = predict_parquet(f"{url}/m.safetensors", noise_images, "--out", tmp_path / "csv", form="csv")
    assert (code, err) == (
        1,
        f"fastmsflow: {url}/m.safetensors: this needs --format parquet; add that, or leave it out",
    )


def test_a_server_that_has_a_page_for_every_name_may_hold_images(
    served: tuple[str, Path],
    checkpoint: Path,
    predict_parquet: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    get = Quiet.do_GET

    def answers(handler: Quiet) -> None:
        if not handler.path.endswith(".png"):
            handler.path = "/images/"
        get(handler)

    monkeypatch.setattr(Quiet, "do_GET", answers)
    assert predict_parquet(checkpoint, f"{served[0]}/images", "--out", tmp_path / "out", "--workers", 0)[0] == 0
    assert len(rows(tmp_path / "out")) == IMAGES


def test_a_list_may_name_urls_and_images_are_taken_where_a_server_refuses_all_else(
    served: tuple[str, Path],
    checkpoint: Path,
    predict_parquet: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url, root = served
    get = Quiet.do_GET

    def refuses(handler: Quiet) -> None:
        if ".png" in handler.path:
            get(handler)
        else:
            handler.send_error(403)

    monkeypatch.setattr(Quiet, "do_GET", refuses)
    listed = f"{url}/images/00.png\n{root}/images/01.png\n".encode()
    assert predict_parquet(checkpoint, "-", "--out", tmp_path / "listed", "--workers", 0, stdin=listed)[0] == 0
    assert [row["path"] for row in rows(tmp_path / "listed")] == [f"{root}/images/01.png", f"{url}/images/00.png"]
    for name in ("00.png", "00.png?signed=by/somebody"):
        assert predict_parquet(checkpoint, f"{url}/images/{name}", "--out", tmp_path / name[:3], "--workers", 0)[0] == 0
    code, _, err = predict_parquet(checkpoint, f"{url}/images", "--out", tmp_path / "all", "--workers", 0)
    assert (code, "status 403; give a signed URL" in err, len(err.splitlines())) == (1, True, 1), err
    code, _, err = predict_parquet(checkpoint, "-", "--out", tmp_path / "csv", "--workers", 0, form="csv", stdin=listed)
    assert (code, f"{url}/images/00.png: a URL; they are for predict --format parquet alone" in err) == (1, True)


def test_an_image_that_does_not_arrive_has_a_fault_and_the_others_have_scores(
    served: tuple[str, Path],
    checkpoint: Path,
    predict_parquet: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The other images and the listing must arrive in this time on a busy machine.
    monkeypatch.setattr(url_images, "TIMEOUT", 4.0)
    get, ended = Quiet.do_GET, threading.Event()

    def hangs(handler: Quiet) -> None:
        if "07" in handler.path:
            ended.wait(60)
        get(handler)

    monkeypatch.setattr(Quiet, "do_GET", hangs)
    url, _ = served
    code, _, err = predict_parquet(checkpoint, f"{url}/images", "--out", tmp_path / "out", "--workers", 0)
    line = f"skipped {url}/images/07.png: no answer within 4 s; look whether the server can be reached"
    ended.set()
    assert (code, err.strip()) == (1, line)
    assert sum(row["fault"] is None for row in rows(tmp_path / "out")) == IMAGES - 1


def test_a_server_or_store_that_is_not_there_is_one_line(
    checkpoint: Path, predict_parquet: Command, tmp_path: Path
) -> None:
    for url in ("http://127.0.0.1:9/images", "nothing://bucket/images"):
        code, _, err = predict_parquet(checkpoint, url, "--out", tmp_path / "out", "--workers", 0)
        assert (code, err.startswith(f"fastmsflow: {url}"), len(err.splitlines())) == (1, True, 1), err
    code, _, err = predict_parquet(checkpoint, tmp_path, "--out", "nothing://bucket/out", "--workers", 0)
    assert (code, len(err.splitlines())) == (1, 1), err


def test_results_go_into_an_object_store_and_are_gone_on_with_there(
    noise_images: Path, checkpoint: Path, predict_parquet: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = pytest.importorskip("moto.server", reason="needs moto[server]: an object store of this machine")
    fs = pytest.importorskip("pyarrow.fs")
    dataset = pytest.importorskip("pyarrow.dataset")
    store = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    store.start()
    try:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "test")
        query = f"?endpoint_override=127.0.0.1:{store._server.server_port}&scheme=http&region=us-east-1"
        files, _ = fs.FileSystem.from_uri(f"s3://bucket/x{query}&allow_bucket_creation=true")
        files.create_dir("bucket")
        out = f"s3://bucket/results{query}"
        given = ("--images-per-part", PER_PART, "--batch-size", PER_PART, "--workers", 0)
        some = sorted(noise_images.iterdir())
        assert predict_parquet(checkpoint, *some[:7], "--out", out, *given)[0] == 0
        code, printed, _ = predict_parquet(checkpoint, *some, "--out", out, *given)
        assert (code, f"{IMAGES} of {IMAGES} images scored; {IMAGES - 7} now" in printed) == (0, True)
        table = dataset.dataset("bucket/results/parts", filesystem=files).to_table()
        assert sorted(table["path"].to_pylist()) == list(map(str, some))
        code, _, err = predict_parquet(checkpoint, *some, "--out", out, *given, "--threshold", 1)
        assert (code, "holds results of another run (threshold was" in err) == (1, True)
    finally:
        store.stop()
