"""Pictures of made-up results: every legend, title and label lies inside the picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from benchmarks import plot
from benchmarks.operator import GPT2, case
from benchmarks.peers import OURS, PEERS

PREFIXES = (0, 16, 512, 2048)
PICTURES = ("latency", "lengths", "speedup", "roofline", "regret", "memory", "model")
SAMPLES = {"seconds": [0.01, 0.01], "median": 0.01, "minimum": 0.01, "iqr": 0.001, "error_multiple": 1.0}
RATES = {"tflops": 0.1, "bytes_per_second": 1e10, "rows_per_second": 1e3, "of_roofline": 0.5, "auto": "cpu"}


def operator_records(cases: list[dict[str, Any]], what: str) -> list[dict[str, Any]]:
    return [{"case": c, "what": what, "way": way, **SAMPLES, **RATES} for c in cases for way in PEERS]


def whole_model(what: str, way: str, P: int, **numbers: Any) -> dict[str, Any]:
    c = {"model": "smollm2", "B": 8, "S": 96, "P": P, "dtype": "float32", "mlp": 512, "on": "cpu"}
    return {"case": c, "what": what, "way": way, **numbers}


def write(path: Path, suite: str, records: list[dict[str, Any]]) -> Path:
    ceilings = {"memory": 4e10, "float32": 4e11, "bfloat16": 9e11}
    path.write_text(json.dumps({"suite": suite, "ceilings": ceilings, "records": records}))
    return path


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Files of results for each picture. One panel is the narrowest figure, so each has as few as it can have."""
    folder = tmp_path_factory.mktemp("made-up")
    decode = operator_records([case(64, 1, 128, P, GPT2) for P in PREFIXES], "decode")
    several = operator_records([case(B, 1, 128, P, GPT2) for P in PREFIXES[:3] for B in (1, 64)], "decode")
    both = operator_records([case(1024 // S, S, S, 128, GPT2) for S in (32, 64, 128, 256, 512)], "both")
    memory = [
        {"case": {**case(B, 64, 64, P, GPT2), "on": "cpu"}, "what": "both", "way": way, "extra": 1e6, "copy": 1024}
        for way in PEERS
        for B in (1, 64)
        for P in PREFIXES
    ]
    models = [
        whole_model("train", way, P, **SAMPLES, tokens_per_second=100.0)
        for way in ("bare", "ours", "PEFT", "adapters")
        for P in PREFIXES
        if (way == "bare") == (P == 0)
    ]
    files = {
        name: write(folder / f"{name}.json", "operator", records)
        for name, records in (("decode", decode), ("several", several), ("both", both))
    }
    files["memory"] = write(folder / "memory.json", "memory", memory)
    files["model"] = write(folder / "model.json", "model", models)
    sources = dict.fromkeys(PICTURES, "decode") | {"lengths": "both", "speedup": "several"}
    sources |= {"memory": "memory", "model": "model"}
    return {picture: [files[source]] for picture, source in sources.items()}


def outside(figure: Figure) -> list[str]:
    """What the edge of the picture cuts: legends, and axes with their titles, labels and ticks."""
    figure.draw_without_rendering()
    boxes = {f"legend {i}": found.get_window_extent() for i, found in enumerate(figure.legends)}
    boxes |= {f"axes {i}": axis.get_tightbbox() for i, axis in enumerate(figure.axes) if axis.get_visible()}
    edges = figure.bbox.padded(0.5)
    return [name for name, b in boxes.items() if not (edges.contains(*b.min) and edges.contains(*b.max))]


@pytest.mark.parametrize("picture", PICTURES)
def test_nothing_is_cut_off(picture: str, results: dict[str, list[Path]]) -> None:
    """The legend of a single panel once had all ways in one row, wider than the picture: our own line had no name."""
    drawn = plot.figures(results[picture])
    figure = drawn[picture]
    assert outside(figure) == []
    named = {label for axis in figure.axes for label in axis.get_legend_handles_labels()[1]}
    shown = {text.get_text() for found in figure.legends for text in found.get_texts()}
    if picture in ("latency", "lengths", "memory"):
        assert shown == named == set(PEERS)
    if picture == "model":
        assert shown == named == {"ours", "PEFT", "adapters"}
    for other in drawn.values():
        plot.pyplot().close(other)


def test_what_is_cut_off_is_found() -> None:
    figure, (axis,) = plot.grid_of_axes(1)
    axis.plot([0, 1], label="a name " * 30)
    figure.legend(loc="outside lower center")
    axis.set_title("a title " * 30)
    assert outside(figure) == ["legend 0", "axes 0"]
    plot.pyplot().close(figure)


def test_no_two_ways_look_alike() -> None:
    styles = {name: plot.style(name) for name in PEERS}
    assert len({str(style["color"]) for style in styles.values()}) == len(PEERS)
    assert {name for name, style in styles.items() if style["linewidth"] > 2} == set(OURS) - {"eager"}
