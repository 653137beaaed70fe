"""GPUs slowed down by heat or power are reported with the rows; `nvidia-smi` is a script here."""

from __future__ import annotations

import csv
import time

import pytest

from bottleneck.benchmark import __main__ as benchmark
from bottleneck.benchmark import decode, slowed, table
from bottleneck.core.errors import UserError

HOT = "0, GPU-aa11, 86, 420, 0x0000000000000020\n1, GPU-bb22, 61, 1980, 0x0000000000000004\n"
FINE = "0, GPU-aa11, 60, 1980, 0x0000000000000000\n1, GPU-bb22, 61, 1980, 0x0000000000000004\n"
UNKNOWN = 'Field "clocks_event_reasons.active" is not a valid field to query.'


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Write a script of that name, the only program on PATH. Returns the file that it prints by default."""
    folder, answer = tmp_path / "bin", tmp_path / "answer"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def write(first="", text=HOT):
        answer.write_text(text)
        script = folder / "nvidia-smi"
        script.write_text(f'#!/bin/sh\n{first}\nwhile read -r line; do echo "$line"; done < {answer}\n')
        script.chmod(0o755)
        return answer

    return write


def found():
    """The warning about a block that does nothing."""
    with slowed.watch() as readings:
        pass
    return slowed.warning(readings)


@pytest.fixture
def rows_of_a_gpu(monkeypatch):
    """`benchmark decode` returns a row of a GPU and one of a CPU."""
    rows = [table.row("decode", "case", "ours", [1.0], device=device) for device in ("cuda", "cpu")]
    monkeypatch.setattr(decode, "run", lambda args: rows)
    monkeypatch.setattr(table, "hardware", lambda device="cpu": f"a {device}")


def test_a_slowed_gpu_is_named_under_the_table_and_in_its_rows(nvidia_smi, rows_of_a_gpu, tmp_path, capsys):
    nvidia_smi()
    assert benchmark.main(["decode", "--csv", str(tmp_path / "rows.csv")]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("warning: ") and "SW thermal slowdown" in last and "86 °C, 420 MHz" in last
    assert "GPU 0" in last and "GPU 1" not in last
    with open(tmp_path / "rows.csv", newline="") as f:
        gpu, cpu = csv.DictReader(f)
    assert f"warning: {gpu['slowed']}" == last and cpu["slowed"] == ""


@pytest.mark.parametrize("installed", [True, False])
def test_nothing_is_said_of_gpus_at_full_speed_or_without_nvidia_smi(nvidia_smi, rows_of_a_gpu, capsys, installed):
    if installed:
        nvidia_smi(text=FINE)
    assert benchmark.main(["decode"]) == 0
    out, err = capsys.readouterr()
    assert "warning" not in out and err == ""


def test_rows_of_the_cpu_have_no_warning(nvidia_smi, capsys):
    nvidia_smi()
    assert benchmark.main(["decode", "--shape", "tiny", "--ranks", "8", "--batch", "1", "--repeats", "1"]) == 0
    assert "warning" not in capsys.readouterr().out


def test_older_drivers_know_the_field_by_another_name(nvidia_smi):
    nvidia_smi(f"case \"$*\" in *clocks_event_reasons*) echo '{UNKNOWN}'; exit 2;; esac")
    assert "SW thermal slowdown" in found()
    nvidia_smi('case "$*" in *clocks_throttle_reasons*) exit 2;; esac')
    assert "SW thermal slowdown" in found()


@pytest.mark.parametrize("first", ["exit 9", f"echo '{UNKNOWN}'; exit 2", "printf '\\377, 1\\n'; exit 0", "kill -9 $$"])
def test_a_broken_answer_says_nothing(nvidia_smi, first):
    nvidia_smi(first)
    assert found() == ""


@pytest.mark.parametrize("text", ["", "no devices were found\n", "0, GPU-a, 86, 420\n", "0, GPU-a, 86, 420, [N/A]\n"])
def test_lines_without_all_numbers_count_as_no_reading(nvidia_smi, text):
    nvidia_smi(text=text)
    assert found() == ""
    nvidia_smi(text=text + HOT)
    assert "GPU 0 in " in found() and "86 °C" in found()


def test_a_program_that_hangs_is_given_up(nvidia_smi, monkeypatch):
    nvidia_smi("exec /bin/sleep 60")
    monkeypatch.setattr(slowed, "PATIENCE", 0.1)
    began = time.monotonic()
    assert found() == "" and time.monotonic() - began < 30


def test_exactly_four_reasons_are_a_fault():
    """Of the bits of nvmlClocksEventReasons, idle, application clocks, the power cap, sync boost and the display's
    clocks are chosen or normal."""
    bad = {
        bit
        for bit in (1 << i for i in range(12))
        if slowed.warning([slowed.Reading(0, "GPU-a", temperature=50, clock=1980, reasons=bit)])
    }
    assert bad == {0x8, 0x20, 0x40, 0x80}


def test_the_warning_sums_up_the_slowed_readings_of_each_gpu():
    readings = [slowed.Reading(g, f"GPU-{g}", t, c, r) for g, t, c, r in [
        (1, 70, 1900, 0x4), (0, 86, 675, 0x20), (1, 90, 300, 0x88), (0, 99, 1980, 0x0), (0, 84, 420, 0x44),
    ]]  # fmt: skip
    said = slowed.warning(readings)
    assert "GPU 0 in 2 of 3 readings (SW thermal slowdown, HW thermal slowdown; 86 °C, 420 to 675 MHz)" in said
    assert "GPU 1 in 1 of 2 readings (HW slowdown, HW power brake; 90 °C, 300 MHz)" in said


@pytest.mark.parametrize(
    "devices, indices",
    [
        (None, [0, 1]),
        ("1", [1]),
        ("1,0", [0, 1]),
        ("GPU-bb", [1]),
        ("GPU-aa11, 1", [0, 1]),
        ("", []),
        ("-1", []),
        ("1,7,0", [1]),
        ("NoDevFiles", []),
        ("GPU-cc", []),
    ],
)
def test_only_visible_gpus_count(devices, indices):
    """As the CUDA C++ programming guide says of CUDA_VISIBLE_DEVICES."""
    assert sorted(r.gpu for r in slowed.visible(slowed._parse(HOT), devices)) == indices


def test_a_neighbour_s_gpu_is_not_reported(nvidia_smi, monkeypatch):
    nvidia_smi()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert found() == ""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-aa11")
    assert "GPU 0" in found()


def test_gpus_are_read_at_the_start_in_between_and_at_the_end(nvidia_smi, monkeypatch):
    answer = nvidia_smi(text=FINE)

    def wait_for(count, readings):
        end = time.monotonic() + 30
        while len(readings) < count and time.monotonic() < end:
            time.sleep(0.01)

    monkeypatch.setattr(slowed, "EVERY", 1e6)
    with slowed.watch() as readings:
        wait_for(2, readings)
        answer.write_text(HOT)
    assert [r.reasons for r in readings] == [0, 4, 0x20, 4]
    answer.write_text(FINE)
    monkeypatch.setattr(slowed, "EVERY", 0.01)
    with slowed.watch() as readings:
        wait_for(2, readings)
        answer.write_text(HOT)
        wait_for(len(readings) + 4, readings)
        answer.write_text(FINE)
        wait_for(len(readings) + 4, readings)
    assert readings[0].reasons == readings[-2].reasons == 0 and "GPU 0" in slowed.warning(readings)


def test_times_of_a_slowed_gpu_are_not_written_where_others_read_them(nvidia_smi):
    """What `heads --write-table` and `cost` call before they write; a card that was hot only before counts too."""
    answer = nvidia_smi()
    with slowed.watch():
        for _ in range(500):
            if slowed._watched[0]:
                break
            time.sleep(0.01)
        answer.write_text(FINE)
        with pytest.raises(UserError, match=r"measured.csv: not written, .*86 °C, 420 MHz"):
            slowed.check_times("measured.csv")
    slowed.check_times("measured.csv")
