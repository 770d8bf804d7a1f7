"""Pictures of runs, of the probe and of a table's growth: what they show, from whatever a run has left."""

import json
import math
import xml.etree.ElementTree as ElementTree

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex

from apps.bench import growth as bench
from apps.plots import growth
from apps.plots.curves import MOST_POINTS, smooth, thin
from apps.plots.panels import build_panels
from apps.plots.probe import build_view, draw_probe
from apps.plots.read import names_of, read_run
from apps.plots.run import main, parse_command_line, plot
from apps.plots.sheet import draw_sheet, grid
from apps.plots.style import ShortNumbers, label_ends, short
from tests.helpers.training import REPOSITORY

LAYERS = (4, 12)


@pytest.fixture(autouse=True)
def _closed_figures():
    yield
    plt.close("all")


def record(step, **changes):
    """A line of metrics.jsonl."""
    line = {
        "global_step": step,
        "acc_step": 0,
        "speed/wps": 1000.0 + step,
        "speed/curr_iter_time": 0.5,
        "speed/data_load_time": 0.01,
        "speed/FLOPS": 1e9,
        "optim/grad_norm": 2.0 / step,
        "optim/value_grad_norm": 0.1 / step,
        "optim/lr": 1e-3 * step,
        "optim/value_lr": 2e-3 * step,
        "optim/total_tokens": 100 * step,
        "memory/rss_gib": 0.5,
        "loss/out": 2 + 4 / step,
        "created_at": "2026-01-01",
    }
    for layer in LAYERS:
        line |= {f"pk/layer_{layer}/ever_read": 0.01 * step + layer, f"pk/layer_{layer}/kl": 3.0 - 0.01 * step}
    return {**line, **changes}


def lines(records):
    return "".join(json.dumps(one) + "\n" for one in records)


def write_run(folder, steps=range(1, 21), **changes):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text(lines(record(step, **changes) for step in steps))
    slots = {"total": 1000, "read_by_layer_4": 100, "read_by_layer_12": 200, "read": 250}
    validation = [
        {
            "global_step": step,
            "wiki": {"loss": 3 - step / 100, "bits_per_byte": 1.0, "n_tokens": 5},
            "memory_slots": slots,
        }
        for step in (10, 20)
    ]
    (folder / "metrics.validation.jsonl").write_text(lines(validation))
    tasks = {
        "piqa": {"alias": "piqa", "acc,none": 0.5, "acc_norm,none": 0.6, "acc_stderr,none": 0.1},
        "nq": {"acc,none": 0.25},
    }
    (folder / "metrics.eval.jsonl").write_text(lines([{"global_step": 20, "acc_step": 0, **tasks}]))
    return folder


def sheet(*folders, by_tokens=False, width=1):
    """Title -> axes of the sheet of some runs."""
    runs = [read_run(folder, folder.name) for folder in folders]
    figure = draw_sheet(build_panels(runs, by_tokens), runs, "step", width)
    return {ax.get_title(loc="left"): ax for ax in figure.axes}


def drawn(ax, label=""):
    """(x, y) of the line of a series."""
    (line,) = [line for line in ax.lines if line.get_label() == label]
    return list(line.get_xdata()), list(line.get_ydata())


def texts(ax):
    return [text.get_text() for text in ax.texts if text.get_text()]


# --- the sheet -------------------------------------------------------------------------------------------------------


def test_the_sheet_shows_what_was_logged(tmp_path):
    axes = sheet(write_run(tmp_path / "run"))
    steps = list(range(1, 21))
    assert drawn(axes["training loss"], "_child0") == (steps, [2 + 4 / step for step in steps])
    assert drawn(axes["learning rate"], "weights") == (steps, [1e-3 * step for step in steps])
    assert drawn(axes["learning rate"], "tables") == (steps, [2e-3 * step for step in steps])
    assert drawn(axes["gradient norm before clipping"], "tables")[1] == [0.1 / step for step in steps]
    assert drawn(axes["speed"], "_child0")[1] == [1000 + step for step in steps]
    assert drawn(axes["waiting for data"], "_child0")[1] == pytest.approx([2] * 20)
    assert drawn(axes["memory"], "resident")[1] == [0.5] * 20
    assert drawn(axes["validation: loss"], "wiki") == ([10, 20], [2.9, 2.8])
    assert drawn(axes["slots read in validation"], "layer 12") == ([10, 20], [20, 20])
    assert drawn(axes["slots read in validation"], "all layers") == ([10, 20], [25, 25])
    assert drawn(axes["slots ever read"], "layer 4")[1] == pytest.approx([0.01 * step + 4 for step in steps])
    assert drawn(axes["evaluation: acc"], "piqa") == ([20], [0.5])
    assert not any("stderr" in title or "n_tokens" in title for title in axes)
    assert axes["training loss"].get_ylabel() == "nats a token"
    assert axes["gradient norm before clipping"].get_yscale() == "log"
    assert "run   step 20, loss 2.2, 2k tokens, 1.01k tokens/s" in axes["training loss"].figure.texts[0].get_text()


def test_a_layer_has_one_colour_and_its_name_at_the_line(tmp_path):
    axes = sheet(write_run(tmp_path / "run"))
    colours = {
        to_hex(line.get_color())
        for title in ("slots ever read", "slot use: KL from uniform", "slots read in validation")
        for line in axes[title].lines
        if line.get_label() == "layer 12"
    }
    assert len(colours) == 1
    tasks = [axes[title].lines for title in ("evaluation: acc", "evaluation: acc norm")]
    assert {line.get_label(): line.get_color() for line in tasks[0]}["piqa"] == tasks[1][0].get_color()
    assert texts(axes["slots ever read"]) == ["layer 4 4.2", "layer 12 12.2"]


def test_several_runs_on_one_sheet_by_tokens(tmp_path):
    long, brief = write_run(tmp_path / "long"), write_run(tmp_path / "brief", range(1, 6))
    axes = sheet(long, brief, by_tokens=True)
    ax = axes["training loss"]
    assert [list(line.get_xdata()) for line in ax.lines] == [[100 * n for n in range(1, 21)], [100, 200, 300, 400, 500]]
    assert len({to_hex(line.get_color()) for line in ax.lines}) == 2
    (legend,) = ax.figure.legends
    assert [text.get_text().split()[0] for text in legend.get_texts()] == ["long", "brief"]
    # Evaluated behind its last line: at the pace so far.
    assert list(axes["validation: loss"].lines[1].get_xdata()) == [1000, 2000]
    # A colour is a run's, so what else there is has dashes, or a panel of its own.
    assert axes["learning rate"].lines[0].get_linestyle() != axes["learning rate"].lines[1].get_linestyle()
    assert axes["learning rate"].lines[0].get_color() == axes["learning rate"].lines[1].get_color()


def test_runs_of_which_one_has_no_metrics_or_no_positive_norm(tmp_path):
    runs = [write_run(tmp_path / name) for name in ("a$b", "zero", "bare")]
    (runs[1] / "metrics.jsonl").write_text(lines(record(n, **{"optim/grad_norm": 0.0}) for n in range(1, 200)))
    write_probe(runs[2])
    for file in runs[2].glob("*.jsonl"):
        file.unlink()
    args = parse_command_line([*map(str, runs), f"out={tmp_path / 'a.svg'}", "statistics=[]"])
    assert plot(args) == [tmp_path / "a.svg"]
    drawn_texts = "".join(ElementTree.parse(tmp_path / "a.svg").getroot().itertext())
    assert "a$b   step 20" in drawn_texts
    assert "bare   step 0" in drawn_texts


def test_many_runs_have_cells_below_their_names(tmp_path):
    axes = sheet(*(write_run(tmp_path / f"run{number}", (1, 2)) for number in range(20)))
    boxes = [ax.get_position() for ax in axes.values()]
    assert all(0 < box.x0 < box.x1 < 1 and 0 < box.y0 < box.y1 for box in boxes)
    height = axes["training loss"].figure.get_figheight()
    assert max(box.y1 for box in boxes) < 1 - 10 * 0.2 / height
    assert len({to_hex(line.get_color()) for line in axes["training loss"].lines}) == 20


def test_many_tasks_are_spread_over_panels(tmp_path):
    run = write_run(tmp_path / "run")
    tasks = {f"task{number}": {"acc,none": number / 20} for number in range(19)}
    (run / "metrics.eval.jsonl").write_text(lines([{"global_step": 20, **tasks}]))
    axes = sheet(run)
    shown = [line.get_label() for title, ax in axes.items() if title.startswith("evaluation: acc") for line in ax.lines]
    assert shown == [f"task{number}" for number in range(19)]
    assert "evaluation: acc (3 of 3)" in axes


def test_other_metrics_get_panels_where_they_vary(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text(lines(record(n, **{"data/skipped": n, "constant": 7}) for n in (1, 2, 3)))
    axes = sheet(run)
    assert drawn(axes["data/skipped"], "_child0") == ([1, 2, 3], [1, 2, 3])
    assert "constant" not in axes


def test_guards_are_marked_where_they_acted(tmp_path):
    run = write_run(tmp_path / "run")
    counts = {1: 0, 2: 0, 3: 2, 4: 2, 5: 3}
    (run / "metrics.jsonl").write_text(
        lines(record(n, **{"guard/skipped": c, "guard/loss_spikes": 0}) for n, c in counts.items())
    )
    ax = sheet(run)["training loss"]
    (marks,) = [line for line in ax.lines if line.get_marker() == "x"]
    assert list(marks.get_xdata()) == [3, 5]
    assert "× 3 skipped" in texts(ax)


@pytest.mark.parametrize("n_panels", range(1, 40))
def test_every_panel_has_a_cell(n_panels):
    n_rows, n_columns = grid(n_panels)
    assert n_rows >= 2 <= n_columns
    assert n_rows * n_columns >= n_panels + 3
    assert (n_rows - 1) * n_columns < n_panels + 3 or n_rows == 2


# --- whatever a run has left -----------------------------------------------------------------------------------------


def test_damaged_and_repeated_lines(tmp_path, caplog):
    """A run that went back from step 6 to 3, with lines that are none, and is being written."""
    run = tmp_path / "run"
    run.mkdir()
    good = [lines([record(n, **{"loss/out": float(n)})]) for n in range(1, 7)]
    again = [lines([record(n, **{"loss/out": 10.0 * n})]) for n in (4, 5)]
    within = lines([{"global_step": 5, "acc_step": 2, "loss/out": 99.0}])
    broken = 'garbage\n[1]\n{"global_step": "7"}\n{"global_step": null, "acc_step": 0}\n'
    text = "".join([*good, broken, *again, within]).encode() + b'\xff\n{"global_step": 6, "loss/o'
    (run / "metrics.jsonl").write_bytes(text)
    column = read_run(run, "run").metrics["loss/out"]
    assert (list(column.steps), list(column.values)) == ([1, 2, 3, 4, 5], [1, 2, 3, 40, 50])
    assert f"{run / 'metrics.jsonl'}:7 and 2 more lines are no records; left out" in caplog.text


def test_numbers_that_are_not_finite_are_gaps_and_marked(tmp_path):
    run = write_run(tmp_path / "run")
    losses = [3.0, math.nan, 2.0, math.inf, None, 10**400]
    (run / "metrics.jsonl").write_text(lines(record(n, **{"loss/out": x}) for n, x in enumerate(losses, start=1)))
    ax = sheet(run)["training loss"]
    assert [math.isnan(y) for y in drawn(ax, "_child0")[1]] == [False, True, False, True, True, True]
    (marks,) = [line for line in ax.lines if line.get_marker() == "x"]
    assert list(marks.get_xdata()) == [2, 4, 5, 6]
    assert "× 4 not finite" in texts(ax)


@pytest.mark.parametrize("steps", [[1], [1, 2]])
def test_short_runs_are_drawn(tmp_path, steps):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text(lines({"global_step": n, "loss/out": 1.0} for n in steps))
    axes = sheet(run)
    assert list(axes) == ["training loss"]
    assert axes["training loss"].lines[0].get_marker() == "o"


def test_what_is_all_nan_has_no_panel(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text(lines(record(n, **{"loss/out": math.nan, "optim/lr": 0.0}) for n in (1, 2)))
    axes = sheet(run)
    assert "training loss" not in axes
    assert drawn(axes["learning rate"], "weights")[1] == [0, 0]


def test_evaluations_in_any_order_and_twice(tmp_path):
    run = write_run(tmp_path / "run")
    found = [(20, "a", 1.0), (10, "a", 2.0), (10, "b", 3.0), (20, "a", 4.0)]
    text = lines({"global_step": step, source: {"loss": loss}} for step, source, loss in found)
    (run / "metrics.validation.jsonl").write_text(text)
    axes = sheet(run)
    assert drawn(axes["validation: loss"], "a") == ([10, 20], [2, 4])
    assert drawn(axes["validation: loss"], "b") == ([10], [3])
    assert "slots read in validation" not in axes


# --- the command -----------------------------------------------------------------------------------------------------


def is_png(file):
    return file.read_bytes().startswith(b"\x89PNG\r\n")


def test_pictures_are_written(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "a=run")
    monkeypatch.setattr("sys.argv", ["run.py", str(run)])
    main()
    png, svg = run / "plots" / "run.png", run / "plots" / "run.svg"
    assert capsys.readouterr().out.split("\n")[:2] == [str(png), str(svg)]
    assert is_png(png)
    assert "training loss" in "".join(ElementTree.parse(svg).getroot().itertext())
    before = svg.read_bytes()
    plot(parse_command_line([f"dump_dir={run}", f"out={svg}"]))
    assert svg.read_bytes() == before
    assert sorted(file.name for file in png.parent.iterdir()) == ["run.png", "run.svg"]


def test_help(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["run.py", "--help"])
    main()
    assert "`smooth`: log lines" in capsys.readouterr().out


def test_a_run_without_anything_is_left_out_beside_others(tmp_path, caplog):
    write_run(tmp_path / "good")
    (tmp_path / "none").mkdir()
    out = tmp_path / "new" / "picture.png"
    args = parse_command_line([str(tmp_path / "none"), str(tmp_path / "good"), f"out={out}"])
    assert plot(args) == [out]
    assert is_png(out)
    assert "none: no metrics in it; left out" in caplog.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "dump_dir: not set"),
        (["nowhere"], "dump_dir: no folder 'nowhere'"),
        (["empty"], "dump_dir: nothing to draw in 'empty'"),
        (["run", "x=epochs"], "x: 'epochs' is neither steps nor tokens"),
        (["run", "smooth=0"], "smooth: 0 is too small"),
        (["run", "out=a.pdf"], "out: 'a.pdf'; pictures are written as .png and .svg"),
        (["run", "out=run/metrics.jsonl"], "out: 'run/metrics.jsonl' is a file, not a folder"),
        (["run", "colour=red"], "colour: unknown key"),
        (["old", "x=tokens"], "x: tokens, but old/metrics.jsonl has no optim/total_tokens"),
        (["run", "statistics=[median]"], "statistics: 'median' must be one of mean, rms, which the probe has in 'run'"),
    ],
)
def test_errors_are_one_line(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    write_probe(write_run(tmp_path / "run", (1, 2)))
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "metrics.jsonl").write_text(lines([{"global_step": 1, "loss/out": 1.0}]))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").write_text('{"global_step": 1, "acc_step"')
    with pytest.raises(ValueError, match=r"^.*$") as error:
        plot(parse_command_line(words))
    assert message in str(error.value)


def test_names_tell_runs_apart(tmp_path):
    assert names_of([tmp_path / "a" / "x", tmp_path / "b" / "y"]) == ["x", "y"]
    assert names_of([tmp_path / "a" / "x", tmp_path / "b" / "x"]) == ["a/x", "b/x"]


# --- long and noisy lines --------------------------------------------------------------------------------------------


def test_thinning_keeps_ends_and_spikes():
    rng = np.random.default_rng(0)
    x, y = np.arange(100_000), rng.normal(size=100_000)
    y[[12_345, 77_777]] = 50, -60
    y[40_000:41_000] = math.nan
    thin_x, thin_y = thin(x, y)
    assert len(thin_x) <= MOST_POINTS
    assert (thin_x[0], thin_x[-1]) == (0, 99_999)
    assert (np.diff(thin_x) > 0).all()
    assert {12_345, 77_777} <= set(thin_x)
    assert np.array_equal(thin_y, y[thin_x], equal_nan=True)
    assert np.isnan(thin_y).any()
    assert thin(x[:MOST_POINTS], y[:MOST_POINTS])[0] is not thin_x
    assert len(thin(x[:MOST_POINTS], y[:MOST_POINTS])[0]) == MOST_POINTS


def test_smoothing():
    y = np.array([9.0, 1, 2, 3, math.nan, 5, 6, 7])
    assert smooth(y, 1) is y
    means = smooth(y, 2)
    assert means[0] == 9  # the start is steep: nothing of what follows
    assert list(means[[1, 2]]) == [4, 2]
    assert math.isnan(means[4])
    assert means[3] == 2.5
    assert means[-1] == 6.5
    assert smooth(np.array([1.0, 100, 1, 100]), 2, in_logs=True)[1] == pytest.approx(100 ** (1 / 3))
    flat = smooth(np.full(50, 2.0), 10)
    assert flat == pytest.approx(np.full(50, 2.0))


def test_labels_do_not_overlap():
    ax = plt.figure().add_axes((0.1, 0.1, 0.5, 0.8))
    ax.set_ylim(0, 1)
    label_ends(ax, [(0.5, "c", "red"), (0.501, "d", "red"), (0.1, "a", "red"), (0.499, "b", "red")])
    places = {text.get_text(): text.get_position()[1] for text in ax.texts}
    assert sorted(places, key=places.get) == ["a", "b", "c", "d"]
    assert places["a"] == pytest.approx(0.1)
    assert places["c"] == pytest.approx(0.5)
    assert places["d"] - places["c"] == pytest.approx(places["c"] - places["b"])
    assert places["d"] - places["c"] > 0.02


def test_numbers_are_short():
    numbers = (0, 0.5, 12, 999.9, 1500, 3.2e6, 4e10, 2e12, 0.00012, -2000, math.nan)
    assert [*map(short, numbers)] == ["0", "0.5", "12", "1k", "1.5k", "3.2M", "40B", "2T", "0.00012", "-2k", "-"]


def test_ticks_are_told_apart():
    assert ShortNumbers().format_ticks([2.301, 2.302, 2.303]) == ["2.301", "2.302", "2.303"]
    assert ShortNumbers().format_ticks([0, 50_000, 100_000]) == ["0", "50k", "100k"]


# --- the probe -------------------------------------------------------------------------------------------------------


def write_probe(run, steps=(10, 20, 40)):
    """Value of each record: its step, plus its block."""
    records = []
    for step in steps:
        places = [("tok_embeddings", -1, "residual"), ("output", 3, "input"), ("output", 3, "weight")]
        for layer in range(3):
            places.append((f"layers.{layer}", layer, "residual"))
            for linear in ("attention.wq", "attention.wo"):
                places += [(f"layers.{layer}.{linear}", layer, kind) for kind in ("input", "weight")]
        places.append(("layers.1.feed_forward.query_proj.query_mlps.0", 1, "input"))
        for name, depth, kind in places:
            value = step + depth if (name, step) != ("layers.2", 20) else None
            records.append({"global_step": step, "name": name, "kind": kind, "rms": value, "mean": -1.0})
    (run / "probe").mkdir(exist_ok=True)
    (run / "probe" / "probe.0.jsonl").write_text(lines(records) + '{"global_step": 50, "na')
    return run


def test_probe_over_depth_and_steps(tmp_path):
    run = read_run(write_probe(write_run(tmp_path / "run")), "run")
    view = build_view(run, "rms")
    assert list(view.steps) == [10, 20, 40]
    assert list(view.depths) == [-1, 0, 1, 2, 3]  # the embedding, three blocks, the output
    (residual,) = view.of_kind("residual")
    assert np.array_equal(residual.values[:4, 0], [9, 10, 11, 12])
    assert np.isnan(residual.values[3, 1])
    assert residual.is_there[3, 1]
    assert not residual.is_there[4].any()
    inputs = view.of_kind("input")
    assert [picture.part for picture in inputs] == [
        "attention.wq",
        "attention.wo",
        "feed_forward.query_proj.query_mlps.0",
        "output",
    ]
    assert list(inputs[-1].values[4]) == [13, 23, 43]
    assert np.argwhere(inputs[2].is_there)[:, 0].tolist() == [2, 2, 2]
    for statistic in ("rms", "mean"):
        figure = draw_probe(run, statistic)
        titles = [ax.get_title(loc="left") for ax in figure.axes if ax.get_title(loc="left")]
        assert titles == ["residual", "wq", "wo", "query_proj", "output"]
    # A tensor that is not finite is grey; what there is none of is left blank.
    drawn_meshes = draw_probe(run, "rms").axes[0].collections
    assert [mesh.get_array().count() for mesh in drawn_meshes] == [1, 11]


def test_probe_sheets_are_written(tmp_path):
    run = write_probe(write_run(tmp_path / "run"), steps=(5,))
    (run / "metrics.jsonl").unlink()
    written = plot(parse_command_line([str(run), "statistics=[rms]", f"out={tmp_path / 'all'}"]))
    assert [file.name for file in written] == ["run.png", "run.svg", "probe.rms.png", "probe.rms.svg"]
    assert all(file.stat().st_size > 1000 for file in written)


# --- growth ----------------------------------------------------------------------------------------------------------


def test_growth_is_measured_and_drawn(tmp_path, monkeypatch, capsys):
    file, picture = tmp_path / "growth.json", tmp_path / "growth.svg"
    words = ["device=cpu", "n_keys=[16,8]", "knn=4", "heads=1", "dim=64", "tokens=256", "rounds=1"]
    monkeypatch.setattr("sys.argv", ["growth.py", *words, f"out={file}", f"plot={picture}"])
    alone = bench.run_alone
    monkeypatch.setattr(bench, "run_alone", lambda args, measure, *rest: measure(args, *rest))
    bench.main()
    rows = json.loads(file.read_text())["rows"]
    assert [row["slots"] for row in rows] == [64, 256, "none: a feed-forward"]
    # 192 more slots of 64, and 16 more keys of half the query's size.
    assert rows[1]["parameters"] - rows[0]["parameters"] == 192 * 64 + 16 * 16
    timed = ("search", "lookup", "layer", "layer, backward too", "step, dense", "step, sparse")
    assert all(row[name] > 0 for row in rows[:2] for name in timed)
    assert rows[2]["search"] == rows[2]["step, sparse"] == "-"
    assert "none: a feed-forward" in capsys.readouterr().out
    drawn_texts = "".join(ElementTree.parse(picture).getroot().itertext())
    assert "slots × 4" in drawn_texts
    assert growth.read_measured(file)["rows"] == rows
    args = bench.BenchArgs(device="cpu", dim=64, tokens=256, rounds=1, heads=1, knn=4)
    assert set(alone(args, bench.measure_layer, 8)) == set(timed[:4])


def test_tables_that_do_not_fit_are_left_out(monkeypatch):
    monkeypatch.setattr(
        bench, "run_alone", lambda args, measure, *rest: {"parameters": 1} if rest[0] != 2**20 else 1 / 0
    )
    rows = bench.measure(bench.BenchArgs(device="cpu", dim=256, tokens=1024, n_keys=[16, 2**20]))
    assert [row["parameters"] for row in rows] == [1, "-", 1]
    measured = [dict.fromkeys(bench.COLUMNS, 2.0) | {"slots": 2**n} for n in (14, 16)]
    figure = growth.draw_growth({"machine": "m", "title": "t", "rows": [*measured, rows[1]]})
    assert [list(line.get_xdata()) for line in figure.axes[0].lines] == [[2**14, 2**16]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["device=tpu"], "device: 'tpu' is neither cuda nor cpu"),
        (["n_keys=[8]"], "n_keys: [8]; wanted a list of numbers of at least knn=32"),
        (["tokens=100"], "tokens: 100 is no multiple of 256"),
        (["rounds=0"], "rounds: 0 is too small"),
        (["dim=100"], "dim: 100 is no multiple of 64"),
        (["out=setup/test.sh/growth.json"], "out: 'setup/test.sh' is a file"),
        (["dtype=int8"], "dtype: 'int8' must be one of"),
        (["plot=growth.pdf"], "plot: 'growth.pdf' ends in neither .png nor .svg"),
    ],
)
def test_what_cannot_be_measured(monkeypatch, words, message):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr("sys.argv", ["growth.py", "device=cpu", *words])
    with pytest.raises(ValueError, match=r".") as error:
        bench.main()
    assert message in str(error.value)


def test_files_that_are_no_measurements(tmp_path):
    file = tmp_path / "other.json"
    for text in ("", "[]", '{"rows": [], "machine": "m", "title": "t"}', '{"rows": [{"slots": 1}]}'):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"other.json: not what python -m apps.bench.growth out=other.json writes"):
            growth.read_measured(file)
