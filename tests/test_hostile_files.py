"""Files from strangers, through the commands that read them."""

from pathlib import Path

import pytest
from test_training_commands import TEXT, TRAIN, invoke

import placesearch as ps

HOSTILE = {
    "a tag that runs code": "placement: !!python/object/apply:os.system ['touch hacked']",
    "a tag of its own": "placement: !include /etc/passwd",
    "a newer version": "placesearch: 2",
    "code that was not allowed": "backbone: evil:build",
    "a block that is code": "placement: [{site: unit1.bn2, block: 'evil:build'}]",
    "a path for a backbone": "backbone: ../../etc/passwd",
    "a path for a site": "placement: [{site: ../../etc/passwd, block: se, reduction: 2}]",
    "dunder names": "placement: [{site: __class__.__init__, block: se, reduction: 2}]",
    "a number without end": f"num_classes: 1{'0' * 10_000}",
    "too many classes": "num_classes: 1000000000000",
    "too large an input": "input_size: [3, 100000000, 100000000]",
    "too large a window": "placement: [{site: unit1.bn2, block: spatial, kernel_size: 999999}]",
    "too many units": "backbone: resnet18[999,999,999,999]",
    "not a number": "num_classes: .nan",
    "aliases that explode": "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n"
    + "\n".join(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12))
    + "\nplacement: *a11",
    "an alias that explodes in a name": "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n"
    + "\n".join(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12))
    + "\nplacement: [{site: *a11, block: se, reduction: 2}]",
    "merge keys that explode": "a0: &a0 {x: 1}\n"
    + "\n".join(f"a{n}: &a{n} {{<<: [{','.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 12)),
    "a hexadecimal number without end": f"num_classes: 0x1{'0' * 10_000}",
    "a version without end": f"placesearch: 0x1{'0' * 10_000}",
    "an alias of itself": "placement: &a [*a]",
    "nesting without end": f"placement: {'[' * 5000}",
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("command", ["train", "profile"])
@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_hostile_file_gets_one_line_and_nothing_of_it_is_run(workplace, capsys, monkeypatch, command, hostile):
    Path("evil.py").write_text("open('hacked', 'w')\ndef build(num_classes): ...\n")
    line = HOSTILE[hostile]
    key = line.split(":")[0]
    kept = [part for part in TEXT.split("placement:")[0].splitlines() if part.split(":")[0] != key]
    Path("a.yaml").write_text("\n".join([*kept, line]) + "\n")
    options = TRAIN[2:] if command == "train" else ["--allow", "mine:tiny", "--device", "cpu"]
    code, _, err = invoke(capsys, monkeypatch, command, "a.yaml", *options)
    assert (code, err.count("\n")) == (2, 1)
    assert len(err) < 1000
    assert "Traceback" not in err
    assert not Path("hacked").exists()
    assert not Path("reports").exists() or not list(Path("reports").rglob("*.safetensors"))


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "line",
    [
        "backbone: evil:build",
        "blocks: [se, 'evil:build']",
        "blocks: 5",
        "evaluate: evil:build",
        "jobs: *a11",
        "backbone: *a11",
        "blocks: *a11",
        "trials: *a11",
        f"epochs: 0x1{'0' * 10_000}",
        "weights: !!python/name:os.system",
    ],
)
def test_a_hostile_study_file_gets_one_line_too(workplace, capsys, monkeypatch, line):
    Path("evil.py").write_text("open('hacked', 'w')\ndef build(num_classes): ...\n")
    bomb = "\n".join(f"  - &a{n} [{','.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12))
    kept = "" if line.startswith("backbone") else "backbone: resnet18\n"
    text = f"sites:\n  - &a0 [x,x]\n{bomb}\n" if "*" in line else ""
    Path("s.yaml").write_text(f"{kept}{text}{line}\n")
    code, _, err = invoke(capsys, monkeypatch, "run", "s.yaml")
    assert (code, err.count("\n")) == (2, 1)
    assert len(err) < 1000
    assert not Path("hacked").exists()
    assert not Path("studies").exists()


def test_a_file_that_never_ends_is_refused(workplace, capsys, monkeypatch):
    code, _, err = invoke(capsys, monkeypatch, "profile", "/dev/zero")
    assert (code, err.count("\n")) == (2, 1)
    assert "/dev/zero has more than 4,000,000 characters" in err


def test_the_file_that_hostile_ones_were_made_of_is_fine(workplace):
    Path("a.yaml").write_text(TEXT)
    assert ps.Architecture.load("a.yaml", ["mine:tiny"]).build()
