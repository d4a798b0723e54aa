"""Configuration: strict YAML, overrides, and errors that name file and key."""

from typing import ClassVar

import pytest
from pydantic import Field

from geokr import config
from geokr.config import ConfigError, Options
from geokr.options import PretrainOptions
from preprocess.options import PackOptions


class Inner(Options):
    lr: float = 0.1
    """Rate."""
    steps: int | None = 10
    """Steps."""
    epochs: float | None = None
    """Epochs."""
    names: tuple[int | str, ...] = ("a",)
    """Names."""
    switch: bool = False
    """On or off."""
    word: str = "x"
    """A word."""


class Outer(Options):
    exclusive: ClassVar[dict[str, str]] = {"inner.steps": "inner.epochs", "inner.epochs": "inner.steps"}
    inner: Inner = Inner()
    size: int = Field(default=8, ge=1, le=100)
    """Size."""


def load(tmp_path, text="", *overrides):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return config.load(Outer, path, overrides)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        ("1.e3", 1e3),
        ("-2e+2", -200),
        (".5e-1", 0.05),
        ("1_000e-3", 1),
        ("3", 3),
        ("0.25", 0.25),
    ],
)
def test_numbers_are_numbers(tmp_path, text, number):
    assert load(tmp_path, f"inner: {{lr: {text}}}").inner.lr == number
    assert load(tmp_path, "", f"inner.lr={text}").inner.lr == number
    assert isinstance(config.parse_overrides([f"x={text}"])["x"], (int, float))


@pytest.mark.parametrize("text", ["1e-3x", "e3", "1e", "x1e3", "10^30", "1.2.3"])
def test_what_is_no_number_stays_a_word(text):
    assert config.parse_overrides([f"x={text}"])["x"] == text


@pytest.mark.parametrize("text", ["on", "off", "yes", "no", "2020-01-01", "2020-13-45", "12:30:00x"])
def test_words_that_yaml_1_1_would_change_stay_words(tmp_path, text):
    assert load(tmp_path, f"inner: {{word: {text}}}").inner.word == text


@pytest.mark.parametrize(("text", "value"), [("on", True), ("off", False), ("yes", True), ("False", False)])
def test_truth_values_take_words_too(tmp_path, text, value):
    assert load(tmp_path, f"inner: {{switch: {text}}}").inner.switch is value


BAD_FILES = {
    "duplicate": ("size: 1\ninner: {lr: 1}\nsize: 2", r"c\.yaml: duplicate key 'size' in line 3"),
    "duplicate inside": ("inner: {lr: 1, lr: 2}", r"c\.yaml: duplicate key 'lr' in line 1"),
    "unknown": ("sise: 3", r"c\.yaml: unknown key 'sise' \(did you mean 'size'\?\)"),
    "unknown inside": ("inner: {step: 3}", r"unknown key 'inner\.step' \(did you mean 'inner\.steps'\?\)"),
    "without its section": ("epochs: 3", r"unknown key 'epochs' \(did you mean 'inner\.epochs'\?\)"),
    "python tag": ("size: !!python/object/apply:os.system ['true']", r"c\.yaml: not valid YAML.*python"),
    "python name": ("size: !!python/name:os.system", r"c\.yaml: not valid YAML.*python"),
    "type": ("size: big", r"c\.yaml: size: .*integer.*'big'"),
    "type inside": ("inner: {lr: [1]}", r"c\.yaml: inner\.lr: .*number.*\[1\]"),
    "huge": ("inner: {lr: 10^30}", r"inner\.lr: .*'10\^30'"),
    "beyond": ("size: 1000000000000000000000000000000", r"size: .*less than or equal to 100"),
    "infinite": ("inner: {lr: 1e999}", r"inner\.lr: .*finite number"),
    "infinity": ("inner: {lr: .inf}", r"inner\.lr: .*finite number"),
    "a list": ("- 1", r"c\.yaml: expected a mapping.*list"),
    "a word": ("hello", r"c\.yaml: expected a mapping.*str"),
    "syntax": ("size: [1", r"c\.yaml: not valid YAML"),
    "a list as a key": ("? [1, 2]\n: 3", r"c\.yaml: line 1: \[1, 2\] cannot be a key"),
    "nested without end": ("size: " + "[" * 5000, r"c\.yaml: not valid YAML: too deeply nested"),
    "section as a value": ("inner: 5", r"c\.yaml: inner: .*5"),
    "nothing in a section": ("inner:", r"c\.yaml: inner: .*None"),
    "itself": ("inner: &x {lr: *x}", r"c\.yaml: not valid YAML.*recursive"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(tmp_path, case):
    text, message = BAD_FILES[case]
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, text)


def test_a_file_that_is_not_there_or_not_text(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read"):
        config.load(Outer, tmp_path / "nowhere.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"b\.yaml: cannot be read"):
        config.load(Outer, tmp_path / "b.yaml")


def test_an_empty_file_is_the_defaults(tmp_path):
    assert load(tmp_path) == Outer()


BAD_OVERRIDES = {
    "unknown": (["inner.lrr=1"], r"override inner\.lrr=1: unknown key \(did you mean 'inner\.lr'\?\)"),
    "section": (["inner=1"], r"unknown key"),
    "twice": (["size=1", "size=2"], r"override size: given twice"),
    "no value": (["size"], r"expected key=value"),
    "a comment": (["size=3 # three"], r"override size: '# three' would be a comment"),
    "a path": (["name=/data/set #2/rec"], r"override name: '#2/rec' would be a comment and be left out; with quotes"),
    "nothing but": (["size=#3"], r"override size: '#3' would be a comment"),
    "type": (["size=x"], r"defaults \+ overrides|c\.yaml \+ overrides: size: .*'x'"),
    "syntax": (["size=[1"], r"override 'size=\[1': not valid YAML"),
    "list as a key": (["size={[1]: 2}"], r"override .* cannot be a key"),
    "python": (["size=!!python/name:os.system"], r"override .*not valid YAML"),
    "duplicate": (["size={a: 1, a: 2}"], r"override .*duplicate key 'a'"),
}


@pytest.mark.parametrize("case", BAD_OVERRIDES)
def test_bad_overrides(tmp_path, case):
    overrides, message = BAD_OVERRIDES[case]
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, "", *overrides)


def test_overrides_stand_anywhere():
    arguments = ["--scenes", "a.tif", "tile.size=64", "b.tif", "--out", "o", "seed=1", "--config=x.yaml", "./d=1/s.tif"]
    others, overrides = config.split_overrides(arguments)
    assert overrides == ["tile.size=64", "seed=1"]
    assert others == ["--scenes", "a.tif", "b.tif", "--out", "o", "--config=x.yaml", "./d=1/s.tif"]


def test_an_override_wins_over_the_file(tmp_path):
    made = load(tmp_path, "inner: {lr: 1, names: [1, b]}", "inner.lr=2", "size=9")
    assert (made.inner.lr, made.inner.names, made.size) == (2, (1, "b"), 9)


def test_setting_one_of_two_keys_clears_the_other(tmp_path):
    assert load(tmp_path, "inner: {steps: 5}", "inner.epochs=2").inner.steps is None
    both = load(tmp_path, "inner: {steps: 5}", "inner.epochs=2", "inner.steps=7").inner
    assert (both.steps, both.epochs) == (7, 2)


def test_objects_do_not_change(tmp_path):
    with pytest.raises(ValueError, match="frozen"):
        load(tmp_path).size = 3


@pytest.mark.parametrize(("schema", "needed"), [(PackOptions, []), (PretrainOptions, ["train.epochs=2"]), (Outer, [])])
def test_the_written_configuration_reads_back(tmp_path, schema, needed):
    path = tmp_path / "resolved.yaml"
    made = config.load(schema, None, needed)
    path.write_text(config.to_yaml(made))
    assert config.load(schema, path) == made


@pytest.mark.parametrize("betas", ["[0.9, 1.0]", "[1.5, 0.9]", "[-0.1, 0.9]"])
def test_moments_that_never_fade_are_refused(betas):
    with pytest.raises(ConfigError, match=r"optim\.betas.*from 0 to below 1"):
        config.load(PretrainOptions, None, [f"optim.betas={betas}", "train.max_steps=1"])
    assert config.load(PretrainOptions, None, ["optim.betas=[0, 0.9]", "train.max_steps=1"]).optim.betas == (0, 0.9)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("brightness=[0, 0]", r"leaves nothing of an image.*\[1, 1\] switches it off"),
        ("contrast=[0, 1]", "leaves nothing of an image"),
        ("band_gain=[0, 0]", "leaves nothing of an image"),
        ("saturation=[-0.5, 1]", "below 0"),
        ("band_gain=[-1, 1]", "below 0"),
        ("contrast=[1.5, 0.5]", r"the smaller number first.*\[1, 1\]"),
        ("hue=[0.1, -0.1]", r"the smaller number first.*\[0, 0\]"),
    ],
)
def test_ranges_that_destroy_images_are_refused(given, message):
    with pytest.raises(ConfigError, match=f"augment.{given.partition('=')[0]}: .*{message}"):
        config.load(PretrainOptions, None, [f"augment.{given}", "train.max_steps=1"])


def test_parts_of_augmentation_can_be_switched_off():
    one = ("brightness", "contrast", "saturation", "band_gain")
    words = [f"augment.{name}=[1, 1]" for name in one] + [f"augment.{name}=[0, 0]" for name in ("hue", "band_offset")]
    augment = config.load(PretrainOptions, None, [*words, "train.max_steps=1"]).augment
    assert {augment.brightness, augment.saturation, augment.band_gain} == {(1, 1)}
    assert config.load(PretrainOptions, None, ["augment.saturation=[0, 0]", "train.max_steps=1"])


@pytest.mark.parametrize("schema", [PackOptions, PretrainOptions])
def test_every_key_says_what_it_means(schema):
    silent = [key for key, field in config.field_keys(schema).items() if not field.description]
    assert not silent


def test_differences_name_leaves():
    old, new = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 5}, "e": 4}
    assert config.differences(old, new) == ["a.c: 2 -> 5", "d: 3 -> None", "e: None -> 4"]


BAD_PACKING = {
    "four bands of jpeg": (["tile.bands=[1,2,3,4]"], "exactly 3 bands"),
    "no bands": (["tile.bands=[]"], "tile.bands is empty"),
    "limits without mode": (["stretch.limits=[[0,1]]"], "stretch.mode=limits"),
    "mode without limits": (["stretch.mode=limits"], "stretch.limits goes with"),
    "limits upside down": (["stretch.mode=limits", "stretch.limits=[[5,1]]"], "low < high"),
    "limits a band": (["stretch.mode=limits", "stretch.limits=[[0,1],[0,2]]"], "2 pairs for 3 bands"),
    "percentiles": (["stretch.percentiles=[99,1]"], "stretch.percentiles"),
    "steps apart": (["tile.size=8", "tile.step=1000"], "tile.step 1000"),
    "fraction": (["split.val_fraction=1"], "less than 1"),
    "negative": (["shards.records=0"], "shards.records"),
    "codec": (["tile.codec=webp"], "'jpeg', 'png', 'raw' or 'lz4'"),
    "workers": (["workers=-1"], "workers"),
    "seed": (["seed=99999999999999999999"], "seed"),
}


@pytest.mark.parametrize("case", BAD_PACKING)
def test_packing_keys_that_do_not_fit(case):
    overrides, message = BAD_PACKING[case]
    with pytest.raises(ConfigError, match=message):
        config.load(PackOptions, None, overrides)


def test_subsampling_may_be_a_number():
    assert config.load(PackOptions, None, ["tile.jpeg_subsampling=420"]).tile.jpeg_subsampling == "420"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("name='/data/set #2'", "/data/set #2"),
        ('name="a # b"', "a # b"),
        ("name=a#b", "a#b"),
        ("name=[a, 'b # c']", ["a", "b # c"]),
        ("name=", None),
        ("name={a: '#'}", {"a": "#"}),
    ],
)
def test_signs_of_comments_that_are_none(text, value):
    assert config.parse_overrides([text]) == {"name": value}


def test_a_path_from_home(monkeypatch):
    """bash leaves the tilde behind ``key=`` alone."""
    monkeypatch.setenv("HOME", "/home/u")
    words = ["run.dir=~/runs/a", "data.records=[~/x, {path: ~/y, label_weights: ~/w}, s3://b/~/z]", "model.init=~/w.pt"]
    options = config.load(PretrainOptions, None, [*words, "data.cache_dir=~/c", "train.max_steps=1"])
    assert options.run.dir == "/home/u/runs/a"
    assert [source.path for source in options.data.sources] == ["/home/u/x", "/home/u/y", "s3://b/~/z"]
    assert options.data.sources[1].label_weights == "/home/u/w"
    assert (options.model.init, options.data.cache_dir) == ("/home/u/w.pt", "/home/u/c")
    one = config.load(PretrainOptions, None, ["data.records=~/x", "data.label_weights=~/w", "train.max_steps=1"])
    assert (one.data.records, one.data.label_weights) == ("/home/u/x", "/home/u/w")
