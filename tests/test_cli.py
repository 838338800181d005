import errno
import io
import os
import pty
import re
import resource
import select
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner
from conftest import COMMAND, reproducible

from placesearch.cli.commands import cli
from placesearch.cli.view import make_view
from placesearch.placement import Placement
from placesearch.records import TrialEnded, TrialRecord

TINY = ["run", "--backbone", "mine:tiny", "--input-size", "32", "--batch-size", "128", "--reductions", "2,4"]
SLOW = [*TINY, "--epochs", "60", "--jobs", "1"]  # long enough to be met in the middle of a trial


def table(name):
    return reproducible(pd.read_csv(Path("reports") / name / "trials.csv"))


def finished_trials(name):
    """Trials that the journal holds as ended by themselves: its records of state COMPLETE."""
    journal = Path("studies") / name / "journal.log"
    return journal.read_text().count('"state":1') if journal.exists() else 0


def wait_for_trials(process, name, count):
    deadline = time.monotonic() + 120
    while finished_trials(name) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_run_ends_with_front_reports_and_best_config(call, call_here):
    code, out, err = call(*TINY, "--epochs", "1", "--trials", "5", "--name", "s", "--jobs", "2")
    assert (code, err) == (0, "")
    assert "5/5" in out
    assert "front of s" in out
    assert "reports/s/architectures/best.yaml" in out
    for command in ("dashboard s", "confirm s --allow mine:tiny", "export s --format py --allow mine:tiny"):
        assert f"\n  placesearch {command} " in out
    assert table("s").trial.tolist() == list(range(5))
    assert "\x1b" not in out  # plain lines in a pipe

    code, out, err = call_here(*TINY, "--epochs", "1", "--trials", "5", "--name", "s", "--quiet")
    assert (code, out, err) == (0, "", "")

    code, out, _ = call_here("studies")
    assert code == 0
    assert "s " in out

    before = table("s")
    Path("reports/s/trials.csv").unlink()
    assert call_here("report", "s")[0] == 0
    pd.testing.assert_frame_equal(table("s"), before)


@pytest.mark.slow
def test_a_study_file_is_run_and_its_code_only_if_allowed(call):
    Path("mine.yaml").write_text("backbone: mine:tiny\ntrials: 1\nepochs: 1\ninput_size: 32\nname: s\n")
    code, out, err = call("run", "mine.yaml")
    assert (code, out) == (2, "")
    assert "--allow mine:tiny" in err
    code, out, err = call("run", "mine.yaml", "--allow", "mine:tiny", "--name", "other")
    assert (code, err) == (0, "")
    assert len(table("other")) == 1  # the option wins over the file


def test_stopping_early_is_an_option_of_the_command_and_shown_in_a_line(workplace, capsys):
    flags = ["--epochs", "2", "--trials", "1", "--jobs", "1", "--name", "s", "--stop-early"]
    assert CliRunner().invoke(cli, [*TINY, *flags]).exit_code == 0
    assert "stop_early: true" in Path("studies/s/study.yaml").read_text()
    stopped = TrialRecord(
        trial=7, state="PRUNED", placement=Placement(), curve=(0.4321,), stopped_after=3, epochs=5, forecast=0.5
    )
    with make_view(quiet=False) as view:
        view(TrialEnded(stopped))
    assert "trial 7: stopped early, at 43.21 % after 3 of 5 epochs  none" in capsys.readouterr().out


def test_if_every_trial_fails_the_exit_code_is_1(call_here):
    options = ["--input-size", "32", "--trials", "2", "--epochs", "1", "--jobs", "1"]
    code, out, err = call_here("run", "--backbone", "mine:broken", *options)
    assert (code, err) == (1, "")
    assert "2 of 2 trials failed; the first: the training loss became" in out
    assert table("mine-broken-digits").state.tolist() == ["FAIL", "FAIL"]


@pytest.mark.slow
@pytest.mark.parametrize(("how", "jobs"), [(signal.SIGINT, "1"), (signal.SIGTERM, "2")])
def test_ctrl_c_and_sigterm_end_soon_with_reports_and_the_same_command_goes_on(call, start, how, jobs):
    command = [*SLOW[:-1], jobs, "--trials", "4"]
    process = start(*command, "--name", "cut")
    wait_for_trials(process, "cut", 2)
    time.sleep(0.3)
    pressed = time.monotonic()
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert time.monotonic() - pressed < 30  # a bound for a busy machine; the closing note has the measured time
    assert err.count("\n") == 1
    assert "reports/cut/" in err
    assert len(table("cut")) == finished_trials("cut")
    assert workers_here() == []
    assert call(*command, "--name", "cut")[0] == 0
    assert call(*command, "--name", "whole")[0] == 0
    pd.testing.assert_frame_equal(table("cut"), table("whole"))


@pytest.mark.slow
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_kill_9_in_mid_trial_loses_no_finished_trial(call, start, jobs):
    command = [*TINY, "--epochs", "60", "--trials", "5", "--jobs", jobs]
    for kills in range(3):
        process = start(*command, "--name", "killed")
        wait_for_trials(process, "killed", kills + 1)
        time.sleep(0.1 * kills)
        kept = finished_trials("killed")
        process.kill()
        process.wait()
        assert finished_trials("killed") >= kept
    code, _, err = call(*command, "--name", "killed")
    assert (code, err) == (0, "")
    assert call(*command, "--name", "whole")[0] == 0
    pd.testing.assert_frame_equal(table("killed"), table("whole"))


def processes_here(part=b""):
    """Processes in this folder, but this one, by what their command line holds."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes()
                here = (entry / "cwd").resolve() == Path.cwd()
            except OSError:
                continue
            if part in line and here:
                found.append(entry.name)
    return found


def workers_here():
    return processes_here(b"placesearch.evaluation.worker")


@pytest.mark.slow
def test_workers_end_when_the_process_that_began_them_is_killed(start):
    process = start(*TINY, "--epochs", "2000", "--trials", "4", "--jobs", "2", "--name", "s")
    deadline = time.monotonic() + 60
    while len(workers_here()) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(workers_here()) == 2
    process.kill()
    process.wait()
    while workers_here() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert workers_here() == []


@pytest.mark.slow
def test_what_hangs_in_a_worker_and_what_that_started_end_when_the_main_process_is_killed(start):
    process = start(*TINY, "--evaluate", "mine:hangs", "--trials", "4", "--jobs", "2", "--name", "s")
    deadline = time.monotonic() + 60
    while not processes_here(b"sleep") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_here(b"sleep")
    process.kill()
    process.wait()
    began = time.monotonic()
    while processes_here() and time.monotonic() < began + 20:
        time.sleep(0.1)
    assert processes_here() == []


@pytest.mark.slow
def test_a_second_sigterm_does_not_keep_the_reports_from_being_written(start):
    process = start(*SLOW, "--trials", "4", "--name", "cut")
    wait_for_trials(process, "cut", 1)
    process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) in (130, -signal.SIGTERM)  # the interpreter may be past its handlers
    assert len(table("cut")) == finished_trials("cut")


@pytest.mark.slow
def test_a_full_disk_gets_one_line_and_no_finished_trial_is_lost(call):
    """The journal may not grow beyond a size; the write that would is torn, as on a full disk."""
    command = [*TINY, "--epochs", "1", "--jobs", "1", "--name", "full", "--trials", "6"]
    assert call(*command[:-1], "2")[0] == 0
    room = Path("studies/full/journal.log").stat().st_size + 4500

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))

    code, _, err = call(*command, preexec_fn=limit)
    assert code == 2
    assert err.count("\n") == 1
    assert os.strerror(errno.EFBIG) in err
    kept = finished_trials("full")
    assert kept >= 2
    assert call(*command)[0] == 0
    assert call(*command[:-4], "--name", "whole", "--trials", "6")[0] == 0
    pd.testing.assert_frame_equal(table("full"), table("whole"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run"], "no backbone given"),
        (["run", "--backbone", "resnet19"], "did you mean 'resnet18'"),
        ([*TINY, "--data", "cifer10"], "did you mean 'cifar10'"),
        ([*TINY, "--trials", "0"], "trials"),
        ([*TINY, "--trial-timeout", "soon"], "trial-timeout: 'soon' is no duration such as 90s, 10m or 2h"),
        ([*TINY, "--kernel-sizes", "4"], "not odd"),
        ([*TINY, "--jobs", "9"], "jobs"),
        ([*TINY, "--max-params", "5%"], "'5%' is no limit such as +5%"),
        ([*TINY, "--max-macs", "1k"], "macs without any block, more than --max-macs 1k"),
        ([*TINY, "--objectives", "accuracy,flops"], "unknown objective 'flops'"),
        ([*TINY, "--weights", "nothing.pt"], "cannot read weights nothing.pt"),
        ([*TINY, "--weights", "mine.py"], "mine.py is damaged, or holds more than tensors"),
        ([*TINY, "--weights", "DEFAULT"], "no DEFAULT weights"),
        (["profile", "nothing.yaml"], "cannot read nothing.yaml"),
        (["profile", "mine.py"], "mine.py is damaged"),
        (["sites", "--backbone", "vit_b_16"], "VisionTransformer has no feature maps"),
        (["sites", "--backbone", "mine:tiny", "--blocks", "cbma"], "unknown block 'cbma'; did you mean 'cbam'"),
        ([*TINY, "--trails", "3"], "No such option"),
        (["run", "nothing.yaml"], "cannot read nothing.yaml"),
        (["report", "nothing"], "no study 'nothing'"),
        (["confirm", "nothing"], "no study 'nothing'"),
        (["confirm", "nothing", "--seeds", "1"], "seeds 1 is not allowed; allowed are 2 to 1,000"),
        (["confirm", "nothing", "--epochs", "0"], "epochs 0 is not allowed"),
        (["confirm", "nothing", "--top", "few"], "--top"),
        (["run", "--backbone", "mine:tiny", "--reductions", "16"], "no site can take reduction 16"),
        (["serach"], "No such command"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(call_here, arguments, says):
    code, out, err = call_here(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("placesearch: ")
    assert err.count("\n") == 1
    assert says in err
    assert not Path("studies").exists()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which not even root can make anything")
def test_a_folder_that_cannot_be_written_to_gets_one_line(call_here, monkeypatch):
    monkeypatch.chdir("/proc")
    code, out, err = call_here("run", "--backbone", "resnet18", "--input-size", "32")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "cannot write to studies" in err


@pytest.mark.skipif(os.getuid() == 0 and not shutil.which("setpriv"), reason="root needs setpriv to heed permissions")
@pytest.mark.slow
def test_a_study_in_a_folder_that_became_read_only_gets_one_line_and_is_left_as_it_is(workplace):
    command = [*TINY, "--epochs", "1", "--jobs", "1", "--name", "s"]
    assert CliRunner().invoke(cli, [*command, "--trials", "1"]).exit_code == 0
    files = {path: path.read_bytes() for path in Path("studies").rglob("*") if path.is_file()}
    paths = [workplace, *workplace.rglob("*")]
    heeding = ["setpriv", "--bounding-set", "-dac_override"] if os.getuid() == 0 else []
    for path in paths:
        path.chmod(0o555)
    try:
        done = subprocess.run(
            [*heeding, COMMAND, *command, "--trials", "2"], capture_output=True, text=True, timeout=120
        )
    finally:
        for path in paths:
            path.chmod(0o755)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("placesearch: cannot write to ")
    assert done.stderr.endswith("studies/s/run.lock: Permission denied\n")
    assert {path: path.read_bytes() for path in Path("studies").rglob("*") if path.is_file()} == files
    assert CliRunner().invoke(cli, [*command, "--trials", "2"]).exit_code == 0
    assert table("s").trial.tolist() == [0, 1]


def test_a_file_where_a_folder_should_be_gets_one_line(call_here):
    Path("studies").write_text("in the way")
    code, out, err = call_here(*TINY)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "studies" in err
    assert Path("studies").read_text() == "in the way"


def test_sites_are_listed_with_costs_and_the_attention_that_is_there_already(workplace):
    out = CliRunner().invoke(cli, ["sites", "--backbone", "mine:tiny", "--input-size", "32", "--format", "csv"]).output
    frame = pd.read_csv(io.StringIO(out)).set_index("site")
    assert frame.loc["unit1.bn2", ["kinds", "channels", "height", "width"]].tolist() == ["residual", 8, 4, 4]
    assert {"eca_params", "spatial_macs", "cbam_bn_params"} <= set(frame.columns)
    assert frame.loc["unit1.bn2", ["se_macs", "se_params"]].tolist() == [16, 2 * 8 + 1 + 8]  # r=16 becomes r=8
    assert frame.loc["unit1.bn2", ["spatial_macs", "spatial_params"]].tolist() == [2 * 49 * 16, 2 * 49 + 1]

    out = CliRunner().invoke(cli, ["sites", "--backbone", "mobilenet_v3_small", "--blocks", "eca"]).output
    assert "eca" in out
    assert "cbam" not in out
    assert "\nfeatures\n├─ 3             block stage  24x28x28" in out
    assert "attention that it has already, in 9 modules: features.1.block.1," in out


def test_an_architecture_is_profiled_beside_the_plain_backbone(workplace):
    text = "placesearch: 1\nbackbone: mine:tiny\nnum_classes: 10\ninput_size: [3, 32, 32]\n"
    Path("a.yaml").write_text(text + "placement: [{site: unit1.bn2, block: se, reduction: 4}]\n")
    command = ["profile", "a.yaml", "--allow", "mine:tiny", "--device", "cpu", "--batch-size", "2"]
    out = CliRunner().invoke(cli, command).output
    assert "mine:tiny: unit1.bn2=se(r=4)" in out
    assert "latency: batch 2, " in out
    assert ", one thread, inference mode" in out
    out = CliRunner().invoke(cli, [*command, "--format", "csv"]).output
    frame = pd.read_csv(io.StringIO(out)).set_index("cost")
    assert frame.loc["params", ["plain", "candidate"]].tolist() == [2682, 2682 + 2 * 8 * 2 + 2 + 8]
    assert frame.loc["macs", "candidate"] - frame.loc["macs", "plain"] == 2 * 8 * 2
    row = frame.loc["latency_ms"]
    assert 0 < row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
    assert frame.loc["macs", ["ratio_low", "ratio_high"]].isna().all()


def test_operators_that_nobody_counts_are_named_wherever_costs_are_shown(workplace):
    Path("a.yaml").write_text("placesearch: 1\nbackbone: mine:odd\nnum_classes: 10\ninput_size: [3, 32, 32]\n")
    out = CliRunner().invoke(cli, ["profile", "a.yaml", "--allow", "mine:odd", "--device", "cpu"]).output
    assert "macs_full is too low: no rule counts" in out
    assert "cumprod" in out
    command = [*TINY, "--epochs", "1", "--trials", "1", "--jobs", "1", "--backbone", "mine:odd"]
    out = CliRunner().invoke(cli, command).output
    assert "note: operators that no rule counts, so that macs_full is too low: " in out
    assert "cumprod" in out


def test_every_command_and_option_has_help():
    for command in cli.commands.values():
        assert command.help
        for parameter in command.params:
            assert parameter.param_type_name == "argument" or parameter.help


@pytest.mark.slow
def test_a_terminal_gets_a_live_view(workplace):
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [str(COMMAND), *TINY, "--epochs", "40", "--trials", "3", "--name", "t"],
        stdout=terminal,
        stderr=terminal,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80", "CI": ""},
    )
    os.close(terminal)
    seen = b""
    while select.select([controller], [], [], 60)[0]:
        try:
            chunk = os.read(controller, 65536)
        except OSError:  # the other end was closed
            break
        if not chunk:
            break
        seen += chunk
    os.close(controller)
    assert process.wait(timeout=60) == 0
    text = seen.decode()
    for part in ("epoch ", "front of observed accuracies after 3 trials", "/3 trials", "front of t"):
        assert part in text


def test_an_error_of_our_own_is_one_line_with_a_place_for_its_traceback(call_here, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr("placesearch.cli.commands.load_study", broken)
    code, out, err = call_here("report", "s")
    assert (code, out) == (70, "")
    line = re.fullmatch(r"placesearch: ZeroDivisionError: two; its traceback is in (.*)\n", err)
    written = Path(line[1])
    assert written.read_text().splitlines()[-2:] == ["ZeroDivisionError: two", "lines"]
    written.unlink()
    monkeypatch.setattr("placesearch.cli.commands.tempfile.NamedTemporaryFile", full_disk)
    code, out, err = call_here("report", "s")
    assert code == 70
    assert err == "placesearch: ZeroDivisionError: two; its traceback could not be written: No space left on device\n"


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("size", "shown"), [("64", "64x64"), ("64x96", "64x96"), ("3x96x64", "96x64"), ("1x64x64", "takes? ")]
)
def test_sites_takes_any_input_size(call_here, size, shown):
    code, out, err = call_here("sites", "--backbone", "resnet18", "--input-size", size)
    if code:
        assert code == 2
        assert err.count("\n") == 1
    else:
        assert f"sites of resnet18 at {shown}" in out


def test_what_is_no_input_size_is_refused_by_every_command(call_here):
    for command in (["run", "--backbone", "resnet18"], ["sites", "--backbone", "resnet18"]):
        code, _, err = call_here(*command, "--input-size", "64x")
        assert code == 2
        assert "is no input size such as 64, 256x512 or 1x28x28" in err


def test_additions_without_a_site_are_named(call_here, workplace):
    (workplace / "gated.py").write_text(
        "from torch import nn\nfrom torch.nn.functional import relu\n\n\n"
        "class Unit(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.conv = nn.Conv2d(4, 4, 3, padding=1)\n\n"
        "    def forward(self, x):\n"
        "        return x + relu(self.conv(x))\n\n\n"
        "def net(num_classes):\n"
        "    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes)]\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), Unit(), Unit(), *head)\n"
    )
    code, out, _ = call_here("sites", "--backbone", "gated:net", "--input-size", "16")
    assert code == 0
    assert "note: 2 residual additions" in out
