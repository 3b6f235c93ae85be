"""--device adb:SERIAL, against a fake adb: addresses, words and codes through its shell, and what is wrong with it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from adb_fake import Fake
from hypothesis import given, settings
from hypothesis import strategies as st

from thinet_deploy.devices import android as android_site
from thinet_deploy.devices.adb import Adb
from thinet_deploy.devices.address import find_device
from thinet_deploy.errors import InputError, MissingError, ThinetDeployError

WORDS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)


@pytest.mark.parametrize("serial", ["", "FP5", "emulator-5554", "192.168.1.5:5555", "adb-1A2B-x._adb-tls-connect._tcp"])
def test_addresses(serial: str) -> None:
    device = find_device(f"adb:{serial}")
    assert device == Adb(serial)
    assert device.name == f"adb:{serial}"


@pytest.mark.parametrize("serial", ["-s", "-H evil", "a b", "a;id", "$(id)", "a\nb", "`id`", "../x", "a'b"])
def test_what_is_no_serial_is_refused_before_adb_is_called(serial: str) -> None:
    with pytest.raises(InputError, match="adb:SERIAL was expected") as stop:
        find_device(f"adb:{serial}")
    assert stop.value.exit_code == 2


@settings(deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=4))
def test_a_devices_shell_gets_back_the_words_that_were_given(words: list[str]) -> None:
    *_, name, serial, shell, raw, line = Adb("FP5").argv(words)
    assert (name, serial, shell, raw) == ("-s", "FP5", "shell", "-T")
    shown = subprocess.run(["sh", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True)
    assert shown.stdout.decode("utf-8", "surrogateescape").split("\0")[:-1] == words


@pytest.mark.parametrize("code", [0, 1, 2, 77])
def test_a_command_has_its_own_code_and_words(phone: Fake, code: int) -> None:
    done = Adb("FP5").run(["sh", "-c", f"cat; echo oh >&2; exit {code}"], b"bytes \0\r\n\xff")
    assert (done.code, done.out, done.err) == (code, b"bytes \0\r\n\xff", "oh\n")


def test_a_program_that_is_killed_is_known_as_such(phone: Fake) -> None:
    assert Adb().run(["sh", "-c", "kill -9 $$"]).code == -9
    assert Adb().run(["no-such-program"]).code == 127


@pytest.mark.parametrize(
    ("devices", "serial", "words"),
    [
        ({}, "FP5", "adb:FP5 is not connected"),
        ({}, "", "No Android device is connected"),
        ({"FP5": "unauthorized"}, "FP5", "adb:FP5 has not allowed this computer to debug it"),
        ({"FP5": "offline"}, "FP5", "adb:FP5 is offline"),
        (
            {"FP5": "insufficient permissions for device: missing udev rules? user is in the plugdev group"},
            "FP5",
            "This user may not use the USB device of adb:FP5",
        ),
        ({"FP5": "device", "FP4": "device"}, "", "Several Android devices are connected"),
        ({"FP5": "recovering"}, "FP5", "The connection to adb:FP5 was cut: error: device recovering"),
    ],
)
def test_what_is_wrong_with_a_device_is_said(phone: Fake, devices: dict[str, str], serial: str, words: str) -> None:
    phone.set(devices=devices)
    with pytest.raises(ThinetDeployError, match=words) as stop:
        android_site.reach(find_device(f"adb:{serial}"))
    assert stop.value.exit_code == (2 if words.startswith("Several") else 3)
    assert stop.value.hint


def test_without_adb_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingError, match="There is no adb on this machine") as stop:
        Adb().run(["true"])
    assert "apt install adb" in stop.value.hint
