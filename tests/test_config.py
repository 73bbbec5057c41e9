import pytest

from distrain import config
from distrain.data.shards.patterns import name_below
from distrain.errors import UserError
from distrain.track.uri import tracking_uri

REQUIRED = ["run.name=a", "data.train=t.parquet", "data.val=v.parquet", "model.name=densenet121"]


def write(path, text):
    path.write_text(text)
    return path


def test_overrides_win_over_the_file_and_the_file_over_what_it_extends(tmp_path):
    write(tmp_path / "base.yaml", "batch: {lanes: 2, per_lane: 16}\ntrain: {epochs: 7}\n")
    path = write(tmp_path / "run.yaml", "extends: base.yaml\nbatch: {lanes: 4}\n")
    loaded = config.load(path, [*REQUIRED, "batch.per_lane=64"])
    assert (loaded.batch.lanes, loaded.batch.per_lane, loaded.train.epochs) == (4, 64, 7.0)


def test_printed_configuration_reads_back_as_the_same(tmp_path):
    loaded = config.load(None, [*REQUIRED, "optimizer.weight_decay=1e-5", "model.options.dropout=0.2"])
    path = write(tmp_path / "printed.yaml", config.to_yaml(loaded))
    assert config.load(path) == loaded


def test_options_of_a_network_are_numbers_truth_values_and_text():
    words = ["depth=6", "wa=16.5", "final_relu=true", "stem=cifar", "stage_gate=null"]
    loaded = config.load(None, [*REQUIRED, *(f"model.options.{word}" for word in words)])
    assert loaded.model.options == {"depth": 6, "wa": 16.5, "final_relu": True, "stem": "cifar", "stage_gate": None}


def test_every_setting_is_explained_where_it_is_printed():
    lines = config.to_yaml(config.load(None, REQUIRED)).splitlines()
    assert all("  # " in line for line in lines if line.startswith("  "))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch.lane=3", "batch.lane=3: unknown key batch.lane: did you mean batch.lanes?"),
        ("optimiser.lr=3", "optimiser.lr=3: unknown key optimiser: did you mean optimizer?"),
        ("batch.lanes=x", "batch.lanes=x: batch.lanes must be an integer, not 'x'"),
        ("batch.lanes=1e3", "batch.lanes=1e3: batch.lanes must be an integer, not '1e3'"),
        ("optimizer.lr=0x10", "optimizer.lr=0x10: optimizer.lr must be a number, not '0x10'"),
        ("train.tf32=1", "train.tf32=1: train.tf32 must be true or false, not '1'"),
        ("data.mean=3", "data.mean=3: data.mean must be a list of numbers, such as [1, 2], not '3'"),
        ("run.name=???", "run.name=???: run.name=??? stands for a value that must be set: set another one"),
        (
            "run.name=${x}",
            "run.name: Interpolation key 'x' not found; write ${oc.env:NAME} for an environment variable, and \\${ for "
            "the characters themselves",
        ),
        ("run.name=a\0b", "run.name='a\\x00b' contains a line break or another control character: remove it"),
        (f"run.name={'n' * 300}", "run.name has 300 bytes, a folder name at most 255: shorten it"),
        (
            "run.dir=~nobody-here/x",
            "run.dir=~nobody-here/x: no home folder of ~nobody-here: write ./~nobody-here/x for a folder here",
        ),
        (
            "track.uri=http://***@host",
            "track.uri=http://***@host: *** replaced a secret when these settings were written: set track.uri again",
        ),
        ("batch.lanes=0", "batch.lanes=0: must be at least 1"),
        ("train.precision=fp8", "train.precision=fp8 is not known: did you mean fp32?"),
        (
            "data.val_resize=200",
            "data.val_resize=200 is smaller than data.image_size=224: the center crop would exceed the image",
        ),
        (
            "schedule.warmup_epochs=101",
            "schedule.warmup_epochs=101.0 is longer than train.epochs=100.0: shorten the warm-up or train longer",
        ),
        ("train.epochs=0", "train.epochs=0.0: must be greater than 0"),
        ("data.max_bad=2", "data.max_bad=2.0: must be in [0, 1]"),
        ("data.shuffle=windows", "data.shuffle=windows is not known: did you mean window?"),
        ("data.crop=pad", "data.crop=pad: data.crop is now called augment.crop"),
        ("average.decay=0.9", "average.decay=0.9: average.decay is now called ema.decay"),
        ("train.recompute=block", "train.recompute=block: train.recompute=block is now called train.recompute=full"),
        ("lanes", "'lanes' is not an override: write key=value, such as batch.lanes=4"),
        ("batch=3", "batch=3: batch must be a mapping of settings, not '3'"),
        ("data.mean=[1,2]", "data.mean=[1.0, 2.0] must be a list of 3 numbers"),
        ("run.name=a/b", "run.name='a/b' must be a plain folder name, without '/'"),
        ("optimizer.lr=.nan", "optimizer.lr=nan must be finite"),
        ("data.mean=[0.5,.inf,0.5]", "data.mean=[0.5, inf, 0.5] must be finite"),
        ("optimizer.betas=[0.9,1]", "optimizer.betas=[0.9, 1.0]: every item must be in [0, 1)"),
        (
            "train.recompute=auto",
            "train.recompute=auto needs train.activation_gb: the memory budget for activations",
        ),
        (
            "parallel.offload=true",
            "parallel.offload=true needs parallel.strategy=zero1, zero2 or zero3, not ddp",
        ),
        (
            "parallel.strategy=zero2 optimizer.name=lars",
            "optimizer.name=lars needs whole layers, which parallel.strategy=zero2 partitions: "
            "use ddp or zero0, or optimizer.name=adamw",
        ),
        (
            "parallel.strategy=zero3 train.compile=true",
            "train.compile=true does not work with the partitioned weights of parallel.strategy=zero3: "
            "use zero2 or lower",
        ),
        (
            "parallel.batch_norm=sync train.recompute=full",
            "train.recompute=full would reduce the statistics of parallel.batch_norm=sync twice: "
            "set train.recompute=none or parallel.batch_norm=lane",
        ),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(override, message):
    with pytest.raises(UserError) as caught:
        config.load(None, [*REQUIRED, *override.split()])
    assert str(caught.value) == message


TYPED = [
    "2024_01_15", "007", "1.10", "1.1", "no", "on", "null", "~", "1e3", "x #1", "[a, b]", "{a: 1}", "a: b", "- a",
    "'q'", '"q"', " x ", "a=b", "Café", "*a", "&a", "!a", "%a", "a\\b", "true",
]  # fmt: skip


@pytest.mark.parametrize("name", TYPED)
def test_a_name_is_taken_as_typed_and_printed_so_that_it_reads_back(tmp_path, name):
    loaded = config.load(None, [*REQUIRED, f"run.name={name}"])
    assert loaded.run.name == name
    assert config.load(write(tmp_path / "printed.yaml", config.to_yaml(loaded))) == loaded


def test_a_file_and_a_path_keep_text_as_typed_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    path = write(tmp_path / "run.yaml", "run: {name: 2024_01_15, dir: ~/x}\ndata: {val: '/v #1', train: 007}\nbatch:\n")
    loaded = config.load(path, ["model.name=densenet121", "download.cache=${oc.env:SCRATCH}/no", "track.uri=''"])
    assert (loaded.run.name, loaded.run.dir) == ("2024_01_15", "/home/me/x")
    assert (loaded.data.val, loaded.data.train) == ("/v #1", "007")
    assert (loaded.download.cache, loaded.track.uri) == ("/scratch/no", "")
    assert config.load(None, [*REQUIRED, "run.dir='/a b'", "batch.lanes=1_0"]).run.dir == "/a b"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a mapping, such as batch: {lanes: 4}"),
        (b"- a\n", "expected a mapping, such as batch: {lanes: 4}"),
        (b"data:\nrun:\n\tname: x\n", "line 3: indented with a tab: use spaces"),
        (b"run: {name: a}\nrun: {name: b}\n", "line 2: run occurs twice; the first is in line 1: remove one"),
        (b"run: {name: a,\n  name: b}\n", "line 2: run.name occurs twice; the first is in line 1: remove one"),
        (b"run:\n  name: caf\xe9\n", "line 2: not UTF-8 text: save it as UTF-8"),
        (b"run: &a {name: *a}\n", "line 1: run.name contains itself, by an anchor"),
        (
            b"run: {name: !!python/name:os.system x}\n",
            "line 1: run.name has the tag tag:yaml.org,2002:python/name:os.system: tags are not supported",
        ),
        (b"extends: [a]\n", "line 1: extends must be the name of one file"),
        (b"run: {name: [a]}\n", "line 1: run.name must be text, not a list"),
        (b"[" * 5000, "not valid YAML: nested too deeply"),
    ],
    ids=lambda value: value[:12] if isinstance(value, bytes) else "",
)
def test_a_mistake_in_a_file_is_one_line_that_names_the_line(tmp_path, content, message):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        config.load(path, REQUIRED)
    assert str(caught.value) == f"{path}: {message}"


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xef\xbb\xbfbatch: {lanes: 5}\n")
    assert config.load(path, REQUIRED).batch.lanes == 5


def test_a_secret_in_a_url_is_not_printed_and_not_taken_for_a_setting_afterwards(tmp_path):
    loaded = config.load(None, [*REQUIRED, "track.uri=http://me:s3cret@host", "data.train=https://h/t?sig=s3cret&a=1"])
    printed = config.to_yaml(loaded)
    assert "s3cret" not in printed
    assert "http://***@host" in printed
    assert "https://h/t?sig=***&a=1" in printed
    with pytest.raises(
        UserError, match=r"\*\*\* replaced a secret when these settings were written: set data.train again"
    ):
        config.load(write(tmp_path / "printed.yaml", printed))


def test_an_unknown_key_in_a_file_names_the_file(tmp_path):
    path = write(tmp_path / "run.yaml", "batch: {lane: 4}\n")
    with pytest.raises(UserError, match=r"run\.yaml: unknown key batch\.lane: did you mean batch\.lanes\?"):
        config.load(path, REQUIRED)


def test_a_file_that_is_missing_or_not_yaml_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.yaml: configuration file not found"):
        config.load(tmp_path / "nothing.yaml", REQUIRED)
    with pytest.raises(UserError, match=r"broken\.yaml: line 1: not valid YAML"):
        config.load(write(tmp_path / "broken.yaml", "batch: [1,"), REQUIRED)


def test_files_that_extend_each_other_are_refused(tmp_path):
    write(tmp_path / "a.yaml", "extends: b.yaml\n")
    path = write(tmp_path / "b.yaml", "extends: a.yaml\n")
    with pytest.raises(UserError, match="extends itself"):
        config.load(path, REQUIRED)


def test_missing_settings_are_listed():
    with pytest.raises(UserError, match=r"^data\.train, data\.val, model\.name must be set"):
        config.load(None, ["run.name=a"])


def test_every_rank_needs_a_lane():
    loaded = config.load(None, [*REQUIRED, "batch.lanes=4"])
    config.check_ranks(loaded, 4)
    with pytest.raises(UserError, match=r"batch\.lanes=4 does not fit 5 ranks"):
        config.check_ranks(loaded, 5)


def test_a_number_of_ranks_that_does_not_suit_the_strategy_is_refused():
    config.check_ranks(config.load(None, [*REQUIRED, "batch.lanes=7"]), 4)
    zero = config.load(None, [*REQUIRED, "batch.lanes=6", "parallel.strategy=zero1"])
    config.check_ranks(zero, 3)
    with pytest.raises(UserError, match=r"is not divisible by 4 ranks: start 3, or set parallel\.strategy=ddp"):
        config.check_ranks(zero, 4)
    sync = config.load(None, [*REQUIRED, "batch.lanes=4", "parallel.batch_norm=sync"])
    config.check_ranks(sync, 4)
    with pytest.raises(UserError, match=r"needs one lane per rank, and there are batch\.lanes=4 on 2 ranks"):
        config.check_ranks(sync, 2)


def test_the_identity_of_a_run_excludes_its_location_and_its_reports():
    fixed = config.fixed_settings(config.load(None, REQUIRED))
    assert {"batch.lanes", "optimizer.lr", "run.seed", "model.name", "train.epochs"} <= fixed.keys()
    assert not {"run.dir", "data.train", "track.uri", "checkpoint.keep", "data.threads"} & fixed.keys()


def test_a_loop_of_links_is_refused_in_one_line(tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    with pytest.raises(UserError, match=r"^.*/loop: cannot be read: Too many levels of symbolic links$"):
        config.load(loop)
    settings = config.load(None, [*REQUIRED, f"run.dir={loop}"])
    assert tracking_uri(settings) == f"sqlite:///{loop}/mlflow.db"
    assert name_below(str(loop), tmp_path) == "loop"


@pytest.mark.parametrize(
    ("override", "section", "name", "value"),
    [
        ("run.name='a'", "run", "name", "'a'"),
        ("run.dir='/x y'", "run", "dir", "/x y"),
        ('data.train="t.parquet"', "data", "train", "t.parquet"),
        ("run.dir='", "run", "dir", "'"),
        ("run.dir='a\"", "run", "dir", "'a\""),
        ("batch.lanes='4'", "batch", "lanes", 4),
        (f"run.name={'n' * 255}", "run", "name", "n" * 255),
    ],
)
def test_quotes_that_were_typed_around_a_path_or_a_number_are_taken_off(override, section, name, value):
    assert getattr(getattr(config.load(None, [*REQUIRED, override]), section), name) == value


def test_only_settings_that_may_change_are_named_in_run_change():
    allowed = config.load(None, [*REQUIRED, "run.change=[optimizer.lr,train.epochs]"])
    assert list(allowed.run.change) == ["optimizer.lr", "train.epochs"]
    with pytest.raises(UserError, match=r"run\.change: batch\.lanes cannot change during a run"):
        config.load(None, [*REQUIRED, "run.change=[batch.lanes]"])


def test_options_of_a_network_and_sizes_of_images_do_not_apply_to_others(tmp_path):
    path = tmp_path / "base.yaml"
    path.write_text(
        "run: {name: a}\ndata: {train: t.parquet, val: v.parquet, image_size: 32, val_resize: 32, "
        "size_schedule: [[0, 16]]}\n"
        "model: {name: densenet, options: {growth_rate: 40}}\n"
    )
    other = tmp_path / "other.yaml"
    other.write_text("extends: base.yaml\nmodel: {name: regnet, options: {depth: 4}}\n")

    def found(path, *words):
        loaded = config.load(path, words)
        return loaded.model.options, loaded.data.size_schedule

    options, sizes = {"growth_rate": 40}, [[0, 16]]
    assert found(path) == found(path, "model.name=densenet", "data.image_size=32") == (options, sizes)
    assert found(path, "model.options={stem: cifar}") == (options | {"stem": "cifar"}, sizes)
    assert found(path, "model.name=regnety_400mf") == ({}, sizes)
    assert found(path, "model.options={depth: 3}", "model.name=regnet") == ({"depth": 3}, sizes)
    assert found(path, "data.image_size=24") == (options, [])
    assert found(path, "data.size_schedule=[[0,8]]", "data.image_size=24") == (options, [[0, 8]])
    assert found(other) == ({"depth": 4}, sizes)
    nameless = tmp_path / "nameless.yaml"
    nameless.write_text("model: {options: {dropout: 0.2}}\n")
    (tmp_path / "named.yaml").write_text(path.read_text().replace("run:", "extends: nameless.yaml\nrun:"))
    assert found(tmp_path / "named.yaml") == (options | {"dropout": 0.2}, sizes)
    assert found(other, "model.name=densenet121") == ({}, sizes)
