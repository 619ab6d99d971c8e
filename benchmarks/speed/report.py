"""The tables and the picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table as RichTable

from benchmarks.speed.cases import CASES, Case
from benchmarks.speed.systems import PEERS

Rows = Mapping[str, Mapping[str, Any]]  # what `measure` returns, by the name of the case


class Table(NamedTuple):
    """A table of text.

    Args:
        title: one line.
        header: the name of each column.
        rows: as wide as the header.
        notes: sentences below.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def tables(rows: Rows) -> list[Table]:
    """One table a group of cases with all systems, and one that sums up jmeta."""
    measured = [case for case in CASES if case.name in rows]
    groups = dict.fromkeys(case.group for case in measured)
    parts = [_group(group, [case for case in measured if case.group == group], rows) for group in groups]
    chosen = {case.name: rows[case.name] for case in measured}
    return [*parts, _memory(chosen), _summary(chosen)]


def _group(title: str, cases: Sequence[Case], rows: Rows) -> Table:
    names = list(dict.fromkeys(name for case in cases for name in rows[case.name]["systems"]))

    def cell(systems: Mapping[str, Any], name: str) -> str:
        if name not in systems:
            return "–"
        if "died" in systems[name]:
            return systems[name]["died"]
        ratio = f" ({_short(_ratio(systems, name))})" if name != "jmeta" and _ran(systems, "jmeta") else ""
        processes = "²" if systems[name].get("processes", 1) > 1 else ""
        return _short(1e3 * systems[name]["seconds"]) + processes + ratio

    fewer = {
        name: f"{name}: timed with {system['tasks']} tasks, times {rows[case.name]['tasks'] // system['tasks']}."
        for case in cases
        for name, system in rows[case.name]["systems"].items()
        if system.get("tasks", rows[case.name]["tasks"]) < rows[case.name]["tasks"]
    }
    return Table(
        f"{title}: milliseconds a meta-step (times jmeta)",
        ("case", *names),
        [(case.label, *(cell(rows[case.name]["systems"], name) for name in names)) for case in cases],
        tuple(fewer.values()),
    )


def _summary(rows: Rows) -> Table:
    def line(row: Mapping[str, Any]) -> tuple[str, ...]:
        systems = row["systems"]
        default = "two devices" if _ran(systems, "two devices") else "jmeta"
        own = systems[default]
        peers = [name for name in PEERS if _ran(systems, name)]
        fastest = min(peers, key=lambda name: systems[name]["seconds"], default=None)
        one, fixed = systems["jmeta"], "fixed batch"
        sampling = 1 - systems[fixed]["seconds"] / one["seconds"] if _ran(systems, fixed) else None
        return (
            _short(1e3 * own["seconds"]),
            "2" if default == "two devices" else "1",
            f"{systems[fastest]['seconds'] / own['seconds']:.2f} ({fastest})" if fastest else "–",
            f"{own['compile']:.1f}",
            f"{row['flops'] / 1e9:.3g}",
            f"{row['flops'] / own['seconds'] / row['peak']:.0%}",
            f"{sampling:.0%}" if sampling is not None else "–",
        )

    return Table(
        "jmeta with the devices that `jmeta train` takes",
        ("case", "ms", "devices", "fastest peer", "compile", "GFLOP", "peak", "sampling"),
        [(name, *line(row)) for name, row in rows.items() if _ran(row["systems"], "jmeta")],
        (
            f"Fastest peer: of {', '.join(PEERS)}, its time over jmeta's. Compile: seconds. "
            "Peak: share of the FLOP/s of a float32 matrix product in JAX. Sampling: its share of the meta-step on one "
            "device. "
            "²: two processes of one thread, half of the tasks each, where that was faster.",
        ),
    )


def _memory(rows: Rows) -> Table:
    names = list(dict.fromkeys(name for row in rows.values() for name in row["systems"]))

    def cell(systems: Mapping[str, Any], name: str) -> str:
        return f"{systems[name]['memory'] / 1e9:.1f}" if _ran(systems, name) and "memory" in systems[name] else "–"

    return Table(
        "Peak memory, GB, of all processes of a system",
        ("case", *names),
        [(case, *(cell(row["systems"], name) for name in names)) for case, row in rows.items()],
    )


def _ran(systems: Mapping[str, Any], name: str) -> bool:
    return name in systems and "died" not in systems[name]


def _ratio(systems: Mapping[str, Any], name: str) -> float:
    return systems[name]["seconds"] / systems["jmeta"]["seconds"]


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 20 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def show(console: Console, tables: Sequence[Table]) -> None:
    """Prints the tables."""
    for table in tables:
        rich = RichTable(
            title=table.title, title_justify="left", caption="\n".join(table.notes), caption_justify="left"
        )
        for i, name in enumerate(table.header):
            rich.add_column(name, justify="right" if i else "left", no_wrap=True)
        for row in table.rows:
            rich.add_row(*row)
        console.print(rich)


def markdown(environment: Mapping[str, Any], tables: Sequence[Table]) -> str:
    """The tables for the docs, with the command that makes them."""
    versions = ", ".join(f"{name} {number}" for name, number in environment["versions"].items())
    parts = [
        f"`python -m benchmarks.speed` on {environment['cpu']}, {environment['threads']} threads, float32, medians; "
        f"Python {environment['python']}, {versions}."
    ]
    for title, header, rows, notes in tables:
        lines = [header, ["---", *("---:" for _ in header[1:])], *rows]
        parts += [f"{title}:", "\n".join(f"| {' | '.join(line)} |" for line in lines), *notes]
    return "\n\n".join(parts) + "\n"


def picture(file: Path, rows: Rows) -> None:
    """Draws the time of each system over jmeta's as bars, by case, on a logarithmic axis.

    Args:
        file: where the PNG goes.
        rows: what `measure` returned, by the name of the case.
    """
    from matplotlib.figure import Figure

    alive = {case: {n for n in row["systems"] if _ran(row["systems"], n)} for case, row in rows.items()}
    shown = [c.name for c in CASES if alive.get(c.name, set()) > {"jmeta"}]
    names = [n for n in dict.fromkeys(n for case in shown for n in rows[case]["systems"]) if n != "jmeta"]
    half = -(-len(shown) // 2)
    bars = sum(len(alive[case]) for case in shown[:half])
    figure = Figure(figsize=(13, 2 + 0.16 * bars), layout="constrained")
    for axes, cases in zip(figure.subplots(1, 2, sharex=True), (shown[:half], shown[half:]), strict=True):
        y, ticks = 0.0, []
        for case in cases:
            systems = rows[case]["systems"]
            top = y
            for name in (n for n in names if n in alive[case]):
                ratio = _ratio(systems, name)
                # From 1, so that what is slower than jmeta points to the right.
                axes.barh(y, ratio - 1, left=1, color=f"C{names.index(name)}", label=name)
                axes.annotate(
                    _short(ratio), (max(ratio, 1), y), (3, 0), textcoords="offset points", va="center", fontsize=7
                )
                y += 1
            ticks.append((top + y - 1) / 2)
            y += 1
        axes.set(xscale="log", yticks=ticks, yticklabels=cases, xlabel="time a meta-step, jmeta = 1")
        axes.axvline(1, color="black", linewidth=0.8)
        axes.margins(y=0.01)
        axes.invert_yaxis()
        axes.xaxis.set_major_formatter("{x:g}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0, labelsize=8)
    handles: dict[str, Any] = {str(h.get_label()): h for a in figure.axes for h in a.containers}
    figure.legend(list(handles.values()), list(handles), loc="outside upper center", ncols=len(handles), frameon=False)
    figure.savefig(file, dpi=120)
