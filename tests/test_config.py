import pytest

from placesearch.config import StudyConfig, full_input_size, limit_of, read_definition
from placesearch.errors import InputError


def test_lists_are_read_as_the_command_line_and_yaml_give_them():
    config = StudyConfig(backbone="resnet18", blocks="se", reductions="4, 8", kernel_sizes=[3])
    assert (config.blocks, config.reductions, config.kernel_sizes) == (("se",), (4, 8), (3,))
    assert StudyConfig(**config.plain()) == config


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("1.5m", 90), ("2h", 7200), ("1d", 86400), (45, 45)]
)
def test_durations_have_units(text, seconds):
    assert StudyConfig(backbone="resnet18", timeout=text).timeout == seconds


@pytest.mark.parametrize(
    ("bad", "good"),
    [
        ({"trials": 0}, {"trials": 1}),
        ({"trials": "many"}, {"trials": "12"}),
        ({"jobs": "many"}, {"jobs": "auto"}),
        ({"jobs": "9"}, {"jobs": "8"}),
        ({"jobs": 0}, {"jobs": 1}),
        ({"timeout": "soon"}, {"timeout": "10m"}),
        ({"timeout": "0s"}, {"timeout": "1s"}),
        ({"kernel_sizes": "4"}, {"kernel_sizes": "5"}),
        ({"kernel_sizes": "-3"}, {"kernel_sizes": "3"}),
        ({"reductions": "0"}, {"reductions": "1"}),
        ({"reductions": "4,x"}, {"reductions": "4,5"}),
        ({"reductions": "4,4"}, {"reductions": "4,8"}),
        ({"objectives": "macs"}, {"objectives": "accuracy"}),
        ({"objectives": "accuracy,mac"}, {"objectives": "accuracy,macs"}),
        ({"sites": "everywhere"}, {"sites": "residual"}),
        ({"stem": "tiny"}, {"stem": "small"}),
        ({"name": "a/b"}, {"name": "a-b"}),
        ({"name": "../up"}, {"name": "up"}),
        ({"seed": -1}, {"seed": 1}),
        ({"backbones": "resnet18"}, {}),
    ],
)
def test_a_bad_value_gets_one_line_and_its_neighbour_passes(bad, good):
    StudyConfig(backbone="resnet18", **good)
    with pytest.raises(InputError) as caught:
        StudyConfig(backbone="resnet18", **bad)
    assert "\n" not in str(caught.value)
    assert next(iter(bad)).replace("_", "-") in str(caught.value) or "backbones" in str(caught.value)


def test_a_study_file_names_the_study(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("backbone: resnet18\nkernel-sizes: [3]\n")
    assert read_definition(path) == {"backbone": "resnet18", "kernel_sizes": [3], "name": "mine"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("backbone: [", "damaged, line"),
        ("- resnet18", "no mapping"),
        ("backbone: resnet18\nepoch: 3\n", "did you mean 'epochs'"),
        ("!!python/object/apply:os.system [echo]", "damaged"),
        ("\x00", "damaged"),
    ],
)
def test_a_damaged_study_file_is_refused_in_one_line(tmp_path, text, says):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match="mine.yaml") as caught:
        read_definition(path)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_more_jobs_than_a_study_allows_are_refused_and_one_can_allow_more():
    with pytest.raises(
        InputError, match="jobs: 9 is no number of workers here; expected 1 to 8, or auto; .*--max-jobs 9"
    ):
        StudyConfig(backbone="resnet18", jobs="9")
    assert StudyConfig(backbone="resnet18", jobs="9", max_jobs=9).jobs == 9
    assert [StudyConfig(backbone="resnet18", max_jobs=most).lag for most in (1, 4, 8, 9, 100)] == [0, 3, 7, 17, 199]


def test_a_password_is_in_no_text_of_a_config():
    config = StudyConfig(backbone="resnet18", storage="postgresql://ann:hunter2@db.example/studies")
    assert config.plain()["storage"] == "postgresql://ann@db.example/studies"
    assert "hunter2" not in repr(config) + str(config) + config.model_dump_json() + str(config.model_dump())
    assert StudyConfig(**config.plain()).storage.shown == config.storage.shown
    with pytest.raises(InputError) as caught:
        StudyConfig(backbone="resnet18", storage="postgres://ann:hunter2@db.example/studies")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "expected", "size"),
    [
        (64, 64, (3, 64, 64)),
        ("64", 64, (3, 64, 64)),
        ("256x512", (256, 512), (3, 256, 512)),
        ("1x28x28", (1, 28, 28), (1, 28, 28)),
        ([3, 64, 32], (3, 64, 32), (3, 64, 32)),
    ],
)
def test_an_input_size_is_a_number_a_text_or_a_list(given, expected, size):
    assert StudyConfig(backbone="resnet18", input_size=given).input_size == expected
    assert full_input_size(expected, 3) == size
    again = StudyConfig(**StudyConfig(backbone="resnet18", input_size=given).plain())
    assert again.input_size == expected


@pytest.mark.parametrize("given", ["", "64x", "axb", "1x2x3x4", "7", "0x64x64", "9000", 64.5, [], True, [64, "x"]])
def test_what_is_no_input_size_is_refused_in_a_line(given):
    with pytest.raises(InputError) as refused:
        StudyConfig(backbone="resnet18", input_size=given)
    assert "\n" not in str(refused.value)


SAME_IN_BOTH = {
    "max_latency": [("3.5", 3.5), ("4", 4)],
    "max_params": [("12000000", 12000000), ("1.2e7", "1.2e7"), ("1.2e7", 1.2e7)],
    "timeout": [("90", 90), ("90", 90.0), ("1.5", 1.5)],
    "reductions": [("8", 8), ("4,8", [4, 8])],
    "kernel_sizes": [("3", 3), ("3,7", [3, 7])],
    "name": [("2024", 2024)],
    "data": [("2024", 2024)],
    "jobs": [("2", 2)],
    "seed": [("3", 3)],
    "trials": [("10", 10)],
    "blocks": [("se", "se"), ("se,cbam", ["se", "cbam"])],
    "gpus_per_worker": [("0.5", 0.5), ("1", 1)],
    "device": [("0", 0)],
}


@pytest.mark.parametrize("field", sorted(SAME_IN_BOTH))
def test_what_the_command_line_takes_a_study_file_takes_as_well(field):
    for text, value in SAME_IN_BOTH[field]:
        one, other = (getattr(StudyConfig(backbone="resnet18", **{field: given}), field) for given in (text, value))
        same = limit_of(one, 1) == limit_of(other, 1) if field.startswith("max_") else one == other
        assert same, (text, value)


@pytest.mark.parametrize("field", ["trials", "seed", "epochs", "name", "timeout", "max_params", "until", "reductions"])
def test_a_truth_value_is_no_number_and_no_text(field):
    with pytest.raises(InputError, match=rf"^{field.replace('_', '-')}: 'true' is no value for it"):
        StudyConfig(backbone="resnet18", **{field: True})


def test_the_sampler_is_checked_where_the_config_is():
    with pytest.raises(InputError, match="unknown sampler 'tpa'; did you mean 'tpe'"):
        StudyConfig(backbone="resnet18", sampler="tpa")
