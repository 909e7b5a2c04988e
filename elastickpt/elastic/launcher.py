"""`elastickpt-run`, without its command line: a coordinator with the workers of this machine, or the workers of a further
one."""

from __future__ import annotations

import selectors
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from elastickpt.elastic.agent import Agent, WorkerProgram, ZygoteLost
from elastickpt.elastic.calling import connected
from elastickpt.elastic.conductor import Conductor
from elastickpt.elastic.coordinator import Coordinator, Listening
from elastickpt.elastic.duties import LadderOf
from elastickpt.elastic.enlisting import Enlist, Finish, Start, to_launcher
from elastickpt.elastic.environment import Told
from elastickpt.elastic.event_log import EventLog
from elastickpt.elastic.limits import COORDINATOR_S, Limits
from elastickpt.elastic.messages import End
from elastickpt.elastic.replacing import Replacing
from elastickpt.elastic.stream import Closed
from elastickpt.errors import Refused
from elastickpt.ranks.addresses import listen
from elastickpt.ranks.messages import encode

COORDINATOR_LOST = End(75, "coordinator-lost", "the coordinator is gone")


@dataclass(frozen=True, slots=True)
class Here:
    """This machine's part: what its workers run, how many there are, and how the machine is called."""

    program: WorkerProgram
    workers: int
    host: str
    zone: str


@dataclass(frozen=True, slots=True)
class Launch:
    """A job. `replacements`: how many workers may be started in place of others. `at`: the address at which
    further machines find the coordinator, "" for no further machines."""

    here: Here
    stages: int
    token: str
    replacements: int
    limits: Limits = field(default_factory=Limits)
    events: Path | None = None
    at: str = ""


def launch(job: Launch, ladder_of: LadderOf) -> End:
    """Runs a job; why it ended. Blocking. SIGTERM ends it after the next step, SIGINT now. Raises Refused where it cannot
    listen, and for events that cannot be written."""
    events = EventLog(job.events)
    near, endpoint = listen(host=None)
    listeners = (near,) if not job.at else (near, _listen_at(job.at))
    here = job.here
    agent = Agent(here.program, Told(endpoint, job.token, "", here.host, here.zone, torchrun=False))
    replacing = Replacing(here.workers, job.replacements)
    conductor = Conductor(job.stages, job.limits, replacing, clock_offset=time.time() - time.monotonic())
    coordinator = Coordinator(conductor, agent, Listening(listeners, job.token), ladder_of, events)
    with _signals_to(coordinator.signalled):
        coordinator.start_workers(here.workers)
        try:
            return coordinator.run()
        finally:
            events.close()


def join(here: Here, at: str, token: str) -> End:
    """Starts workers here for the job whose coordinator listens at `at`; why it ended. Blocking. Raises RecoveryFailed."""
    endpoint = f"tcp:{at}"
    stream = connected(endpoint, token, wait_s=COORDINATOR_S)
    stream.send(encode(Enlist(here.host, here.zone, here.workers)))
    agent = Agent(here.program, Told(endpoint, token, "", here.host, here.zone, torchrun=False))
    ended: list[End] = []
    with selectors.DefaultSelector() as selector, _signals_to(lambda _: ended.append(End(75, "", "asked to end"))):
        selector.register(stream, selectors.EVENT_READ)
        selector.register(agent, selectors.EVENT_READ)
        try:
            while not ended:
                for key, _ in selector.select(1.0):
                    if key.fileobj is agent:
                        agent.flush()
                        for said in agent.receive():
                            stream.send(encode(said))
                        continue
                    stream.flush()
                    for data in stream.receive():
                        order = to_launcher(data)
                        if isinstance(order, Finish):
                            ended.append(End(order.code, "", "as the coordinator said"))
                        elif isinstance(order, Start):
                            agent.start(order.uid)
                        else:
                            agent.kill(order.uid)
        except Closed:
            ended.append(COORDINATOR_LOST)
        except ZygoteLost as lost:
            ended.append(End(75, "coordinator-lost", str(lost)))
        finally:
            stream.close()
            agent.close()
    return ended[0]


def _listen_at(at: str) -> socket.socket:
    host, _, port = at.rpartition(":")
    found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, int(port)))
        found.listen(128)
    except (OSError, ValueError) as error:
        found.close()
        raise Refused(f"--coordinator {at}: cannot listen there: {error}") from error
    return found


@contextmanager
def _signals_to(told: Callable[[int], None]) -> Iterator[None]:
    """SIGTERM and SIGINT are told, from now on until the end of the block. Only in the main thread; elsewhere nothing is."""
    before: dict[signal.Signals, object] = {}

    def handle(number: int, _: FrameType | None) -> None:
        told(number)

    with suppress(ValueError):
        for one in (signal.SIGTERM, signal.SIGINT):
            before[one] = signal.signal(one, handle)
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)  # type: ignore[arg-type]  # what signal.signal gave
