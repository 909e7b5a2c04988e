"""Whether the job that claimed a run last lives. [RUN-46..49, RUN-64]"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from run_actors import begun, by, memory_store

import elastickpt
from elastickpt.errors import Refused, RunBusy
from elastickpt.ledger.epochs import claim
from elastickpt.ledger.objects import complete
from elastickpt.ledger.records import Claim
from elastickpt.ranks.processes import host_identity, socket_identity
from elastickpt.runs.answering import Answering
from elastickpt.runs.trainer_address import (
    DIGEST_NBYTES,
    QUESTION_NBYTES,
    TrainerAddress,
    answer,
    parse_address,
    question,
    require_no_living_trainer,
    trainer_answers,
)

TOKEN = "a token of the claim"
NAME = "elastickpt-trainer-" + "0" * 32
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(elastickpt.__file__).parents[1])}
TRAINER = f"""
import os, sys
from elastickpt.runs.answering import Answering
answering = Answering()
answering.answer_for({TOKEN!r})
began, begins = os.pipe()
child = os.fork() if sys.argv[1] == "forks" else 0
if sys.argv[1] == "forks" and child == 0:
    os.write(begins, b"!")  # what Python does first in a forked process is done: the address is closed there
    sys.stdin.read(1)  # never comes: until it is killed
if child:
    os.read(began, 1)
print(answering.address, child, flush=True)
sys.stdin.read()
os._exit(0)
"""


def claim_at(address: str, *, token: str = TOKEN) -> Claim:
    return Claim(1, replace(by(1), address=address, token=token))


@pytest.fixture
def answering() -> Iterator[Answering]:
    with Answering(tcp_host="127.0.0.1") as one:
        one.answer_for(TOKEN)
        yield one


@contextlib.contextmanager
def trainer(what: str) -> Iterator[tuple[subprocess.Popen[str], str, int]]:
    """A process that answers, its address, and the child that it forked or 0; killed at the end."""
    command = [sys.executable, "-c", TRAINER, what]
    with subprocess.Popen(command, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        address, _, child = line.rpartition(" ")
        try:
            yield process, address, int(child)
        finally:
            process.kill()
            if int(child):
                os.kill(int(child), signal.SIGKILL)


def connected(address: str) -> socket.socket:
    found = parse_address(address)
    assert found is not None
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(20)
    connection.connect(f"\0{found.name}")
    return connection


def test_a_trainer_answers_until_it_closes(answering: Answering) -> None:
    assert trainer_answers(claim_at(answering.address))
    assert trainer_answers(claim_at(answering.address))
    answering.close()
    answering.close()
    assert not trainer_answers(claim_at(answering.address))


def test_it_answers_for_all_claims_of_its_job_and_no_others(answering: Answering) -> None:
    """A rollback is a claim with a token of its own. [RUN-12, RUN-45]"""
    assert not trainer_answers(claim_at(answering.address, token="another"))
    answering.answer_for("another")
    assert trainer_answers(claim_at(answering.address, token="another"))
    assert trainer_answers(claim_at(answering.address))


def test_other_hosts_ask_by_tcp(answering: Answering) -> None:
    """[RUN-47]"""
    elsewhere = answering.address.replace(socket_identity(), "other/boot/net:[1]")
    assert elsewhere != answering.address
    assert trainer_answers(claim_at(elsewhere))
    assert not trainer_answers(claim_at(elsewhere, token="another"))
    assert not trainer_answers(claim_at(elsewhere.partition(" tcp:")[0]))


def test_the_socket_reaches_as_far_as_its_network_namespace() -> None:
    assert host_identity().startswith(socket_identity() + "/pid:")


@pytest.mark.parametrize("tcp", [None, ("10.0.0.5", 1), ("fd00::1", 65535)])
def test_addresses_are_read_as_they_are_written(tcp: tuple[str, int] | None) -> None:
    """[RUN-47]"""
    address = TrainerAddress(NAME, socket_identity(), tcp)
    assert parse_address(str(address)) == address


@pytest.mark.parametrize(
    "text",
    [
        *("", "host:1", "unix:x@h", f"unix:{NAME}@", f"unix:{NAME}@h ", f"unix:{NAME}@h tcp:", f"unix:{NAME}0@h"),
        *(f"unix:{NAME}@h tcp:{place}" for place in ("localhost:80", "1.2.3:80", "1.2.3.4:0", "1.2.3.4:65536", "1.2.3.4:080")),
        *(f"unix:{NAME}@h tcp:{place}" for place in ("::1:80", "[1.2.3.4]:80", "[::1:80", "[::0:1]:80")),
        *(f"unix:/run/systemd/{NAME}@h", f"unix:{NAME}@h tcp:1.2.3.4:80 udp:1.2.3.4:80"),
    ],
)
def test_at_any_other_text_nobody_is_asked(text: str) -> None:
    """No name is resolved, no socket of somebody else's is spoken to. [RUN-47]"""
    assert parse_address(text) is None
    assert not trainer_answers(claim_at(text))


def test_the_token_is_not_sent_and_an_answer_serves_once() -> None:
    """[RUN-48]"""
    first, expected = question(TOKEN)
    second, other = question(TOKEN)
    assert len(first) == QUESTION_NBYTES
    assert len({first, second, expected, other}) == 4
    assert TOKEN.encode() not in first + expected
    assert answer(first, ("x", TOKEN, "y")) == expected
    assert answer(second, (TOKEN,)) == other
    assert answer(first, ("x",)) == answer(first, ()) == b""
    assert answer(b"\x02" + first[1:], (TOKEN,)) == b""
    assert answer(first[:-1] + bytes([first[-1] ^ 1]), (TOKEN,)) == b""
    assert expected not in (first[-DIGEST_NBYTES:], second[-DIGEST_NBYTES:])  # a question sent back is no answer


@pytest.mark.parametrize("reply", ["echo", "nothing", "zeros", "short"])
def test_whoever_does_not_know_the_token_is_not_the_trainer(reply: str) -> None:
    """[RUN-48, RUN-49]"""
    import threading

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{NAME}")
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                asked = connection.recv(QUESTION_NBYTES)
                said = {"echo": asked[-DIGEST_NBYTES:], "nothing": b"", "zeros": bytes(DIGEST_NBYTES), "short": b"x"}
                connection.sendall(said[reply])

        thread = threading.Thread(target=serve)
        thread.start()
        assert not trainer_answers(claim_at(str(TrainerAddress(NAME, socket_identity()))), limit_s=20)
        thread.join()


def test_who_asks_without_the_token_hears_nothing(answering: Answering) -> None:
    """[RUN-48]"""
    for asked in (os.urandom(QUESTION_NBYTES), question("another")[0], b"GET / HTTP/1.1\r\n" * 8):
        with connected(answering.address) as connection:
            connection.sendall(asked)
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(100) == b""


def test_those_who_ask_and_say_nothing_are_in_nobody_s_way(answering: Answering) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(connected(answering.address)).sendall(b"\x01")
        assert trainer_answers(claim_at(answering.address), limit_s=20)


def test_a_stopped_trainer_is_taken_as_gone_and_one_that_goes_on_is_not() -> None:
    """Its kernel accepts; the claim fences it. [RUN-49]"""
    with trainer("alone") as (process, address, _):
        assert trainer_answers(claim_at(address), limit_s=20)
        os.kill(process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        connected(address).close()
        assert not trainer_answers(claim_at(address), limit_s=0.2)
        os.kill(process.pid, signal.SIGCONT)
        assert trainer_answers(claim_at(address), limit_s=20)
        process.kill()
        process.wait()
        assert not trainer_answers(claim_at(address), limit_s=20)


def test_a_forked_process_neither_answers_nor_keeps_the_address() -> None:
    """[RUN-64]"""
    with trainer("forks") as (process, address, child):
        assert trainer_answers(claim_at(address), limit_s=20)
        process.kill()
        process.wait()
        os.kill(child, 0)
        with pytest.raises(ConnectionRefusedError):
            connected(address)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "no.such.host.invalid"])
def test_a_host_that_others_cannot_be_told_is_refused(host: str) -> None:
    with pytest.raises(Refused, match="expected"):
        Answering(tcp_host=host)


def test_a_run_is_busy_while_the_trainer_of_the_newest_claim_lives(answering: Answering) -> None:
    """[RUN-46]"""
    store = memory_store()
    complete(require_no_living_trainer(store))
    living = replace(by(1), address=answering.address, token=TOKEN)
    complete(claim(store, living))
    with pytest.raises(RunBusy, match=r"epoch 1 is held by a job that lives: process 101 on host host1 .*take_over=True"):
        complete(require_no_living_trainer(store))
    begun(store, job=2)  # its address is nobody's; it has fenced the first one, which lives on for now
    complete(require_no_living_trainer(store))
    answering.close()
    complete(claim(store, living))
    complete(require_no_living_trainer(store))


def test_a_damaged_claim_names_nobody_to_ask() -> None:
    store = memory_store()
    begun(store, job=1)
    store.create("commits/epoch-2.json", b"torn")
    complete(require_no_living_trainer(store, answers=lambda claim: True))
