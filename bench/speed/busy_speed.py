"""Seconds for one drawing on a machine that does other work, by the number of threads and by how they wait.

    python -m bench.speed.busy_speed [--model emoji] [--busy 2] [--rounds 7] [--variants program,spinning,single]

Each variant is a process of its own that has the model loaded; in every round each draws once on the machine as it is
and once beside `--busy` processes that never rest, in turn, so that what else the machine does falls on all alike.
Figures are medians of the rounds, and medians of the ratio to `single` in the same round. The variants:
* single: one thread, the measure of the others;
* spinning: OpenMP as it comes, whose threads spin at every barrier;
* program: what our programs set (`mmwudao.loading.threads`);
* passive: OMP_WAIT_POLICY=PASSIVE, and as many threads as cores;
* spin=N: GOMP_SPINCOUNT=N.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

PROMPT = "戴墨镜的笑脸"
WAITING = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
DRAWER = """
import sys, time
from mmwudao.loading.threads import wait_passively
if sys.argv[2] == "program":
    wait_passively()
from mmwudao.loading.devices import choose_threads
from mmwudao.pipeline import load
pipe = load(sys.argv[1], device="cpu")
choose_threads()
pipe.generate(sys.argv[3], seed=0)
print("ready", flush=True)
for line in sys.stdin:
    if sys.argv[2] == "program":
        choose_threads()
    started = time.perf_counter()
    pipe.generate(sys.argv[3], seed=0)
    print(time.perf_counter() - started, flush=True)
"""


@contextmanager
def drawer(model: str, variant: str) -> Iterator[subprocess.Popen[str]]:
    """A process that draws once for each line it gets, and prints the seconds."""
    environment = {name: value for name, value in os.environ.items() if name not in WAITING}
    if variant == "single":
        environment["OMP_NUM_THREADS"] = "1"
    elif variant == "passive":
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
    elif variant.startswith("spin="):
        environment["GOMP_SPINCOUNT"] = variant.removeprefix("spin=")
    command = [sys.executable, "-c", DRAWER, model, variant, PROMPT]
    with subprocess.Popen(
        command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "ready\n", f"{variant} did not start"
        yield process
        process.stdin.close()


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """So many processes that compute without rest."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def draw(process: subprocess.Popen[str]) -> float:
    assert process.stdout is not None
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--busy", type=int, default=2, help="Processes that compute beside.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--variants", default="program,spinning", help="Separated by commas; single is always there.")
    arguments = parser.parse_args()
    names = ["single", *(name for name in arguments.variants.split(",") if name != "single")]
    seconds: dict[str, dict[str, list[float]]] = {name: {"as it is": [], "busy": []} for name in names}
    with ExitStack() as stack:
        drawers = {name: stack.enter_context(drawer(arguments.model, name)) for name in names}
        for number in range(arguments.rounds):
            order = names if number % 2 else names[::-1]
            for name in order:
                seconds[name]["as it is"].append(draw(drawers[name]))
            with busy_processes(arguments.busy):
                for name in order:
                    seconds[name]["busy"].append(draw(drawers[name]))
    rows = {}
    print(f"{'variant':14}{'as it is':>10}{'of single':>11}{'busy':>10}{'of single':>11}  (medians; seconds)")
    for name, of in seconds.items():
        row = {}
        for state, times in of.items():
            ratios = [time / single for time, single in zip(times, seconds["single"][state], strict=True)]
            row[state] = {"seconds": round(statistics.median(times), 2), "ratio": round(statistics.median(ratios), 2)}
        rows[name] = row
        print(f"{name:14}" + "".join(f"{one['seconds']:10}{one['ratio']:11}" for one in row.values()))
    print(json.dumps({"busy": arguments.busy, "rounds": arguments.rounds, "cores": os.cpu_count(), "rows": rows}))


if __name__ == "__main__":
    main()
