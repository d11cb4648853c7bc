"""Vectors by a Ray cluster: the local command's files, also when a worker or the driver is killed on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.sample import DataError
from mmwudao.cli.app import run
from retrieval.cluster import connected
from retrieval.vectors.embed import embed_shards
from retrieval.vectors.embed_ray import embed_shards_on_cluster
from retrieval.vectors.settings import EmbedSettings, RaySettings
from tests.helpers.tiny_towers import ColourTowers, write_shards

ROOT = Path(__file__).parents[2]


class KilledOnce(ColourTowers):
    """The process that comes first to its third picture batch is killed there."""

    def __init__(self, mark: Path):
        super().__init__()
        self.mark, self.batches = mark, 0

    def encode_pixels(self, pixels):
        self.batches += 1
        if self.batches == 3:
            try:
                self.mark.touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().encode_pixels(pixels)


class Slow(ColourTowers):
    """Tells which processes work, a file each, and takes half a second a shard."""

    def __init__(self, told: Path):
        super().__init__()
        self.told = told

    def encode_pixels(self, pixels):
        (self.told / str(os.getpid())).touch()
        time.sleep(0.5)
        return super().encode_pixels(pixels)


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        # what is pickled here is of these modules, which pytest imports by both names
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
        patch.setenv("RAY_worker_niceness", "0")
        ray.init(num_cpus=2, object_store_memory=100 * 2**20, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path / "shards", ["a", "b", "c", "d", "e", "f"], corrupt=True)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_files_although_a_worker_is_killed(cluster, shards, tmp_path):
    local = embed_shards(ColourTowers(), shards, tmp_path / "local")
    mark = tmp_path / "killed"
    report = embed_shards_on_cluster(KilledOnce(mark), shards, tmp_path / "out", RaySettings(replicas=2))
    assert mark.exists()
    assert report == local
    assert files(tmp_path / "out") == files(tmp_path / "local")
    assert report.skipped == {"corrupt image": 6}


def test_a_run_goes_on_and_only_there(cluster, shards, tmp_path):
    out = tmp_path / "out"
    embed_shards(ColourTowers(), shards, out, EmbedSettings(dtype="float16"))
    whole = files(out)
    (out / "train-00003.parquet").unlink()
    (out / ".train-00003.parquet.abc.tmp").write_bytes(b"left by a kill")
    report = embed_shards_on_cluster(ColourTowers(), shards, out, RaySettings(), EmbedSettings(dtype="float16"))
    assert (report.parts, report.found) == (6, 5)
    assert files(out) == whole
    with pytest.raises(DataError, match="other settings"):
        embed_shards_on_cluster(ColourTowers(), shards, out, RaySettings(), EmbedSettings(texts=False))


def test_what_machines_do_not_see_is_said(cluster, shards, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def hide(*_):
        parts = claim(*_)
        (out / "settings.json").unlink()
        return parts

    from retrieval.vectors import embed_ray

    claim = embed_ray.claim_parts
    monkeypatch.setattr(embed_ray, "claim_parts", hide)
    with pytest.raises(DataError, match="not every machine sees .*settings.json: give folders that they share$"):
        embed_shards_on_cluster(ColourTowers(), shards, out, RaySettings(replicas=1))


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_the_driver_is_killed(cluster, shards, tmp_path):
    told, out = tmp_path / "told", tmp_path / "out"
    told.mkdir()
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from retrieval.vectors.embed_ray import embed_shards_on_cluster\n"
        "from retrieval.vectors.settings import RaySettings\n"
        "from tests.retrieval.test_embed_ray import Slow\n"
        "told, shards, out = map(Path, sys.argv[1:])\n"
        "embed_shards_on_cluster(Slow(told), shards, out, RaySettings('auto', replicas=1))\n"
    )
    import ray

    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    child = subprocess.Popen([sys.executable, "-c", script, told, shards, out], env=environment, cwd=ROOT)
    late = time.monotonic() + 300
    while len(list(out.glob("*.parquet"))) < 2:
        assert child.poll() is None, "ended too early"
        assert time.monotonic() < late
        time.sleep(0.02)
    child.kill()
    child.wait()
    found = len(list(out.glob("*.parquet")))
    assert 2 <= found < 6
    # at once, while the killed driver's actor may still write
    report = embed_shards_on_cluster(Slow(told), shards, out, RaySettings(replicas=1))
    assert report.found >= found
    embed_shards(ColourTowers(), shards, tmp_path / "local")
    assert files(out) == files(tmp_path / "local")
    first, *_ = sorted(told.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    while alive(first.name):
        assert time.monotonic() < late, "the killed driver's actor goes on for ever"
        time.sleep(0.1)


def test_bad_calls_are_one_line(tmp_path, monkeypatch, capsys):
    shards = write_shards(tmp_path / "shards", ["a"])
    monkeypatch.setattr("mmwudao.loading.towers.load_model_towers", lambda *_: ColourTowers())
    command = ["embed", str(shards), "--out", str(tmp_path / "out")]
    monkeypatch.setitem(sys.modules, "ray", None)
    for options, problem in (
        (["--ray", "local"], "pip install 'mmwudao[ray]'"),
        (["--replicas", "2"], "--replicas is for --ray"),
        (["--ray", "local", "--replicas", "0"], "replicas must be a whole number of at least 1"),
        (["--ray", "local", "--device", "mps"], "auto, cpu or cuda"),
    ):
        assert run([*command, *options]) == 2
        said = capsys.readouterr().err
        assert problem in said
        assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_no_cluster_there(monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)

    def refuse(**_):
        raise ConnectionError("nobody answers")

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(ValueError, match=r"no Ray cluster at 'x:6379' \(nobody answers\)"), connected("x:6379"):
        pass
