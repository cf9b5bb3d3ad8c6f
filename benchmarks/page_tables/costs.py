"""Time and memory of steps, on a CPU and on a GPU; agreement of estimators beside their price."""

from __future__ import annotations

from collections.abc import Iterable

from results import load

from .base import caption, markdown, table

KINDS = {  # row of step_cost.json -> what the pages call it, what it scores, its name in fidelity.json
    "plain": ("plain step", "", ()),
    "ghost, K=3, W=32": ('`"ghost"` (default), K = 3', "LoRA, trained linears", ("ghost, K=3, W=32",)),
    "ghost, all": ('`"ghost"`, all blocks', "LoRA, trained linears", ("ghost, K=all, W=32",)),
    "difference, all": (
        '`"difference"`, all blocks',
        "all that is trained before the head",
        ("difference, float32, default", "difference, nf4, default"),
    ),
    "difference, bf16": ("the same under bf16 autocast", "", ("difference, bf16 autocast, default",)),
    "path": ('`"path"`, a forward at theta* in each step', "all that is trained", ()),
    "path, KL to theta*": ("the same with its KL, as in `best()`", "", ()),
    "path, precomputed": ("the same, its log-probabilities in the data", "", ()),
    "exact, K=3": ('`"exact"`, K = 3', "all that is trained in three blocks", ("exact, K=3",)),
    "exact, all": ('`"exact"`, all blocks', "all that is trained in the blocks", ()),
}


WEIGHED = {  # the gate with other weights
    "weights given": "weights given with the batch",
    "DFT": "DFT",
    "STM of the model": "STM, by the model's own probabilities",
    "EAFT": "EAFT",
    "STM of the reference": "STM, by the reference's",
    "plain + KL to the reference": "for comparison: all tokens and a KL to the reference",
}


def agreement(names: Iterable[str]) -> tuple[str, str]:
    """Range over moments and learning rates: Spearman's correlation with exact values, share of the same half in %."""
    rates = load("fidelity")["results"].values()
    cells = [c for r in rates for name in names for at, c in r["estimators"][name]["total"].items() if at != "all"]
    if not cells:
        return "", ""
    low, high = (f"{pick(c[0] for c in cells):.3f}" for pick in (min, max))
    least, most = (f"{100 * pick(c[2] for c in cells):.0f}" for pick in (min, max))
    return (low if low == high else f"{low} to {high}"), (f"{least} %" if least == most else f"{least} to {most} %")


PATH, LARGE = "step_cost_path", "step_cost_path_vocabulary"  # the path alone; the same with a large vocabulary


@table
def costs() -> str:
    found, along = load("step_cost")["results"], load(PATH)["results"]
    off, on = ({**found[kind], **along[kind]} for kind in ("plain graph", "checkpointing"))
    rows = []
    for name, (title, scores, known) in KINDS.items():
        ranks, halves = ("1", "100 %") if name == "exact, all" else agreement(known)
        pairs = [
            " / ".join(f"{kind[name][what]:.2f}" for kind in (off, on) if what in kind.get(name, {}))
            for what in ("time ratio", "floor", "with refresh")
        ]
        measured = off.get(name, {}).get("date")  # of a row that is older than its file
        rows.append([title + (f" (of {measured})" if measured else ""), scores, *pairs, ranks, halves])
    header = ["", "scores", "step, without / with checkpointing", "least, by arithmetic", "with the target's refresh",
              "rank correlation with exact values", "same half kept"]  # fmt: skip
    return markdown(header, rows, "step_cost", PATH, "fidelity")


@table
def host_time() -> str:
    found, before = load("host_time")["results"], load("host_time_before")["results"]
    rows = [
        [name, f"{each['ms']:.0f}", f"{each['ratio']:.2f}", f"{before[name]['ratio']:.2f}"]
        for name, each in found.items()
    ]
    return markdown(["", "ms", "of a plain step", "before"], rows, "host_time", "host_time_before")


@table
def costs_weighed() -> str:
    found = load("step_cost")["results"]
    rows = [
        [title, " / ".join(f"{kind[name]['time ratio']:.2f}" for kind in found.values())]
        for name, title in WEIGHED.items()
    ]
    return markdown(["", "step, without / with checkpointing"], rows, "step_cost")


@table
def costs_more() -> str:
    """What the pages say of step_cost beside its table of estimators."""
    deep, cost = load("step_cost_32_blocks"), load("step_cost")
    naive = load("straightforward")["results"]["plain graph"]["straightforward"]
    rows = []
    for name, title in (("ghost, K=3, W=32", "ghost, K = 3"), ("difference, all", "difference, all blocks")):
        pairs = " / ".join(
            f"{deep['results'][kind][name]['with refresh']:.2f}" for kind in ("plain graph", "checkpointing")
        )
        rows.append([f"32 blocks, {title}: step with refresh, without / with checkpointing", pairs])
        again = cost["results"]["plain graph"][f"target of {name}"]["time ratio"]
        rows.append([f"12 blocks, {title}: a new target from as many sequences as a step has", f"{again:.2f}"])
    for kind, found in cost["results"].items():
        steps = [row["peak ratio"] for name, row in found.items() if name in KINDS and "peak ratio" in row]
        low, high = (min(steps), max(steps)) if steps else cost["peak ratio, all kinds of step"][kind]
        rows.append([f"peak memory of a step, {kind}", f"{low:.3f} to {high:.3f}"])
    found = load(LARGE)
    large, vocabulary = found["results"]["plain graph"], found["settings"]["vocabulary"]
    for name in ("path", "path, KL to theta*", "path, precomputed"):
        title = KINDS[name][0].replace("the same", '`"path"`')
        low, high = large[name]["low"], large[name]["high"]
        cell = f"{large[name]['time ratio']:.2f} ({low:.2f} to {high:.2f}), least {large[name]['floor']:.2f}"
        rows.append([f"vocabulary of {vocabulary:,}, short rows, {title}", cell])
    if "ghost's time ratio at other hours" in cost:
        low, high = cost["ghost's time ratio at other hours"]
        rows.append(["ghost step without checkpointing, in rounds of other hours", f"{low} to {high}"])
    rows.append(["the method as first written down (`straightforward.py`): time", f"{naive['time ratio']}"])
    rows.append(["the same: peak memory", f"{naive['peak ratio']}"])
    sources = ("step_cost", LARGE, "step_cost_32_blocks", "straightforward")
    return markdown(["beside a plain step of the same model", "ratio"], rows, *sources)


def gpu(title: str) -> str:
    columns = {"seconds": "s/step", "time ratio": "time", "with refresh": "with refresh", "peak GiB": "peak GiB",
               "reserved GiB": "reserved GiB", "memory ratio": "memory"}  # fmt: skip
    rows = [
        [name, *(f"{row[key]:.3f}" if key in row else "" for key in columns)]
        for name, row in load("gpu_budget")["results"][title].items()
    ]
    return markdown([title, *columns.values()], rows)


@table
def gpu_steps() -> str:
    found = load("gpu_budget")
    cap, beyond = (found["machine"][name] for name in ("capped at GiB", "held by CUDA beyond the cap, GiB"))
    limits = f"The allocator was capped at {cap} GiB; CUDA itself held {beyond} GiB beyond."
    return "\n\n".join([*map(gpu, found["results"]), limits, caption("gpu_budget")])


@table
def gpu_host() -> str:
    """Where the time of a GPU step goes: kernels, and operations that the host dispatches."""
    found = load("gpu_host")["results"]
    rows = [[name, *(f"{row[key]}" if key in row else "" for key in found["columns"])] for name, row in found["rows"].items()]  # noqa: E501  # fmt: skip
    return markdown(["", *found["columns"]], rows, "gpu_host")


@table
def arithmetic() -> str:
    from arithmetic import budget, totals  # they need transformers

    measured = load("gpu_budget")["results"]["8b dpo"]
    rows = []
    for name, size in totals("8b").items():
        peak = measured[name.removesuffix(" step")]["peak GiB"]
        rows.append([name, f"{size / 2**30:.3f}", f"{peak:.3f}", f"{100 * (1 - peak * 2**30 / size):.0f} %"])
    header = ["8b dpo", "arithmetic, GiB", "measured peak, GiB", "below the arithmetic"]
    return f"{budget('8b', 'dpo')}\n\n{markdown(header, rows, 'gpu_budget')}"


@table
def long_run() -> str:
    columns = {
        "step ms": ("time of a step, ratio", 2),
        "resident MiB": ("memory, MiB", 1),
        "hooks": ("hooks", 0),
        "tensors": ("tensors", 0),
        "objects": ("Python objects", 0),
        "journal": ("changes to undo", 0),
    }
    rows = [
        [f'`"{name}"`', *(f"{run['change'][key]:.{digits}f}" for key, (_, digits) in columns.items())]
        for name, run in load("long_run")["results"].items()
    ]
    return markdown(["", *(title for title, _ in columns.values())], rows, "long_run")
