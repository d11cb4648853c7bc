"""A numerics gate for refactoring: what the commands and the service give must stay, whatever moves behind them.

    python tests/gate.py record before.json               before the change, on this machine
    python tests/gate.py compare before.json               after it; one line an entry, exit code 1 if any differs
    python tests/gate.py compare before.json --only draw/greedy train-style --tolerance 1e-5

It imports nothing of the project and relies only on what a user sees: `python -m mmwudao ...` (found as Python finds
it from the current folder and PYTHONPATH), YAML configurations, the files that commands write, and the routes of
`mmwudao serve`. All is computed in float32, on the CPU, with one thread and fixed seeds, with the shipped model and
the sample shards; the same machine and the same PyTorch give the same figures to the last bit. What differs from run
to run is left out. A run takes five minutes on a core of its own. pytest does not collect this file.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import functools
import json
import os
import re
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pyarrow.parquet
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for the line below; the commands do not see it
from tests.gate_records import (  # noqa: E402
    answer,
    array_record,
    codes_record,
    first_difference,
    log_record,
    picture_record,
    pictures_record,
    sha256,
    tidy,
    weights_record,
)

SHARDS = ROOT / "data" / "samples" / "emoji"
CPU = ("--device", "cpu")
FLOAT32 = (*CPU, "--dtype", "float32")
CASES: dict[str, Any] = json.loads((ROOT / "tests" / "gate_cases.json").read_text(encoding="utf-8"))
PROMPT = "a red apple"
STEPS = CASES["loop"]["steps"]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
DIM = 256  # of the shipped towers' vectors


class GateError(Exception):
    """A command failed, or gave something that cannot be recorded."""


@dataclass(frozen=True)
class Work:
    """A folder for what the commands write, and the things that several sections need, each made once."""

    folder: Path
    shards: str = str(SHARDS)
    text_model: str = str(SHARDS / "text.model")

    def run(self, *arguments: str | Path) -> str:
        """What `mmwudao ARGUMENTS` prints. Raises `GateError` if it fails."""
        done = subprocess.run(command(*arguments), capture_output=True, text=True, check=False)
        if done.returncode:
            raise GateError(f"mmwudao {' '.join(map(str, arguments))}: exit code {done.returncode}\n{done.stderr}")
        return done.stdout

    def records(self, *arguments: str | Path) -> list[Any]:
        """The lines of JSON that a command prints."""
        return [json.loads(line) for line in self.run(*arguments, "--json").splitlines()]

    @functools.cached_property
    def samples(self) -> list[Path]:
        """Three of the sample pictures, as PNG."""
        paths = []
        with tarfile.open(SHARDS / "test-family-00000.tar") as archive:
            for name in sorted(name for name in archive.getnames() if not name.endswith(".json"))[::5]:
                member = archive.extractfile(name)
                assert member is not None
                paths.append(self.folder / f"{Path(name).stem}.png")
                Image.open(member).convert("RGB").save(paths[-1])
        return paths

    @property
    def image0(self) -> str:
        return data_uri(self.samples[0])

    @property
    def image1(self) -> str:
        return data_uri(self.samples[1])

    @property
    def vector(self) -> list[float]:
        return [1.0] * DIM

    @property
    def tokenizer_yaml(self) -> str:
        return str(self.configuration("tokenizer"))

    @functools.cached_property
    def codes(self) -> Path:
        """The sample shards as codes of the shipped tokenizer."""
        self.run("tokenize", SHARDS, "-o", self.folder / "codes", *CPU)
        return self.folder / "codes"

    @functools.cached_property
    def vectors(self) -> Path:
        """What `embed` makes of the sample shards."""
        self.run("embed", SHARDS, "-o", self.folder / "vectors", *CPU)
        return self.folder / "vectors"

    @functools.cached_property
    def tiny_tokenizer(self) -> Path:
        return self.train("tokenizer")[0]

    @functools.cached_property
    def tiny_codes(self) -> Path:
        """The sample shards as codes of the tokenizer that was just trained."""
        out = self.folder / "tiny-codes"
        self.run("tokenize", SHARDS, "-o", out, "--model", self.tiny_tokenizer, "--size", "32", *CPU)
        return out

    @functools.cache  # noqa: B019  there is one `Work` in a process
    def train(self, kind: str) -> tuple[Path, Path]:
        """Train from start to end: the folder of what was trained, and of the run."""
        out = self.folder / f"train-{kind}"
        printed = self.run("train", trainer(kind), self.configuration(kind), f"loop.out={out}")
        return Path(printed.splitlines()[-1]), out

    def configuration(self, kind: str) -> Path:
        """The YAML file (JSON is YAML) of a trainer."""
        settings = CASES["train"][kind]
        settings = self.filled(settings | {"loop": CASES["loop"] | settings.get("loop", {})})
        path = self.folder / f"{kind}.yaml"
        path.write_text(json.dumps(settings, default=str), encoding="utf-8")
        return path

    def filled(self, case: Any) -> Any:
        """A case with the attribute `name` of this object for each "{name}" in it."""
        if isinstance(case, dict):
            return {name: self.filled(one) for name, one in case.items()}
        if isinstance(case, list):
            return [self.filled(one) for one in case]
        match = re.fullmatch(r"\{(\w+)\}", case) if isinstance(case, str) else None
        return case if match is None else getattr(self, match[1])

    def collection(self, name: str) -> Path:
        """A new collection of the sample pictures."""
        path = self.folder / name
        self.run("index", "build", self.vectors, "--collection", path, *CPU)
        return path


def trainer(kind: str) -> str:
    """The command of a configuration, such as "tokenizer" of "tokenizer-streamed"."""
    return kind.partition("-")[0]


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "mmwudao", *map(str, arguments)]


def data_uri(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


# --- the sections: each gives entries by name


def draw(work: Work) -> dict[str, Any]:
    """Pictures of three prompts with several ways to sample; a picture drawn again, completed and enlarged."""
    entries: dict[str, Any] = {}
    for name, arguments in CASES["generate"].items():
        out = work.folder / f"draw-{name}"
        work.run("generate", *arguments, *FLOAT32, "-o", out)
        entries[name] = pictures_record(out)
    first = sorted((work.folder / "draw-defaults").glob("a-red*.png"))[0]
    again = work.folder / "again.png"
    entries["replay"] = {"printed": work.records("replay", first, "-o", again), "picture": picture_record(again)}
    completed, enlarged = work.folder / "completed", work.folder / "enlarged"
    work.run("complete", work.samples[0], "--prompt", PROMPT, "--seed", "3", *FLOAT32, "-o", completed)
    work.run("upscale", *work.samples, *FLOAT32, "-o", enlarged)
    return entries | {"complete": pictures_record(completed), "upscale": pictures_record(enlarged)}


def tokenize(work: Work) -> dict[str, Any]:
    """Codes of the sample shards, and of single pictures with what is decoded from them."""
    out = work.folder / "tokenized"
    work.run("tokenize", *work.samples, "-o", out, *CPU)
    single = {path.name: array_record(numpy.load(path)) for path in sorted(out.glob("*.npy"))}
    return {"shards": codes_record(work.codes), "codes": single, "decoded": pictures_record(out)}


def embed(work: Work) -> dict[str, Any]:
    """Vectors of the sample shards: the files' bytes, and the vectors."""
    files, vectors = {}, {}
    for path in sorted(work.vectors.iterdir()):
        files[path.name] = sha256(path.read_bytes())
        if path.suffix == ".parquet":
            column = pyarrow.parquet.read_table(path).column("vector").combine_chunks().flatten()
            vectors[path.name] = array_record(column.to_numpy())
    return {"files": files, "vectors": vectors}


def search(work: Work) -> dict[str, Any]:
    """A collection of the sample pictures, built and asked."""
    place = work.collection("searched")
    checked = work.records("index", "check", "--collection", place, "--queries", "20")
    return {"text": work.records("search", place, PROMPT, "-k", "8", *CPU), "check": checked}


def describe(work: Work) -> dict[str, Any]:
    """Captions of two pictures in every language, and which of them shows a prompt best."""
    scores = work.records("rerank", PROMPT, *work.samples, "--by", "both", *FLOAT32)
    return {"captions": work.records("caption", *work.samples[:2], "--language", "all", *FLOAT32), "rerank": scores}


def figures(work: Work) -> dict[str, Any]:
    """What the model and the shards are said to be, and how well the towers do."""
    out = work.folder / "eval"
    work.run("eval", "retrieval", "emoji", SHARDS, "-o", out, *CPU)
    retrieval = json.loads((out / "retrieval.json").read_text(encoding="utf-8"))
    (info,), (stats,) = work.records("info"), work.records("data", "stats", SHARDS)
    return {"info": info, "data stats": stats, "eval retrieval": retrieval}


def train(work: Work, kind: str) -> dict[str, Any]:
    """Ten steps of a trainer, and whether a run that is killed and resumed is the same run."""
    folder, out = work.train(kind)
    entries = {"steps": log_record(out), "weights": weights_record(folder)}
    if (out / "sheets").is_dir():
        entries["sheets"] = pictures_record(out / "sheets")
    if not kind.endswith("-streamed"):  # a stream starts anew after a resume, in another order
        again, parts = resumed(work, kind)
        steps = first_difference(entries["steps"], log_record(parts), 0.0)
        weights = first_difference(entries["weights"], weights_record(again), 0.0)
        entries["resumed"] = {"first different figure": steps, "first different weights": weights}
    return entries


def trained(work: Work) -> dict[str, Any]:
    """Pictures of what was trained: a model that is put together of its parts, and the shipped one with the style."""
    model, drawn, styled = (work.folder / name for name in ("tiny-model", "tiny-drawn", "styled"))
    work.run("assemble", "--tokenizer", work.tiny_tokenizer, "--generator", work.train("generator")[0],
             "--text", SHARDS / "text.model", "--upscaler", work.train("upscaler")[0], "--name", "tiny",
             "--image-size", "32", "-o", model)  # fmt: skip
    work.run("generate", PROMPT, "--seed", "3", "--model", model, *FLOAT32, "-o", drawn)
    work.run("generate", PROMPT, "--seed", "3", "--adapter", work.train("style")[0], *FLOAT32, "-o", styled)
    return {"assembled": pictures_record(drawn), "with style": pictures_record(styled)}


def resumed(work: Work, kind: str) -> tuple[Path, Path]:
    """Train again, killed at the first checkpoint and resumed: the folder of what was trained, and of the run."""
    for attempt in range(3):
        out = work.folder / f"resume-{kind}-{attempt}"
        arguments = (
            "train",
            trainer(kind),
            work.configuration(kind),
            f"loop.out={out}",
            "loop.save_in_background=false",
        )
        with subprocess.Popen(command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while not (out / "checkpoints" / "latest").exists() and process.poll() is None:
                time.sleep(0.001)
            process.kill()
        if str(STEPS) not in log_record(out):
            return Path(work.run(*arguments, "--resume").splitlines()[-1]), out
    raise GateError(f"train {kind}: no run could be stopped before its end")


def errors(work: Work) -> dict[str, Any]:
    """What commands say to mistakes."""
    entries = {}
    for name, arguments in work.filled(CASES["mistakes"]).items():
        done = subprocess.run(command(*arguments), capture_output=True, text=True, check=False)
        entries[name] = {"exit code": done.returncode, "stderr": done.stderr}
    return entries


@contextlib.contextmanager
def serving(work: Work) -> Iterator[str]:
    """A server with a collection of its own; yields its address."""
    with contextlib.closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    arguments = ("serve", "--collection", work.collection("served"), "--port", str(port), *FLOAT32)
    with (work.folder / "serve.log").open("wb") as log:
        process = subprocess.Popen(command(*arguments), stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        late = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError):
                if urllib.request.urlopen(f"{address}/readyz", timeout=5).status == 200:
                    break
            if process.poll() is not None or time.monotonic() > late:
                raise GateError(f"the server does not start: {(work.folder / 'serve.log').read_text()}")
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(30)


def http(work: Work) -> dict[str, Any]:
    """The answers of the service: a good request for every route, and bad ones; in this order, for some store items."""
    with serving(work) as address:
        return {name: answer(address, case) for name, case in work.filled(CASES["http"]).items()}


SECTIONS: dict[str, Callable[[Work], dict[str, Any]]] = {
    **{one.__name__: one for one in (draw, tokenize, embed, search, describe, figures, errors, http)},
    **{f"train-{kind}": functools.partial(train, kind=kind) for kind in CASES["train"]},
    "trained": trained,
}


def measure(sections: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The entries of some sections, as "section/name", and the sections that failed. Says on stderr what it does."""
    os.environ.update(ONE_THREAD)
    where = [sys.executable, "-c", "import mmwudao; print(mmwudao.__file__)"]
    print("gate of", subprocess.run(where, capture_output=True, text=True, check=True).stdout.strip(), file=sys.stderr)
    entries: dict[str, Any] = {}
    failed = []
    with tempfile.TemporaryDirectory(prefix="gate-") as folder:
        work = Work(Path(folder))
        # forty commands import the same modules: compiled once, apart from the code, so that nothing old is found
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.environ["PYTHONPYCACHEPREFIX"] = str(work.folder / "compiled")
        for section in sections:
            started = time.monotonic()
            try:
                found = SECTIONS[section](work)
                entries |= {f"{section}/{name}": tidy(entry, work.folder, ROOT) for name, entry in found.items()}
            except (GateError, OSError, ValueError, LookupError) as error:
                print(f"{section}: {type(error).__name__}: {error}", file=sys.stderr)
                failed.append(section)
            print(f"{section}: {time.monotonic() - started:.0f} s", file=sys.stderr)
    return entries, failed


def record(path: Path) -> int:
    """Write all entries to `path`; 1 if a section failed, and nothing is written."""
    entries, failed = measure(list(SECTIONS))
    if not failed:
        path.write_text(json.dumps(entries, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return bool(failed)


def compare(path: Path, only: list[str], tolerance: float) -> int:
    """Print a line for each entry that begins with one of `only` (none: all); 1 if any differs."""
    before = json.loads(path.read_text(encoding="utf-8"))
    sections = [name for name in SECTIONS if not only or any(one.partition("/")[0] == name for one in only)]
    if unknown := {one.partition("/")[0] for one in only} - set(SECTIONS):
        raise SystemExit(f"no section {', '.join(sorted(unknown))}: there are {', '.join(SECTIONS)}")
    now, failed = measure(sections)
    names = [name for name in [*before, *(name for name in now if name not in before)]
             if name.partition("/")[0] in sections and (not only or name.startswith(tuple(only)))]  # fmt: skip
    if idle := [one for one in only if not any(name.startswith(one) for name in names)]:
        failed.append(f"no entry begins with {', '.join(idle)}")
        print(failed[-1], file=sys.stderr)
    different = 0
    for name in names:
        old, new = ({name: entries[name]} if name in entries else {} for entries in (before, now))
        difference = first_difference(old, new, tolerance)
        print(f"same     {name}" if difference is None else f"differs  {difference}")
        different += difference is not None
    print(f"{len(names) - different} of {len(names)} entries are the same")
    return bool(different or failed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("record", "compare"))
    parser.add_argument("path", type=Path)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="sections or entries; default: all")
    parser.add_argument("--tolerance", type=float, default=0.0, help="relative, for numbers; default: equal")
    arguments = parser.parse_args()
    path = arguments.path
    return record(path) if arguments.what == "record" else compare(path, arguments.only, arguments.tolerance)


if __name__ == "__main__":
    sys.exit(main())
