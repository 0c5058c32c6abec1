"""The report of a run: it holds what it should, needs nothing from outside, and shows hostile texts as text."""

import json
import re
import shlex
from html.parser import HTMLParser

import pytest
from written_runs import answered, completion, healthy_rows, with_values, write_run

from tunix_torch.cli.command import main
from tunix_torch.config.flags import parse_job
from tunix_torch.config.recipes import TINY
from tunix_torch.config.saved import settings_of
from tunix_torch.report import metrics, page, pictures
from tunix_torch.report.metrics import load_metrics, series
from tunix_torch.report.panels import Curve, Panel, overlaid, panels_of
from tunix_torch.report.record import read_run
from tunix_torch.report.settings import command_of, not_at_default
from tunix_torch.report.verdict import rivals, verdict_of

# Texts that would do something if they were not shown as texts.
HOSTILE = (
    "<script>document.title='broken'</script>",
    "x" * 100_000,
    "</script><script>document.title='broken'</script>",
    "</pre></article><img src='https://example.com/x.png' onerror=\"document.title='broken'\">",
    "\x1b[31m red \x07\x00",
    "\u202egnp.exe",
    "{{ 7 * 7 }} {% raw %}",
    "</style><link rel=stylesheet href=//example.com/a.css>",
    "مرحبا",
    "",
)


class Tags(HTMLParser):
    """The elements of a page, and whether each is closed in its order."""

    EMPTY = {"meta", "link", "br", "img", "path", "use"}

    def __init__(self, text):
        super().__init__()
        self.open, self.all, self.text = [], [], ""
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.all.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.EMPTY:
            assert self.open.pop() == tag, tag
            self.text += " " if tag in ("td", "th", "p", "li", "dt", "dd") else ""

    def handle_startendtag(self, tag, attrs):
        self.all.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += "" if self.open and self.open[-1] == "style" else data


@pytest.fixture(scope="module")
def settings():
    return json.loads(json.dumps(settings_of(*parse_job(["--use_grpo", "--max_steps", "60"])), default=str))


@pytest.fixture(scope="module")
def run(tmp_path_factory, settings):
    """A run with everything in its folder, hostile texts among its completions, questions and answers."""
    kept = [completion(step, i, text, float(i % 2), prompt=text) for step in (1, 60) for i, text in enumerate(HOSTILE)]
    answers = [answered(0, i, text, False, text, text) for i, text in enumerate(HOSTILE)]
    answers += [answered(60, i, text + "!", i % 2 == 0, text, text) for i, text in enumerate(HOSTILE)]
    start = {"time": "2026-11-30T08:00:00+0000", "step": 0, "device": "CPU", "training_rows": 4096}
    starts = [start | {"evaluation_rows": 256, "versions": {"torch": "2.9.1", "<b>": "</b>"}}]
    folder = write_run(tmp_path_factory.mktemp("run") / "<b>run", healthy_rows(), settings, kept, answers, starts)
    rows = [{"quantity": "loss", "verdict": "pass", "tolerance": 1e-5, "difference": 2e-7}]
    (folder / "crosscheck.json").write_text(json.dumps({"rows": rows}))
    return folder


@pytest.fixture(scope="module")
def report(run):
    return page.write_report(run).read_text()


def test_it_names_everything_that_a_reader_looks_for(report):
    text = " ".join(Tags(report).text.split())
    for words in (
        "Right answers rose from 50.0% to 80.0%.",
        "43.9% to 56.1%",  # the interval
        "tiny, the embedded Gemma, LoRA of rank 16",
        "generated arithmetic: 4,096 to learn from, 256 held out",
        "correctness_reward + format_reward",
        "60, each of 32 prompts × 4 completions",
        "Nothing was found",
        "Groups without a signal",
        "Tokens a second",
        "Time of a step",
        "How the rewards move",
        "1 comparisons with Google's Tunix on the batches of this run, all within their tolerance",
        "max_steps 60 280",
        "python train.py --max_steps 60 --use_grpo",
        "torch 2.9.1",
        "Of 10 held-out questions that were kept, 5 were learned and 0 lost",
    ):
        assert words in text, words


def test_it_is_one_file_that_asks_for_nothing(report):
    tags = Tags(report).all
    assert not [tag for tag, _ in tags if tag in ("script", "img", "iframe", "object", "form")]
    for tag, attributes in tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "xlink:href", "action"):
            value = attributes.get(name, "#")
            assert value.startswith("#") or value == "data:,", (tag, value)
    style = re.search("<style>(.*?)</style>", report, re.DOTALL)[1]
    assert "url(" not in style and "@import" not in style and "http" not in style
    policy = next(a["content"] for tag, a in tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "script" not in policy


def test_hostile_texts_are_shown_as_texts_and_cut(report):
    shown = Tags(report).text
    assert HOSTILE[0] in shown and HOSTILE[3] in shown and HOSTILE[6] in shown
    assert "\\x1b[31m red \\x07\\x00" in shown and "\\u202egnp.exe" in shown and "مرحبا" in shown
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", report)
    assert "and 98,500 more characters" in shown and len(report) < 600_000


def test_everything_has_a_name_and_an_order_for_a_screen_reader(report):
    tags = Tags(report).all
    ids = [a["id"] for _, a in tags if "id" in a]
    assert len(ids) == len(set(ids)), "an id is there twice"
    for tag, attributes in tags:
        for name in ("aria-labelledby", "href"):
            for wanted in attributes.get(name, "").split() if name != "href" or tag == "a" else []:
                assert wanted.lstrip("#") in ids, wanted
    pictures_in_it = [a for tag, a in tags if tag == "svg"]
    assert len(pictures_in_it) >= 12 and all(a["role"] == "img" and a["aria-labelledby"] for a in pictures_in_it)
    levels = [int(tag[1]) for tag, _ in tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in zip(levels, levels[1:], strict=False)), "a level of headings is left out"
    regions = [a for _, a in tags if a.get("class", "").startswith("scroll")]
    assert regions and all(a["tabindex"] == "0" and a["aria-label"] for a in regions)
    assert dict(tags)["html"] == {"lang": "en"}


def test_colors_are_those_of_the_page_and_text_stays_text(report):
    for svg in re.findall("<svg.*?</svg>", report, re.DOTALL):
        assert "<text" in svg and "var(--sans)" in svg and re.search(r"var\(--[sq]1\)", svg)
        assert "DejaVu" not in svg and not re.search("(fill|stroke): *#", svg), "a font or a color that is its own"


def test_the_numbers_of_a_picture_are_those_of_the_metrics(run):
    rows = load_metrics(run)
    for panel in panels_of(rows):
        columns, table = panel.table()
        assert len(columns) == 1 + len(panel.curves) and table
    accuracy = next(panel for panel in panels_of(rows) if panel.name == "accuracy")
    assert accuracy.curves[0].points == series(rows, "eval_accuracy")
    assert accuracy.table()[1][0] == ["0", "50.0%", "40.0%"]
    assert accuracy.describe() == "greedy: from 50.0% at step 0 to 80.0% at step 60; " + (
        "mean@8: from 40.0% at step 0 to 70.0% at step 60."
    )
    time = next(panel for panel in panels_of(rows) if panel.name == "time")
    whole = series(rows, "step_seconds")
    for i, (step, seconds) in enumerate(whole):
        parts = [curve.points[i] for curve in time.curves]
        assert all(at == step for at, _ in parts) and sum(value for _, value in parts) == pytest.approx(seconds)


def test_a_picture_does_not_depend_on_those_before_it(run):
    panels = panels_of(load_metrics(run))
    together = pictures.pictures_of(panels)
    for panel, picture in zip(panels, together, strict=True):
        (alone,) = pictures.pictures_of([panel])
        assert alone.svg == picture.svg, panel.name


def test_the_learning_rate_is_drawn_as_it_was_and_a_reward_as_the_mean_around_each_step():
    """A mean would draw a warm-up from 0 to 0.002 as one from 0.0008 to 0.0019."""
    rates = [0.002 * min(step / 14, (280 - step) / 266) for step in range(280)]
    rows = [{"step": step, "learning_rate": rate, "reward": rate} for step, rate in enumerate(rates, start=1)]
    panels = {panel.name: panel for panel in panels_of(rows)}
    assert panels["rate"].exact and not panels["reward"].exact

    def heights(name):
        """Of each curve its first and its highest point, as heights in the picture; there a lower number is higher."""
        (picture,) = pictures.pictures_of([panels[name]])
        found = re.findall(r'<path d="([^"]+)"[^>]*style="[^"]*stroke: var\(--s1\)', picture.svg)
        ys = [[float(y) for y in re.findall(r"[ML] \S+ (\S+)", path)] for path in found]
        return [(y[0], min(y)) for y in ys]

    (exact,), (raw, smooth) = heights("rate"), heights("reward")
    assert exact == raw, "the bold line is the rate itself"
    assert smooth[0] < raw[0] - 5 and smooth[1] > raw[1] + 5
    long = [(step, 0.0 if step else 1.0) for step in range(1001)]
    thin = pictures._each(long, 300)
    assert thin[0] == long[0] and thin[-1] == long[-1] and set(thin) <= set(long) and len(thin) <= 301


def test_numbers_at_an_axis_are_whole():
    values = (0, 1e-9, -2.5e-10, 2e-5, 0.0005, 0.002, -0.25, 20000, 2.5e6)
    assert [pictures.tick(value) for value in values] == (
        "0 1e−9 −2.5e−10 2e−5 0.0005 0.002 −0.25 20000 2.5e6".replace("−", "\N{MINUS SIGN}").split()
    )
    rows = [{"step": step, "loss": 1e-9 * (step % 3 - 1), "learning_rate": 1.0} for step in range(30)]
    (picture,) = pictures.pictures_of([panel for panel in panels_of(rows) if panel.name == "loss"])
    written = re.findall(r"<text[^>]*>([^<]+)</text>", picture.svg)
    assert "0" in written and any("e\N{MINUS SIGN}10" in text for text in written), written
    assert all(re.fullmatch(r"[\d.]+|\N{MINUS SIGN}?[\d.]+e\N{MINUS SIGN}\d+", text) for text in written), written


def test_a_long_run_makes_no_long_page(tmp_path):
    rows = healthy_rows(steps=3000, evaluated_every=100)
    text = page.report_of(read_run(write_run(tmp_path / "a", rows)))
    assert len(text) < 1_500_000
    points = [(step, float(step % 7)) for step in range(1000)]
    thin = metrics.thinned(points, 40)
    assert len(thin) == 40 and thin[-1][0] == 999
    assert sum(value for _, value in thin) / 40 == pytest.approx(sum(v for _, v in points) / 1000)


def test_a_run_without_a_kl_says_so_at_the_diagnosis_and_at_the_curves(settings, tmp_path):
    rows = [{key: value for key, value in row.items() if key != "kl"} for row in healthy_rows()]
    run = write_run(tmp_path / "a", rows, settings | {"kl_penalty_coef": 0.0})
    text = " ".join(Tags(page.report_of(read_run(run))).text.split())
    looked = text.partition("Looked for: ")[2].partition("Could not be looked for: ")
    assert "KL" not in looked[0] and "a collapse" in looked[0]
    assert looked[2].startswith("a KL that runs away (KL: not logged, since kl_penalty_coef is 0).")
    assert "Not drawn: KL from the reference: not logged, since kl_penalty_coef is 0." in text
    other = write_run(tmp_path / "b", healthy_rows(), settings)
    text = " ".join(Tags(page.comparison_of(read_run(run), read_run(other))).text.split())
    assert "Not drawn, as a has none: KL from the reference: not logged, since kl_penalty_coef is 0." in text
    assert "Not drawn, as b" not in text


def test_a_run_without_completions_settings_or_starts_says_so(tmp_path):
    text = " ".join(Tags(page.report_of(read_run(write_run(tmp_path / "a", healthy_rows())))).text.split())
    for words in (
        "The answers at evaluations were not kept",
        "The completions of training steps were not kept",
        "which were not kept. The mean of each reward is among the curves.",
        "They are not known: the run has no config.json",
        "Versions were not noted",
        "There is none. A run with --save_batches 3",
    ):
        assert words in text, words


def test_without_matplotlib_there_are_tables_and_a_line_says_so(run, monkeypatch):
    monkeypatch.setattr(pictures, "can_draw", lambda: False)
    monkeypatch.setattr(page, "can_draw", lambda: False)
    text = page.report_of(read_run(run))
    assert "<svg" not in text and "matplotlib is not installed" in text and "The numbers" in text


@pytest.mark.parametrize(
    "rows, words",
    [
        ([{"step": 1, "loss": 0.1, "learning_rate": 1e-3}], "The run has logged 1 training step so far"),
        ([{"step": i, "loss": 2.0 - i / 10, "learning_rate": 1.0} for i in range(1, 9)], "fell from 1.75 to 1.35"),
        ([{"step": i, "reward": 1.0 + i % 3, "learning_rate": 1.0} for i in range(1, 9)], "which may be chance"),
        ([{"step": i, "reward": 1.0 * i, "learning_rate": 1.0} for i in range(1, 4)], "logged 3 training steps so far"),
        (healthy_rows()[:1], "Right answers are 50.0%"),
        (with_values(healthy_rows(), eval_accuracy=lambda done: 0.5 + 0.01 * done), "which may be chance"),
        (with_values(healthy_rows(), eval_accuracy=lambda done: 0.5), "stayed at 50.0%"),
        ([row for row in healthy_rows() if "eval_runtime" not in row], "The mean reward of training rose"),
        ([{"step": 0, "eval_loss": 2.0}, {"step": 9, "eval_loss": 1.0}], "The loss on held-out questions fell"),
        ([{"step": 0, "eval_a_accuracy": 0.5}, {"step": 9, "eval_a_accuracy": 0.4}], "fell from 50.0% to 40.0%"),
        ([{"step": 1, "loss": float("nan"), "learning_rate": 1e-3}], "The run has logged 1 training step so far"),
    ],
)
def test_the_verdict_fits_what_was_logged(rows, words, tmp_path):
    run = read_run(write_run(tmp_path / "a", rows))
    assert words in verdict_of(run).headline
    Tags(page.report_of(run))


def test_a_change_is_sure_only_outside_of_the_intervals():
    from tunix_torch.report.record import RunRecord

    sure = verdict_of(RunRecord(None, healthy_rows()))
    assert sure.tone == "better" and sure.changes[0].sure
    small = verdict_of(RunRecord(None, healthy_rows(questions=8)))
    assert small.tone == "same" and not small.changes[0].sure
    bare = [{k: v for k, v in row.items() if "interval" not in k} for row in healthy_rows()]
    assert verdict_of(RunRecord(None, bare)).changes[0].difference is None
    known = verdict_of(RunRecord(None, bare, starts=[{"evaluation_rows": 256, "versions": {}}]))
    assert known.tone == "better" and known.changes[0].before_interval == pytest.approx((0.439, 0.561), abs=1e-3)


@pytest.mark.parametrize(
    "flags",
    [
        ["--use_grpo"],
        ["--use_grpo", "--max_steps", "7", "--learning_rate", "0.5", "--system_message", 'Think, it\'s "easy"'],
        ["--use_grpo", "--model_name", "org/model", "--data_path", "rows.jsonl", "--max_steps", "9"],
        [
            "--use_grpo",
            "--reward_funcs",
            "correctness",
            "format",
            "--reward_weights",
            "1",
            "0.5",
            "--report_to",
            "none",
        ],
        ["--model_name", "org/model", "--preference_loss", "dpo", "--eval_steps", "5", "--eval_on_start", "false"],
        ["--use_grpo", "--generation_kwargs", '{"top_k": 20}', "--lr_scheduler_type", "cosine"],
    ],
)
def test_the_command_that_repeats_a_run_gives_its_settings(flags):
    settings = json.loads(json.dumps(settings_of(*parse_job(flags)), default=str))
    command = shlex.split(command_of(settings))
    assert command[:2] == ["python", "train.py"]
    again = json.loads(json.dumps(settings_of(*parse_job(command[2:])), default=str))
    assert again | {"report_to": 0} == settings | {"report_to": 0}
    if flags == ["--use_grpo"]:
        assert len(command) == 3, "what the command takes by itself is not said again"


def test_settings_that_differ_are_those_that_differ():
    """From the defaults that the job's command shows in its help: the tiny model's job has defaults of its own."""

    def differ(*flags):
        given = json.loads(json.dumps(settings_of(*parse_job(["--use_grpo", *flags])), default=str))
        return {setting.name: (setting.value, setting.default) for setting in not_at_default(given)}

    assert differ() == {}
    assert differ("--output_dir", "elsewhere", "--run_name", "mine") == {}
    assert differ("--max_steps", "60", "--learning_rate", "1e-5") == {
        "max_steps": ("60", "280"),
        "learning_rate": ("1e-05", "0.002"),
    }
    gemma = differ("--model_name", "google/gemma-3-270m-it")
    assert gemma == {"model_name": ("google/gemma-3-270m-it", "tiny")}
    assert differ("--model_name", "org/model", "--learning_rate", "0.002")["learning_rate"] == ("0.002", "1e-05")
    assert TINY["learning_rate"] == 0.002, "as above"


def test_a_report_says_where_all_settings_are_at_their_defaults_and_whose_they_are(settings, tmp_path):
    def text_of(**changed):
        run = read_run(write_run(tmp_path / "a", healthy_rows(), settings | {"max_steps": 280} | changed))
        return " ".join(Tags(page.report_of(run)).text.split())

    assert "None: all settings are at the defaults of train.py for the tiny model." in text_of()
    text = text_of(learning_rate=1e-5)
    assert "Compared with the defaults of train.py for the tiny model." in text
    assert "learning_rate 1e-05 0.002" in text and "generation_top_p" not in text


def test_two_runs_are_compared(run, settings, tmp_path, capsys):
    rows = with_values(healthy_rows(seed=3), kl=lambda done: 2 * done**3)
    other = write_run(tmp_path / "other", rows, settings | {"learning_rate": 0.01})
    main(["report", str(run), "--compare", str(other)])
    file = run / "comparison.html"
    assert capsys.readouterr().out == f"{file}\n"
    tags = Tags(file.read_text())
    text = " ".join(tags.text.split())
    assert "<b>run and other" in text and "learning_rate 0.002 0.01" in text and "epsilon" not in text
    assert "Neither run is surely ahead: 80.0% in <b>run, 80.0% in other." in text
    assert "KL running away" in text and "Nothing was found" in text
    assert len([tag for tag, _ in tags.all if tag == "svg"]) >= 10
    main(["report", str(run), "--compare", str(run)])
    assert "None: both runs have the same settings." in file.read_text()


def test_a_comparison_draws_every_curve_of_both_runs():
    panels, others = panels_of(healthy_rows()), panels_of(with_values(healthy_rows(seed=3), kl=lambda done: done))
    for alone, other, both in zip(panels, others, overlaid([("a", panels), ("b", others)]), strict=True):
        assert [c.points for c in both.curves if c.run == 0] == [c.points for c in alone.curves], alone.name
        assert [c.points for c in both.curves if c.run == 1] == [c.points for c in other.curves], alone.name
        names = both.table()[0][1:]
        assert len(set(names)) == len(names) == 2 * len(alone.curves), "a column for each curve of each run"
        (picture,) = pictures.pictures_of([both])
        runs = [label for mark, label in picture.legend if mark in (("r1", "r2") if len(names) > 2 else ("l1", "l2"))]
        labels = alone.labels if len(names) > 2 else []
        assert runs == ["a", "b"] and [label for _, label in picture.legend[2:]] == labels
        colors = set(re.findall(r"stroke: (var\(--s\d\))", picture.svg))
        assert len(colors) == max(2, len(alone.curves)) and "stroke-dasharray" in picture.svg


def test_of_curves_that_one_picture_cannot_hold_those_of_both_runs_are_shown():
    own, others = ([Curve(label, [(1, 0.5)]) for label in labels] for labels in ("abcdefg", "xgbyz"))
    (panel,) = overlaid([("one", [Panel("p", "", "Note.", own)]), ("other", [Panel("p", "", "", others)])])
    assert [(curve.label, curve.run) for curve in panel.curves[:4]] == [("b", 0), ("b", 1), ("g", 0), ("g", 1)]
    assert panel.labels == list("bgacde") and panel.note == "Note. Left out: f, x, y, z."


def test_of_two_runs_the_better_one_is_named_where_chance_is_no_reason():
    from tunix_torch.report.record import RunRecord

    def ending(share, key="eval_accuracy", questions=256):
        rows = healthy_rows(questions=questions)
        last = rows[-2] | {key: share, "eval_interval/accuracy_low": share - 0.05}
        return verdict_of(RunRecord(None, [*rows[:-2], last | {"eval_interval/accuracy_high": share + 0.05}]))

    sampled = verdict_of(RunRecord(None, healthy_rows(), {"eval_temperature": 0.7})).changes[1].label
    assert sampled == "right answers, mean of 8 samples at temperature 0.7"
    names = ("a", "b")
    assert rivals(ending(0.8), ending(0.9), names)[0] == "b ended better: 80.0% in a, 90.0% in b"
    assert rivals(ending(0.9), ending(0.8), names)[0] == "a ended better: 90.0% in a, 80.0% in b"
    assert rivals(ending(0.8), ending(0.83), names)[0].startswith("Neither run is surely ahead")
    for one, other, apart in (
        (0.8, 0.9, "b is between 2.9 and 17.1 points above a"),
        (0.9, 0.8, "a is between 2.9 and 17.1 points above b"),
        (0.8, 0.83, "b is between 4.1 points below a and 10.1 above it"),
    ):
        assert f" With 95% confidence {apart}." in rivals(ending(one), ending(other), names)[1]
    losses = [
        verdict_of(RunRecord(None, [{"step": 0, "eval_loss": 2.0}, {"step": 9, "eval_loss": end}])) for end in (1, 1.5)
    ]
    assert rivals(*losses, names)[0] == "a ended better: 1 in a, 1.5 in b"
    assert "no evaluation in common" in rivals(losses[0], ending(0.8), names)[0]


def test_a_page_is_written_anew_and_no_other_file_is_overwritten(run, tmp_path, capsys):
    main(["report", str(run)])
    main(["report", str(run)])
    assert capsys.readouterr().out == f"{run / 'report.html'}\n" * 2
    mine = tmp_path / "mine.html"
    mine.write_text("mine")
    for output, words in (
        (mine, "is there already, and is no report"),
        (tmp_path, "expected a file"),
        (tmp_path / "no" / "a.html", "in a folder that exists"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["report", str(run), "--output", str(output)])
        (line,) = capsys.readouterr().err.splitlines()
        assert end.value.code == 2 and words in line
    assert mine.read_text() == "mine"
    main(["report", str(run), "--output", str(tmp_path / "b.html")])
    assert (tmp_path / "b.html").read_text() == (run / "report.html").read_text()


def test_a_page_says_by_which_command_it_was_written_and_this_one_works(run, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        main(["report", str(run), "--compare", "nope"])
    assert capsys.readouterr().err == "error: compare='nope': no such folder\n"
    other = write_run(tmp_path / "it's other", healthy_rows())
    for name, flags in (("report", []), ("comparison", ["--compare", str(other)])):
        main(["report", str(run), *flags])
        text = " ".join(Tags((run / f"{name}.html").read_text()).text.split())
        words = shlex.split(text.partition("Written by ")[2].partition(". Everything here")[0])
        assert words == ["python", "report.py", str(run), *flags]


def test_what_fails_in_a_report_does_not_fail_its_run(tmp_path, caplog):
    folder = write_run(tmp_path / "a", healthy_rows(steps=3), {}, [completion(1)])
    (folder / "completions" / "completions_00001.parquet").write_bytes(b"no parquet")
    assert page.write_report_of_ended_run(folder) is False
    assert not (folder / "report.html").exists()
    (record,) = caplog.records
    assert "The report was not written: ValueError" in record.message and "python report.py" in record.message
