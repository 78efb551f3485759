"""The report: what stands where on the page, its figures too, read back from trials in the real formats."""

import json
import math
import re
import shlex
import shutil
import uuid
from html import unescape
from html.parser import HTMLParser

import pytest
from cluster import Master, Trial
from conftest import REPO
from determined.cli import cli
from determined.cli._declarative_argparse import add_args
from made import noise, pairs_of
from playwright.sync_api import expect
from plotly.offline import get_plotlyjs

import report
from comparison.options import parse_command_line, parse_hyperparameters
from config.experiment import expand_trials, read_experiment_config
from experiment.charts import LINES, MAX_POINTS, range_around, series
from experiment.next_steps import next_steps
from experiment.report_page import render
from experiment.results import Experiment, Searcher, read_cluster, read_local, summarize
from experiment.verdicts import PAIR_METRICS
from storage.checkpoints import local_checkpoint_storage
from trial.events import append_event

ACCURACY, MARGIN = "eval_rewards/accuracies", "eval_rewards/margins"
DPO = {
    "name": "grid",
    "entrypoint": "python dpo_finetune.py",
    "searcher": {"name": "grid", "metric": ACCURACY, "smaller_is_better": False},
    "hyperparameters": {
        "model_name": "base",
        "model_ckpt": "6b6fbaa7-faa9-4449-867b-2939a147a335",
        "datasets": ["pairs"],
        "dpo_beta": {"type": "categorical", "vals": [0.1, 0.01]},
        "training_args": {"data_seed": 7, "learning_rate": {"type": "categorical", "vals": [5e-7, 1e-7, 5e-8]}},
    },
}
ACCURACIES = (0.75, 0.875, 0.5, 0.625, 0.8125, 0.5625)  # of the six trials: beta 0.1 at 5e-7, 1e-7, 5e-8, then 0.01
SFT = {
    "name": "sft",
    "entrypoint": "python sft_finetune.py",
    "searcher": {"name": "single", "metric": "eval_loss"},
    "hyperparameters": {"model_name": "base", "training_args": {"learning_rate": 1e-5}},
}
SCALED_BY_BETA = "Scaled by beta: comparable between trials of the same beta only."
URL = re.compile(r"(?:src|href)\s*=|url\(|@import|https?:")


def changed(config, hyperparameters=None, **keys):
    config = json.loads(json.dumps(config | keys))
    config["hyperparameters"] |= hyperparameters or {}
    return config


def uuid_of(trial_id, step):
    return str(uuid.UUID(int=1000 * trial_id + step))


def metrics_of(score, sft=False):
    """A trial's metrics, from the one it is ranked by."""
    return {"eval_loss": score} if sft else {ACCURACY: score, MARGIN: 2 * score, "eval_loss": 1 - score}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """An experiment's folder as local_experiment.py leaves it: trials of two evaluations, the second the better one.

    `scores` has the second evaluation's for each trial, or its metrics; a trial that it leaves out has not started.
    """

    monkeypatch.setenv("LOCAL_CHECKPOINT_STORAGE", str(tmp_path / "checkpoints"))

    def write(config, scores, states=()):
        folder = tmp_path / "local_runs" / config["name"]
        folder.mkdir(parents=True)
        (folder / "experiment.json").write_text(json.dumps(config))
        sft, lines = "sft" in config["entrypoint"], []
        for trial_id, hparams in enumerate(expand_trials(config), start=1):
            score = dict(enumerate(scores, start=1)).get(trial_id)
            if score is None:
                continue
            path, events = folder / "trials" / str(trial_id) / "events.jsonl", []
            final = score if isinstance(score, dict) else metrics_of(score, sft)
            events.append({"kind": "hparams", "hparams": hparams})
            for step in (10, 20, 30, 40):
                training = {name.removeprefix("eval_"): value / step for name, value in final.items()}
                events.append({"kind": "training", "steps_completed": step, "metrics": training})
                if step % 20 == 0:
                    worse = 1.25 if Searcher(config).smaller_is_better else 0.75
                    metrics = final if step == 40 else {name: worse * value for name, value in final.items()}
                    events.append({"kind": "validation", "steps_completed": step, "metrics": metrics})
                    events.append({"kind": "checkpoint", "steps_completed": step, "uuid": uuid_of(trial_id, step)})
                    model = local_checkpoint_storage() / uuid_of(trial_id, step) / f"checkpoint-{step}"
                    model.mkdir(parents=True)
                    (model / "model.safetensors").touch()
            for event in events:
                append_event(path, **event)
            state = dict(states).get(trial_id, "COMPLETED")
            if state != "UNFINISHED":
                lines.append(json.dumps(summarize(trial_id, state, hparams, events, Searcher(config))) + "\n")
        (folder / "trials.jsonl").write_text("".join(lines))
        return folder

    return write


class Element:
    def __init__(self, tag, attributes, parent):
        self.tag, self.attributes, self.parent, self.children = tag, attributes, parent, []

    def all(self, tag, **attributes):
        """The elements within, in order, that have these attributes (`class_` one of its classes)."""
        for child in self.children:
            if isinstance(child, Element):
                wanted = {name.strip("_").replace("_", "-"): value for name, value in attributes.items()}
                if child.tag == tag and all(
                    value in child.attributes.get(k, "").split() for k, value in wanted.items()
                ):
                    yield child
                yield from child.all(tag, **attributes)

    @property
    def text(self):
        parts = [child.text if isinstance(child, Element) else child for child in self.children]
        return " ".join(" ".join(parts).split())


class Page(HTMLParser):
    """A page's elements, which the parser checks to be closed in the order they were opened."""

    VOID = ("meta",)

    def __init__(self, html):
        super().__init__()
        self.html, self.root = html, Element("", {}, None)
        self.at = self.root
        self.feed(html)
        assert self.at is self.root

    def handle_starttag(self, tag, attributes):
        element = Element(tag, dict(attributes), self.at)
        self.at.children.append(element)
        if tag not in self.VOID:
            self.at = element

    def handle_startendtag(self, tag, attributes):
        self.at.children.append(Element(tag, dict(attributes), self.at))

    def handle_endtag(self, tag):
        assert tag == self.at.tag
        self.at = self.at.parent

    def handle_data(self, data):
        self.at.children.append(data)

    def section(self, name):
        return next(self.root.all("section", id=name), None)

    @property
    def heatmaps(self):
        """By title, each metric's heatmaps."""
        divs = [div for div in self.section("grid").all("div") if any(child.tag == "h3" for child in elements(div))]
        return {next(div.all("h3")).text: [Heatmap(plot) for plot in div.all("div", class_="plot")] for div in divs}

    @property
    def maps(self):
        """By title, each heatmap as rows of cells, the heads of rows and columns among them."""
        return {title: [heatmap.rows for heatmap in heatmaps] for title, heatmaps in self.heatmaps.items()}

    @property
    def curves(self):
        """By the title of its panel, each figure of curves as its traces."""
        plots = self.section("curves").all("div", class_="plot")
        return {plot.attributes["aria-label"]: json.loads(plot.attributes["data-figure"]) for plot in plots}

    @property
    def table(self):
        """The rows of the table of trials, by column."""
        heads, *rows = grid(next(self.section("trials").all("table")))
        return [dict(zip(heads, row, strict=True)) for row in rows]

    @property
    def commands(self):
        return [pre.text for pre in self.section("winner").all("pre")]


class Heatmap:
    """What a heatmap's figure shows."""

    def __init__(self, plot):
        figure = json.loads(plot.attributes["data-figure"])
        (self.trace,), self.shapes = figure["data"], figure["layout"]["shapes"]
        axes = figure["layout"]["xaxis"], figure["layout"]["yaxis"]
        (across, down), (columns, rows) = ([plain(a["title"]["text"]) for a in axes], [a["ticktext"] for a in axes])
        cells = [plain(shape["label"]["text"]) for shape in self.shapes]
        assert [(round(s["x0"] + 0.48), round(s["y0"] + 0.47)) for s in self.shapes] == [
            (x, y) for y in range(len(rows)) for x in range(len(columns))
        ]
        assert axes[1]["range"][0] > axes[1]["range"][1]  # the first row on top
        self.rows = [["", across]] if down else []
        self.rows += [[down or across, *map(plain, columns)]]
        self.rows += [[plain(row), *cells[i * len(columns) :][: len(columns)]] for i, row in enumerate(rows)]

    def outlined(self, width):
        """The trials with an outline of this width."""
        return [
            shape["name"] for shape in self.shapes if shape["line"]["width"] == width and "dash" not in shape["line"]
        ]

    def shade(self, trial_id):
        """How strong a trial's cell is, in percent."""
        (place,) = [
            (y, x) for y, row in enumerate(self.trace["customdata"]) for x, i in enumerate(row) if i == str(trial_id)
        ]
        return round(100 * self.trace["z"][place[0]][place[1]])


def plain(text):
    """Plotly's HTML as text."""
    return unescape(re.sub("<.*?>", "", text.replace("<br>", " ")))


def elements(element):
    return [child for child in element.children if isinstance(child, Element)]


def grid(table):
    return [[cell.text for cell in elements(row)] for row in table.all("tr")]


def page_of(folder):
    return Page(render(read_local(folder)))


def shade(page, trial_id, title):
    """How strong a trial's cell is in a metric's heatmap, in percent."""
    (heatmap,) = page.heatmaps[title]
    return heatmap.shade(trial_id)


def test_the_numbers_of_a_grid_stand_in_their_cells(write):
    page = page_of(write(DPO, ACCURACIES))
    assert next(page.root.all("h1")).text == "grid"
    (intro, progress) = [p.text for p in next(page.root.all("header")).all("p")]
    assert intro == (
        "6 trials of dpo_finetune.py over dpo_beta (0.01, 0.1) and learning_rate (5e-08, 1e-07, 5e-07),"
        " judged by eval_rewards/accuracies (larger is better)."
    )
    assert progress == "6 of 6 trials completed."
    assert page.maps == {
        "Reward accuracy": [
            [
                *(["", "learning_rate"], ["dpo_beta", "5e-08", "1e-07", "5e-07"]),
                ["0.01", "0.5625 trial 6", "0.8125 trial 5", "0.6250 trial 4"],
                ["0.1", "0.5000 trial 3", "0.8750 trial 2", "0.7500 trial 1"],
            ]
        ],
        "Reward margin": [
            [
                *(["", "learning_rate"], ["dpo_beta", "5e-08", "1e-07", "5e-07"]),
                ["0.01", "1.125 trial 6", "1.625 trial 5", "1.250 trial 4"],
                ["0.1", "1.000 trial 3", "1.750 trial 2", "1.500 trial 1"],
            ]
        ],
    }
    shades = {i: shade(page, i, "Reward accuracy") for i in range(1, 7)}
    assert shades == {2: 100, 5: 83, 1: 67, 4: 33, 6: 17, 3: 0}
    for (heatmap,) in page.heatmaps.values():
        assert heatmap.outlined(3) == ["2"]
        assert heatmap.trace["hovertext"][1][1] == (
            "<b>trial 2</b><br>dpo_beta 0.1<br>learning_rate 1e-07"
            "<br>reward accuracy 0.8750<br>reward margin 1.750<br>loss 0.1250<br>completed"
        )
        assert (heatmap.trace["zmin"], heatmap.trace["zmax"]) == (0, 1)


def test_the_winner(write):
    winner = page_of(write(DPO, ACCURACIES)).section("winner")
    assert next(winner.all("h2")).text == "Trial 2 is best"
    figures = zip(winner.all("dt"), winner.all("dd"), strict=True)
    assert {name.text: value.text for name, value in figures} == {
        **{"reward accuracy": "0.8750", "reward margin": "1.750", "loss": "0.1250"}
    }
    said = [p.text for p in winner.all("p")]
    assert said == [
        "dpo_beta 0.1, learning_rate 1e-07",
        "Next is trial 5 (dpo_beta 0.01, learning_rate 1e-07) with 0.8125: 0.0625 behind.",
        "Trials are compared without pairs: the checkpoints keep none. Small differences may be chance.",
        "Checkpoint, saved at step 40:",
    ]


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ((0.5, 0.75, 0.5, 0.75, 0.5, 0.5), "Trial 4 is as good; the first is taken. Next is trial 1 ("),
        ((0.5, 0.75, 0.75, 0.75, 0.5, 0.5), "Trials 3 and 4 are as good; the first is taken. Next is trial 1 ("),
        ((0.75,) * 6, "Trials 2, 3, 4, 5 and 6 are as good; the first is taken."),
    ],
)
def test_ties_are_told(write, scores, said):
    page = page_of(write(DPO, scores))
    assert any(p.text.startswith(said) for p in page.section("winner").all("p"))
    tied = [trial_id for trial_id, score in enumerate(scores, start=1) if score == 0.75]
    assert [row["rank"] for row in page.table].count("1") == len(tied)
    for (heatmap,) in page.heatmaps.values():
        assert heatmap.outlined(3) == [str(tied[0])]
        assert sorted(heatmap.outlined(1)) == [str(trial_id) for trial_id in tied[1:]]


def test_values_that_are_all_equal_have_a_colour_of_their_own(write):
    assert shade(page_of(write(DPO, (0.75,) * 6)), 3, "Reward margin") == 50


def test_a_pair_more_is_no_landslide(write):
    """An accuracy is coloured over a tenth at least, a margin among trials of its beta."""
    page = page_of(write(DPO, (0.9, 0.88, 0.9, 0.5, 0.5, 0.6)))
    assert [shade(page, trial, "Reward accuracy") for trial in (1, 2, 4)] == [100, 95, 0]
    assert [shade(page, trial, "Reward margin") for trial in (1, 2, 4, 6)] == [100, 0, 0, 100]
    assert "low high, each dpo_beta by itself" in page.section("grid").text


def test_two_pairs_more_are_no_landslide_either(write):
    page = page_of(write(DPO, (0.9, 0.88, 0.9, 0.9, 0.9, 0.9)))
    assert [shade(page, trial, "Reward accuracy") for trial in (1, 2)] == [100, 80]


def test_the_table_is_sorted_and_failed_trials_come_last(write):
    states = {2: "ERROR", 5: "UNFINISHED"}
    page = page_of(write(DPO, (*ACCURACIES[:5], {ACCURACY: math.nan, MARGIN: math.inf}), states))
    rows = [(row["rank"], row["trial"], row["state"], row["reward accuracy"]) for row in page.table]
    assert rows == [
        *(("1", "1", "completed", "0.7500"), ("2", "4", "completed", "0.6250"), ("3", "3", "completed", "0.5000")),
        *(("\N{EN DASH}", "2", "failed", "0.8750"), ("\N{EN DASH}", "5", "unfinished", "0.8125")),
        ("\N{EN DASH}", "6", "completed", "\N{EN DASH}"),
    ]
    first = page.table[0]
    assert (first["dpo_beta"], first["learning_rate"], first["steps"], first["loss"]) == (
        "0.1",
        "5e-07",
        "40",
        "0.2500",
    )
    assert first["checkpoint"].startswith(uuid_of(1, 40))
    assert next(page.root.all("header")).text.endswith("4 of 6 trials completed, 1 failed, 1 unfinished.")
    assert next(page.section("winner").all("h2")).text == "Trial 1 is best so far"
    cells = {cell for row in page.maps["Reward accuracy"][0] for cell in row}
    assert {"failed trial 2", "unfinished trial 5", "\N{EN DASH} trial 6"} <= cells


def test_values_that_are_not_finite_leave_a_gap_in_a_curve():
    experiment = Experiment("one", SFT)
    losses = [(1, 1.0), (2, 2.0), (3, math.nan), (4, 3.0), (5, math.inf)]
    events = [{"kind": "training", "steps_completed": step, "metrics": {"loss": loss}} for step, loss in losses]
    hparams = SFT["hyperparameters"]
    experiment.events[1] = events
    experiment.results[1] = summarize(1, "RUNNING", hparams, events, experiment.searcher)
    page = Page(render(experiment))
    (trace,) = page.curves["loss by step, Training"]["data"]
    assert (trace["x"], trace["y"]) == ([1, 2, 3, 4, 5], [1, 2, None, 3, None])
    assert "connectgaps" not in trace
    assert trace["mode"] == "lines+markers"  # a point between two gaps has no line
    assert trace["meta"] == "<b>trial 1</b><br>loss"
    assert not {"nan", "inf"} & set(re.findall(r"\w+", page.section("curves").text))


def test_the_curves(write):
    page = page_of(write(DPO, ACCURACIES))
    curves = page.section("curves")
    assert [h3.text for h3 in curves.all("h3")] == ["Loss", "Reward accuracy", "Reward margin"]
    assert len(page.curves) == 6
    evaluation = page.curves["reward accuracy by step, Evaluation, held out"]
    *others, last = evaluation["data"]
    assert last["name"] == "2"  # the best one, on top
    assert all(last["line"]["width"] > 2 * trace["line"]["width"] for trace in others)
    assert (last["x"], last["y"]) == ([20, 40], [0.65625, 0.875])
    assert last["meta"] == "<b>trial 2</b><br>dpo_beta 0.1<br>learning_rate 1e-07<br>reward accuracy"
    assert last["hovertemplate"] == "%{meta} %{y:.4g}<br>step %{x}<extra></extra>"
    assert evaluation["layout"]["xaxis"]["range"] == [0, 40]
    assert evaluation["layout"]["xaxis"]["title"]["text"] == "step"
    # Two trials share a colour if they share beta, dashes and marker if they share the learning rate.
    looks = {trace["name"]: trace for trace in evaluation["data"]}
    colour = {i: trace["line"]["color"] for i, trace in looks.items()}
    dash = {i: (trace["line"]["dash"], trace["marker"]["symbol"]) for i, trace in looks.items()}
    assert colour["1"] == colour["2"] == colour["3"] != colour["4"] == colour["5"] == colour["6"]
    assert dash["1"] == dash["4"]
    assert len({dash["1"], dash["2"], dash["3"]}) == 3
    # The key of each trial looks like its curve.
    for key in curves.all("span", tabindex="0"):
        i, (svg,) = key.attributes["data-trial"], key.all("svg")
        line, marker = svg.all("path")
        assert svg.attributes["style"] == f"--c: {colour[i]}"
        assert (line.attributes["stroke-dasharray"], marker.attributes["d"]) in {
            (dash, path) for dash, _, path in LINES
        }
        assert line.attributes["stroke-dasharray"] == dash[i][0]
    assert [key.text for key in curves.all("span", tabindex="0")][:2] == ["1 0.1, 5e-07", "2 0.1, 1e-07"]
    assert "Some share a look" not in curves.text
    # Loss and margins of different betas are not to be compared, and it says so; accuracies are.
    said = [SCALED_BY_BETA in chart.text for chart in curves.all("div", class_="chart")]
    assert said == [True, False, True]


def test_a_step_done_twice_counts_once_and_long_curves_are_thinned():
    def told(step, loss):
        return {"kind": "training", "steps_completed": step, "metrics": {"loss": loss}}

    events = [told(1, 9), told(2, 9), told(2, 5), {"kind": "training", "steps_completed": 2, "metrics": {"x": 0}}]
    events.append({"kind": "validation", "steps_completed": 3, "metrics": {"loss": 1}})
    assert series(events, "training", "loss") == [(1, 9), (2, 5)]
    long = series([told(step, 0) for step in range(1000)], "training", "loss")
    assert len(long) <= MAX_POINTS
    assert long[-1] == (999, 0)


@pytest.mark.parametrize(
    ("low", "high", "span"),
    [
        *((0.53, 1.0, None), (-0.01, 2.3, None), (1e-9, 4e-9, None)),  # Plotly's choice
        *((0.9, 0.9, [0.45, 1.35]), (0.9, 0.9 + 1e-9, [0.45, 1.35]), (-2, -2, [-3, -1]), (0, 0, [-0.5, 0.5])),
    ],
)
def test_rounding_is_not_magnified_to_a_curve(low, high, span):
    assert range_around([low, high]) == (span and pytest.approx(span))


def test_sft_goes_on_with_dpo(write):
    page = page_of(write(SFT, [0.25]))
    assert next(page.section("winner").all("h2")).text == "Its best checkpoint"
    assert page.commands[1] == (
        f"python local_experiment.py dpo.yaml . --config hyperparameters.model_ckpt={uuid_of(1, 40)}"
    )
    assert page.section("grid") is None
    assert [h3.text for h3 in page.section("curves").all("h3")] == ["Loss"]
    assert grid(next(page.section("constants").all("table")))[1:] == [
        *(["model_name", "base"], ["training_args.learning_rate", "1e-05"])
    ]


def test_smaller_is_better_and_one_axis_is_one_row(write):
    rates = {"training_args": {"learning_rate": {"type": "log", "base": 10, "minval": -6, "maxval": -4, "count": 3}}}
    config = changed(SFT, rates, searcher={"name": "grid", "metric": "eval_loss"})
    page = page_of(write(config, (0.5, 0.25, 1.0)))
    assert next(page.section("winner").all("h2")).text == "Trial 2 is best"
    assert page.maps["Loss"] == [
        [["learning_rate", "1e-06", "1e-05", "0.0001"], ["loss", "0.500 trial 1", "0.250 trial 2", "1.000 trial 3"]]
    ]
    assert [shade(page, i, "Loss") for i in (1, 2, 3)] == [67, 100, 0]
    assert [row["trial"] for row in page.table] == ["2", "1", "3"]


def test_three_axes_are_a_grid_for_each_value_of_the_third(write):
    config = changed(DPO, {"seed": {"type": "categorical", "vals": [None, [1, 2], "x"]}})
    del config["hyperparameters"]["training_args"]["learning_rate"]
    config["hyperparameters"]["zeta"] = {"type": "int", "minval": 9, "maxval": 10, "count": 2}
    page = page_of(write(config, [0.5 + i / 64 for i in range(11)]))  # the twelfth has not started
    grids = page.maps["Reward accuracy"]
    assert "Some share a look" in page.section("curves").text  # six combinations of the other two axes, five dashes
    captions = [p.text for p in page.section("grid").all("p") if p.text.startswith("zeta")]
    assert captions == ["zeta 9", "zeta 10"] * 2
    assert grids[1] == [
        *(["", "seed"], ["dpo_beta", "None", "[1, 2]", "x"]),
        ["0.01", "0.6094 trial 8", "0.6406 trial 10", "not started"],
        ["0.1", "0.5156 trial 2", "0.5469 trial 4", "0.5781 trial 6"],
    ]


def test_a_search_that_is_no_grid_has_scatters(write):
    """A point for each trial on each axis, hollow where the search stopped it. Of a cluster, whose draws may differ."""
    experiment = read_local(write(DPO, ACCURACIES))
    experiment.config = changed(DPO, {"dpo_beta": {"type": "log", "base": 10, "minval": -3, "maxval": -1}})
    experiment.config["searcher"] |= {"name": "adaptive_asha", "max_trials": 6, "max_time": 2, "time_metric": "epochs"}
    drawn = Experiment(experiment.name, experiment.config)
    drawn.results, drawn.events = experiment.results, experiment.events
    for trial_id, result in drawn.results.items():
        result["hparams"]["dpo_beta"] = trial_id / 100
        result["metrics"]["epochs"] = 1.5 if trial_id in (3, 6) else 2.0
    page = Page(render(drawn))
    assert "4 of 6 trials completed, 2 stopped early." in page.root.text
    assert "dpo_beta (0.01 to 0.06)" in page.root.text
    assert {row["state"] for row in page.table} == {"completed", "stopped early"}
    assert page.section("grid") is None
    captions = [figure.text for figure in page.section("search").all("figcaption")]
    assert captions[:2] == ["dpo_beta", "learning_rate"]
    by_beta, by_rate, *_ = (
        json.loads(plot.attributes["data-figure"]) for plot in page.section("search").all("div", class_="plot")
    )
    assert (by_beta["layout"]["xaxis"]["type"], by_rate["layout"]["xaxis"]["type"]) == ("log", "linear")
    points = {int(point["name"]): point for point in by_beta["data"]}
    assert {i: (point["x"], point["y"]) for i, point in points.items()} == {
        i: ([i / 100], [accuracy]) for i, accuracy in enumerate(ACCURACIES, start=1)
    }
    hollow = {i for i, point in points.items() if point["marker"].get("symbol") == "circle-open"}
    assert hollow == {3, 6}
    assert "<b>trial 3</b>" in points[3]["hovertext"]
    assert points[2]["marker"]["size"] > points[1]["marker"]["size"]  # the best


def test_everything_is_escaped(write):
    evil = '</script><script>alert("x")</script>\'&'
    losses = {"type": "categorical", "vals": [evil, "plain"]}
    config = changed(DPO, {"dpo_beta": losses, "<b>": evil, "<i>": losses}, name="<i>")
    page = page_of(write(config, [0.5 + i / 64 for i in range(12)]))
    assert next(page.root.all("h1")).text == "<i>"
    assert len(list(page.root.all("script"))) == 2  # Plotly's and the page's
    assert not any(page.root.all("b"))
    assert all(i.parent.attributes["class"] == "soft ramp" for i in page.root.all("i"))  # the legends' colours
    for plot in page.root.all("div", class_="plot"):  # Plotly takes text for HTML
        texts = re.findall(r"<(?!/?(?:b|br|span|extra)\b)\w+", plot.attributes["data-figure"])
        assert texts == []
    assert {row["dpo_beta"] for row in page.table} == {evil, "plain"}


def test_nothing_is_fetched(write):
    html = render(read_local(write(DPO, ACCURACIES)))
    assert html.count(get_plotlyjs()) == 1
    html = html.replace(get_plotlyjs(), "")
    assert not URL.search(html)
    assert """default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:">""" in html
    assert len(html) < 200_000
    page = Page(html)
    assert all(head.attributes.get("scope") for head in page.root.all("th"))
    assert all(svg.attributes.get("aria-label") or svg.attributes.get("aria-hidden") for svg in page.root.all("svg"))


def test_without_results_there_is_still_a_page(write):
    page = page_of(write(DPO, ()))
    assert next(page.section("winner").all("h2")).text == "No best trial yet"
    assert "0 of 6 trials completed." in page.root.text
    assert page.section("grid") is page.section("curves") is page.section("trials") is None


def test_commands_of_a_local_trial(write):
    page = page_of(write(DPO, ACCURACIES))
    assert page.commands[1] == (
        f"python inference.py --model sft={DPO['hyperparameters']['model_ckpt']}"  # which does not tell its base
        f" --model dpo={uuid_of(2, 40)} --reference sft --beta 0.1 --dataset pairs"
        " --data-seed 7 --output_file comparison.html"
    )
    assert page.commands[2] == serving_commands(uuid_of(2, 40))


def serving_commands(source):
    served = f"local_runs/{DPO['name']}-served"
    return f"pip install 'transformers[serving]' python export.py {source} {served} transformers serve {served}"


def test_a_model_that_is_gone_is_not_offered(write):
    folder = write(DPO, ACCURACIES)
    shutil.rmtree(local_checkpoint_storage() / uuid_of(2, 40))
    page = page_of(folder)
    assert f"The model is gone: checkpoint {uuid_of(2, 40)}: no such checkpoint in" in page.section("winner").text
    assert page.commands == [uuid_of(2, 40)]


# With pairs.

SHARED = 4 * noise(0)  # what makes a pair hard for every trial
BY_LOSS = {"searcher": {"name": "grid", "metric": "eval_preference_loss"}}
MEANS = (3, 4, 0.5, 2, 3.98, 1)  # of h, for the six trials


def write_pairs(write, config, means, shared=SHARED):
    """An experiment whose trials keep 200 pairs each; their h has these means."""
    trials = [mean + shared + 0.3 * noise(i) for i, mean in enumerate(means, start=1)]
    scores = [{name: float(of(h, 0.1).mean()) for name, of in PAIR_METRICS.items()} for h in trials]
    shutil.rmtree(local_checkpoint_storage(), ignore_errors=True)  # an earlier experiment's have the same UUIDs
    folder = write(config, scores)
    for trial_id, h in enumerate(trials, start=1):
        pairs_of(h, truncations=["train: <b> cut"]).write(
            local_checkpoint_storage() / uuid_of(trial_id, 40) / "checkpoint-40"
        )
    return folder


def test_the_page_says_which_trials_cannot_be_told_apart(write):
    page = page_of(write_pairs(write, DPO | BY_LOSS, MEANS))
    winner = page.section("winner")
    assert (
        next(winner.all("h2")).text
        == "Trial 2 is best; trial 5 cannot be told apart from it; the others are worse (95%)"
    )
    figures = {name.text: value.text for name, value in zip(winner.all("dt"), winner.all("dd"), strict=True)}
    assert re.fullmatch(r"0\.53\d\d 0\.50\d? to 0\.5\d+", figures["preference loss"])
    assert re.fullmatch(r"0\.\d{4} 0\.\d\d to 0\.\d\d", figures["reward accuracy"])
    said = [p.text for p in winner.all("p")]
    assert said[1] == "Below a figure: its 95% interval, over 200 held-out pairs."
    behind = r"0\.0\S+ behind \(\S+ to \S+, over the same 200 held-out pairs\)\."
    assert re.fullmatch(r"Next is trial 5 \(.*\) with 0\.5\d+: " + behind, said[2])
    assert "without pairs" not in page.root.text
    for (heatmap,) in page.heatmaps.values():
        assert (heatmap.outlined(3), heatmap.outlined(1)) == (["2"], ["5"])
    assert "Outlined: the best; thinly, those that cannot be told apart from it." in page.section("grid").text
    stands = {row["trial"]: row["against the best"].split(" 0.")[0].split(" \N{MINUS SIGN}")[0] for row in page.table}
    assert stands == {"2": "best", "5": "cannot be told apart"} | dict.fromkeys("1346", "worse")
    assert [row["rank"] for row in page.table] == ["1", "2", "3", "4", "5", "6"]
    assert all(" to " in row["preference loss"] for row in page.table)
    heatmap = page.heatmaps["Preference loss"][0]
    assert "<br>cannot be told apart, " in heatmap.trace["hovertext"][0][1]
    happened = [li.text for li in page.section("happened").all("li")]
    assert "less likely than the reference" in happened[0]
    assert happened[-1] == "train: <b> cut"


def test_the_preference_loss_is_the_same_scale_for_every_beta(write):
    page = page_of(write_pairs(write, DPO | BY_LOSS, MEANS))
    legends = [p.text for p in page.section("grid").all("p", class_="ramp")]
    assert ["each dpo_beta by itself" in legend for legend in legends] == [False, False, True]
    assert {"Preference loss", "Reward accuracy", "Reward margin"} == page.maps.keys()
    charts = {next(chart.all("h3")).text: chart.text for chart in page.section("curves").all("div", class_="chart")}
    assert SCALED_BY_BETA not in charts["Preference loss"]
    assert SCALED_BY_BETA in charts["Reward margin"]


SEEDS = {"training_args": {"seed": {"type": "categorical", "vals": [1, 2, 3]}}}


def test_seeds_are_averaged(write):
    means = (4, 4.1, 3.9, 2, 2.1, 1.9)  # two betas, three seeds each
    page = page_of(write_pairs(write, changed(DPO, SEEDS, **BY_LOSS), means))
    (rows,) = page.maps["Preference loss"]
    assert [row[0] for row in rows] == ["dpo_beta", "preference loss"]
    assert all(re.fullmatch(r"0\.\d+ ± 0\.00\d+ n 3", cell) for cell in rows[1][1:])
    (heatmap,) = page.heatmaps["Preference loss"]
    assert heatmap.outlined(3) == ["1 2 3"]  # the trials of beta 0.1
    assert "trials 4, 5, 6</b><br>dpo_beta 0.01<br>preference loss 0." in heatmap.trace["hovertext"][0][0]
    assert "A cell is the mean over n seeds ± their standard deviation." in page.section("grid").text
    said = [p.text for p in page.section("winner").all("p")]
    assert any(re.match(r"The best setting is dpo_beta 0\.1: 0\.\d+ ± \S+ \(over 3 seeds", line) for line in said)
    assert "The other setting is worse (95%, other seeds too)." in said


def test_seeds_alone_are_no_grid_and_a_cell_waits_for_its_trials(write):
    config = changed(DPO, SEEDS | {"dpo_beta": 0.1}, name="seeds", **BY_LOSS)
    page = page_of(write_pairs(write, config, (4, 3, 2)))
    assert page.section("grid") is None
    assert any(p.text.startswith("The searcher's metric is 0.") for p in page.section("winner").all("p"))
    page = page_of(
        write_pairs(write, changed(DPO, SEEDS, name="begun", **BY_LOSS), (4, 3, 2, 1))
    )  # the last two have not started
    cells = page.maps["Preference loss"][0][1]
    assert [cell[-3:] for cell in cells[1:]] == ["n 1", "n 3"]
    assert " ± " not in cells[1]


@pytest.fixture
def master(tmp_path, monkeypatch):
    with Master(tmp_path) as master:
        monkeypatch.setenv("DET_MASTER", master.url)
        monkeypatch.setenv("DET_USER", "determined")
        monkeypatch.setenv("DET_PASS", "Strong-enough-1")
        monkeypatch.setenv("HOME", str(tmp_path))
        yield master


def on_cluster(master, folder, states=(), first=1):
    """The trials of a local folder as an experiment of the cluster, with ids from `first` on."""
    local = read_local(folder)
    master.experiments[1] = {"config": local.config, "body": {"config": ""}}
    for number, result in local.results.items():
        events = [event for event in local.events[number] if event["kind"] != "hparams"]
        state = f"STATE_{dict(states).get(number, 'COMPLETED')}"
        master.trials[number + first - 1] = Trial(number + first - 1, 1, result["hparams"], events, state=state)


def test_an_experiment_of_the_cluster_has_the_page_of_a_local_one(master, write):
    scores = (*ACCURACIES[:4], {ACCURACY: math.nan, MARGIN: math.inf, "eval_loss": 1.0})
    folder = write(DPO, scores, {4: "RUNNING"})
    on_cluster(master, folder, {4: "RUNNING"})
    experiment = read_cluster("exp:1")
    assert math.isnan(experiment.results[5]["metrics"][ACCURACY])
    local, cluster = page_of(folder), Page(render(experiment))
    for section in ("grid", "curves", "trials", "constants"):
        assert cluster.section(section).text == local.section(section).text
    assert cluster.commands[0] == local.commands[0] == uuid_of(2, 40)
    assert cluster.commands[1] == (
        f"python inference.py --model sft=ckpt:{DPO['hyperparameters']['model_ckpt']}"
        f" --model dpo=ckpt:{uuid_of(2, 40)} --reference sft --beta 0.1 --dataset pairs"
        " --data-seed 7 --output_file comparison.html"
    )
    assert cluster.commands[2] == serving_commands(f"ckpt:{uuid_of(2, 40)}")
    assert not master.unknown


def det_arguments(command):
    """The command as Determined's own CLI parses it."""
    parser = cli.make_parser()
    add_args(parser, cli.all_args_description)
    return parser.parse_args(shlex.split(command)[1:])


@pytest.fixture
def their_base(monkeypatch):
    """Have the master know what SFT began with: the DPO trials' own `model_name` here."""

    def know(name):
        monkeypatch.setattr("experiment.next_steps.base_of", lambda source, key: name)

    return know


def cluster_command(master, folder, datasets, mounts, image=None, **hyperparameters):
    """The command that compares, of an experiment of the cluster with these data sets and bind mounts."""
    on_cluster(master, folder)
    master.experiments[1]["config"] |= {"bind_mounts": mounts, "environment": {"image": image}}
    for trial in master.trials.values():
        trial.hparams |= {"datasets": datasets} | hyperparameters
    experiment = read_cluster("exp:1")
    return next(step for step in next_steps(experiment, experiment.best()) if step[0].startswith("Compare"))


def test_a_clusters_data_are_compared_here_if_a_bind_mount_leads_to_them(master, write, tmp_path, their_base):
    (tmp_path / "disk" / "tiny" / "base").mkdir(parents=True)
    (tmp_path / "disk" / "tiny" / "it, too.jsonl").touch()
    mounts = [
        {"host_path": "/nowhere", "container_path": "/host_tmp", "read_only": False, "propagation": "rprivate"},
        {"host_path": str(tmp_path / "disk"), "container_path": "/host_tmp/data"},
        {"host_path": str(tmp_path / "disk" / "tiny"), "container_path": "beside"},  # beside the scripts
    ]
    details = {"name": "/host_tmp/data/tiny/it, too.jsonl", "eval_dataset": {"name": "beside/it, too.jsonl"}}
    data = [details, "argilla/dpo-mix-7k", "beside/it, too.jsonl"]
    their_base("/host_tmp/data/tiny/base")
    title, command = cluster_command(master, write(DPO, ACCURACIES), data, mounts)
    assert title == "Compare its answers with those of the models that it came from"
    python, script, *words = shlex.split(command)
    assert (python, script) == ("python", "inference.py")
    options = parse_command_line(words, None)
    here = str(tmp_path / "disk" / "tiny" / "it, too.jsonl")
    assert options.dataset == [{"name": here, "eval_dataset": {"name": here}}, "argilla/dpo-mix-7k", here]
    assert options.model == {
        **{"base": str(tmp_path / "disk" / "tiny" / "base"), "dpo": f"ckpt:{uuid_of(2, 40)}"},
        "sft": f"ckpt:{DPO['hyperparameters']['model_ckpt']}",
    }
    assert (options.reference, options.beta, options.data_seed) == ("sft", 0.1, 7)


TMP = [{"host_path": "/tmp", "container_path": "/host_tmp", "read_only": False, "propagation": "rprivate"}]
DISK = [{"host_path": "/disk", "container_path": "/data", "read_only": True, "propagation": "rprivate"}]


@pytest.mark.parametrize(
    ("datasets", "mounts", "changes"),
    [
        ([{"name": "/host_tmp/no such/pairs", "eval_ratio": 1e-5}, "argilla/dpo-mix-7k"], TMP, {}),
        (["/data/pairs.jsonl"], DISK, {"model_ckpt": None, "model_name": "/data/m"}),
        (["/tmp"], TMP, {"model_ckpt": "exp:12"}),  # the container's own
    ],
)
def test_data_that_only_containers_see_are_compared_on_the_cluster(
    master, write, datasets, mounts, changes, monkeypatch, their_base, tmp_path
):
    """As the trials had them: also a base that is here beside data that are not, one's own image, read-only mounts."""
    (tmp_path / "base").mkdir()
    mounts = [*mounts, {"host_path": str(tmp_path), "container_path": "/here"}]
    their_base(base := changes.get("model_name") or "/here/base")
    image = dict.fromkeys(("cpu", "cuda", "rocm"), "mine:1")
    title, command = cluster_command(master, write(DPO, ACCURACIES), datasets, mounts, image, **changes)
    assert title.endswith("where its data are: the log ends with the command that downloads the page")
    arguments = det_arguments(command)
    assert (arguments.config_file.name, str(arguments.model_def)) == ("inference.yaml", ".")
    monkeypatch.chdir(REPO)
    config = read_experiment_config("inference.yaml", arguments.config)
    own = read_experiment_config("inference.yaml")
    defaults = {"read_only": False, "propagation": "rprivate"}
    kept = [{key: value for key, value in mount.items() if defaults.get(key) != value} for mount in mounts]
    assert config["bind_mounts"] == kept
    assert config["environment"]["image"] == "mine:1"
    options = parse_hyperparameters(config["hyperparameters"])
    hparams = DPO["hyperparameters"] | changes
    sft = {"exp:12": "exp:12", None: None}.get(hparams["model_ckpt"], f"ckpt:{hparams['model_ckpt']}")
    models = {"base": base, "sft": sft, "dpo": f"ckpt:{uuid_of(2, 40)}"}
    assert options.model == {name: source for name, source in models.items() if source}
    assert options.dataset == datasets
    assert (options.reference, options.beta, options.data_seed) == ("sft" if sft else None, 0.1, 7)
    assert options.output_file == own["hyperparameters"]["output_file"]


@pytest.mark.parametrize(
    ("name", "registered"),
    [("grid", "grid"), ("org/my  grid: 2", "org-my-grid-2"), ("2026", "experiment-1"), ("//", "experiment-1")],
)
def test_the_winner_is_registered_by_the_lines_at_the_end(master, write, capfd, name, registered):
    on_cluster(master, write(DPO, ACCURACIES))
    master.experiments[1]["config"]["name"] = name
    page = Page(render(experiment := read_cluster("exp:1")))
    assert (
        page.commands[-1] == f"det model create {registered} det model register-version {registered} {uuid_of(2, 40)}"
    )
    assert f"inference.py --model dpo=model:{registered} then takes" in page.section("winner").text
    *_, (_, lines) = next_steps(experiment, experiment.best())
    for line in lines.splitlines():
        cli.main(["-m", master.url, *shlex.split(line)[1:]])  # DET_MASTER was read at the import
    assert master.models == {registered: [uuid_of(2, 40)]}
    assert uuid_of(2, 40) in capfd.readouterr().out
    assert not master.unknown


def test_only_a_clusters_model_is_registered(write):
    assert not any("det " in command for command in page_of(write(DPO, ACCURACIES)).commands)


def test_a_paused_grid_is_not_queued(master, write):
    on_cluster(master, write(DPO, ACCURACIES[:4]), {3: "QUEUED", 4: "QUEUED"})
    master.experiments[1]["state"] = "STATE_PAUSED"
    page = Page(render(read_cluster("exp:1")))
    assert "2 of 6 trials completed, 2 paused. To go on: det e activate 1" in page.root.text
    assert "queued" not in page.section("trials").text
    det_arguments("det e activate 1")
    master.experiments[1]["state"] = "STATE_QUEUED"
    assert "2 of 6 trials completed, 2 queued." in Page(render(read_cluster("exp:1"))).root.text


def keep_on_cluster(master, storage):
    """Say that the trials' checkpoints, in this storage, hold what they keep of their evaluations."""
    master.experiments[1]["config"]["checkpoint_storage"] = {"type": "shared_fs", "host_path": str(storage)}
    for trial in master.trials.values():
        for saved in trial.of_kind("checkpoint"):
            name = f"checkpoint-{saved['steps_completed']}"
            saved["resources"] = {f"{name}/model.safetensors": "1", f"{name}/evaluations.json": "1"}


def test_pairs_come_from_a_clusters_checkpoints(master, write, monkeypatch, tmp_path):
    folder = write_pairs(write, DPO | BY_LOSS, MEANS)
    on_cluster(master, folder)
    keep_on_cluster(master, local_checkpoint_storage())
    local = page_of(folder)
    copied = []
    monkeypatch.setattr("shutil.copy2", lambda source, to: copied.append(source.name) or shutil.copyfile(source, to))
    cluster = Page(render(read_cluster("exp:1")))
    assert set(copied) == {"evaluations.json"}  # nothing larger
    for section in ("happened", "grid", "trials"):
        assert cluster.section(section).text == local.section(section).text
    assert next(cluster.section("winner").all("h2")).text.startswith("Trial 2 is best; trial 5 cannot be told apart")
    assert not master.unknown


def test_a_trial_that_was_preempted_in_its_best_evaluation_keeps_its_pairs_in_the_latest_checkpoint(master, write):
    folder = write_pairs(write, DPO | BY_LOSS, MEANS)
    for trial_id, result in read_local(folder).results.items():
        best, latest = (local_checkpoint_storage() / uuid_of(trial_id, n) / f"checkpoint-{n}" for n in (40, 60))
        latest.mkdir(parents=True)
        (best / "evaluations.json").rename(latest / "evaluations.json")
        pairs_of(SHARED, step=20).write(best)
        events = folder / "trials" / str(trial_id) / "events.jsonl"
        worse = {name: 1.5 * value for name, value in result["metrics"].items()}
        append_event(events, kind="validation", steps_completed=60, metrics=worse)
        append_event(events, kind="checkpoint", steps_completed=60, uuid=uuid_of(trial_id, 60))
    on_cluster(master, folder)
    keep_on_cluster(master, local_checkpoint_storage())
    for experiment in (read_local(folder), read_cluster("exp:1")):
        winner = Page(render(experiment)).section("winner")
        assert next(winner.all("h2")).text.startswith("Trial 2 is best; trial 5 cannot be told apart")
        assert next(winner.all("pre")).text == uuid_of(2, 40)
    shutil.rmtree(local_checkpoint_storage() / uuid_of(2, 60))
    assert read_local(folder).evaluations[2].steps.keys() == {20}  # the best one has what there was when it was saved
    assert not master.unknown


def test_a_storage_out_of_reach_costs_the_pairs_but_not_the_report(master, write, tmp_path):
    on_cluster(master, write_pairs(write, DPO | BY_LOSS, MEANS))
    keep_on_cluster(master, tmp_path / "elsewhere")
    experiment = read_cluster("exp:1")
    assert experiment.evaluations == {}
    winner = Page(render(experiment)).section("winner")
    assert next(winner.all("h2")).text == "Trial 2 is best"
    reason = (
        "Trials are compared without pairs: the checkpoint storage cannot be reached from here (Did not find checkpoint"
    )
    assert any(p.text.startswith(reason) for p in winner.all("p"))
    assert not master.unknown


def test_what_the_cluster_has_cleaned_up_is_not_offered(master, write):
    on_cluster(master, write(DPO, ACCURACIES), first=37)
    master.trials[38].deleted = {uuid_of(2, 40)}
    page = Page(render(read_cluster("exp:1")))
    assert next(page.section("winner").all("h2")).text == "Trial 41 is best"
    assert page.maps["Reward accuracy"][0][3] == ["0.1", "0.5000 trial 39", "0.6562 trial 38", "0.7500 trial 37"]
    assert uuid_of(2, 40) not in page.html
    assert uuid_of(2, 20) in page.html


def test_command_line(call, write, master, tmp_path):
    folder = write(DPO, ACCURACIES)
    status, out, err = call(report.main, folder)
    assert (status, out) == (0, f"Report: {folder / 'report.html'}\n"), err
    expected = render(read_local(folder))
    assert (folder / "report.html").read_text() == expected
    on_cluster(master, folder)
    status, out, err = call(report.main, "exp:1", "--output", tmp_path / "exp.html")
    assert (status, out.splitlines()[-1]) == (0, f"Report: {tmp_path / 'exp.html'}"), err
    assert "Trial 2 is best" in (tmp_path / "exp.html").read_text()
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}"], "{folder} holds no experiment: experiment.json is missing"),
        (["nonsense"], "'nonsense' is neither a folder nor exp:NUMBER"),
        (["exp:best"], "'exp:best': exp: must be followed by the number of the experiment"),
        (["exp:9"], "exp:9: {url} has no such experiment"),
        (["{written}", "--output", "{folder}/no/report.html"], "--output {folder}/no/report.html: No such file"),
    ],
)
def test_mistakes_get_one_line(call, master, write, tmp_path, arguments, message):
    names = {"folder": tmp_path, "url": master.url, "written": write(SFT, [0.5])}
    status, _, err = call(report.main, *(argument.format(**names) for argument in arguments))
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith(f"error: {message.format(**names)}")


NO_TEXT = b'{"searcher": {"metric": ["a"]}, "hyperparameters": {}}'


def test_a_broken_folder_and_a_missing_master_get_one_line_too(call, write, master):
    folder = write(SFT, [0.5])
    for damaged in (
        b"",
        b"\0" * 100,
        b'{"searcher": {"metr',
        b"\xff\xfe",
        b"[]",
        b'{"searcher": {}}',
        b"[" * 100_000,
        NO_TEXT,
    ):
        (folder / "experiment.json").write_bytes(damaged)
        status, _, err = call(report.main, folder)
        assert (status, err.count("\n")) == (2, 1)
        assert err.startswith(f"error: {folder}/experiment.json: ")
    master.server.shutdown()
    master.server.server_close()
    status, _, err = call(report.main, "exp:1")
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith(f"error: exp:1: no Determined master at {master.url} ")


def test_damaged_results_are_left_out_with_a_line(call, write):
    """A trial without a line is drawn from its events, without those that are damaged."""
    folder = write(SFT, [0.5])
    whole = (folder / "trials.jsonl").read_bytes()
    events = folder / "trials" / "1" / "events.jsonl"
    outside = b'{"kind": "checkpoint", "uuid": "..", "steps_completed": 9}\n'
    events.write_bytes(b"\0" * 40 + b"\n" + events.read_bytes() + outside)
    for damaged in (
        whole[:-20],
        b"\0" * len(whole),
        b"\xff" + whole,
        b"{}\n",
        b"7\n",
        whole.replace(b": 1,", b": 7,", 1),
    ):
        (folder / "trials.jsonl").write_bytes(damaged)
        status, out, err = call(report.main, folder)
        assert (status, err) == (0, "")
        assert f"{folder}: 1 line of trials.jsonl damaged: left out\n" in out
        page = Page((folder / "report.html").read_text())
        assert "0 of 1 trial completed, 1 unfinished" in page.root.text
        assert uuid_of(1, 40) in page.html


def test_why_a_trial_failed(write):
    folder = write(SFT, [0.5], states={1: "ERROR"}.items())
    result = json.loads((folder / "trials.jsonl").read_text())
    (folder / "trials.jsonl").write_text(json.dumps(result | {"error": "error: no row is left <b>"}) + "\n")
    assert "Trial 1 failed: error: no row is left <b>" in Page(render(read_local(folder))).root.text


def test_help_teaches(call):
    status, out, _ = call(report.main, "--help")
    assert status == 0
    assert "default:" in out
    for command in re.findall(r"python (\S+\.py)", out):
        assert (REPO / command).exists()


# In a browser.


@pytest.fixture
def visit(browser, write, tmp_path):
    """Open a report in a browser. Errors in the page, and requests to a network, fail the test."""
    contexts, wrong = [], []

    def open_report(*experiment, **settings):
        (tmp_path / "report.html").write_text(render(read_local(write(*experiment))))
        contexts.append(browser.new_context(**settings))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text))
        page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else wrong.append(r.url))
        page.goto((tmp_path / "report.html").as_uri())
        return page

    yield open_report
    for context in contexts:
        context.close()
    assert wrong == []


def lightness(page, selector, of):
    """How light a colour of an element is, from 0 to 765."""
    colour = page.locator(selector).first.evaluate(f"element => getComputedStyle(element).{of}")
    return sum(map(float, re.findall(r"[\d.]+", colour)[:3]))


TICK, TRACE = "#curves .xtick text", "#curves .plot >> nth=3 >> .trace"


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_charts_fit_and_can_be_read(visit, width, scheme):
    page = visit(DPO, ACCURACIES[:5], viewport={"width": width, "height": 800}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    plots = page.locator(".plot")
    expect(plots).to_have_count(8)
    expect(plots.locator(".main-svg:visible .scatterlayer .trace")).to_have_count(6 * 5)
    expect(plots.locator(".heatmaplayer image")).to_have_count(2)
    for plot in plots.all():
        box, svg = plot.bounding_box(), plot.locator(".main-svg").first.bounding_box()
        assert (svg["width"], svg["height"]) == pytest.approx((box["width"], box["height"]), abs=1)
        assert svg["x"] + svg["width"] <= width
    cells = page.locator("#grid .plot >> nth=0 >> .shape-label-text").all_text_contents()
    assert ["".join(cell.split()) for cell in cells] == [
        *("notstarted", "0.8125trial5", "0.6250trial4", "0.5000trial3", "0.8750trial2", "0.7500trial1")
    ]
    assert page.locator("#curves .plot >> nth=3 >> .xtick text").all_text_contents() == ["0", "10", "20", "30", "40"]
    for selector in (TICK, "#grid .shape-label-text"):
        paper, ink = lightness(page, "body", "backgroundColor"), lightness(page, selector, "fill")
        assert (paper > ink) == (scheme == "light")
        assert abs(paper - ink) > 300


def test_charts_follow_the_color_scheme_and_are_light_in_print(visit):
    page = visit(DPO, ACCURACIES, color_scheme="dark")
    assert lightness(page, TICK, "fill") > 400
    light, dark = "rgb(90, 96, 104)", "rgb(163, 169, 177)"
    for scheme, media, colour in (("light", "screen", light), ("dark", "screen", dark), ("dark", "print", light)):
        page.emulate_media(color_scheme=scheme, media=media)
        expect(page.locator(TICK).first).to_have_css("fill", colour)


def test_pointing_at_a_trial_shows_its_values_and_highlights_it_everywhere(visit):
    page = visit(DPO, ACCURACIES, viewport={"width": 1280, "height": 900})
    cell = page.locator("#grid .plot").first
    box = cell.bounding_box()
    cell.hover(position={"x": box["width"] - 50, "y": 100})  # trial 4, at the top right
    expect(page.locator(".hoverlayer")).to_contain_text(
        ["trial 4dpo_beta 0.01learning_rate 5e-07reward accuracy 0.6250"]
    )
    marked = page.locator("[data-trial='4']")
    expect(marked).to_have_count(1 + 2 + 6 + 1)  # key, cells, curves, row
    expect(page.locator(".on")).to_have_count(10)
    expect(page.locator(TRACE).first).to_have_css("opacity", "0.15")
    expect(page.locator("#curves .plot >> nth=3 >> .trace.on")).to_have_css("opacity", "1")
    page.locator("h1").hover()
    expect(page.locator(".on")).to_have_count(0)
    page.locator("#trials tr[data-trial='2']").click()
    expect(page.locator("[data-trial='2'].on")).to_have_count(10)

    curve = page.locator("#curves .plot").nth(3)
    curve.scroll_into_view_if_needed()
    curve.hover(position={"x": curve.bounding_box()["width"] - 17, "y": 12})  # the best trial's last point
    label = curve.locator(".hoverlayer")
    expect(label).to_have_text("trial 2dpo_beta 0.1learning_rate 1e-07reward accuracy 0.8750step 40")
    expect(page.locator("[data-trial='2'].on")).to_have_count(10)


def test_hyperparameters_are_text_in_charts_too(visit):
    evil = "<b>x</b><a href='javascript:1'>&lt;"
    page = visit(changed(DPO, {"dpo_beta": {"type": "categorical", "vals": [evil, "plain"]}}), ACCURACIES)
    assert evil in page.locator("#grid .plot >> nth=0 >> .ytick").all_text_contents()
    assert page.locator("a").count() == 0
