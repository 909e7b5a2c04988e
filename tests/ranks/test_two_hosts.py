"""Ranks on two hosts meet by TCP: in two network namespaces with names of their own, as no second machine is at hand."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import elastickpt as ek
from elastickpt.ledger.branch import history

JOB = Path(__file__).with_name("two_hosts_job.py")
LIMIT_S = 240.0


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Two namespaces with one cable between them."""
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("needs root, ip and unshare, to make network namespaces")
    names = (f"ek{os.getpid()}a", f"ek{os.getpid()}b")
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", "ek0", "netns", names[0], "type", "veth", "peer", "name", "ek1", "netns", names[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr}")
        for number, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", f"ek{number}")
            for device in (f"ek{number}", "lo"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.mark.long
def test_ranks_on_two_hosts_save_load_and_go_on(hosts: tuple[str, str], tmp_path: Path) -> None:
    """[SAVE-65]"""
    jobs = []
    for rank, name in enumerate(hosts):
        command = ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", 'hostname "$1"; shift; exec "$@"', "sh"]
        command += [f"host{rank}", sys.executable, str(JOB), str(rank), str(tmp_path)]
        output = open(tmp_path / f"output-{rank}.txt", "wb")  # noqa: SIM115
        with output:
            jobs.append(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT))
    try:
        for rank, job in enumerate(jobs):
            assert job.wait(LIMIT_S) == 0, (tmp_path / f"output-{rank}.txt").read_text()[-3000:]
    finally:
        for job in jobs:
            if job.poll() is None:
                job.kill()
                job.wait()
    assert [entry.step for entry in history(tmp_path / "run") if entry.state == "live"] == list(range(8, 0, -1))
    for path in ("plain", "beside-0", "beside-1"):
        assert ek.open(tmp_path / path).verify().problems == ()
