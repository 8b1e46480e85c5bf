"""The page: well-formed, whole in one file, the same every time, the right winners."""

import re
from html.parser import HTMLParser

import pytest
from sweep_folder import write_evaluation, write_needles, write_run, write_sweep

from longmix.reporting.page import html
from longmix.reporting.panels import panels_of
from longmix.reporting.runs import find_runs

VOID = {"meta", "input"}


class Page(HTMLParser):
    """Checks that tags close in order, and gathers text by the classes around it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[tuple[str, str]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("class", "")))

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if data.strip():
            self.text.append((" ".join(kind for _, kind in self.open), data.strip()))

    def under(self, kind: str) -> list[str]:
        return [text for kinds, text in self.text if kind in kinds.split()]


@pytest.fixture
def sweep(tmp_path):
    return write_sweep(tmp_path)


def page_of(folder) -> tuple[Page, str]:
    found = find_runs([folder])
    text = html(found, panels_of(found.runs), folder)
    return Page(text), text


class TestPage:
    @pytest.mark.slow
    def test_needs_nothing_else(self, sweep):
        page, text = page_of(sweep)
        links = [value for _, name, value in page.attributes if name in ("src", "href", "xlink:href")]
        ids = [value for _, name, value in page.attributes if name == "id"]
        assert {link[1:] for link in links} <= set(ids) and all(link.startswith("#") for link in links)
        assert len(ids) == len(set(ids)), "no two pictures share an id"
        assert "http" not in text and "url(" not in text and "@import" not in text
        assert text.count("<svg") == 10 + 2 and "$" not in re.sub(r"<script>.*</script>", "", text, flags=re.DOTALL)

    @pytest.mark.slow
    def test_is_the_same_every_time(self, sweep):
        assert page_of(sweep)[1] == page_of(sweep)[1]

    @pytest.mark.slow
    def test_figures_stand_in_rows_without_empty_cells(self, sweep):
        widths = re.findall(r'<div class="of(\d)"><figure>', page_of(sweep)[1])
        assert widths == list("3333332222"), "ten panels"

    @pytest.mark.slow
    def test_winners_by_length(self, sweep):
        page, _ = page_of(sweep)
        assert page.under("winner") == ["slow", "fast", "fast"] * 2
        assert page.under("number")[:3] == ["2.320 bits/byte", "1,000 tokens/s", "1.00 GiB"]
        assert page.under("next")[:3] == ["then fast, 3.320", "then slow, 500", "then slow, 3.00"]

    @pytest.mark.slow
    def test_a_leak_does_not_win_by_its_loss(self, sweep):
        write_evaluation(sweep / "0,mixer=slow,seq_len=32", "causality_step9", causal=False, step=9)
        page, _ = page_of(sweep)
        assert page.under("winner") == ["fast", "fast", "fast", "slow", "fast", "fast"]

    @pytest.mark.slow
    def test_a_mixer_has_one_colour_everywhere(self, sweep):
        _, text = page_of(sweep)
        chips = re.findall(r'<label class="(c\d)"><input type="checkbox" id="pick\d"/><svg.*?</svg>(\w+)</label>', text)
        rows = set(re.findall(r'<tr class="mark (c\d)"><td class="left c\d".*?</span>(\w+)</td>', text))
        names = set(re.findall(r'<g class="mark (c\d)"><text [^>]*>(\w+)</text>', text))
        assert set(chips) == rows == names == {("c0", "fast"), ("c1", "slow")}
        for number in (0, 1):
            assert f"body:has(.c{number}:hover) .mark:not(.c{number})" in text
            assert f"body:has(#pick{number}:checked) .mark.c{number}" in text

    @pytest.mark.slow
    def test_pictures_have_the_colours_of_the_page(self, sweep):
        svgs = "".join(re.findall(r'<svg viewBox="0 0 400 .*?</svg>', page_of(sweep)[1], flags=re.DOTALL))
        assert set(re.findall(r"#[0-9a-f]{6}", svgs)) == set() and "font-family" not in svgs
        assert {"var(--colour)", "var(--ink)", "var(--soft)", "var(--rule)"} >= set(re.findall(r"var\(--\w+\)", svgs))

    @pytest.mark.slow
    def test_badges_and_recall(self, sweep):
        runs = sorted(sweep.iterdir())
        write_evaluation(runs[0], "causality_step9", causal=True, step=9)
        write_evaluation(runs[1], "causality_step9", causal=False, step=9)
        lengths = {"32": {"accuracy": 0.75}, "64": {"accuracy": 0.5}}
        write_evaluation(runs[0], "accuracy_mqar_test_step9", data="mqar", step=9, lengths=lengths)
        page, text = page_of(sweep)
        assert [words for words in page.under("badge") if words != "not evaluated"] == [
            "causal",
            "not audited",
            "LEAKS",
            "not audited",
        ]
        assert page.under("badge").count("not evaluated") == 3
        assert "<th>mqar</th>" in text and ">75.0 %<" in text and ">50.0 %<" not in text
        assert "task=causality" in text and "task=needle" in text

    @pytest.mark.slow
    def test_who_recalls_best(self, sweep):
        for name, found in (("0,mixer=slow,seq_len=32", 0.5), ("1,mixer=fast,seq_len=32", 0.75)):
            write_needles(sweep / name, [32], [0.0], [[found]])
        page, text = page_of(sweep)
        assert page.under("winner") == ["slow", "fast", "fast", "fast", "slow", "fast", "fast"]
        assert page.under("number")[3] == "75.0 %" and page.under("next")[3] == "then slow, 50.0 %"
        assert page.under("next")[-1] == "not measured" and "best recall, needle<" in text

    @pytest.mark.slow
    def test_nobody_wins_with_nothing_or_with_what_others_have(self, sweep):
        for name in ("0,mixer=slow,seq_len=32", "1,mixer=fast,seq_len=32"):
            write_needles(sweep / name, [32], [0.0], [[0.0]])
        for name in ("2,mixer=slow,seq_len=64", "3,mixer=fast,seq_len=64"):
            write_needles(sweep / name, [64], [0.0], [[0.75]])
        page, text = page_of(sweep)
        assert page.under("winner") == ["slow", "fast", "fast"] * 2, "of loss, speed and memory alone"
        assert "none above 0.0 %" in page.under("next") and "a tie: slow, fast" in page.under("next")
        assert ">0.0 %<" in text and 'class="bar best" style="--share:0.000' not in text

    @pytest.mark.slow
    def test_a_run_that_diverged_does_not_win(self, sweep):
        write_run(sweep / "nan", "nan", 32, float("nan"), 100.0)
        assert page_of(sweep)[0].under("winner")[0] == "slow"

    def test_a_run_that_was_not_evaluated_says_so(self, sweep):
        page, text = page_of(sweep)
        assert "<th>recall</th>" in text and page.under("badge") == ["not evaluated", "not audited"] * 4

    def test_says_what_is_missing_and_how_to_get_it(self, tmp_path):
        write_run(tmp_path / "a", "flash", 32, 2.0, 500.0)
        _, text = page_of(tmp_path)
        for command in ("task=causality", "task=needle", "seq_len=2048,8192"):
            assert command in text

    @pytest.mark.slow
    def test_commands_name_the_folder_as_a_shell_takes_it(self, tmp_path):
        sweep = tmp_path / "a sweep"
        write_sweep(sweep)
        _, text = page_of(sweep)
        assert f"checkpoint=&#x27;{sweep}&#x27; task=causality" in text and "FOLDER" not in text
        for run in list(sweep.iterdir())[1:]:
            write_evaluation(run, "causality_step9", causal=True, step=9)
        (lacking,) = [run.folder for run in find_runs([sweep]).runs if run.evaluations.causal is None]
        assert f"checkpoint=&#x27;{lacking}&#x27; task=causality" in page_of(sweep)[1]

    def test_says_what_was_compared(self, tmp_path):
        config = """
seed: {seed}
batch_size: 2
data: {{corpus: {{_target_: longmix.data.corpora.files.TextFiles, path: {path}}}}}
tokenizer: {{_target_: longmix.data.tokens.tokenizers.ByteTokenizer}}
optimizer: {{_target_: longmix.training.optimizers.muon, learning_rate: {rate}}}
model: {{d_model: 128, num_layers: 6, num_heads: 2, block: {{_target_: longmix.model.blocks.{block}}}}}
mixer: {{x: {seed}}}
name: {seed}
"""
        for seed, mixer, block in ((1, "flash", "Standard"), (2, "gla", "Standard"), (3, "rwkv7", "RWKVBlocks")):
            text = config.format(seed=seed, path="books" if seed < 3 else "web", rate=0.01 * seed, block=block)
            write_run(tmp_path / mixer, mixer, 32, 2.0 + seed, 500.0, config=text)
        page, text = page_of(tmp_path)
        for words in (
            "6 layers, d_model 128, heads 2",
            "TextFiles path=books; TextFiles path=web",
            "1; 2; 3",
            "0.01; 0.02; 0.03",
            "2 windows, 1,000 tokens a step",
            "torch 2.13.0",
            "ByteTokenizer",
        ):
            assert f">{words}<" in text, words
        warnings = page.under("warn")
        assert any(
            words.startswith("rwkv7 ran in another block (RWKVBlocks) than the others (Sta") for words in warnings
        )
        assert any("trained on different data: TextFiles path=books; TextFiles path=web" in words for words in warnings)
        assert ">optimizer.learning_rate<" in text and ">mixer.x<" not in text and ">name<" not in text

    def test_a_setting_of_sizes_that_is_missing_or_no_number(self, tmp_path):
        for number, config in enumerate(("model: {d_model: 64}\n", "model: {num_layers: x}\nbatch_size: x\n")):
            write_run(tmp_path / str(number), f"m{number}", 32, 2.0 + number, 500.0, config=config)
        _, text = page_of(tmp_path)
        assert ">d_model 64; x layers<" in text and ">1,000 tokens a step; x windows, 1,000 tokens a step<" in text

    @pytest.mark.slow
    def test_nothing_is_missing(self, sweep):
        for run in sweep.iterdir():
            write_evaluation(run, "causality_step9", causal=True, step=9)
            lengths = {"32": {"accuracy": 0.75}}
            write_evaluation(run, "accuracy_mqar_test_step9", data="mqar", step=9, lengths=lengths)
        assert "Not here" not in page_of(sweep)[1]

    def test_best_of_a_length_is_bold_and_ties_are_not(self, sweep):
        _, text = page_of(sweep)
        best = re.findall(r'<td class="bar best"[^>]*>([^<]+)<', text)
        assert sorted(best) == ["1,000", "1,000", "1.00", "1.00", "2.320", "2.640"]  # FLOPs are equal: none is best

    def test_unfair_comparisons_are_marked(self, sweep):
        write_run(sweep / "other", "other", 32, 2.0, 100.0, parameters={"total": 200_000})
        assert any("match.parameters" in words for words in page_of(sweep)[0].under("warn"))

    def test_names_are_text_not_markup(self, tmp_path):
        write_run(tmp_path / "a", "<b>&amp", 32, 2.0, 500.0)
        write_run(tmp_path / "b", "flash", 32, 2.0, 600.0)
        page, text = page_of(tmp_path)
        assert "<b>" not in text and [words for _, words in page.text].count("<b>&amp") == 6
