"""Every command line that Hydra would refuse is refused in one line that names the word and the cure."""

import pytest

from longmix.errors import DataError

REFUSED = [
    ("train", "mixer=flahs", "mixer=flahs does not exist. Did you mean flash? Choices are: block_sparse,"),
    ("train", "model=huge", "model=huge does not exist. Choices are: 125m,"),
    ("train", "experiment=shotout", "Did you mean shootout?"),
    ("evaluate", "checkpoint=x task=los", "task=los does not exist. Did you mean loss?"),
    ("evaluate", "checkpoint=x task=[loss,los]", "task=los does not exist."),
    ("train", "optimizer.lr=1", "unknown word optimizer.lr. Did you mean optimizer.learning_rate?"),
    ("train", "lr=1", "unknown word lr. Did you mean optimizer.learning_rate? Words are: mixer, model,"),
    ("train", "mixr=flash", "unknown word mixr. Did you mean mixer?"),
    ("train", "model.n_layers=3", "Did you mean model.num_layers?"),
    ("train", "mixer=sliding_window mixer.windw=3", "unknown word mixer.windw. Did you mean mixer.window?"),
    ("train", "mixer.window=3", "mixer.window is a setting of mixer=hyper,"),
    ("train", "mixer=kda+flash mixer.rotary_base=null", "mixer.rotary_base names no member of mixer=kda+flash, and "
     "each has its own settings. kda lacks rotary_base. Write mixer.flash.rotary_base=null."),
    ("train", "mixer=sliding_window*3+flash mixer.rotary_base=1", "names no member of mixer=sliding_window+flash, and "
     "each has its own settings. Write mixer.sliding_window.rotary_base=1 mixer.flash.rotary_base=1."),
    ("train", "mixer=kda+flash mixer.kda.rotary_base=1", "kda lacks rotary_base. Did you mean mixer.flash.rotary_base"),
    ("train", "mixer=kda+flash mixer.rotary_bse=1", "word mixer.rotary_bse. Did you mean mixer.flash.rotary_base?"),
    ("train", "mixer=kda+flash mixer.hyper.qk_norm=true", "hyper is no member of mixer=kda+flash. Write mixer.flash.q"),
    ("train", "hydra.foo=1", "unknown word hydra.foo."),
    ("train", "data.corpus.path=books/", "data.corpus.path is a setting of data=jsonl, data=parquet and data=text;"),
    ("evaluate", "checkpoint=x task.needle.seed=1", "which is not chosen; add task=needle."),
    ("evaluate", "checkpoint=x task=needle task.needle.lengths=1", "Did you mean task.needle.depths?"),
    ("evaluate", "mixer=rwkv7", "mixer=rwkv7 cannot be chosen here: mixer comes from the checkpoint."),
    ("generate", "checkpoint=x model.d_model=3", "cannot be chosen here: model comes from the checkpoint."),
    ("prepare", "mixer=rwkv7", "mixer is not a word of python prepare.py. Words there are: data, tokenizer,"),
    ("train", "~x", "~x: there is no x to leave out."),
    ("train", "+seed=1", "+seed=1: seed is there already; write seed=1."),
    ("train", "max_steps 5", "max_steps has no value; write max_steps=5."),
    ("train", "--max_steps 5", "there is no option --max_steps. Words have no dashes: max_steps=5."),
    ("train", "--max-steps=5", "there is no option --max-steps=5. Words have no dashes: max_steps=5."),
    ("train", "-x", "there is no option -x."),
    ("train", "--cfg nojob", "argument --cfg/-c: invalid choice: 'nojob'"),
    ("train", "--config-name nope", "--config-name nope: there is no nope.yaml in a folder of --config-dir or hydra"),
    ("evaluate", "checkpoint=x task=['']", "task= does not exist."),
    ("evaluate", 'checkpoint=x task=[loss,"los"]', "task=los does not exist. Did you mean loss?"),
    ("train", "--package x", "--package x goes with --cfg."),
    ("generate", "checkpoint=x --package=x", "--package x goes with --cfg."),
    ("train", "--config-name=", "--config-name is empty;"),
    ("train", "--config-name evaluate", "this command. It is that of `longmix evaluate`. A file of your own"),
    ("evaluate", "-cn train checkpoint=x", "of your own for it has `defaults: [evaluate, _self_]`."),
    ("train", "--config-path /tmp", "would take the place of longmix's own configuration, which every command needs;"),
    ("train", "-cp=/tmp", "add a folder to it with --config-dir /tmp."),
    ("train", "-m mixer=choice()", "mixer=choice() is no sweep: it is written like mixer=choice(A,B)."),
    ("train", "-m mixer=range()", "mixer=range() is no sweep: it is written like mixer=range(1,4)."),
    ("train", "-m seed=range()", "seed=range() is no sweep: it is written like seed=range(1,4)."),
    ("train", "mixer=choice(flash,kda)", "mixer=choice(flash,kda) is a sweep; write -m mixer=flash,kda"),
    ("train", "--run --multirun", "Only one of --run, --multirun, --cfg,"),
    ("train", "help", "help is not a word; python train.py -h prints the help."),
    ("train", "rwkv7", "rwkv7 stands alone; write block=rwkv7 or mixer=rwkv7"),
    ("train", "seqlen", "seqlen is neither word=value nor an option. Did you mean seq_len=VALUE?"),
    ("generate", "checkpoint=x prompt=Fellow citizens all", "quote the word: 'prompt=Fellow citizens all'."),
    ("train", "=5", "=5 has no name before the equals sign."),
    ("train", "müxer=5", "müxer is no name of a word. Did you mean mixer?"),
    ("train", "name=\udcff", "name=\\udcff is not valid UTF-8."),
    ("train", "mixer=sliding_window*0+flash", "the count '0' of sliding_window must be a whole number from 1."),
    ("train", "mixer=sliding_window*x+flash", "the count 'x' of sliding_window must be a whole number from 1."),
    ("train", "mixer=flash+sliding_window*99999", "99999 layers of sliding_window are too many; give at most 9999."),
    ("train", "mixer=sliding_window+", "mixer=sliding_window+ has nothing on one side of a +;"),
    ("train", "mixer=sliding_windw*2+flash", "there is no mixer 'sliding_windw'. Did you mean sliding_window?"),
    ("train", "mixer=flash,rwkv7", "gives several values; write -m mixer=flash,rwkv7 for one run with each."),
    ("train", "mixer=[flash,rwkv7]", "mixer=[flash,rwkv7] is a list; mixer takes one choice."),
    ("train", "mixer=null", "mixer=null does not exist."),
    ("train", "mixer=", "mixer= does not exist."),
    ("train", "seq_len=1,2", "seq_len=1,2 gives several values. -m seq_len=1,2 makes one run with each."),
    ("train", "seq_len=x", "seq_len=x is not a whole number."),
    ("train", "seq_len=3.5", "seq_len=3.5 is not a whole number."),
    ("train", "seq_len=16k", "seq_len=16k is not a whole number. Write seq_len=16000 or seq_len=16384."),
    ("train", "seq_len=ü", "seq_len=ü is not a whole number."),
    ("train", "seq_len=${nothing}", "seq_len=${nothing}: hydra.run.dir: Interpolation key 'nothing' not found."),
    ("train", "seed=null", "seed=null is not a whole number."),
    ("train", "name=null", "name=null is not text."),
    ("train", "loop=[]", "loop=[]: loop has no value of its own; its words are: loop.gradient_clip, loop.log_every,"),
    ("train", "loop=null", "loop=null: loop has no value of its own;"),
    ("train", "loop=", "loop=: loop has no value of its own;"),
    ("train", "match=3", "match=3: match has no value of its own; its words are: match.parameters,"),
    ("train", "-m tuning=1,2", "tuning=1,2: tuning has no value of its own;"),
    ("train", "~name", "~name: name cannot be left out; without the word it has its default."),
    ("train", "~max_tokens", "it has its default. For no value write max_tokens=null."),
    ("train", "~model", "~model: model cannot be left out;"),
    ("train", "~mixer=flash", "~mixer=flash: mixer cannot be left out;"),
    ("train", "~loop.log_every", "~loop.log_every: loop.log_every cannot be left out;"),
    ("train", "-m ~loop seed=1,2", "~loop: loop cannot be left out;"),
    ("evaluate", "checkpoint=x ~task", "~task: task cannot be left out;"),
    ("train", "+mixer=flash", "+mixer=flash: mixer has a choice already; write mixer=flash."),
    ("train", "++mixer=flash", "++mixer=flash: mixer has a choice already; write mixer=flash."),
    ("train", "+experiment=mqar", "write experiment=mqar."),
    ("train", "-m experiment=null,mqar", "null is no choice of a sweep;"),
    ("train", "hydra.run.dir=a${", "hydra.run.dir=a${: the ${ in it begins an interpolation that has no end."),
    ("train", "data=needle data.task.needles=0", "unknown word data.task.needles. Did you mean data.needles?"),
    ("train", "seq_len=1_0_", "seq_len=1_0_ is not a whole number."),
    ("train", "max_tokens=1e400", "max_tokens=1e400 is too large; whole numbers go up to 9223372036854775807."),
    ("train", "hydra.run=x", "hydra.run=x: hydra.run has no value of its own; its words are: hydra.run.dir."),
    ("train", "hydra.output_subdir=", "hydra.output_subdir is empty; was a variable of the shell not set?"),
    ("train", "data.corpus={_target_:x,y:z}", "gives several settings at once; write each as data.corpus.NAME=VALUE."),
    ("train", "-m seed=range(1,1000000000)", "has 999,999,999 values, and a sweep may have 10,000 runs."),
    ("train", "-m seed=shuffle(range(1,1000000000))", "has 999,999,999 values, and a sweep may have 10,000 runs."),
    ("train", "-m seed=range(1,1000) seq_len=range(1,1000)", "the sweep would have 998,001 runs or more, and may have"),
    ("train", "-m mixer=glob(nosuch*)", "mixer=glob(nosuch*) matches none of its choices, which are: block_sparse,"),
    ("train", "-m mixer=glob(*,exclude=*)", "matches none of its choices,"),
    ("train", "-m mixer=flash,sliding_window mixer.window=4", "mixer.window is no setting of mixer=flash, and every"),
    ("train", "-m mixer=sliding_window,flash,kda mixer.window=4", "no setting of mixer=flash and mixer=kda, and every"),
    ("train", "-m mixer=choice(sliding_window,flash) mixer.window=4", "mixer.window is no setting of mixer=flash,"),
    ("train", "-m mixer=flash,kda mixer.windw=4", "unknown word mixer.windw. Did you mean"),
    ("generate", "checkpoint=x stop=###", "stop=### is not a list, each text. A list is 'stop=[###]'."),
    ("train", "loop.tasks=needle", "loop.tasks=needle is not a list."),
    ("train", "-m seq_len=choice()", "seq_len=choice() is no sweep: it is written like seq_len=choice(A,B)."),
    ("train", "-m seq_len=range(1,1)", "seq_len=range(1,1) holds no value, so the sweep would have no run."),
    ("train", "-m seq_len=range(1,5,0)", "seq_len=range(1,5,0) is no sweep:"),
    ("train", "-m seq_len=1,", "seq_len=1, is not a whole number."),
    ("train", "-m mixer=flash,flahs", "mixer=flahs does not exist. Did you mean flash?"),
    ("train", "hydra.run.dir=/proc/x", "hydra.run.dir=/proc/x cannot be made: No such file or directory."),
    ("train", "-m hydra.sweep.dir=/proc/x", "hydra.sweep.dir=/proc/x cannot be made: No such file or directory."),
    ("train", "hydra/launcher=nix", "hydra/launcher=nix does not exist. Choices are: basic,"),
    ("train", "hydra.mode=FOO", "hydra.mode: Invalid value 'FOO', expected one of [RUN, MULTIRUN]."),
]  # fmt: skip


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("command", "line", "expected"),
    REFUSED,
    ids=[f"{case[0]} {case[1]}".encode("ascii", "backslashreplace").decode() for case in REFUSED],
)
def test_refused_in_one_line(run_words, tmp_path, command, line, expected):
    outcome = run_words(command, *line.split(" "))
    assert (outcome.code, outcome.configs) == (2, [])
    (message,) = outcome.err.splitlines()
    assert message.startswith("ConfigError: ") and expected in message
    assert message.endswith((".", "?")) and "HYDRA_FULL_ERROR" not in message
    assert list(tmp_path.glob("runs/*")) == []


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("prepare", "~hydra.mode=choice(1,2)"),
        ("evaluate", "--cfg +data="),
        ("evaluate", "--info ++task="),
        ("train", ""),
    ],
)
def test_no_message_is_longer_than_a_screen(run_words, command, line):
    outcome = run_words(command, *f"{line}{'x' * 5000}".split(" "))
    assert outcome.code == 2 and len(outcome.err.splitlines()) == 1 and len(outcome.err) < 1500


def test_no_character_of_a_message_steers_the_terminal(run_words):
    assert "\x1b" not in run_words("train", "\x1b[31mseed").err
    assert "\x1b" not in run_words("train", "seq_len=\x1b[31m").err


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("command", "line", "key", "value"),
    [
        ("train", "seed=1 seed=2", "seed", 2),
        ("train", "max_tokens=3e6", "max_tokens", 3_000_000),
        ("train", "name=ü", "name", "ü"),
        ("train", "experiment=null", "seed", 0),
        ("train", "experiment=mqar experiment=null", "seq_len", 512),
        ("evaluate", "checkpoint=x data=null", "data", None),
        ("train", "max_tokens=3_000_000", "max_tokens", 3_000_000),
        ("generate", "checkpoint=x", "prompt", ""),
        ("evaluate", "checkpoint=x data=text data.corpus.path=a,b", "split", "validation"),
    ],
)
def test_accepted(run_words, command, line, key, value):
    outcome = run_words(command, *line.split(" "))
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.configs[0][key] == value


@pytest.mark.slow
def test_a_sweep_runs_each(run_words):
    outcome = run_words("train", "-m", "name=ü b,c", "seed=1,2")
    assert outcome.code == 0
    assert [(config["name"], config["seed"]) for config in outcome.configs] == [
        ("ü b", 1),
        ("ü b", 2),
        ("c", 1),
        ("c", 2),
    ]


@pytest.mark.slow
def test_a_sweep_ends_with_the_code_of_its_failure(run_words):
    def fail(config):
        if config.seed == 1:
            raise DataError("no data.")

    outcome = run_words("train", "-m", "seed=1,2", task=fail)
    assert outcome.code == 2 and len(outcome.configs) == 2
    assert "DataError: no data.\n" in outcome.err and "Traceback" not in outcome.err
    assert "Error executing job" not in outcome.err


def test_a_defect_keeps_its_traceback(run_words):
    outcome = run_words("train", task=lambda config: 1 / 0)
    assert outcome.code == 1
    assert "Traceback" in outcome.err and "ZeroDivisionError" in outcome.err and "_run_hydra" not in outcome.err


def test_values_that_the_schema_cannot_know_are_the_tasks(run_words):
    assert run_words("train", "+x=1").configs[0]["x"] == 1


@pytest.mark.parametrize("command", ["evaluate", "generate"])
def test_a_folder_without_its_word(run_words, tmp_path, command):
    (tmp_path / "runs" / "a").mkdir(parents=True)
    outcome = run_words(command, "runs/a", "seed=1")
    assert outcome.code == 2 and "runs/a stands alone; write checkpoint=runs/a." in outcome.err


def test_an_unknown_package_is_a_wrong_word(run_words):
    assert run_words("train", "--cfg", "hydra", "--package", "nosuch").code == 2


def test_ranges_and_patterns_that_have_values_are_swept(run_words):
    outcome = run_words("train", "-m", "seed=range(1,3)", "mixer=glob(flas*)")
    assert [(config["seed"], config["mixer"]["_target_"][-5:]) for config in outcome.configs] == [
        (1, "Flash"),
        (2, "Flash"),
    ]
