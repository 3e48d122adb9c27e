"""A real Apache Kafka broker (KRaft, one node) on a free loopback port. Jars: tests/harness/kafka/pom.xml, by `make
test-tools`."""

import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.harness.process import free_port, running, wait_for_port

ROOT = Path(__file__).parents[2]
JARS = ROOT / ".cache" / "kafka"
HOW_TO = "run `make test-tools` (it installs Java and Maven from the distribution and fetches the jars)"
START_DEADLINE_S = 60.0

# One node keeps everything itself; a group's first members need not wait for more to come; and a broker that was killed
# may come back as soon as its session is over.
_PROPERTIES = """
process.roles=broker,controller
node.id=1
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
controller.listener.names=CONTROLLER
controller.quorum.voters=1@127.0.0.1:{controller}
log.dirs={data}
auto.create.topics.enable=false
num.partitions=1
default.replication.factor=1
offsets.topic.num.partitions=3
offsets.topic.replication.factor=1
transaction.state.log.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.num.partitions=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
broker.session.timeout.ms=2000
broker.heartbeat.interval.ms=500
group.initial.rebalance.delay.ms=0
group.min.session.timeout.ms=1000
"""


class Broker:
    """address: host:port for clients. The broker keeps its port and its data over stop() and start()."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        port, controller = free_port(), free_port()
        self._port = port
        self.address = f"127.0.0.1:{port}"
        self._properties = folder / "server.properties"
        self._properties.write_text(_PROPERTIES.format(port=port, controller=controller, data=folder / "data"))
        subprocess.run(
            [*self._java("-Xmx128m"), "kafka.tools.StorageTool", "format", "-t", _cluster_id(), "-c", self._properties],
            check=True,
            stdout=subprocess.DEVNULL,
        )

    def start(self) -> None:
        """Returns when it listens."""
        command = [*self._java("-Xmx512m"), "kafka.Kafka", str(self._properties)]
        self._process = running(command, self._folder / "log.txt")
        wait_for_port(self._port, self._process, self._folder / "log.txt", START_DEADLINE_S)

    def stop(self) -> None:
        """As a crash: at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _java(self, heap: str) -> list[str]:
        options = [heap, "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn"]
        return ["java", *options, "-cp", f"{JARS}/*"]


@contextmanager
def kafka() -> Iterator[Broker]:
    if shutil.which("java") is None or not any(JARS.glob("kafka_*.jar")):
        raise RuntimeError(f"Java or Kafka's jars in {JARS} are missing: {HOW_TO}")
    with tempfile.TemporaryDirectory(prefix="agentiad-kafka-") as folder:
        broker = Broker(Path(folder))
        try:
            broker.start()
            yield broker
        finally:
            broker.stop()


def _cluster_id() -> str:
    return uuid.uuid4().hex[:22]
