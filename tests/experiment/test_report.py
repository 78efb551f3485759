"""The report: what stands where on the page, read back as a browser would, of trials in the real formats."""

import json
import math
import re
import shutil
import uuid
from html.parser import HTMLParser

import pytest
from cluster import Master, Trial
from conftest import REPO
from determined.cli import cli
from determined.cli._declarative_argparse import add_args

from config.experiment import expand_trials
from experiment import report_page as report
from experiment.results import Searcher, summarize
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
            path, reports = folder / "trials" / str(trial_id) / "events.jsonl", []
            final = score if isinstance(score, dict) else metrics_of(score, sft)
            reports.append({"kind": "hparams", "hparams": hparams})
            for step in (10, 20, 30, 40):
                training = {name.removeprefix("eval_"): value / step for name, value in final.items()}
                reports.append({"kind": "training", "steps_completed": step, "metrics": training})
                if step % 20 == 0:
                    worse = 1.25 if Searcher(config).smaller_is_better else 0.75
                    metrics = final if step == 40 else {name: worse * value for name, value in final.items()}
                    reports.append({"kind": "validation", "steps_completed": step, "metrics": metrics})
                    reports.append({"kind": "checkpoint", "steps_completed": step, "uuid": uuid_of(trial_id, step)})
                    model = local_checkpoint_storage() / uuid_of(trial_id, step) / f"checkpoint-{step}"
                    model.mkdir(parents=True)
                    (model / "model.safetensors").touch()
            for line in reports:
                append_event(path, **line)
            state = dict(states).get(trial_id, "COMPLETED")
            if state != "UNFINISHED":
                lines.append(json.dumps(summarize(trial_id, state, hparams, reports, Searcher(config))) + "\n")
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
    def maps(self):
        """By title, each heatmap's tables as rows of cells, the heads of rows and columns among them."""
        divs = [div for div in self.section("grid").all("div") if any(child.tag == "h3" for child in elements(div))]
        return {next(div.all("h3")).text: [grid(table) for table in div.all("table")] for div in divs}

    @property
    def table(self):
        """The rows of the table of trials, by column."""
        heads, *rows = grid(next(self.section("trials").all("table")))
        return [dict(zip(heads, row, strict=True)) for row in rows]

    @property
    def commands(self):
        return [pre.text for pre in self.section("winner").all("pre")]


def elements(element):
    return [child for child in element.children if isinstance(child, Element)]


def grid(table):
    return [[cell.text for cell in elements(row)] for row in table.all("tr")]


def page_of(folder):
    return Page(report.render(report.read_local(folder)))


def shade(page, trial_id, title):
    """How strong a trial's cell is in a heatmap, in percent."""
    (div,) = [d for d in page.section("grid").all("div") if elements(d)[:1] and elements(d)[0].text == title]
    (cell,) = div.all("td", data_trial=str(trial_id))
    return int(re.fullmatch(r"--t: (\d+)%", cell.attributes["style"])[1])


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
    outlined = [cell.attributes["data-trial"] for cell in page.section("grid").all("td", class_="best")]
    assert outlined == ["2", "2"]


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
    marked = [cell.attributes["data-trial"] for cell in page.section("grid").all("td", class_="tied")]
    assert sorted(set(marked)) == [str(trial_id) for trial_id in tied[1:]]


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


def test_what_is_not_finite_leaves_a_gap_in_a_curve():
    experiment = report.Experiment("one", SFT)
    losses = [(1, 1.0), (2, 2.0), (3, math.nan), (4, 3.0), (5, math.inf)]
    reports = [{"kind": "training", "steps_completed": step, "metrics": {"loss": loss}} for step, loss in losses]
    hparams = SFT["hyperparameters"]
    experiment.reports[1] = reports
    experiment.results[1] = summarize(1, "RUNNING", hparams, reports, experiment.searcher)
    page = Page(report.render(experiment))
    (path,) = page.section("curves").all("path", class_="line")
    assert re.sub(r"[\d.,]+", "", path.attributes["d"]) == "MhLhMh"
    points = [point.text for point in page.section("curves").all("title")]
    assert points == ["trial 1, step 1: 1", "trial 1, step 2: 2", "trial 1, step 4: 3"]
    assert not {"nan", "inf"} & set(re.findall(r"\w+", page.section("curves").text))


def test_the_curves(write):
    page = page_of(write(DPO, ACCURACIES))
    curves = page.section("curves")
    assert [h3.text for h3 in curves.all("h3")] == ["Loss", "Reward accuracy", "Reward margin"]
    assert len(list(curves.all("svg", role="img"))) == 6
    evaluation = list(curves.all("svg", role="img"))[3]
    *_, last = evaluation.all("g", class_="curve")
    assert (last.attributes["data-trial"], "best" in last.attributes["class"]) == ("2", True)  # on top
    assert [title.text for title in last.all("title")] == ["trial 2, step 20: 0.6562", "trial 2, step 40: 0.875"]
    ticks = [text.text for text in evaluation.all("text")]
    assert ticks == ["0.2", "0.4", "0.6", "0.8", "1", "0", "10", "20", "30", "40", "step"]
    # Two trials share a colour if they share beta, dashes and marker if they share the learning rate.
    looks = {g.attributes["data-trial"]: g for g in evaluation.all("g", class_="curve")}
    colour = {i: g.attributes["style"] for i, g in looks.items()}
    dash = {i: next(g.all("path", class_="line")).attributes["stroke-dasharray"] for i, g in looks.items()}
    assert colour["1"] == colour["2"] == colour["3"] != colour["4"] == colour["5"] == colour["6"]
    assert dash["1"] == dash["4"]
    assert len({dash["1"], dash["2"], dash["3"]}) == 3
    assert "Some share a look" not in curves.text
    # Loss and margins of different betas are not to be compared, and it says so; accuracies are.
    said = [report.SCALED_BY_BETA in chart.text for chart in curves.all("div", class_="chart")]
    assert said == [True, False, True]


def test_a_step_done_twice_counts_once_and_long_curves_are_thinned():
    def told(step, loss):
        return {"kind": "training", "steps_completed": step, "metrics": {"loss": loss}}

    reports = [told(1, 9), told(2, 9), told(2, 5), {"kind": "training", "steps_completed": 2, "metrics": {"x": 0}}]
    reports.append({"kind": "validation", "steps_completed": 3, "metrics": {"loss": 1}})
    assert report.series(reports, "training", "loss") == [(1, 9), (2, 5)]
    long = report.series([told(step, 0) for step in range(1000)], "training", "loss")
    assert len(long) <= report.MAX_POINTS
    assert long[-1] == (999, 0)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.53, 1.0, [0.4, 0.6, 0.8, 1.0]),
        (-0.01, 2.3, [-1, 0, 1, 2, 3]),
        (0, 48, [0, 20, 40, 60]),
        (0.9, 0.9, [0.5, 1.0]),
        (0, 0, [0, 0.5]),
        (1e-9, 4e-9, [1e-9, 2e-9, 3e-9, 4e-9]),
    ],
)
def test_ticks_are_round_and_span_the_values(low, high, ticks):
    assert report.nice_ticks(low, high) == pytest.approx(ticks)


def test_sft_goes_on_with_dpo(write):
    page = page_of(write(SFT, [0.25]))
    assert next(page.section("winner").all("h2")).text == "Its best checkpoint"
    assert page.commands[1] == (
        f"python local_experiment.py dpo.yaml . --config hyperparameters.model_ckpt={uuid_of(1, 40)}"
        " --config hyperparameters.model_name=base"
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
    captions = [caption.text for caption in page.section("grid").all("caption")]
    assert captions == ["zeta 9", "zeta 10"] * 2
    assert grids[1] == [
        *(["", "seed"], ["dpo_beta", "None", "[1, 2]", "x"]),
        ["0.01", "0.6094 trial 8", "0.6406 trial 10", "not started"],
        ["0.1", "0.5156 trial 2", "0.5469 trial 4", "0.5781 trial 6"],
    ]


def test_a_random_search_has_a_table_and_no_grid(write):
    """Only a cluster runs one, and only it knows what the trials will be."""
    experiment = report.read_local(write(DPO, ACCURACIES))
    experiment.config = changed(DPO, {"dpo_beta": {"type": "log", "base": 10, "minval": -3, "maxval": -1}})
    experiment.config["searcher"] |= {"name": "random", "max_trials": 6}
    drawn = report.Experiment(experiment.name, experiment.config)
    drawn.results, drawn.reports = experiment.results, experiment.reports
    for trial_id, result in drawn.results.items():
        result["hparams"]["dpo_beta"] = trial_id / 100
    page = report.render(drawn)
    assert "6 of 6 trials completed" in page
    assert 'id="trials"' in page
    assert 'id="grid"' not in page


def test_everything_is_escaped(write):
    evil = '</script><script>alert("x")</script>\'&'
    losses = {"type": "categorical", "vals": [evil, "plain"]}
    config = changed(DPO, {"dpo_beta": losses, "<b>": evil, "<i>": losses}, name="<i>")
    page = page_of(write(config, [0.5 + i / 64 for i in range(12)]))
    assert next(page.root.all("h1")).text == "<i>"
    assert len(list(page.root.all("script"))) == 1
    assert not any(page.root.all("b"))
    assert all("style" in i.attributes for i in page.root.all("i"))  # the legend's
    assert {row["dpo_beta"] for row in page.table} == {evil, "plain"}


def test_nothing_is_fetched_and_nothing_is_clipped_by_ids(write):
    html = report.render(report.read_local(write(DPO, ACCURACIES)))
    assert not URL.search(html)
    assert "default-src 'none'" in html
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
        f"python inference.py --model base=base --model sft={DPO['hyperparameters']['model_ckpt']}"
        f" --model dpo={uuid_of(2, 40)} --reference sft --beta 0.1 --dataset pairs"
        " --data-seed 7 --output_file comparison.html"
    )
    folder = local_checkpoint_storage() / uuid_of(2, 40) / "checkpoint-40"
    assert page.commands[2] == f"pip install 'transformers[serving]' transformers serve {folder}"


def test_a_model_that_is_gone_is_not_offered(write):
    folder = write(DPO, ACCURACIES)
    shutil.rmtree(local_checkpoint_storage() / uuid_of(2, 40))
    page = page_of(folder)
    assert f"The model is gone: checkpoint {uuid_of(2, 40)}: no such checkpoint in" in page.section("winner").text
    assert page.commands == [uuid_of(2, 40)]


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
    local = report.read_local(folder)
    master.experiments[1] = {"config": local.config, "body": {"config": ""}}
    for number, result in local.results.items():
        told = [r for r in local.reports[number] if r["kind"] != "hparams"]
        state = f"STATE_{dict(states).get(number, 'COMPLETED')}"
        master.trials[number + first - 1] = Trial(number + first - 1, 1, result["hparams"], told, state=state)


def test_an_experiment_of_the_cluster_has_the_page_of_a_local_one(master, write):
    scores = (*ACCURACIES[:4], {ACCURACY: math.nan, MARGIN: math.inf, "eval_loss": 1.0})
    folder = write(DPO, scores, {4: "RUNNING"})
    on_cluster(master, folder, {4: "RUNNING"})
    experiment = report.read_cluster("exp:1")
    assert math.isnan(experiment.results[5]["metrics"][ACCURACY])
    local, cluster = page_of(folder), Page(report.render(experiment))
    for section in ("grid", "curves", "trials", "constants"):
        assert cluster.section(section).text == local.section(section).text
    assert cluster.commands[0] == local.commands[0] == uuid_of(2, 40)
    assert cluster.commands[1] == (
        f"python inference.py --model base=base --model sft=ckpt:{DPO['hyperparameters']['model_ckpt']}"
        f" --model dpo=ckpt:{uuid_of(2, 40)} --reference sft --beta 0.1 --dataset pairs"
        " --data-seed 7 --output_file comparison.html"
    )
    assert cluster.commands[2] == (
        f"pip install 'transformers[serving]' det checkpoint download {uuid_of(2, 40)} --output-dir assistant"
        " transformers serve assistant/checkpoint-40"
    )
    parser = cli.make_parser()
    add_args(parser, cli.all_args_description)
    parser.parse_args(["checkpoint", "download", uuid_of(2, 40), "--output-dir", "assistant"])
    assert not master.unknown


def test_what_the_cluster_has_cleaned_up_is_not_offered(master, write):
    on_cluster(master, write(DPO, ACCURACIES), first=37)
    master.trials[38].deleted = {uuid_of(2, 40)}
    page = Page(report.render(report.read_cluster("exp:1")))
    assert next(page.section("winner").all("h2")).text == "Trial 41 is best"
    assert page.maps["Reward accuracy"][0][3] == ["0.1", "0.5000 trial 39", "0.6562 trial 38", "0.7500 trial 37"]
    assert uuid_of(2, 40) not in page.html
    assert uuid_of(2, 20) in page.html


def test_command_line(call, write, master, tmp_path):
    folder = write(DPO, ACCURACIES)
    status, out, err = call(report.main, folder)
    assert (status, out) == (0, f"Report: {folder / 'report.html'}\n"), err
    expected = report.render(report.read_local(folder))
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
        (["exp:best"], "'exp:best': after exp: comes the number of the experiment"),
        (["exp:9"], "exp:9: {url} has no such experiment"),
        (["{written}", "--output", "{folder}/no/report.html"], "--output {folder}/no/report.html: No such file"),
    ],
)
def test_mistakes_get_one_line(call, master, write, tmp_path, arguments, message):
    names = {"folder": tmp_path, "url": master.url, "written": write(SFT, [0.5])}
    status, _, err = call(report.main, *(argument.format(**names) for argument in arguments))
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith(f"error: {message.format(**names)}")


def test_a_broken_folder_and_a_missing_master_get_one_line_too(call, write, master):
    folder = write(SFT, [0.5])
    (folder / "trials.jsonl").write_text("{}\n")
    status, _, err = call(report.main, folder)
    assert (status, err) == (2, f"error: {folder} cannot be read: KeyError: 'trial_id'\n")
    master.server.shutdown()
    master.server.server_close()
    status, _, err = call(report.main, "exp:1")
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith(f"error: exp:1: no Determined master at {master.url} ")


def test_help_teaches(call):
    status, out, _ = call(report.main, "--help")
    assert status == 0
    assert "default:" in out
    for command in re.findall(r"python (\S+\.py)", out):
        assert (REPO / command).exists()
