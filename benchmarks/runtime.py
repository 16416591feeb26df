"""Exported guards against PyTorch: the same verdicts, time, memory, and what is traded for what.

    python benchmarks/runtime.py export LATENTS... --exports DIR
    python benchmarks/runtime.py agreement LATENTS... --exports DIR
    python benchmarks/runtime.py speed --exports DIR
    python benchmarks/runtime.py turns --exports DIR
    python benchmarks/runtime.py cost --exports DIR
    python benchmarks/runtime.py pareto

export: int8 is calibrated on every 16th of the latents (random ones for Latent-CLIP); agreement is
measured on the others: nano-flux2 under the family policy on real latents, whose ids (`class/name`,
see caltech.py) tell revolvers and cannons from the rest; Latent-CLIP with random weights on random
latents, where only margins and embeddings mean something. speed: every contender in a process of
its own. turns: the times at batch 1 anew, a model's contenders in one process, so that ratios hold.
pareto: all as tables and a plot.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine
from numpy.typing import NDArray

RESULTS = Path(__file__).parent / "results"
POLICY = "family"
NANO, CLIPS = "nano-flux2", ("latent-clip-b8", "latent-clip-b4-plus")
MERGING = (
    "latent-clip-b8+merge=0.5",
    *(f"latent-clip-b4-plus+merge={share}" for share in (0.25, 0.5, 0.75, 0.9)),
)
"""With token merging; agreement is measured against the model without."""
MODELS = (NANO, *CLIPS, *MERGING)
PRECISIONS = ("fp32", "fp16", "int8", "int8-dynamic")
CLASSES = {"revolver": "firearms", "cannon": "military"}
UNSURE = (0.01, 0.02, 0.05, 0.1, 0.2)
THREADS = 2
CLIENTS = 8
CALIBRATION = 16
"""One latent in this many is for calibration, and not judged."""


def exported(folder: Path, model: str, precision: str, cells: int) -> Path:
    """Where an export of this script lies."""
    return folder / f"{model}-{cells}-{precision}.onnx"


def encoder(model: str) -> Any:
    """The bundled encoder, or a Latent-CLIP with random weights."""
    from latentguard.encoders import load_encoder
    from latentguard.encoders.catalog import MERGE
    from latentguard.encoders.latent_clip import LatentCLIP

    name, _, share = model.partition(MERGE)
    if name in CLIPS:
        return LatentCLIP.random(name, merge=float(share or 0))
    return load_encoder(model, "cpu")


def plain(model: str) -> str:
    """The model without token merging."""
    return model.partition("+merge=")[0]


# --- export ---------------------------------------------------------------------------------------


def export(arguments: argparse.Namespace) -> None:
    """Every file that the other commands read."""
    from latentguard.export import export_onnx
    from latentguard.export.samples import drawn, read_samples, resized

    arguments.exports.mkdir(parents=True, exist_ok=True)
    real = read_samples(arguments.latents, "flux2")
    real = real.pick(range(0, len(real), CALIBRATION))
    clips = ((name, 64) for name in (*CLIPS, *MERGING))
    for model, cells in ((NANO, 32), (NANO, 64), *clips):
        if model not in arguments.only:
            continue
        chosen = resized(real, (cells, cells)) if model == NANO else drawn("sdxl", (64, 64), 32)
        for precision in ("fp32", "int8") if model in MERGING else PRECISIONS:
            path = exported(arguments.exports, model, precision, cells)
            if not path.exists():
                made = export_onnx(
                    POLICY,
                    encoder(model),
                    path,
                    precision=precision,
                    size=(cells, cells),
                    # Judged on other latents below; here only against a spoiled export.
                    check=chosen[:8],
                    calibrate=chosen if precision.startswith("int8") else None,
                )
                print(path.name, made.checked, flush=True)


# --- agreement ------------------------------------------------------------------------------------


def agreement(arguments: argparse.Namespace) -> None:
    """Margins, decisions, AUROC and embeddings of each export against PyTorch's."""
    from latentguard.export.samples import drawn, read_samples

    real = read_samples(arguments.latents, "flux2")
    judged = [row for row in range(len(real)) if row % CALIBRATION]
    rows = kept("runtime-agreement", arguments.only)
    if NANO in arguments.only:
        rows += compare(arguments.exports, NANO, real.pick(judged), 32)
    for model in (*CLIPS, *MERGING):
        if model in arguments.only:
            count = arguments.drawn // (1 if "b8" in model else 2)
            # Another seed than the calibration's: `drawn` starts anew, so the first are left out.
            rows += compare(arguments.exports, model, drawn("sdxl", (64, 64), 32 + count)[32:], 64)
    save("runtime-agreement", {"machine": measured_on(), "rows": rows})
    print(agreement_table(rows))


def compare(folder: Path, model: str, latents: Any, cells: int) -> list[dict[str, Any]]:
    """One row for each precision of a model, against PyTorch without token merging."""
    import torch

    from latentguard import Scorer
    from latentguard.runtime import Guard
    from latentguard.scorer import Scores

    scorer = Scorer(POLICY, encoder(plain(model)))
    concepts = [concept.id for concept in scorer.policy.concepts]
    parts = []
    with torch.inference_mode():
        for start in range(0, len(latents), 16):
            batch = latents[start : start + 16].to(torch.float32)
            scores = scorer.score(batch)
            parts.append((scores, scorer.encoder.encode_latents(batch), scorer.decide(scores)))
    margins = np.concatenate([scores.margin.numpy() for scores, _, _ in parts])
    embeddings = np.concatenate([embedding.numpy() for _, embedding, _ in parts])
    verdicts = [verdict for _, _, part in parts for verdict in part]
    rows = []
    for precision in PRECISIONS:
        path = exported(folder, model, precision, cells)
        if not path.exists():
            if model not in MERGING or precision in ("fp32", "int8"):
                print(f"{path} is missing, not compared", file=sys.stderr)
            continue
        outputs: list[dict[str, Any]] = []
        with Guard(path, threads=1) as guard:
            for start in range(0, len(latents), 16):
                array = latents[start : start + 16].tensor.float().numpy()
                outputs.append(guard.scores(array))
        decided = []
        for one in outputs:
            names = ("probability", "margin", "best_prompt")
            decided += scorer.decide(Scores(*(torch.from_numpy(one[n]) for n in names), 0.0))
        found = np.concatenate([one["margin"] for one in outputs])
        embedded = np.concatenate([one["embedding"] for one in outputs])
        cosines = (embedded * embeddings).sum(1) / np.linalg.norm(embedded, axis=1)
        error = np.abs(found - margins)
        row = {
            "model": model,
            "precision": precision,
            "latents": len(latents),
            "margin_max": float(error.max()),
            "margin_mean": float(error.mean()),
            "cosine_min": float(cosines.min()),
            "cosine_mean": float(cosines.mean()),
        }
        if model == NANO:
            pairs = list(zip(decided, verdicts, strict=True))
            row["same_decision"] = float(np.mean([a.decision == b.decision for a, b in pairs]))
            row["same_matches"] = float(
                np.mean([{s.id for s in a.matched} == {s.id for s in b.matched} for a, b in pairs])
            )
            if precision == "int8":
                row["cascade"] = cascade(found, scorer.bank.covered, pairs)
            row["auroc"] = aurocs(found, latents.ids, concepts)
            row["auroc_torch"] = aurocs(margins, latents.ids, concepts)
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    return rows


def cascade(
    margins: NDArray[np.float32], covered: Sequence[bool], pairs: Sequence[tuple[Any, Any]]
) -> list[dict[str, float]]:
    """int8 first, float32 where int8 is unsure: the share that goes on, and equal decisions."""
    # All thresholds of the policy are probability 0.5, which is margin 0.
    nearest = np.abs(margins[:, np.array(covered)]).min(1)
    same = np.array([a.decision == b.decision for a, b in pairs])
    return [
        {
            "unsure": unsure,
            "share": float((nearest <= unsure).mean()),
            "same_decision": float((same | (nearest <= unsure)).mean()),
        }
        for unsure in UNSURE
    ]


def aurocs(
    margins: NDArray[np.float32], ids: Sequence[str], concepts: Sequence[str]
) -> dict[str, float]:
    """AUROC of Caltech's revolvers and cannons among its other classes."""
    from latentguard.evaluate.metrics import auroc, count

    kind = np.array([name.split("/")[0] if "/" in name else "" for name in ids])
    others = (kind != "") & ~np.isin(kind, list(CLASSES))
    return {
        name: float(auroc(count(margins[kind == name, at], margins[others, at])))
        for name, concept in CLASSES.items()
        for at in (concepts.index(concept),)
    }


def agreement_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| model | precision | latents | margin, largest difference | mean | cosine, smallest | "
        "same decision | AUROC revolver (torch) | AUROC cannon (torch) |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        cells = [row["model"], row["precision"], str(row["latents"])]
        cells += [f"{row['margin_max']:.2g}", f"{row['margin_mean']:.2g}"]
        cells.append(f"{row['cosine_min']:.6f}")
        if "same_decision" in row:
            cells.append(f"{100 * row['same_decision']:.2f} %")
            cells += [f"{row['auroc'][k]:.4f} ({row['auroc_torch'][k]:.4f})" for k in CLASSES]
        else:
            cells += ["-", "-", "-"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


# --- speed ----------------------------------------------------------------------------------------


def contenders() -> list[tuple[str, str, int]]:
    """Model, engine (eager, or the precision of an export), latent cells a side."""
    engines = ("eager", "fp32", "int8", "int8-dynamic")
    shapes = [*((name, 64) for name in reversed(CLIPS)), (NANO, 32), (NANO, 64)]
    merging = [(model, engine, 64) for model in MERGING for engine in ("fp32", "int8")]
    return [*((model, engine, cells) for model, cells in shapes for engine in engines), *merging]


def arrays(model: str, batch: int, cells: int) -> NDArray[np.float32]:
    channels = 32 if model == NANO else 4
    made = np.random.default_rng(0).standard_normal((batch, channels, cells, cells))
    return made.astype(np.float32)


def runner(
    model: str, engine: str, cells: int, folder: Path, batching: bool = False
) -> Callable[[NDArray[np.float32]], Any]:
    """Latents to scores."""
    if engine == "eager":
        import torch

        from latentguard import Latents, Scorer

        torch.set_num_threads(THREADS)
        scorer = Scorer(POLICY, encoder(model))
        space = scorer.encoder.space

        def score(array: NDArray[np.float32]) -> Any:
            with torch.inference_mode():
                return scorer.score(Latents(torch.from_numpy(array), space, scaled=True))

        return score
    from latentguard.runtime import Batching, Guard

    path = exported(folder, model, engine, cells)
    return Guard(path, threads=THREADS, batching=Batching() if batching else None).scores


def measure(model: str, engine: str, cells: int, folder: Path, repeat: int) -> dict[str, Any]:
    """Times at batch 1 and 16 and with eight clients, and memory, in this process."""
    run = runner(model, engine, cells, folder)
    row: dict[str, Any] = {"model": model, "engine": engine, "cells": cells}
    one = arrays(model, 1, cells)
    taken = timed(lambda: run(one), repeat)
    row["ms"], row["best"] = 1e3 * statistics.median(taken), 1e3 * min(taken)
    row["mb"] = peak_mb()
    many = arrays(model, 16, cells)
    slow = row["ms"] > 100
    row["batch16_per_s"] = 16 / statistics.median(
        timed(lambda: run(many), 1 if slow else 7, warm=1)
    )
    if engine != "eager":
        run = runner(model, engine, cells, folder, batching=True)
    row["clients_per_s"] = clients(run, one, 3 if slow else 20)
    row["mb_peak"] = peak_mb()
    return row


def peak_mb() -> float:
    """Peak memory of this process; getrusage would count what its parent had."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def timed(call: Callable[[], Any], repeat: int, warm: int = 2) -> list[float]:
    """Seconds of each call, after a few that are not counted."""
    for _ in range(warm):
        call()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def clients(run: Callable[..., Any], array: NDArray[np.float32], requests: int) -> float:
    """Images a second with eight threads that each ask for one after the other."""

    def client() -> None:
        for _ in range(requests):
            run(array)

    threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return CLIENTS * requests / (time.perf_counter() - start)


def speed(arguments: argparse.Namespace) -> None:
    """All contenders, one process each."""
    if arguments.child:
        model, engine, cells = arguments.child
        row = measure(model, engine, int(cells), arguments.exports, arguments.repeat)
        print(json.dumps(row))
        return
    rows = kept("runtime-speed", arguments.only)
    for model, engine, cells in contenders():
        missing = (
            engine != "eager" and not exported(arguments.exports, model, engine, cells).exists()
        )
        if model not in arguments.only or missing:
            continue
        command = [sys.executable, __file__, "speed", "--exports", str(arguments.exports)]
        command += ["--repeat", str(arguments.repeat), "--child", model, engine, str(cells)]
        threads = {"OMP_NUM_THREADS": str(THREADS)}
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, **threads}
        )
        if done.returncode:
            sys.exit(f"{model} {engine} failed:\n{done.stderr}")
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], file=sys.stderr, flush=True)
        save("runtime-speed", {"machine": measured_on(), "rows": rows})
    print(speed_table(rows))


def turns(arguments: argparse.Namespace) -> None:
    """Batch 1 anew, a model's contenders in one process: they take turns, so that ratios hold where
    the machine's speed changes. Goes into the rows that `speed` has written."""
    rows = json.loads((RESULTS / "runtime-speed.json").read_text())["rows"]
    for group in dict.fromkeys((plain(model), cells) for model, _, cells in contenders()):
        found = [row for row in rows if (plain(row["model"]), row["cells"]) == group]
        if group[0] not in arguments.only or not found:
            continue
        model, cells = group
        one = arrays(model, 1, cells)
        runs = [runner(row["model"], row["engine"], cells, arguments.exports) for row in found]
        times: list[list[float]] = [[] for _ in runs]
        for _ in range(5):
            for run, taken in zip(runs, times, strict=True):
                taken += timed(partial(run, one), arguments.repeat // 5, warm=1)
        for row, taken in zip(found, times, strict=True):
            row["ms"], row["best"] = 1e3 * statistics.median(taken), 1e3 * min(taken)
            print(row, file=sys.stderr, flush=True)
        save("runtime-speed", {"machine": measured_on(), "rows": rows})
    print(speed_table(rows))


def speed_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    base = {(r["model"], r["cells"]): r["ms"] for r in rows if r["engine"] == "eager"}
    lines = [
        "| model | px | engine | ms, batch 1 (best) | times eager | images/s, batch 16 | images/s, "
        "8 clients | memory, MB | peak, MB |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    order = contenders()
    for row in sorted(rows, key=lambda r: order.index((r["model"], r["engine"], r["cells"]))):
        ratio = base[plain(row["model"]), row["cells"]] / row["ms"]
        cells = [row["model"], str(8 * row["cells"]), row["engine"]]
        cells.append(f"{row['ms']:.1f} ({row['best']:.1f})")
        cells += [f"{ratio:.2f}", f"{row['batch16_per_s']:.1f}", f"{row['clients_per_s']:.1f}"]
        cells += [f"{row['mb']:.0f}", f"{row['mb_peak']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cost(arguments: argparse.Namespace) -> None:
    """Milliseconds of CPU an image on one thread: what stays true on a machine that is busy."""
    global THREADS
    THREADS = 1
    if arguments.child:
        model, engine, cells = arguments.child
        run, array = (
            runner(model, engine, int(cells), arguments.exports),
            arrays(model, 1, int(cells)),
        )
        times = []
        for _ in range(arguments.repeat + 2):
            start = time.thread_time()
            run(array)
            times.append(1e3 * (time.thread_time() - start))
        times = times[2:]
        print(json.dumps({"ms": min(times), "median": statistics.median(times)}))
        return
    rows = kept("runtime-cost", arguments.only)
    for model, engine, cells in contenders():
        missing = (
            engine != "eager" and not exported(arguments.exports, model, engine, cells).exists()
        )
        if model not in arguments.only or missing:
            continue
        command = [sys.executable, __file__, "cost", "--exports", str(arguments.exports)]
        command += ["--repeat", str(arguments.repeat), "--child", model, engine, str(cells)]
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        if done.returncode:
            sys.exit(f"{model} {engine} failed:\n{done.stderr}")
        row = {"model": model, "engine": engine, "cells": cells}
        rows.append(row | json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], file=sys.stderr, flush=True)
        save("runtime-cost", {"machine": measured_on(), "rows": rows})


def cost_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    base = {(r["model"], r["cells"]): r["ms"] for r in rows if r["engine"] == "eager"}
    lines = [
        "| model | px | engine | CPU ms an image, one thread | times eager |",
        "| --- | ---: | --- | ---: | ---: |",
    ]
    for row in rows:
        ratio = base[plain(row["model"]), row["cells"]] / row["ms"]
        cells = [row["model"], str(8 * row["cells"]), row["engine"], f"{row['ms']:.1f}"]
        cells.append(f"{ratio:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


# --- pareto ---------------------------------------------------------------------------------------


def pareto(arguments: argparse.Namespace) -> None:
    """Time against fidelity, from the results of the other two."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    fidelity = json.loads((RESULTS / "runtime-agreement.json").read_text())["rows"]
    timed = json.loads((RESULTS / "runtime-cost.json").read_text())
    ms = {(r["model"], r["engine"], r["cells"]): r["ms"] for r in timed["rows"]}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    points = nano_points(fidelity, ms)
    left.set(
        title="nano-flux2, 256 px, real latents",
        xlabel="CPU ms an image, one thread",
        ylabel="decisions other than PyTorch's, %",
    )
    for name, time_, same, _ in points:
        left.plot(time_, 100 * (1 - same), "o" if "then" not in name else "x", color="#0072B2")
        left.annotate(name, (time_, 100 * (1 - same)), fontsize=7, xytext=(4, 3), **OFFSET)
    right.set(
        title="Latent-CLIP, random weights, random latents",
        xlabel="CPU ms an image, one thread",
        ylabel="1 - cosine with PyTorch's embedding",
        xscale="log",
        yscale="log",
    )
    for model, color in zip(CLIPS, ("#D55E00", "#009E73"), strict=True):
        for row in fidelity:
            key = (row["model"], row["precision"], 64)
            if plain(row["model"]) == model and key in ms:
                place = (ms[key], max(1 - row["cosine_min"], 1e-7))
                right.plot(*place, "x" if row["model"] in MERGING else "o", color=color)
                name = f"{row['model'].removeprefix('latent-clip-')} {row['precision']}"
                right.annotate(name, place, fontsize=7, xytext=(4, 3), **OFFSET)
        right.axvline(ms[model, "eager", 64], color=color, linestyle=":", linewidth=1)
    figure.savefig(RESULTS / "runtime.png", dpi=120)
    lines = [
        "| nano-flux2, 256 px | CPU ms | same decisions | AUROC revolver | AUROC cannon |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, time_, same, found in points:
        scores = " | ".join(f"{found[kind]:.4f}" if found else "-" for kind in CLASSES)
        lines.append(f"| {name} | {time_:.1f} | {100 * same:.2f} % | {scores} |")
    where = timed["machine"]
    text = (
        f"{where['cpu']}, {where['cores']} cores, onnxruntime {where['onnxruntime']}, torch "
        f"{where['torch']}.\n\n"
        f"{cost_table(timed['rows'])}\n{agreement_table(fidelity)}\n" + "\n".join(lines) + "\n"
    )
    whole = RESULTS / "runtime-speed.json"
    if whole.exists():
        text += "\nTwo threads, on a quiet machine:\n\n"
        text += speed_table(json.loads(whole.read_text())["rows"])
    (RESULTS / "runtime.md").write_text(text)
    print(text)


OFFSET = {"textcoords": "offset points"}
Point = tuple[str, float, float, dict[str, float]]


def nano_points(
    fidelity: Sequence[dict[str, Any]], ms: dict[tuple[str, str, int], float]
) -> list[Point]:
    """Name, milliseconds, share of equal decisions, AUROCs; with cascades of int8 and float32."""
    rows = {row["precision"]: row for row in fidelity if row["model"] == NANO}
    points: list[Point] = [("eager", ms[NANO, "eager", 32], 1.0, rows["fp32"]["auroc_torch"])]
    for precision, row in rows.items():
        if (NANO, precision, 32) in ms:
            taken = ms[NANO, precision, 32]
            points.append((precision, taken, row["same_decision"], row["auroc"]))
    for one in rows["int8"]["cascade"]:
        taken = ms[NANO, "int8", 32] + one["share"] * ms[NANO, "fp32", 32]
        name = f"int8, then fp32 within {one['unsure']:g}"
        points.append((name, taken, one["same_decision"], {}))
    return points


def measured_on() -> dict[str, Any]:
    """Where this was measured."""
    import onnxruntime

    return machine() | {"onnxruntime": onnxruntime.__version__}


def kept(name: str, models: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of earlier results that are not of `models`."""
    path = RESULTS / f"{name}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return [row for row in rows if row["model"] not in models]


def save(name: str, data: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    for command in (export, agreement, speed, turns, cost, pareto):
        one = commands.add_parser(command.__name__, help=command.__doc__)
        one.set_defaults(run=command)
        if command is pareto:
            continue
        one.add_argument("--exports", type=Path, required=True)
        one.add_argument("--only", nargs="+", choices=MODELS, default=[*MODELS])
        if command in (speed, turns, cost):
            one.add_argument("--repeat", type=int, default=15)
            if command is not turns:
                one.add_argument("--child", nargs=3, help="internal")
        else:
            one.add_argument("latents", type=Path, nargs="+")
        if command is agreement:
            one.add_argument("--drawn", type=int, default=64, help="random latents, half for B/4")
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
